package engine

import (
	"cmp"
	"slices"
	"time"
)

// Dirty data that the disk refuses, or that is damaged, is deferred: it is tried
// again by itself, in smaller and smaller pieces until only what is really
// wrong is left, and that with growing delays. It stays dirty, and dirty_tail
// stays in front of its key: the rest is written, but nothing behind is
// collected, until the key is logged again (relog.go).

// maxDeferred bounds how many deferred parts the disk has refused, and so their memory.
// Others that it refuses are passed by (skip.go). Data that cannot be read is one part
// for each hole, however large, and always deferred.
const maxDeferred = 4096

// deferred is a part that could not be written.
type deferred struct {
	part
	next time.Time // when to try again
}

// deferAgain keeps the parts that were deferred before for another time, after a
// round that has moved nothing because of err. If it was told to rest, that is no reason
// for anybody: what hinders them is what did before.
func (w *writeback) deferAgain(parts []part, err error) {
	if err == errRest {
		err = cmp.Or(w.hindrance(), err)
	}
	for _, p := range parts {
		if p.wait > 0 {
			p.err = cmp.Or(p.err, err)
			w.deferred = append(w.deferred, deferred{p, time.Now().Add(p.wait)})
		}
	}
}

// refused counts the parts that are deferred because the disk has refused them.
func (w *writeback) refused() (n int) {
	for i := range w.deferred {
		if w.deferred[i].refused() {
			n++
		}
	}
	return n
}

// refusal returns why something was not written, nil if there is nothing.
func (w *writeback) refusal() error {
	switch {
	case len(w.deferred) > 0:
		return w.deferred[0].err
	case w.skipped.on:
		return w.skipped.err
	}
	return nil
}

// holds reports whether there is anything that was tried and not written.
func (w *writeback) holds() bool { return len(w.deferred) > 0 || w.skipped.on }

// deferPart keeps a part that was not written for another time, in pieces where
// that may help and may be.
func (c *Cache) deferPart(p *part, pieces bool) {
	w := &c.writeback
	for rest := p.e; rest.n > 0; {
		n := rest.n
		if pieces || p.lost {
			n = c.pieceOf(p, rest)
		}
		piece := p.sub(rest.off, n)
		if piece.wait = firstRetry; n == p.e.n {
			piece.wait = backoff(p.wait)
		}
		w.deferred = append(w.deferred, deferred{piece, time.Now().Add(piece.wait)})
		rest = rest.from(rest.off + n)
	}
}

// pieceOf returns how many sectors of what is left of a part are to be tried
// alone: what can be read, or cannot, if some of it cannot; else the half of it.
func (c *Cache) pieceOf(p *part, rest extent) uint16 {
	if p.lost {
		n, _ := c.readable(rest, &c.writeback.whole)
		return n
	}
	blocks := max(1, uint16(c.disk.BlockSize()>>sectorShift))
	return min(rest.n, max(1, (p.e.n/blocks+1)/2)*blocks)
}

// nextRetry returns when the first deferred part is due.
func (w *writeback) nextRetry() (at time.Time, ok bool) {
	for i := range w.deferred {
		if next := w.deferred[i].next; !ok || next.Before(at) {
			at, ok = next, true
		}
	}
	return at, ok
}

// retryNow makes all deferred parts due.
func (w *writeback) retryNow() {
	for i := range w.deferred {
		w.deferred[i].next = time.Time{}
	}
}

// takeDue moves the deferred parts that are due to parts, as far as the index still
// has them.
func (c *Cache) takeDue(parts []part) []part {
	w := &c.writeback
	now := time.Now()
	w.deferred = slices.DeleteFunc(w.deferred, func(s deferred) bool {
		if now.Before(s.next) {
			return false
		}
		parts = c.stillDirty(parts, &s.part)
		return true
	})
	return parts
}

// stillDirty appends what the index still has of a part.
func (c *Cache) stillDirty(parts []part, p *part) []part {
	for _, e := range c.dirtyParts(p.s, p.s.place(p.e.seg, p.e.pos)) {
		parts = append(parts, p.sub(e.off, e.n))
	}
	return parts
}

// where is a place in a stripe.
type where struct {
	sh   *shard
	root uint32
	place
}

// known returns the parts that are deferred, or taken up again by this round. A key that
// was logged again leads to it a second time. Data that has overwritten them since is at
// another place.
func (w *writeback) known() map[where][]extent {
	if len(w.deferred) == 0 && len(w.parts) == 0 {
		return nil
	}
	m := map[where][]extent{}
	add := func(p *part) {
		at := where{p.s.sh, p.s.root, p.s.place(p.e.seg, p.e.pos)}
		m[at] = append(m[at], p.e)
	}
	for i := range w.deferred {
		add(&w.deferred[i].part)
	}
	for i := range w.parts {
		add(&w.parts[i])
	}
	return m
}

// without returns what is left of the parts when what is known is taken out.
func without(parts []extent, known extent) (rest []extent) {
	for _, e := range parts {
		if e.end() <= known.off || known.end() <= e.off {
			rest = append(rest, e)
			continue
		}
		if e.off < known.off {
			rest = append(rest, e.to(known.off))
		}
		if known.end() < e.end() {
			rest = append(rest, e.from(known.end()))
		}
	}
	return rest
}
