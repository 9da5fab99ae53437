package engine

import "sync"

// A long sequential read, a backup say, is as fast from the disk as it can be, and what it
// has read will hardly be read again soon. So it is recognised, and from some length on its
// misses are answered from the disk and kept nowhere. What is cached of it is served as ever:
// hits do not come here.
//
// The obvious way, for each queue to see whether a read begins where the last one ended,
// recognises nothing: the kernel cuts a stream up and gives its parts to several queues, in
// some order, and other reads come in between. So there are a few stretches of what has been
// missed lately, for all queues. A read that begins where a stretch ends makes it longer, or
// one that ends where it begins, and two become one where they touch. A part that came too
// early is a stretch of its own until the others come, so it is looked at again when the disk
// has answered.
//
// A read within a stretch makes none longer. It may be the first of somebody who reads the
// same once more, and begins another.
//
// A stream is not only long. Where as much is missed beside it, the disk does not serve it as
// one, and what it reads has as good a chance to be read again as anything else has.
type streams struct {
	mu struct {
		sync.Mutex
		long   [streamsLong]stretch  // of more than one read
		short  [streamsShort]stretch // of one, a ring
		next   int                   // in that
		clock  uint64                // misses
		others int64                 // bytes of those that are in no stretch of more than one
	}
}

const (
	// streamsLong is more than there are streams at a time on a disk that can still serve
	// them as streams. The one goes first that was made longer least lately: a stream is
	// not forgotten between two of its reads because others read here and there meanwhile.
	streamsLong = 16
	// streamsShort is how many misses lie at most between the first two of a stream.
	streamsShort = 16
	// streamShare is how many times as much a stream has missed as all that is none, since
	// it began.
	streamShare = 4
)

// stretch is bytes without a gap; none if from and to are equal.
type stretch struct {
	from, to int64
	others   int64  // as it was when the stretch began
	last     uint64 // when it was made longer, as clock
}

func (r *stretch) bytes() int64 { return r.to - r.from }

func (r *stretch) has(off, n int64) bool { return r.from <= off && off+n <= r.to }

// found is what a miss has done.
type found struct {
	stretch       // that it has made longer, or begun
	others  int64 // bytes that others have missed since that began
	within  bool  // it lies within another one
	place   uint8 // in short, if it has begun one
}

// missed is told of each read that the disk is needed for, of n bytes at off. Any goroutine.
func (x *streams) missed(off, n int64) (f found) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.mu.clock++
	f.from, f.to = off, off+n
	var at *stretch
	for i := range x.mu.long {
		if r := &x.mu.long[i]; r.from <= f.to && f.from <= r.to && f.join(r) {
			at = r
		}
	}
	longer := at != nil
	for i := range x.mu.short {
		if r := &x.mu.short[i]; r.from <= f.to && f.from <= r.to {
			if was := r.bytes(); f.join(r) {
				longer = true
				x.mu.others -= was // it was the first of a stream, or came too early
			}
		}
	}
	switch {
	case !longer:
		x.mu.others += n
		f.stretch.others = x.mu.others
		f.place = uint8(x.mu.next)
		at = &x.mu.short[x.mu.next]
		x.mu.next = (x.mu.next + 1) % streamsShort
	case at == nil:
		at = &x.mu.long[0]
		for i := range x.mu.long {
			if r := &x.mu.long[i]; r.last < at.last {
				at = r
			}
		}
	}
	f.last = x.mu.clock
	*at = f.stretch
	f.others = x.mu.others - f.stretch.others
	return f
}

// join takes a stretch that touches the read, or overlaps it, into the read's, and reports
// whether it has: not if one of them lies within the other.
func (f *found) join(r *stretch) bool {
	switch {
	case r.from == r.to:
		return false
	case r.from <= f.from && f.to <= r.to:
		f.within = true
		return false
	case f.from <= r.from && r.to <= f.to:
		return false
	}
	if f.last == 0 || r.bytes() > f.bytes() {
		f.stretch.others = r.others
	}
	f.from, f.to, f.last = min(r.from, f.from), max(r.to, f.to), r.last
	*r = stretch{}
	return true
}

// around returns how long the longest stretch is that has n bytes at off, and what others have
// missed since it began. place is where missed put them. Any goroutine.
func (x *streams) around(off, n int64, place uint8) (length, others int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if r := &x.mu.short[place]; r.from == off && r.to == off+n {
		return n, 0
	}
	for i := range x.mu.long {
		if r := &x.mu.long[i]; r.has(off, n) && r.bytes() > length {
			length, others = r.bytes(), x.mu.others-r.others
		}
	}
	return length, others
}

// isStream reports whether a stretch is a stream that is not to be kept.
func isStream(length, others, cutoff int64) bool {
	return length > cutoff && length > others*streamShare
}

// passage is whether what a miss reads passes the cache by.
type passage struct {
	sure  bool  // it is of a stream
	open  bool  // the others of its stream may still come
	place uint8 // as around wants it, if it is open
}

// passageOf is told of each read that the disk is needed for.
func (c *Cache) passageOf(r *Request) (p passage) {
	if cutoff := c.settings.now.Load().SeqCutoff; cutoff > 0 {
		f := c.streams.missed(r.Off, int64(len(r.Buf)))
		p.sure = isStream(f.bytes(), f.others, cutoff)
		p.open, p.place = !p.sure && !f.within, f.place
	}
	return p
}

// passes reports whether what r has read of the disk is not to be kept.
func (c *Cache) passes(r *Request) bool {
	cutoff := c.settings.now.Load().SeqCutoff
	if !r.passage.open || cutoff == 0 {
		return r.passage.sure
	}
	length, others := c.streams.around(r.Off, int64(len(r.Buf)), r.passage.place)
	return isStream(length, others, cutoff)
}
