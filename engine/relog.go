package engine

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"ublk-pcache/ondisk"
)

// dirty_tail stays in front of the key of a deferred part (deferred.go), and would hold
// the whole cache for the sake of one sector. So when garbage collection has nothing
// left, deferred parts are logged again at the head: new keys for the same place, which
// the index points to already. Nothing is copied, and damaged data stays damaged. Then
// dirty_tail can pass the old keys, and collecting them leaves the segment its
// references.

// relogDeferred logs deferred parts again, the oldest first, if dirty_tail can pass
// anything by that, and reports whether garbage collection may go on. When there is room
// for some of them only, dirty_tail passes these, and collecting what it has passed makes
// room for more.
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
	more, err := c.relogRuns(runs)
	return passed || more, err
}

// relogRuns logs runs again that have their keys, as far as there is room, and reports
// whether dirty_tail has passed anything by that.
func (c *Cache) relogRuns(runs []run) (passed bool, err error) {
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
	return after > before, err
}

// relogForRoom logs all again that was not written, in however many keys, if writers get a
// segment by that and nothing else has brought one. A few keys may have become many pieces,
// and as many keys again would not pay before as many had come behind them, for which there may
// be no room. It reports whether dirty_tail has passed anything.
func (c *Cache) relogForRoom() (passed bool, err error) {
	if !c.heldByKeys() {
		return false, nil
	}
	w := &c.writeback
	if passed, err = c.relogUnwritten(); err != nil || w.skipped.on {
		return passed, err
	}
	runs := w.runs()
	for i := range runs {
		runs[i].keys = c.keysOf(nil, &runs[i].part)
	}
	more, err := c.relogRuns(runs)
	return passed || more, err
}

// heldByKeys reports whether writers find no segment while one is held by nothing but keys: no
// queue fills it, and nothing in it is still to be written. It becomes free when dirty_tail has
// passed all that was tried, so each segment is a reason once.
func (c *Cache) heldByKeys() bool {
	w := &c.writeback
	dirtyTail, _ := c.tails.dirtyTail()
	if c.available() > c.segments.reserve || w.sweep.on || c.logDamage.Load() != nil {
		return false
	}
	if w.at.ksets < c.journal.point().ksets || c.tails.keyTail() != dirtyTail {
		return false // write-back or collection may bring one
	}
	_, named := c.journal.account()
	if damage := c.eachRefused(w.runs(), func(r *run) { named[r.e.seg] = 0 }); damage != nil {
		return false
	}
	for seg, n := range named {
		if s := &c.segments.all[seg]; n > 0 && !s.filling.Load() && !s.bad.Load() {
			return true
		}
	}
	return false
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
// first has more, and returns how many of the runs those are. It leaves out runs of
// which the index has lost a part: the log would bring back what has been
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
// leaves keep free segments alone.
func (c *Cache) appendAgainLocked(keys []ondisk.Key, keep int) error {
	for len(keys) > 0 {
		some := keys[:min(len(keys), ondisk.MaxKeys)]
		if err := c.appendLocked(some, keep); err != nil {
			return err
		}
		for i := range some {
			c.segments.all[some[i].Seg].refs.Add(1)
			// Two keys have one place now, and the index forgets both with the first.
			c.direct.lose(int64(some[i].Off/ondisk.StripeSize), c.journal.mu.written)
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
// to do with. Damaged data gets one that it cannot match, for it must not pass
// for good after a restart.
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
