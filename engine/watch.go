package engine

import "sync/atomic"

// What somebody asks who plays requests to a cache and wants to know what it keeps.

// Cached reports whether a read of n bytes at off would need no disk now. The range is whole
// sectors of one stripe of the device. It changes nothing: what is asked about is not used.
// Any goroutine.
func (c *Cache) Cached(off int64, n int) bool {
	s := c.index.span(off>>sectorShift, n>>sectorShift)
	s.sh.Lock()
	defer s.sh.Unlock()
	cached := uint16(0)
	for _, e := range s.partsLocked(nil, func(e extent) bool { return e.flags&extClaim == 0 }) {
		cached += e.n
	}
	return cached == s.n
}

// Quiet reports whether garbage collection and write-back have done all that requests, and
// each of the two, have given them reason for. What is due at some time may come at any.
// Who waits for this between its requests, on a disk that answers at once, finds the same
// kept each time it makes them. Any goroutine.
func (c *Cache) Quiet() bool {
	g, w := &c.gc.errands, &c.writeback.errands
	given := g.given.Load() + w.given.Load()
	// Each may have given the other some while that was looked at.
	return g.finished() && w.finished() && g.given.Load()+w.given.Load() == given
}

// errands count what a loop was kicked for, so that others see when it has done that.
type errands struct {
	given atomic.Uint64
	done  atomic.Uint64 // those that were given before the loop last looked for something to do
}

func (e *errands) finished() bool { return e.done.Load() == e.given.Load() }
