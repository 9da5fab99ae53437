package engine

import "errors"

// Errors of opening a cache.
var (
	ErrOptions       = errors.New("invalid option")
	ErrDiskTooSmall  = errors.New("the backing device is smaller than what the cache holds for it")
	ErrKeyGeneration = errors.New("a key names a generation of its segment that does not exist yet")
	ErrKeyInLog      = errors.New("a key names data inside the log")
	ErrKeyOverlap    = errors.New("a key names data that is another's")
	ErrChanged       = errors.New("the backing device was written without its cache")
	ErrUnchanged     = errors.New("the backing device is not known to have been written without its cache")
)

// Errors of requests.
var (
	// ErrInvalid: a request that is not whole sectors inside the device.
	ErrInvalid = errors.New("request outside the device or not aligned to sectors")
	// ErrDamaged is only of dirty data: clean data is read from the disk then.
	ErrDamaged = errors.New("cached data does not match its checksum")
)

// Errors of the cache's own work.
var (
	// ErrUnaligned: dirty data that the backing device cannot take because its
	// blocks are larger, from a cache that was filled in front of another one.
	ErrUnaligned = errors.New("dirty data does not fill the blocks of the backing device")
	// ErrBadHead: the log can neither go on where it ends nor be led away.
	ErrBadHead = errors.New("bad memory at the end of the log")
	// ErrBadSegments: so many segments are bad that the queues could wait for
	// each other for ever.
	ErrBadSegments = errors.New("too many segments have bad memory")
	// errRest: a round of write-back was broken off to be made again later.
	errRest = errors.New("write-back was told to rest")
	// ErrSync: a region that needs syncs has failed one, and the cache takes no more
	// writes until it is opened again.
	ErrSync = errors.New("sync the cache")
	// ErrResting: the settings are another server's to read.
	ErrResting = errors.New("the cache is being handed over")
	// ErrAborted: the cache was told to give up what waits.
	ErrAborted = errors.New("the cache is being removed and waits for nothing")
	// ErrStopped: the cache was closed before the work was done.
	ErrStopped = errors.New("the cache is being stopped")
)
