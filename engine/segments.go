package engine

import (
	"sync"
	"sync/atomic"
	"time"

	"ublk-pcache/ondisk"
)

// segment is what is known about a segment besides its content.
//
// A data segment is held by references: one for each key that names it,
// taken when the space is allocated and dropped when garbage collection
// passes the key, and one by the queue that fills it. When the last is
// dropped the segment is dying; it is free when no reader has it pinned and
// its generation has moved on.
//
// A pin is taken under the lock of the shard whose extent leads to the
// segment, and extents of a key go before its reference does, or are about to
// go under that lock (overwritten.go), so no pin is taken of a dying segment.
type segment struct {
	refs atomic.Int32
	pins atomic.Int32
	bad  atomic.Bool // its memory has failed, see badmem.go
	gen  atomic.Uint64
	sums atomic.Pointer[sums] // of the data, if the cache keeps checksums and it ever had any
}

// logReserve returns how many free segments data may not take, so that the
// log always finds one. Once data gets no more segments, each queue can still
// fill the one it has with at most 32,744 single-sector keys, which take up to
// 64 bytes of log each if every one is a kset of its own: 2 MiB a queue, and
// one more for the rest of the current log segment.
func logReserve(queues int) int { return 1 + (queues+7)/8 }

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
	needed  int          // that must be good
	bad     atomic.Int32 // how many are not
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

// badList returns the numbers of those that are.
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

// takeData hands out a segment for data, with the queue's reference to it.
func (c *Cache) takeData() (uint32, bool) {
	seg, ok := c.segments.take(c.segments.reserve)
	if !ok {
		return 0, false
	}
	c.segments.all[seg].refs.Store(1)
	if c.crc {
		c.sumsOf(seg).clear()
	}
	c.overwritten.begin(seg)
	n := c.segments.good()
	used := n - c.segments.free()
	limit := int(c.gc.percent.Load()) * n / 100
	if used > limit {
		c.gc.kick()
	}
	_, written := c.journal.head()
	// The last quarter is for what becomes dirty while a round is under way. If that
	// were taken, too, the collector would have to ask for a round of all there is.
	kept := limit * 3 / 4
	// Each queue may still name a segment that it took long ago.
	until := c.writeback.backlog.took(written, max(0, kept-len(c.queues)))
	if used > kept {
		c.writeback.demand(until)
	}
	return seg, true
}

// bumpGeneration makes every key that names the segment a dead one, or the
// segment a bad one. It does not persist.
func (c *Cache) bumpGeneration(seg uint32) {
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

// drop gives one reference back. Whoever drops the last one hands the segment
// to garbage collection.
func (c *Cache) drop(seg uint32) {
	if c.segments.all[seg].refs.Add(-1) == 0 {
		c.gc.bury(seg)
	}
}

func (c *Cache) unpin(seg uint32) {
	if c.segments.all[seg].pins.Add(-1) == 0 && c.segments.all[seg].refs.Load() == 0 {
		c.gc.kick()
	}
}

// space is where requests wait for a segment, in the order they came. A woken
// request that finds nothing goes back to its old place.
type space struct {
	waiting atomic.Int32 // requests waiting or being retried
	longest atomic.Int64 // wait that is over, in nanoseconds
	mu      struct {
		sync.Mutex
		list []*Request
		last uint64 // ticket
	}
}

// park adds r, in the order of tickets.
func (s *space) park(r *Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.ticket == 0 {
		s.mu.last++
		r.ticket, r.since = s.mu.last, time.Now()
		s.waiting.Add(1)
	}
	i := len(s.mu.list)
	for i > 0 && s.mu.list[i-1].ticket > r.ticket {
		i--
	}
	s.mu.list = append(s.mu.list, nil)
	copy(s.mu.list[i+1:], s.mu.list[i:])
	s.mu.list[i] = r
}

// leave is called for a request that has got its space.
func (s *space) leave(r *Request) {
	if r.ticket != 0 {
		r.ticket = 0
		s.waiting.Add(-1)
		s.waited(time.Since(r.since))
	}
}

// waited takes note of a wait that is over.
func (s *space) waited(d time.Duration) {
	for old := s.longest.Load(); old < int64(d) && !s.longest.CompareAndSwap(old, int64(d)); {
		old = s.longest.Load()
	}
}

// longestWait returns the longest wait so far, of those who still stand in line
// too.
func (s *space) longestWait() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := time.Duration(s.longest.Load())
	if len(s.mu.list) > 0 {
		d = max(d, time.Since(s.mu.list[0].since))
	}
	return d
}

// wakeWriters lets everybody who waits for space try again.
func (c *Cache) wakeWriters() {
	c.space.mu.Lock()
	list := c.space.mu.list
	c.space.mu.list = nil
	c.space.mu.Unlock()
	for _, r := range list {
		r.q.post(r)
	}
}
