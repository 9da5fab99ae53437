package engine

import (
	"slices"
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
	refs    atomic.Int64 // a log of 86 GB may have 2^31 keys of zeros that all name one
	pins    atomic.Int32
	bad     atomic.Bool // its memory has failed, see badmem.go
	filling atomic.Bool // by a queue
	gen     atomic.Uint64
	sums    atomic.Pointer[sums] // of the data, if the cache keeps checksums and it ever had any
}

// Who may take the last free segments:
//
//	data           while more than logReserve are left
//	the log        while more than relogReserve are left
//	what is stuck  the last one
//
// Zeros are data here, see storeZeros. So the keys that are still to be logged once
// data gets no more segments are bounded, and there is room for them. And what is
// stuck finds room whatever else the log had to take, so the circle of space goes on.

// logReserve returns how many free segments data may not take, so that the
// log always finds one. Once data gets no more segments, each queue can still
// fill the one it has with at most 32,744 single-sector keys, which take up to
// 64 bytes of log each if every one is a kset of its own: 2 MiB a queue. Less than
// eight of them go on in one more segment at most, wherever the log's head is.
func logReserve(queues int) int { return 1 + queues/8 + relogReserve }

// relogReserve is how many free segments are kept for logging again what is stuck,
// which goes on kset by kset: each time a segment has been filled with it, at least
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

// takeData hands out a segment for data of r, with the queue's reference to it.
func (c *Cache) takeData(q *Queue, r *Request) (uint32, bool) {
	if !c.mayTake(q, r) {
		return 0, false
	}
	seg, ok := c.segments.take(c.segments.reserve)
	if !ok {
		return 0, false
	}
	c.space.gotSegment(q)
	c.segments.all[seg].refs.Store(1)
	c.segments.all[seg].filling.Store(true)
	if c.crc {
		c.sumsOf(seg).clear()
	}
	c.overwritten.begin(seg)
	_, written := c.journal.head()
	c.took(written)
	return seg, true
}

// took looks after room now that data or the log has taken a segment. So many ksets
// are in the log.
func (c *Cache) took(written uint64) {
	n := c.segments.good()
	used := n - c.segments.free()
	limit := int(c.gc.percent.Load()) * n / 100
	if used > limit {
		c.gc.kick()
	}
	// The last quarter is for what becomes dirty while a round is under way. If that
	// were taken, too, the collector would have to ask for a round of all there is.
	kept := limit * 3 / 4
	// Each queue may still name a segment that it took long ago.
	until := c.writeback.backlog.took(written, max(0, kept-len(c.queues)))
	if used > kept {
		c.writeback.demand(until)
	}
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

// references are those of some keys to one segment.
type references struct {
	seg uint32
	n   int64
}

// drop gives one reference back.
func (c *Cache) drop(seg uint32) { c.dropAll(references{seg, 1}) }

// dropAll gives references back. Whoever drops the last one hands the segment to
// garbage collection.
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

// space is where requests wait in line, in the order they came: from the moment at
// which there was no room for one until it has found some. One that is woken too
// early goes back to its place.
//
// Nobody is woken before all who came earlier, and who comes while others sleep lines
// up behind them. Those who are awake go on at once, each as far as the segment of its
// queue has room, without waiting for each other: a turn of a queue serves many, and
// would have to be waited for between any two requests of different queues. A new
// segment is taken by nobody who came later than one that needs it as well.
type space struct {
	waiting atomic.Int32 // in line
	parked  atomic.Int32 // those of them that sleep
	longest atomic.Int64 // wait that is over, in nanoseconds
	mu      struct {
		sync.Mutex
		line []*Request
		last uint64          // ticket
		dry  map[*Queue]bool // queues in line that need a segment
	}
}

func (s *space) init() { s.mu.dry = map[*Queue]bool{} }

// start is before any wait, on a clock that nobody sets.
var start = time.Now()

// sinceStart returns the time in nanoseconds.
func sinceStart() int64 { return int64(time.Since(start)) }

// park lets r sleep in line, at its end if it comes for the first time. dry is
// whether its queue needs a segment.
func (s *space) park(r *Request, dry bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.ticket == 0 {
		s.mu.last++
		r.ticket, r.since = s.mu.last, sinceStart()
		s.mu.line = append(s.mu.line, r)
		s.waiting.Add(1)
	}
	if dry {
		s.mu.dry[r.q] = true
	}
	r.parked = true
	s.parked.Add(1)
}

// leave is called for a request in line that has got its space, or never will.
func (s *space) leave(r *Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waited(sinceStart() - r.since)
	i := slices.Index(s.mu.line, r)
	s.mu.line = slices.Delete(s.mu.line, i, i+1)
	r.ticket = 0
	s.waiting.Add(-1)
}

// gotSegment is called for a queue that has taken one.
func (s *space) gotSegment(q *Queue) {
	if s.waiting.Load() > 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.mu.dry, q)
	}
}

// waited takes note of a wait that is over, in nanoseconds.
func (s *space) waited(d int64) {
	for old := s.longest.Load(); old < d && !s.longest.CompareAndSwap(old, d); {
		old = s.longest.Load()
	}
}

// longestWait returns the longest wait so far, of those who still wait too.
func (c *Cache) longestWait() time.Duration {
	var d int64
	c.space.mu.Lock()
	if len(c.space.mu.line) > 0 {
		d = sinceStart() - c.space.mu.line[0].since
	}
	c.space.mu.Unlock()
	for _, q := range c.queues {
		if q.stalled.Load() {
			d = max(d, sinceStart()-q.since.Load())
		}
	}
	// Last: a wait that has ended meanwhile is among them.
	return time.Duration(max(d, c.space.longest.Load()))
}

// mayTake reports whether there are segments enough for r to take one: also for the
// queues that others wait for who came earlier. What a read brings never makes
// anybody wait.
func (c *Cache) mayTake(q *Queue, r *Request) bool {
	s := &c.space
	if s.waiting.Load() == 0 {
		return true // or not: take says so
	}
	if r.Op == Read {
		return false
	}
	left := c.segments.free() - c.segments.reserve
	s.mu.Lock()
	defer s.mu.Unlock()
	var before []*Queue
	for _, other := range s.mu.line {
		if other == r || left <= len(before) {
			break
		}
		if other.q != q && s.mu.dry[other.q] && !slices.Contains(before, other.q) {
			before = append(before, other.q)
		}
	}
	return left > len(before)
}

// serve wakes those who are next in line, as far as there is room in the segments
// that their queues fill, and the first one that needs a new one, if there is one
// for it, with what of its queue comes next. Who comes behind that is woken once it
// has it.
func (c *Cache) serve() {
	s := &c.space
	if s.parked.Load() == 0 {
		return
	}
	left := c.segments.free() - c.segments.reserve
	var needy *Queue
	s.wake(func(r *Request) bool {
		switch {
		case r.q.stalled.Load():
			return false // the log has to go on first
		case needy != nil:
			return r.q == needy
		case s.mu.dry[r.q]:
			needy = r.q
			return left > 0
		}
		return true
	})
}

// wake wakes those in line up to the first who may not, as it is told under the lock.
func (s *space) wake(may func(*Request) bool) {
	s.mu.Lock()
	var woken []*Request
	for _, r := range s.mu.line {
		if !may(r) {
			break
		}
		if r.parked {
			r.parked = false
			woken = append(woken, r)
		}
	}
	s.parked.Add(-int32(len(woken)))
	s.mu.Unlock()
	for _, r := range woken {
		r.q.post(r)
	}
}

// wakeWriters lets everybody try again who waits for space, because nobody will get
// any more.
func (c *Cache) wakeWriters() {
	c.space.wake(func(*Request) bool { return true })
}
