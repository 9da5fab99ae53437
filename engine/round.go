package engine

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
	"ublk-pcache/ondisk"
)

// A round of write-back takes the next ksets behind the place where the one before
// ended, writes what the index still has of their keys, sorted by address and joined
// into large writes, flushes the disk once, and only then moves dirty_tail.
//
// Data that a later key has superseded is not written: the later key is dirty
// too and further on in the log, so dirty_tail cannot pass it unwritten, and
// until then every read is answered by it. The parts of one round are therefore
// disjoint, and nothing of them can be overtaken by an older write.
//
// A round whose flush failed has moved nothing: the next one begins at the same place
// and writes everything again, which is the only safe reading of a failed flush. So
// does the one after a round that was told to rest, which starts no transfer any more:
// those under way must end, or their data might come to the disk behind data that
// somebody else writes there later. Parts that could not be written are deferred
// (deferred.go) or passed by (skip.go), so that the rest goes on. A round has failed,
// too, of which the disk has taken nothing, and has refused more than can be deferred.

// part is one run of dirty sectors of a round.
type part struct {
	s    span
	e    extent
	off  int64         // bytes on the disk
	key  logPoint      // its key lies there or behind
	wait time.Duration // how long it was deferred before this round, 0 if it was not
	err  error         // why it is not written
	lost bool          // that is because it cannot be read
}

// onDisk says where a part, by its index, goes on the disk.
type onDisk struct {
	off int64 // bytes
	i   int
}

// sortParts sorts the parts of the round by where they go. A part is too large to be
// moved more than once, so the order is found first, and then one hole after the
// other filled.
func (w *writeback) sortParts() {
	w.order = w.order[:0]
	for i := range w.parts {
		w.order = append(w.order, onDisk{w.parts[i].off, i})
	}
	slices.SortFunc(w.order, func(a, b onDisk) int { return cmp.Compare(a.off, b.off) })
	for first := range w.order {
		hole, out := first, w.parts[first]
		for w.order[hole].i != first {
			from := w.order[hole].i
			w.parts[hole] = w.parts[from]
			w.order[hole].i = hole
			hole = from
		}
		w.parts[hole] = out
		w.order[hole].i = hole
	}
}

// keyOf returns the kset that names a part, or the last there can be where that is not known: a
// sweep finds parts without their keys, and zeros by an older key for the same.
func (w *writeback) keyOf(p *part) uint64 {
	if w.sweep.on || p.zero() {
		return math.MaxUint64
	}
	return p.key.ksets
}

func (p *part) len() int { return int(p.e.n) << sectorShift }

func (p *part) zero() bool { return p.e.flags&extZero != 0 }

// refused reports whether it is the disk that did not take it.
func (p *part) refused() bool { return p.err != nil && !p.lost }

// sub returns the part of p that begins at sector off of its stripe and is n
// sectors long.
func (p *part) sub(off, n uint16) part {
	q := *p
	q.e = p.e.from(off).to(off + n)
	q.s = p.s.sub(q.e)
	q.off += int64(off-p.e.off) << sectorShift
	return q
}

// extend makes p the longer by q, which lies behind it on the disk and in the cache,
// and reports whether it could: what is damaged stays apart, and zeros have no place.
func (p *part) extend(q *part) bool {
	if p.s.sh != q.s.sh || p.s.root != q.s.root || p.key != q.key || q.zero() || p.lost || q.lost || !p.e.abuts(q.e) {
		return false
	}
	p.e.n += q.e.n
	p.s.n += q.e.n
	return true
}

// round writes the next dirty ksets back, up to a number of them, and the deferred
// parts that are due, and moves dirty_tail as far as that allows.
func (c *Cache) round(until uint64) error {
	w := &c.writeback
	defer w.inRound.Store(0)
	w.sweep.then = w.sweep.next // where a round that failed has left it
	// In this order: no key before to has overwritten the parts that are taken up
	// again, so no part that is picked in front of it is newer and in their
	// place.
	to, _ := c.journal.head()
	w.parts = c.takeDue(w.parts[:0])
	w.end = w.at
	if w.end.ksets < until {
		w.end = c.pick(to, until)
	}
	c.voidFingerprint(w.parts)
	// The disk must not be ahead of the log: a key that a power cut takes would
	// leave its data there, under an older clean copy. And dirty_tail will lean
	// on what lies behind it: a key before it may not be written because a later
	// one superseded it.
	if err := c.persist(); err != nil {
		err = fmt.Errorf("sync the log for write-back: %w", err)
		c.fail(err)
		w.deferAgain(w.parts, err)
		return err
	}
	w.sortParts()
	if err := c.awaitDirect(w.parts); err != nil {
		w.deferAgain(w.parts, err)
		return err
	}
	if err := c.writeParts(); err != nil {
		w.deferAgain(w.parts, err)
		return err
	}
	refused, fresh, room := 0, 0, w.most-w.refused()
	var first error
	for i := range w.parts {
		switch p := &w.parts[i]; {
		case !p.refused():
			continue
		case p.wait > 0:
			room-- // it was deferred before, and its place is kept
		default:
			fresh++
		}
		refused++
		first = cmp.Or(first, w.parts[i].err)
	}
	none := refused == len(w.parts) && fresh > max(0, room)
	// Before dirty_tail moves: after that a part's place may soon be another's.
	for i := range w.parts {
		if p := &w.parts[i]; p.err != nil {
			c.through.refuse(p, w.keyOf(p))
		}
		switch p := &w.parts[i]; {
		case p.err == nil:
			w.scratch = c.index.clean(p.s, p.s.place(p.e.seg, p.e.pos), w.scratch)
		case p.lost:
			c.deferPart(p, true)
		case p.wait > 0 || room > 0 && !none:
			was := len(w.deferred)
			c.deferPart(p, room > 0)
			if room -= len(w.deferred) - was; p.wait > 0 {
				room++
			}
		case w.sweep.on || p.key.ksets < w.end.ksets:
			w.skip(p)
		default: // it lies behind the end of a round that was cut short, and comes again
		}
	}
	w.at = w.end
	w.tried.Store(max(w.tried.Load(), w.at.ksets))
	w.sweep.swept()
	if err := c.advance(); err != nil {
		c.fail(err)
		return err
	}
	if none {
		return first
	}
	return nil
}

// writeParts writes the parts of the round and flushes the disk. A part that
// could not be written says so itself.
func (c *Cache) writeParts() error {
	w := &c.writeback
	if len(w.parts) == 0 {
		return nil
	}
	since := c.flushes.failed.Load()
	if err := c.transferParts(w.parts, w.shorten); err != nil {
		return err
	}
	refused := w.refused()
	for i := range w.parts {
		if w.parts[i].refused() {
			refused++
		}
	}
	if refused > w.most {
		if err := c.transferAlone(w.parts); err != nil {
			return err
		}
	}
	failed := 0
	for i := range w.parts {
		if w.parts[i].err != nil {
			failed++
		}
	}
	if failed > 0 {
		c.errs.rounds.Add(1)
	}
	if failed == len(w.parts) {
		return nil
	}
	if err := c.flushDisk(since, c.workers.stop); err == errRest || err == ErrAborted {
		return err
	} else if err != nil {
		c.errs.rounds.Add(1)
		return fmt.Errorf("flush the backing device: %w", err)
	}
	c.fingerprint.flushed(since)
	return nil
}

// advance moves dirty_tail to where everything before is on the disk.
func (c *Cache) advance() error {
	to := c.writeback.at
	for i := range c.writeback.deferred {
		if m := c.writeback.deferred[i].key; m.ksets < to.ksets {
			to = m
		}
	}
	if s := &c.writeback.skipped; s.on && s.from.ksets < to.ksets {
		to = s.from
	}
	if _, cleaned := c.tails.dirtyTail(); to.ksets > cleaned {
		c.takeFingerprint(to.ksets)
		return c.moveDirtyTail(to.pos, to.ksets-cleaned)
	}
	return nil
}

// pick takes the parts of a round from the log up to a place, or up to a
// number of ksets, and returns where dirty_tail may move after it. Their segments
// need no pins: keys behind dirty_tail keep their references.
func (c *Cache) pick(to ondisk.Position, until uint64) (end logPoint) {
	w := &c.writeback
	if w.sweep.on {
		return c.pickIndex()
	}
	end = w.at
	known := w.known()
	bytes, first := 0, len(w.parts)
	damage := c.walk(&w.walker, w.at.pos, to, func(k *ondisk.Kset, after ondisk.Position) bool {
		c.prefetchKeys(k.Keys, ondisk.KeyClean)
		for i := range k.Keys {
			if key := &k.Keys[i]; key.Flags&ondisk.KeyClean == 0 {
				bytes += c.pickKey(key, end, known)
			}
		}
		end = logPoint{after, end.ksets + 1, end.keys + uint64(len(k.Keys))}
		return !c.stopping() && end.ksets < until && bytes < roundBytes && len(w.parts)-first < roundParts
	})
	if damage != nil && end == w.at {
		c.noteLogDamage(damage, end.ksets)
		return c.pickIndex()
	}
	return end
}

// pickKey adds what the index still has of a key, whose kset is at a place of the
// log, and returns its size. It leaves out the parts that are deferred.
func (c *Cache) pickKey(k *ondisk.Key, at logPoint, known map[where][]extent) (bytes int) {
	if c.dead(k) || c.stale.has(k) {
		return 0
	}
	s, p := c.keySpan(k)
	return c.pickParts(s, int64(k.Off), p, at, c.dirtyParts(s, p), known)
}

// pickParts adds the parts of a place that is at off of the device. Their keys lie
// at a place of the log, or behind.
func (c *Cache) pickParts(s span, off int64, p place, at logPoint, parts []extent, known map[where][]extent) (bytes int) {
	w := &c.writeback
	for _, e := range known[where{s.sh, s.root, p}] {
		parts = without(parts, e)
	}
	for _, e := range parts {
		whole := part{s: s.sub(e), e: e, off: off + int64(e.off-s.off)<<sectorShift, key: at}
		if whole.zero() {
			// The cost of a transfer of zeros has little to do with their
			// number.
			bytes += ondisk.SectorSize
			w.parts = append(w.parts, whole)
			continue
		}
		bytes += whole.len()
		// A key may be as long as a stripe.
		for off := e.off; off < e.end(); off += transferBytes >> sectorShift {
			w.parts = append(w.parts, whole.sub(off, min(transferBytes>>sectorShift, e.end()-off)))
		}
	}
	return bytes
}

// dirtyParts returns what the index still has of a place, and is dirty. The
// slice is valid until the next call.
func (c *Cache) dirtyParts(s span, p place) []extent {
	return c.dirtyIn(s, p.holds)
}

// dirtyIn returns what is dirty in a span and in the places that holds is for.
// The slice is valid until the next call.
func (c *Cache) dirtyIn(s span, holds func(extent) bool) []extent {
	w := &c.writeback
	s.sh.Lock()
	defer s.sh.Unlock()
	w.scratch = s.partsLocked(w.scratch[:0], func(e extent) bool { return e.flags&extDirty != 0 && holds(e) })
	return w.scratch
}

// shorten lets a round that takes too long end with an earlier kset: of the parts from
// i on, no more are left than have been written, the oldest. Those that were written
// and lie behind that end are clean by then, and no more to write.
func (w *writeback) shorten(i int) []part {
	rest := w.parts[i:]
	if w.sweep.on {
		return w.parts
	}
	byAge := slices.DeleteFunc(slices.Clone(rest), func(p part) bool { return p.wait > 0 })
	slices.SortFunc(byAge, func(a, b part) int { return cmp.Compare(a.key.ksets, b.key.ksets) })
	// The first kset of the round is written in any case.
	first := slices.IndexFunc(byAge, func(p part) bool { return p.key.ksets > w.at.ksets })
	if first < 0 || len(byAge) <= i {
		return w.parts
	}
	w.end = byAge[max(i, first)].key
	rest = slices.DeleteFunc(rest, func(p part) bool { return p.wait == 0 && p.key.ksets >= w.end.ksets })
	w.parts = w.parts[:i+len(rest)]
	return w.parts
}
