package engine

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
	"time"

	"ublk-pcache/ondisk"
)

// Dirty data that the disk refuses, or that is damaged, is deferred: it is tried
// again by itself, in smaller and smaller pieces until only what is really
// wrong is left, and that with growing delays. It stays dirty, and dirty_tail
// stays in front of its key: the rest is written, but nothing behind is
// collected.
//
// That would hold the whole cache for the sake of one sector. So when garbage
// collection has nothing left, deferred parts are logged again at the head: new
// keys for the same place, which the index points to already. Nothing is
// copied, and damaged data stays damaged. Then dirty_tail can pass the old
// keys, and collecting them leaves the segment its references.

// maxDeferred bounds how many of them the disk has refused, and so their memory. What
// it refuses beyond is passed by (skip.go). What cannot be read is a piece for each
// hole, however large, and all of it is deferred.
const maxDeferred = 4096

// deferred is a part that could not be written.
type deferred struct {
	part
	next time.Time // when to try again
}

// deferAgain keeps the parts that were deferred before for another time, after a
// round that has moved nothing because of err.
func (w *writeback) deferAgain(parts []part, err error) {
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

// known returns the parts that are deferred, or taken up again by this round. A key that was
// logged again leads to it a second time. What has been overwritten since is at
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

// relogDeferred logs deferred parts again, the oldest first, if dirty_tail can pass
// anything by that, and reports whether garbage collection may go on. When there is room for some of them
// only, dirty_tail passes these, and collecting what it has passed makes room for more.
func (c *Cache) relogDeferred() (passed bool, err error) {
	w := &c.writeback
	var still []deferred
	for i := range w.deferred {
		s := &w.deferred[i]
		for _, p := range c.stillDirty(nil, &s.part) {
			still = append(still, deferred{p, s.next})
		}
	}
	w.deferred = still
	slices.SortFunc(w.deferred, func(a, b deferred) int {
		return cmp.Or(cmp.Compare(a.key.ksets, b.key.ksets), cmp.Compare(a.off, b.off))
	})
	all := w.runs()
	runs := all
	if s := &w.skipped; s.on { // dirty_tail passes none that lie behind that
		runs = runs[:sort.Search(len(runs), func(i int) bool { return runs[i].key.ksets >= s.from.ksets })]
	}
	if c.relogPays(len(runs)) { // each has one key or more, and their checksums take time
		n := 0
		for i := range runs {
			runs[i].keys = c.keysOf(nil, &runs[i].part)
			n += len(runs[i].keys)
		}
		if !c.relogPays(n) {
			runs = c.leftBehind(runs)
		}
	} else {
		runs = c.leftBehind(runs)
	}
	if len(runs) == 0 {
		if passed, err = c.gather(all); err != nil || !passed {
			return false, err
		}
	}
	for len(runs) > 0 {
		n, err := c.relog(runs)
		if err == errLogFull {
			break
		} else if err != nil {
			return false, err
		}
		runs = runs[n:]
	}
	if err := c.persist(); err != nil {
		return false, fmt.Errorf("sync what was logged again: %w", err)
	}
	_, before := c.tails.dirtyTail()
	err = c.advance()
	_, after := c.tails.dirtyTail()
	return passed || after > before, err
}

// relogPays reports whether so many keys, of all deferred parts in front of what was
// passed by, are worth being logged again. As many keys again as dirty_tail passes, or
// more, would only let the log grow, unless it cannot be read there and is about to
// begin anew.
func (c *Cache) relogPays(n int) bool {
	w := &c.writeback
	end := w.at.keys
	if w.skipped.on {
		end = w.skipped.from.keys // dirty_tail stays in front of that
	}
	oldest := end
	for i := range w.deferred {
		oldest = min(oldest, w.deferred[i].key.keys)
	}
	return end-oldest > uint64(n) || n > 0 && c.logDamage.Load() != nil && !w.sweep.on
}

// leftBehind returns the runs, with their keys, that hold segments of the log behind
// that of the head, if there is room for all of them in that one. Then they hold no
// other, and that is worth as many keys once for each segment.
func (c *Cache) leftBehind(runs []run) []run {
	w := &c.writeback
	head := c.journal.point()
	n, keys := 0, 0
	for ; n < len(runs) && runs[n].key.pos.Seg != head.pos.Seg && runs[n].key.ksets < w.at.ksets; n++ {
		if runs[n].keys == nil {
			runs[n].keys = c.keysOf(nil, &runs[n].part)
		}
		keys += len(runs[n].keys)
		if uint32(keys)*(ondisk.KsetHeaderSize+ondisk.KeySize)+ondisk.MaxKsetSize > roomAt(head.pos) {
			return nil
		}
	}
	return runs[:n]
}

// run is deferred parts that lie together, on the disk and in the cache: some are in
// pieces only since they have been tried.
type run struct {
	part
	from, to int // in writeback.deferred
	keys     []ondisk.Key
}

// runs joins the deferred parts, which are sorted.
func (w *writeback) runs() (runs []run) {
	for i := range w.deferred {
		p := &w.deferred[i].part
		if n := len(runs); n > 0 && runs[n-1].extend(p) {
			runs[n-1].to++
			continue
		}
		runs = append(runs, run{part: *p, from: i, to: i + 1})
	}
	return runs
}

// relog appends the keys of the first of the runs, at most a kset unless the very
// first has more, and returns how many of the runs those are. It leaves out what the
// index does not have all of any more: the log would bring back what has been
// overwritten.
func (c *Cache) relog(runs []run) (n int, err error) {
	j := &c.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	most := ondisk.MaxKeys
	if c.segments.free() > 0 {
		most = max(most, len(runs[0].keys))
	} else {
		most = min(most, (int(roomAt(j.mu.head))-ondisk.KsetHeaderSize)/ondisk.KeySize)
	}
	var keys []ondisk.Key
	at := logPoint{j.mu.head, j.mu.written, j.mu.keys}
	for ; n < len(runs) && len(keys)+len(runs[n].keys) <= most; n++ {
		if r := &runs[n]; c.holds(r.keys) {
			keys = append(keys, r.keys...)
		} else {
			r.to = r.from // not logged
		}
	}
	if n == 0 {
		return 0, errLogFull
	}
	if err := c.appendAgainLocked(keys, 0); err != nil {
		return 0, err
	}
	for _, r := range runs[:n] {
		for i := r.from; i < r.to; i++ {
			c.writeback.deferred[i].key = at
		}
	}
	return n, nil
}

// appendAgainLocked appends keys for dirty data that is in the cache already, and
// leaves so many free segments alone.
func (c *Cache) appendAgainLocked(keys []ondisk.Key, keep int) error {
	for len(keys) > 0 {
		some := keys[:min(len(keys), ondisk.MaxKeys)]
		if err := c.appendLocked(some, keep); err != nil {
			return err
		}
		for i := range some {
			c.segments.all[some[i].Seg].refs.Add(1)
		}
		keys = keys[len(some):]
	}
	return nil
}

// holds reports whether the index has all that the keys name, and dirty.
func (c *Cache) holds(keys []ondisk.Key) bool {
	for i := range keys {
		held := 0
		s, p := c.keySpan(&keys[i])
		for _, e := range c.dirtyParts(s, p) {
			held += int(e.n) << sectorShift
		}
		if held != int(keys[i].Len) {
			return false
		}
	}
	return true
}

// keysIn is how many keys a part has, about.
func (c *Cache) keysIn(p *part) int {
	if !c.crc || p.zero() {
		return 1
	}
	return (p.len() + maxSummed - 1) / maxSummed
}

// keysOf appends the keys that name a part: one for each checksum that it has
// to do with. What is damaged gets one that it cannot match, for it must not
// pass for good after a restart.
func (c *Cache) keysOf(keys []ondisk.Key, p *part) []ondisk.Key {
	w := &c.writeback
	for rest := p.e; rest.n > 0; {
		e := rest
		if c.crc && !p.zero() {
			if s, ok := c.segments.all[e.seg].sums.Load().find(e.pos); ok && s.end() < e.pos+e.n {
				e.n = s.end() - e.pos
			}
		}
		rest = rest.from(e.end())
		k := ondisk.Key{
			Off: uint64(p.off) + uint64(e.off-p.e.off)<<sectorShift, Len: uint32(e.n) << sectorShift,
			Seg: e.seg, SegOff: uint32(e.pos) << sectorShift, Gen: c.segments.all[e.seg].gen.Load(),
		}
		switch {
		case p.zero():
			k.Flags = ondisk.KeyZero
			if c.crc {
				k.CRC = zeroSum(k.Len)
			}
		case c.crc:
			buf := make([]byte, k.Len)
			err := c.readExtent(buf, e, &w.whole)
			if k.CRC = ondisk.Checksum(buf); err != nil {
				k.Flags = ondisk.KeyBad
				c.mem.ReadAt(buf, c.layout.Offset(e.seg, k.SegOff))
				k.CRC = ^ondisk.Checksum(buf)
			}
		}
		keys = append(keys, k)
	}
	return keys
}
