package ondisk

import (
	"errors"
	"fmt"
)

// Why a device cannot be opened as a cache.
var (
	ErrNotFormatted   = errors.New("no cache on this device: the superblock at byte 4096 is empty")
	ErrMagic          = errors.New("no cache on this device: the superblock has another magic number; is it the right device?")
	ErrSuperblock     = errors.New("superblock at byte 4096 is damaged: its crc does not match")
	ErrSuperblockLost = errors.New("superblock at byte 4096 is lost, but parts of a cache are there")
	ErrBigEndian      = errors.New("the cache was written by a big-endian host; open it on one")
	ErrSize           = errors.New("the device is smaller than its cache; use the device it was made on, whole")
	ErrNotInitialised = errors.New("the cache was never completely formatted; format it again")
	ErrMode           = errors.New("cache mode is not write-back, the only one supported")
	ErrUnreadable     = errors.New("cannot be read")
	ErrSettingsNewer  = errors.New("the settings are of a newer version of the program; use that")
)

// What is damaged beyond the help of its second copy. The remedy is the same
// for all: run check to see how much it is, and repair, restore or format.
var (
	ErrInfo            = errors.New("cache_info is not valid")
	ErrLost            = errors.New("both copies are lost")
	ErrChain           = errors.New("the chain of segments is broken")
	ErrGeneration      = errors.New("the generation of a segment is lost, its cached data cannot be told from older data")
	ErrGenerationValue = errors.New("the generation of a segment is higher than any cache gets")
	ErrPosition        = errors.New("not a place in the log")
	ErrIdentity        = errors.New("the identity record is damaged in both copies, so the backing device cannot be verified")
	ErrIdentityFields  = errors.New("identity record has an impossible backing size")
	ErrSettingsLost    = errors.New("the settings are damaged in both copies, so nothing tells what the cache promises")
)

// What is wrong with a place in the log where a kset was expected. A log that
// ends properly ends with one of them too.
var (
	errNoKset    = errors.New("no kset")
	errKsetCRC   = errors.New("kset with a wrong crc")
	errKsetKeys  = errors.New("kset with an impossible number of keys")
	errKsetShort = errors.New("kset longer than the bytes at hand")
	errKsetRoom  = errors.New("kset too near the end of the segment")
	errKsetStale = errors.New("kset of an earlier use of the segment")
)

// What makes a kset with a matching crc unusable.
var (
	ErrKey     = errors.New("key is not valid")
	ErrLogLoop = errors.New("the log leads back into itself")
	ErrLast    = errors.New("LAST record leads out of the cache")
)

// Why damage is not mended.
var (
	ErrNoCache   = errors.New("too little of a cache is left to tell that it is one")
	ErrChainLost = errors.New("too many links of the chain of segments are lost to tell their order")
	ErrLogLost   = errors.New("where the log begins is lost, and the log cannot be told from what older ones left")
	ErrLogStart  = errors.New("no kset can be read where the log has to begin, but some lie behind that place")
	ErrCRCLost   = errors.New("cache_info is lost, and without the log nothing tells whether the cache keeps checksums")
)

// ErrOutside is an access outside an overlay, or a store off the 8-byte grid.
var ErrOutside = errors.New("outside the overlay, or not on its words")

// ErrSettings is a setting that makes no sense.
var ErrSettings = errors.New("invalid setting")

// Why a format is refused.
var (
	ErrTooSmall  = errors.New("the device is too small for a cache, which takes at least 512 MiB")
	ErrGCPercent = errors.New("gc percent must be 0 to 90")
)

// Faults is everything that keeps an image from being opened, the first one
// first. It is never empty.
type Faults []error

func (f Faults) Error() string {
	if len(f) == 1 {
		return f[0].Error()
	}
	return fmt.Sprintf("%v (and %d more)", f[0], len(f)-1)
}

// Unwrap makes errors.Is find each of the faults.
func (f Faults) Unwrap() []error { return f }

// maxProblems bounds the report of an image that is wrong all over.
const maxProblems = 100
