package engine

import (
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// segment is what is known about a segment besides its content.
//
// A data segment is held by references: one for each key that names it,
// taken when the space is allocated and dropped when garbage collection
// passes the key, and one by the queue that fills it. When the last is
// dropped the segment is dying; it is free when no reader has it pinned and
// its generation has moved on. A segment of the window (window.go) has one reference,
// and is free as soon as that and all pins are gone.
//
// A pin is taken under the lock of the shard whose extent leads to the
// segment, and extents of a key go before its reference does, or are about to
// go under that lock (stale.go), so no pin is taken of a dying segment.
type segment struct {
	refs    atomic.Int64 // a log of 86 GB may have 2^31 keys of zeros that all name one
	pins    atomic.Int32
	bad     atomic.Bool // its memory has failed, see badmem.go
	filling atomic.Bool // by a queue
	gen     atomic.Uint64
	sums    atomic.Pointer[sums] // of the data, if the cache keeps checksums and it ever had any
}

// The last free segments are kept back. One may be taken for
//
//	the window      while more than its keep are left
//	data            while more than logReserve are left, else the window gives one
//	the log         while more than relogReserve are left
//	deferred parts  while any is left: to log them again
//
// Zeros are data here, see storeZeros. So the keys that are still to be logged once
// data gets no more segments are bounded, and there is room for them. And deferred
// parts find room although the log has taken all it may, so the circle of space goes on.

// logReserve returns how many free segments data may not take, so that the
// log always finds one. Once data gets no more segments, each queue can still
// fill the one it has with at most 32,744 single-sector keys, which take up to
// 64 bytes of log each if every one is a kset of its own: 2 MiB a queue. Less than
// eight of them go on in one more segment at most, wherever the log's head is.
func logReserve(queues int) int { return 1 + queues/8 + relogReserve }

// relogReserve is how many free segments are kept for logging deferred parts again,
// which goes on kset by kset: each time a segment has been filled with them, at least
// as much has been passed by dirty_tail.
const relogReserve = 1

// segmentsFor returns how many segments that many queues need so that none ever
// waits for another: each fills one, and the log one more; and one may be held
// for as long as the disk refuses a sector of it.
func segmentsFor(queues int) int { return queues + 2 + logReserve(queues) }

// MaxQueues returns how many queues a cache of so many segments can have. 0 is
// a cache that is too small for any.
func MaxQueues(segments int) int {
	n := max(0, segments-1)
	for n > 0 && segmentsFor(n) > segments {
		n--
	}
	return n
}

type segments struct {
	all     []segment
	reserve int
	needed  int          // how many must be good
	bad     atomic.Int32 // how many are bad
	// resumable are the half-filled segments that replay found, emptiest
	// first; the queues go on filling them.
	resumable []resumable
	mu        struct {
		sync.Mutex
		freeList []uint32 // first in, first out, so that wear is even
		at       []ondisk.Replica
	}
}

type resumable struct{ seg, off uint32 }

func (s *segments) init(l *ondisk.Layout, queues int) {
	s.all = make([]segment, len(l.Chain))
	s.reserve, s.needed = logReserve(queues), segmentsFor(queues)
	s.mu.at = l.GenAt
	for i := range s.all {
		s.all[i].gen.Store(l.Gens[i])
	}
}

// addFree makes a segment available, unless it is bad.
func (s *segments) addFree(seg uint32) {
	if s.all[seg].bad.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.freeList = append(s.mu.freeList, seg)
}

func (s *segments) free() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.mu.freeList)
}

// good returns how many segments are not bad.
func (s *segments) good() int { return len(s.all) - int(s.bad.Load()) }

// badList returns the numbers of the segments that are bad.
func (s *segments) badList() (list []uint32) {
	for i := range s.all {
		if s.all[i].bad.Load() {
			list = append(list, uint32(i))
		}
	}
	return list
}

// sumBytes returns the memory that the checksums of the data take.
func (s *segments) sumBytes() (n int64) {
	for i := range s.all {
		if t := s.all[i].sums.Load(); t != nil {
			n += t.bytes()
		}
	}
	return n
}

// take removes a segment from the free ones unless that would leave fewer
// than keep.
func (s *segments) take(keep int) (seg uint32, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.mu.freeList) <= keep {
		return 0, false
	}
	seg = s.mu.freeList[0]
	s.mu.freeList = s.mu.freeList[1:]
	return seg, true
}

// takeData hands out a segment for data of r, with the queue's reference to it.
func (c *Cache) takeData(q *Queue, r *Request) (uint32, bool) {
	if !c.mayTake(q, r) {
		return 0, false
	}
	seg, ok := c.segments.take(c.segments.reserve)
	if !ok {
		seg, ok = c.takeFromWindow()
	}
	if !ok {
		return 0, false
	}
	c.space.gotSegment(q)
	c.beginData(seg)
	return seg, true
}

// beginData makes a segment that was taken one of data, with the reference of whoever fills it.
func (c *Cache) beginData(seg uint32) {
	c.segments.all[seg].refs.Store(1)
	c.segments.all[seg].filling.Store(true)
	if c.crc {
		c.sumsOf(seg).clear()
	}
	c.stale.begin(seg)
	_, written := c.journal.head()
	c.took(written)
}

// took is called when data or the log has taken a segment, with how many ksets are in the
// log. It kicks garbage collection or write-back where the cache has become too full.
func (c *Cache) took(written uint64) {
	c.setBrake()
	used := c.inLog()
	s := c.settings.now.Load()
	limit := s.GCPercent * c.segments.good() / 100
	if used > limit || c.segments.free() < c.window.keep && c.window.ready.Load() > 0 {
		c.gc.kick()
	}
	// The last quarter is for what becomes dirty while a round is under way. If that
	// were taken, too, the collector would have to ask for a round of all there is.
	high, low := limit*3/4, limit*3/4
	if s.DirtyHigh != ondisk.DirtyAuto {
		high = int(s.DirtyHigh) * c.segments.good() / 100
		low = high
	}
	if s.DirtyLow != ondisk.DirtyAuto {
		low = int(s.DirtyLow) * c.segments.good() / 100
	}
	// Each queue may still name a segment that it took long ago.
	spare := len(c.queues)
	begin, until := c.writeback.backlog.took(written, max(0, high-spare), max(0, low-spare))
	if _, cleaned := c.tails.dirtyTail(); used > high && cleaned < begin {
		c.writeback.demand(until)
	}
}

// raiseGeneration makes every key that names the segment a dead one or, where memory
// does not take that, the segment a bad one. It does not persist.
func (c *Cache) raiseGeneration(seg uint32) {
	s := &c.segments
	gen := s.all[seg].gen.Load() + 1
	s.mu.Lock()
	at := s.mu.at[seg].Next()
	s.mu.Unlock()
	var buf [ondisk.GenerationSize]byte
	off := c.layout.EncodeGeneration(buf[:], seg, at, gen)
	if err := c.storeRecord("generation", int(seg), buf[:], off); err != nil {
		return
	}
	s.mu.Lock()
	s.mu.at[seg] = at
	s.mu.Unlock()
	s.all[seg].gen.Store(gen)
}

// references are those of some keys to one segment.
type references struct {
	seg uint32
	n   int64
}

// drop gives one reference back.
func (c *Cache) drop(seg uint32) { c.dropAll(references{seg, 1}) }

// dropAll gives references back, and with the last one the segment to garbage
// collection.
func (c *Cache) dropAll(r references) {
	if c.segments.all[r.seg].refs.Add(-r.n) == 0 {
		c.gc.bury(r.seg)
	}
}

func (c *Cache) unpin(seg uint32) {
	if c.segments.all[seg].pins.Add(-1) == 0 && c.segments.all[seg].refs.Load() == 0 {
		c.gc.kick()
	}
}
