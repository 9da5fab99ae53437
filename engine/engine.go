// Package engine is the cache: it puts a persistent-memory region in front of
// a slow disk and answers reads, writes and flushes from the two. It is plain
// Go over two small interfaces and knows nothing of ublk, files or io_uring,
// so that it can be tested at full speed, and under the race detector, on any
// machine.
//
// # Use
//
// Open replays a formatted region. Each thread that serves requests owns one
// Queue, hands it requests with Submit and ends every turn with Turn, which
// makes what was submitted part of the cache and returns what is finished.
// Everything else happens on goroutines of the cache's own: write-back
// (writeback.go, round.go), garbage collection (gc.go), syncing (sync.go), the flushes for
// writes around the cache (direct.go), and the answers to writers that are slowed (brake.go).
//
// # Shape
//
//	request ─▶ queue ─▶ data segment          where the bytes go
//	             │
//	             └─ end of turn ─▶ log        what makes them count
//	                                 │
//	                                 └─▶ index    where readers find them
//
// The log (log.go) is the truth and the index a summary of it: whatever the
// index knows can be rebuilt by replay (replay.go), but for what misses have read,
// which the disk has (window.go). Write-back copies what the
// log names to the disk and moves dirty_tail behind it; garbage collection
// drops from the log what lies before dirty_tail and frees the segments that
// nothing in the log names any more. So space moves in one circle, and each
// part of it waits for the one before only by events.
//
// # Promises
//
// An acknowledged write is in the log, in the region, whatever happens to the
// process. Where the region is durable (DAX) it has passed a fence, and a
// power cut cannot take it either; where it is not, FLUSH and FUA sync the
// region. A read never goes back in time, and dirty_tail only moves after a
// flush of the disk that succeeded.
package engine

import (
	"context"
	"fmt"
	"io"
	"iter"
	"runtime"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// Memory is the region that holds the cache. All methods are safe for
// concurrent use; concurrent accesses do not overlap unless all of them read.
type Memory interface {
	io.ReaderAt
	// WriteAt stores p. The store is durable after the next Fence of the same
	// goroutine if Durable, else after the next Sync. off and len(p) are
	// multiples of 8. An error of this, of ReadAt or Zero is memory that has
	// failed; of a store any part may have been made.
	io.WriterAt
	// Zero stores n zero bytes, like WriteAt.
	Zero(off, n int64) error
	// Fence orders what this thread stored before what it stores later.
	Fence()
	// Sync makes everything stored before it durable. A later one that succeeds
	// says nothing about what was stored before one that failed.
	Sync() error
	// Settle makes the ranges, offsets and lengths in bytes, durable as they are,
	// whatever became of syncs before, and shows elsewhere what is durable. Nobody
	// may access the region meanwhile. With an error the ranges are as they were.
	Settle(ranges iter.Seq2[int64, int64]) error
	// Durable reports whether a Fence makes stores survive a power cut.
	Durable() bool
	// Size returns the region's size in bytes.
	Size() int64
}

// eachReader is a Memory that may do many reads together with less work.
type eachReader interface {
	// ReadEach reads each buffer from its offset, in order, as ReadAt does, and
	// returns how many it has: with an error, all before the one that this is of.
	ReadEach(bufs [][]byte, offs []int64) (n int, err error)
}

// Disk is the backing device. Its methods are safe for concurrent use, do not
// block for the transfer, and call done exactly once, from any goroutine;
// done does not block. Buffers come from Buffer or from a Request.
type Disk interface {
	Read(buf []byte, off int64, done func(error))
	Write(buf []byte, off int64, done func(error))
	// Zero makes n bytes at off read as zeros.
	Zero(off, n int64, done func(error))
	Flush(done func(error))
	// Size returns the disk's size in bytes, BlockSize its logical block.
	Size() int64
	BlockSize() int
	// Buffer returns n bytes that the disk can transfer from and into.
	Buffer(n int) []byte
}

// Logger takes what an operator should know. It is never called by a queue.
type Logger interface {
	Info(e Event, msg string, err error)
	Error(e Event, msg string, err error)
}

// Event is what kind of thing a message tells of, for who waits for that and not for words.
type Event int

const (
	OtherEvent         Event = iota
	WritebackFails           // a round has failed, and is tried again
	WritebackDefers          // the disk refuses some data, or it cannot be read
	WritebackWorks           // again
	BadMemory                // a place that could not be read, or not be stored to
	LogDamaged               // a part of it cannot be read while the cache is open
	LogMended                // that part is needed no more
	WritesFail               // the cache takes no more writes
	PowerCutTookWrites       // that had not been flushed
	DiskWasChanged           // written without the cache, which starts empty
	Events                   // how many there are
)

// Options are the settings of an open cache.
type Options struct {
	Queues         int    // number of queues, 1 to MaxQueues
	WritebackDepth int    // writes of up to 512 KiB under way to the disk at once, 0 for DefaultWritebackDepth
	Log            Logger // required
	Changed        Choice // for a disk that was written without the cache
}

// Cache is an open cache.
type Cache struct {
	mem    Memory
	each   eachReader // mem, nil if it is none
	disk   Disk
	size   int64 // of the disk
	layout *ondisk.Layout
	log    Logger
	crc    bool // keys carry a checksum of their data

	index    *index
	stale    staleSectors
	segments segments
	journal  journal
	window   window
	ghost    ghost
	streams  streams
	space    space
	tails    tails
	queues   []*Queue

	writeback   writeback
	fingerprint fingerprint
	gc          collector
	settings    settings
	brake       brake
	flushes     flushes
	through     through
	direct      direct
	syncer      syncer

	fills     fillTable
	failed    atomic.Pointer[failure]
	errs      errorCounts
	counts    keptCounts
	badMemory badMemory
	logDamage atomic.Pointer[logDamage] // of the log, nil while it can be read

	workers workers
	stop    chan struct{}
	aborted chan struct{} // closed by Abort
	running sync.WaitGroup
}

// failure is why a cache takes no more writes.
type failure struct{ err error }

// Open replays the cache in mem and starts serving it in front of disk. The
// region must be formatted. The error is ErrOptions, wraps an error of
// ondisk, or is one of this package's.
func Open(mem Memory, disk Disk, o Options) (*Cache, error) {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	if !mem.Durable() {
		if err := settle(mem); err != nil {
			return nil, err
		}
	}
	c, err := newCache(mem, disk, o)
	if err != nil {
		return nil, err
	}
	if err := c.replay(o.Changed); err != nil {
		return nil, err
	}
	if c.fingerprint.outdated {
		return c.startOver(o)
	}
	c.start()
	return c, nil
}

// newCache returns a cache of which only the layout has been read.
func newCache(mem Memory, disk Disk, o Options) (*Cache, error) {
	layout, err := ondisk.ReadLayout(mem, mem.Size())
	if err != nil {
		return nil, err
	}
	if most := MaxQueues(len(layout.Chain)); o.Queues < 1 || o.Queues > most {
		return nil, fmt.Errorf("%w: %d queues for a cache of %d segments, which can have 1 to %d", ErrOptions, o.Queues, len(layout.Chain), most)
	}
	c := &Cache{
		mem: mem, disk: disk, size: disk.Size(), layout: layout, log: o.Log,
		crc:  layout.Info.Flags.DataCRC(),
		stop: make(chan struct{}), aborted: make(chan struct{}),
	}
	c.settings.init(layout)
	c.each, _ = mem.(eachReader)
	c.index = newIndex(c.size)
	for _, n := range layout.DamagedCopies {
		c.log.Error(OtherEvent, n.String(), nil)
	}
	if !mem.Durable() && !c.crc {
		c.log.Error(OtherEvent, "the region is not durable and the cache keeps no checksums: a power cut may exchange data that was not flushed for other data, unnoticed", nil)
	}
	c.queues = make([]*Queue, o.Queues)
	c.segments.init(layout, o.Queues)
	c.window.init(&c.segments)
	c.ghost.init(layout)
	c.stale.init(len(layout.Chain))
	c.space.init()
	c.tails.init(layout)
	c.gc.init()
	c.writeback.init(c, o.WritebackDepth)
	c.syncer.init()
	c.brake.init()
	c.flushes.init()
	c.direct.init(c.size)
	return c, nil
}

// start begins the work of a cache that has been replayed.
func (c *Cache) start() {
	for i := range c.queues {
		c.queues[i] = newQueue(c, i)
	}
	c.running.Go(c.syncLoop)
	c.running.Go(c.flushLoop)
	c.running.Go(c.brakeLoop)
	c.workers.mu.Lock()
	defer c.workers.mu.Unlock()
	c.workLocked()
	if promisesClean(c.settings.mode()) {
		// What the last server did not come to, or the kernel has left.
		_, written := c.journal.head()
		c.writeback.demand(written)
	}
}

// Queue returns queue i, from 0 to Options.Queues - 1. Any goroutine may ask for it; all
// of its methods but the ones that say otherwise are for the one thread that serves it.
func (c *Cache) Queue(i int) *Queue { return c.queues[i] }

// Close ends the cache's own work and leaves the region such that Open finds
// everything acknowledged. The queues must have ended: no request may be
// under way. Dirty data stays where it is. Close waits for what write-back has
// under way, unless Abort is called before or meanwhile; then its error is
// ErrAborted. Any goroutine, once. Each Flush that is under way ends with ErrStopped.
func (c *Cache) Close() error {
	close(c.stop)
	c.rest(context.Background())
	c.running.Wait()
	// With the sync mark behind the last kset: damage after an orderly end is not
	// that of a power cut.
	if err := c.syncLog(); err != nil {
		return err
	}
	return c.failure()
}

// stopping tells the workers to stop.
func (c *Cache) stopping() bool {
	select {
	case <-c.workers.stop:
		return true
	default:
		return false
	}
}

// fail makes every later write fail: the region can no longer be trusted to
// take one. Its content stays readable.
func (c *Cache) fail(err error) {
	if c.failed.CompareAndSwap(nil, &failure{err}) {
		go c.log.Error(WritesFail, "the cache takes no more writes", err)
		c.gc.kick()
	}
}

// failure returns why the cache takes no more writes, nil if it does.
func (c *Cache) failure() error {
	if f := c.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// Abort ends all requests that wait, for space or for the disk, and all later
// ones, with ErrAborted, and lets Close return although the disk does not
// answer. The region is left as by a server that was killed. The disk may still
// carry out the requests that it has under way, as may a machine whose cable is
// put back: so their buffers, those of the aborted reads among them, must stay
// mapped and be used for nothing else. Any goroutine.
func (c *Cache) Abort() {
	if f := c.failed.Swap(&failure{ErrAborted}); f != nil && f.err == ErrAborted {
		return
	}
	close(c.aborted)
	c.wakeWriters()
	c.through.abort()
	c.brake.kick()
	for _, q := range c.queues {
		q.wake()
	}
}

// await returns how an operation of the disk ended, or ErrAborted once nobody
// waits for the disk any more. done has a buffer.
func (c *Cache) await(done <-chan error) error {
	select {
	case err := <-done:
		return err
	case <-c.aborted:
		return ErrAborted
	}
}

// persist makes the stores of this goroutine durable, by a fence or a sync,
// whichever the region needs.
func (c *Cache) persist() error {
	c.mem.Fence()
	if c.mem.Durable() {
		return nil
	}
	return c.sync()
}
