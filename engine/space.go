package engine

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// space is where requests wait in line, in the order they came: from the moment at
// which there was no room for one until it has found some. One that is woken too
// early goes back to its place.
//
// Requests are woken in this order, and one that comes while others sleep lines up
// behind them. Requests that are awake go on at once, each as far as the segment of its
// queue has room, and do not wait for each other: a turn of a queue serves many, and
// would have to be waited for between any two requests of different queues. A request
// takes a new segment only if others are left for those that came earlier and need one.
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

// longestWait returns the longest wait so far, also of requests that still wait.
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

// mayTake reports whether r may take a segment: whether there are enough for it and for
// the queues of requests that came earlier and need one. A read may not while others
// wait: it never makes a write wait.
func (c *Cache) mayTake(q *Queue, r *Request) bool {
	s := &c.space
	if s.waiting.Load() == 0 {
		return true // take looks whether there is any
	}
	if r.Op == Read {
		return false
	}
	left := c.available() - c.segments.reserve
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

// serve wakes the requests that are next in line, as long as there is room in the
// segments that their queues fill; then the first that needs a new segment, if there is
// one for it, and those of its queue that come next. The others are woken once the queue
// has its segment.
func (c *Cache) serve() {
	s := &c.space
	if s.parked.Load() == 0 {
		return
	}
	left := c.available() - c.segments.reserve
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

// wake wakes the requests in line up to the first for which may says no. It calls may
// under the lock.
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

// wakeWriters lets all requests that wait for space try again, because none will get
// any more.
func (c *Cache) wakeWriters() {
	c.space.wake(func(*Request) bool { return true })
}
