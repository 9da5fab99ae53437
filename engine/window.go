package engine

import (
	"slices"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// The window is what keeps newcomers: what misses have read. It lies in segments that are
// free to everybody else. The log does not name it, nor does anything on the media, so a
// miss costs no key, no kset and no sync. What is hit there is moved to the log when its
// segment's turn comes, and the rest is forgotten: a scan passes through the window, and the
// log, which has what was written or hit, stays as it is.
//
// The obvious way, to log what a miss has read, has the newest scan push everything out, and
// leaves empty what the log must not take. Now all memory caches something.
//
// Segments enter the window from the free ones as long as enough of these are left for
// writers, and leave it in the order in which they came. Writers never wait for it: the
// collector keeps some segments free, and a writer that finds too few takes the oldest of the
// window itself, and what was hit there is forgotten, too.
//
// Invariants: what the window has is clean. No key names its segments at their present
// generation, so they are used again as they are, without a new one; but not while a reader
// has them pinned. An extent has extWindow as long as it leads there, and goes before its
// segment does.

// windowSegment is a segment of the window, and what was stored there, in order.
type windowSegment struct {
	seg    uint32
	stored []windowPiece
}

// windowPiece is some sectors of the device; where they are in the segment is known by the
// pieces before.
type windowPiece uint64

const pieceShift = 16 // sectors of a piece, at most 8192, are in the lower bits

func newPiece(lba int64, n uint16) windowPiece { return windowPiece(lba)<<pieceShift | windowPiece(n) }

func (p windowPiece) lba() int64      { return int64(p >> pieceShift) }
func (p windowPiece) sectors() uint16 { return uint16(p) }

type window struct {
	keep    int          // free segments that it leaves alone
	taken   atomic.Int32 // segments that it has
	ready   atomic.Int32 // those of them that are full or emptied
	wanted  atomic.Bool  // a queue will need the next one
	closing atomic.Bool  // the queues are to give up those that they fill

	mu struct {
		sync.Mutex
		full    []*windowSegment // oldest first
		emptied []uint32         // can be filled again
		pinned  []uint32         // could be, but for a reader
		spare   []*windowSegment
	}
}

// windowHead is what a queue fills.
type windowHead struct {
	*windowSegment                  // nil if none is open
	off            uint32           // bytes
	closed         []*windowSegment // this turn; its fills are still to be entered
}

func (w *window) init(s *segments) { w.keep = s.reserve + max(1, len(s.all)/64) }

// inLog returns how many segments the log and its data have. A bad one of the window is counted
// out twice until it has been emptied.
func (c *Cache) inLog() int {
	return c.segments.good() - c.segments.free() - int(c.window.taken.Load())
}

// available returns how many segments are free, or are as soon as a writer asks.
func (c *Cache) available() int { return c.segments.free() + int(c.window.ready.Load()) }

// openWindow gives the queue a segment to fill, if there is one at once.
func (q *Queue) openWindow() bool {
	c := q.c
	w := &c.window
	if c.space.waiting.Load() > 0 {
		return false
	}
	seg, ok := w.takeEmptied()
	if !ok {
		if seg, ok = c.segments.take(w.keep); !ok {
			c.wantWindow()
			return false
		}
		w.taken.Add(1)
	}
	c.segments.all[seg].refs.Store(1)
	if c.crc {
		c.sumsOf(seg).clear()
	}
	c.stale.begin(seg)
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.mu.spare); n > 0 {
		q.window.windowSegment, w.mu.spare = w.mu.spare[n-1], w.mu.spare[:n-1]
	} else {
		q.window.windowSegment = &windowSegment{}
	}
	q.window.seg, q.window.off = seg, 0
	return true
}

func (w *window) takeEmptied() (seg uint32, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.mu.emptied)
	if n == 0 {
		return 0, false
	}
	seg = w.mu.emptied[n-1]
	w.mu.emptied = w.mu.emptied[:n-1]
	w.ready.Add(-1)
	return seg, true
}

// closeWindow ends the segment that the queue fills. Its turn to be emptied can come when what
// was stored there is in the index: who empties it before that finds nothing, and the index would
// lead to what it is used for next.
func (q *Queue) closeWindow() {
	q.window.closed = append(q.window.closed, q.window.windowSegment)
	q.window.windowSegment = nil
}

// handIn gives the segments that were closed this turn to the window.
func (q *Queue) handIn() {
	w := &q.c.window
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.full = append(w.mu.full, q.window.closed...)
	w.ready.Add(int32(len(q.window.closed)))
	q.window.closed = q.window.closed[:0]
}

// wantAhead is how many bytes before the end of a segment the next one is asked for: a
// quarter, which is more than the collector is behind.
const wantAhead = ondisk.SegmentData / 4

// storeInWindow stores what the disk said for a fill. It may be less than all of it.
func (q *Queue) storeInWindow(f *fill) {
	c := q.c
	f.window = true
	for done := 0; done < len(f.buf); {
		if q.window.windowSegment != nil && (q.window.off == ondisk.SegmentData || c.segments.all[q.window.seg].bad.Load()) {
			q.closeWindow()
		}
		if q.window.windowSegment == nil && !q.openWindow() {
			return
		}
		n := min(len(f.buf)-done, int(ondisk.SegmentData-q.window.off))
		if c.crc {
			n = min(n, maxSummed)
		}
		p := f.buf[done : done+n]
		k := ondisk.Key{Off: uint64(f.off) + uint64(done), Len: uint32(n), Seg: q.window.seg, SegOff: q.window.off}
		if _, err := c.mem.WriteAt(p, c.layout.Offset(k.Seg, k.SegOff)); err != nil {
			c.badStore("data to be stored", k.Seg, k.SegOff, n, err)
			q.closeWindow()
			return
		}
		if c.crc {
			k.CRC = ondisk.Checksum(p)
			c.segments.all[k.Seg].sums.Load().add(sum{uint16(k.SegOff >> sectorShift), uint16(n >> sectorShift), k.CRC})
		}
		q.window.stored = append(q.window.stored, newPiece(int64(k.Off>>sectorShift), uint16(n>>sectorShift)))
		before := q.window.off
		if q.window.off += uint32(n); before < ondisk.SegmentData-wantAhead && q.window.off >= ondisk.SegmentData-wantAhead {
			c.wantWindow()
		}
		f.keys = append(f.keys, k)
		done += n
	}
}

// wantWindow asks the collector for the next segment, if it will have to be emptied.
func (c *Cache) wantWindow() {
	w := &c.window
	w.mu.Lock()
	none := len(w.mu.emptied) == 0
	w.mu.Unlock()
	if none && c.segments.free() <= w.keep {
		w.wanted.Store(true)
		c.gc.kick()
	}
}

// enterWindow makes the index point at what was stored for fills, as far as it still has their
// claims. The caller has made a fence since.
func (q *Queue) enterWindow(f *fill) {
	if len(f.keys) == 1 && int(f.keys[0].Len) == len(f.buf) && q.enterWhole(f) {
		return
	}
	for i := range f.keys {
		s, p := q.c.keySpan(&f.keys[i])
		s.sh.Lock()
		q.pieces = s.partsLocked(q.pieces[:0], f.claims)
		for _, e := range q.pieces {
			s.sub(e).setLocked(extent{seg: p.seg, pos: e.off + p.delta, flags: extWindow | extFill}, nil)
		}
		s.sh.Unlock()
	}
	q.endFill(f)
}

// enterWhole does so, and ends the fill, if the index still has all of its claim, as it mostly
// has, or nothing.
func (q *Queue) enterWhole(f *fill) bool {
	k, s := &f.keys[0], f.at
	s.sh.Lock()
	if !s.replaceClaimLocked(f, extent{off: s.off, n: s.n, pos: uint16(k.SegOff >> sectorShift), seg: k.Seg, flags: extWindow | extFill}) {
		s.sh.Unlock()
		return false
	}
	f.unlockAndWake()
	q.recycle(f)
	return true
}

// enterWindowed does so for all that this turn has stored, and looks whether the segment that
// the queue fills is needed by others.
func (q *Queue) enterWindowed() {
	if len(q.windowed) > 0 {
		q.c.mem.Fence() // or another thread might find the place before the data
		for _, f := range q.windowed {
			q.enterWindow(f)
		}
		q.windowed = q.windowed[:0]
	}
	if q.window.windowSegment != nil && q.c.window.closing.Load() {
		q.closeWindow()
	}
	if len(q.window.closed) > 0 {
		q.handIn()
		q.c.gc.kick()
	}
}

// claims reports whether an extent is a claim of the fill.
func (f *fill) claims(e extent) bool { return e.flags&extClaim != 0 && e.seg == f.id }

// oldest takes the oldest full segment of the window, whose turn it is to be emptied.
func (w *window) oldest() *windowSegment {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.mu.full) == 0 {
		return nil
	}
	old := w.mu.full[0]
	w.mu.full = w.mu.full[:copy(w.mu.full, w.mu.full[1:])]
	w.ready.Add(-1)
	return old
}

// empty forgets what a segment of the window has. What was hit goes to the log if there is
// a promoter, which belongs to the caller's thread.
func (c *Cache) empty(old *windowSegment, to *promoter) {
	var scratch [64]extent
	pos := uint16(0)
	for _, piece := range old.stored {
		s := c.index.span(piece.lba(), int(piece.sectors()))
		p := s.place(old.seg, pos)
		pos += piece.sectors()
		s.sh.Lock()
		parts := s.partsLocked(scratch[:0], p.holds)
		for _, e := range parts {
			if to == nil || e.flags&extHit == 0 {
				s.sub(e).cutLocked(nil)
			}
		}
		s.sh.Unlock()
		for _, e := range parts {
			if to == nil || e.flags&extHit == 0 {
				c.ghost.add(piece.lba()+int64(e.off-s.off), e.n)
			} else if c.promote(to, s, piece.lba()<<sectorShift, e) {
				c.counts.promoted.Add(uint64(e.n) << sectorShift)
			}
		}
	}
	if to != nil {
		c.endPromotion(to)
	}
}

// leave gives back a segment of the window that has been emptied, if it can be used at once. If
// it is read, the last of its readers kicks the collector, which looks after it; if it is bad,
// nobody gets it. old may be another segment when leave has returned.
func (c *Cache) leave(old *windowSegment) (seg uint32, ok bool) {
	w := &c.window
	w.mu.Lock()
	defer w.mu.Unlock()
	seg = old.seg
	old.stored = old.stored[:0]
	w.mu.spare = append(w.mu.spare, old)
	s := &c.segments.all[seg]
	s.refs.Store(0)
	switch {
	case s.pins.Load() > 0:
		w.mu.pinned = append(w.mu.pinned, seg)
		return seg, false
	case s.bad.Load():
		w.taken.Add(-1)
		return seg, false
	}
	return seg, true
}

// takeFromWindow is for a writer that finds no free segment. What was hit in the one that it
// gets is forgotten with the rest.
func (c *Cache) takeFromWindow() (seg uint32, ok bool) {
	w := &c.window
	for {
		if seg, ok = w.takeEmptied(); !ok {
			old := w.oldest()
			if old == nil {
				return 0, false
			}
			c.empty(old, nil)
			if seg, ok = c.leave(old); !ok {
				continue
			}
		}
		w.taken.Add(-1)
		return seg, true
	}
}

// refill is the collector's: where too few segments are free and may says so, it makes the oldest
// of the window free; or it has that ready for the window itself, if it is asked for. What was hit
// there is promoted where the log may grow. It reports whether it has done anything.
func (c *Cache) refill(may, promote bool) bool {
	w := &c.window
	few := c.segments.free() < w.keep
	if few && !may || !few && !w.wanted.Load() {
		return false
	}
	if few {
		if seg, ok := w.takeEmptied(); ok {
			c.freeFromWindow(seg)
			return true
		}
	}
	old := w.oldest()
	if old == nil {
		w.wanted.Store(false) // until somebody asks again
		return false
	}
	to := &c.gc.promoter
	if !promote {
		to = nil
	}
	c.empty(old, to)
	seg, ok := c.leave(old)
	if !ok {
		return true
	}
	// The promoter may have taken a free one. A queue that waits would have this one before the
	// collector comes to the next, and what was hit there would find no room.
	if few || c.segments.free() < w.keep {
		c.freeFromWindow(seg)
		return true
	}
	w.mu.Lock()
	w.mu.emptied = append(w.mu.emptied, seg)
	w.mu.Unlock()
	w.ready.Add(1)
	w.wanted.Store(false)
	return true
}

// refillAtOnce is for a queue that finds the log without a free segment, and reports whether
// there is one now.
func (c *Cache) refillAtOnce() bool {
	seg, ok := c.takeFromWindow()
	if ok {
		c.segments.addFree(seg)
	}
	return ok
}

func (c *Cache) freeFromWindow(seg uint32) {
	c.window.taken.Add(-1)
	c.segments.addFree(seg)
}

// unpinned frees what has no reader any more.
func (c *Cache) unpinned() {
	w := &c.window
	w.mu.Lock()
	var free []uint32
	w.mu.pinned = slices.DeleteFunc(w.mu.pinned, func(seg uint32) bool {
		if c.segments.all[seg].pins.Load() > 0 {
			return false
		}
		free = append(free, seg)
		return true
	})
	w.mu.Unlock()
	for _, seg := range free {
		c.freeFromWindow(seg)
	}
}

// pressed reports whether somebody waits for room.
func (c *Cache) pressed() bool {
	if c.space.waiting.Load() > 0 {
		return true
	}
	return slices.ContainsFunc(c.queues, func(q *Queue) bool { return q.stalled.Load() })
}

// askForHeads has the queues give up the segments of the window that they fill, while there is
// nothing else to give to writers.
func (c *Cache) askForHeads() {
	w := &c.window
	short := w.taken.Load() > 0 && c.available() <= c.segments.reserve
	if w.closing.Swap(short) || !short {
		return
	}
	for _, q := range c.queues {
		q.wake()
	}
}
