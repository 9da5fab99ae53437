package engine

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"ublk-pcache/ondisk"
)

// A deferred part holds the segment that its data is in: 16 MiB for a sector. To log
// it again where it is does not help there, and a disk with bad places all over it
// would in the end hold all segments, one sector in each, and everybody would wait
// for ever.
//
// So when writers find no segment, and logging again brings nothing any more, deferred
// parts in several segments are copied into one: like writes of what is there already
// to the same place, ordered in the log like any other, and left alone where somebody
// else has written there meanwhile. Then only keys that garbage collection will pass
// name the old segments. Parts that were passed by (skip.go) are copied, too.
//
// Data in bad memory stays where it is, and so does data in a segment that a queue still
// fills: to copy it would free neither.

// holding is what is refused in a segment.
type holding struct {
	seg   uint32
	runs  []*run
	n     int // of them
	bytes int64
	zeros uint32 // the longest run of them
}

// gatherRuns is how many are copied at once, about: as many sectors as a segment has.
const gatherRuns = segmentSectors

// holdings returns the data that can be copied and is worth it: that of two segments
// or more, which fits into one. Parts that were passed by are looked for twice,
// since there may be any number of them.
func (c *Cache) holdings(runs []run) (worth []*holding) {
	in := map[uint32]*holding{}
	damage := c.eachRefused(runs, func(r *run) {
		h := in[r.e.seg]
		if h == nil {
			h = &holding{seg: r.e.seg}
			in[r.e.seg] = h
		}
		h.n++
		if r.zero() {
			h.zeros = max(h.zeros, uint32(r.len()))
		} else {
			h.bytes += int64(r.len())
		}
	})
	if damage != nil {
		return nil
	}
	all := slices.DeleteFunc(slices.Collect(maps.Values(in)), func(h *holding) bool {
		s := &c.segments.all[h.seg]
		return s.bad.Load() || s.filling.Load()
	})
	slices.SortFunc(all, func(a, b *holding) int { return cmp.Compare(a.bytes, b.bytes) })
	if worth = fitting(all); len(worth) < 2 {
		return nil
	}
	clear(in)
	for _, h := range worth {
		in[h.seg] = h
	}
	damage = c.eachRefused(runs, func(r *run) {
		// A run of zeros may have become whole meanwhile.
		if h := in[r.e.seg]; h != nil && !(r.zero() && uint32(r.len()) > h.zeros) {
			h.runs = append(h.runs, r)
		}
	})
	if damage != nil {
		return nil
	}
	return worth
}

// fitting returns those of the holdings, smallest first, that fit into a segment
// together.
func fitting(all []*holding) (fit []*holding) {
	n, bytes, zeros := 0, int64(0), uint32(0)
	for _, h := range all {
		if n+h.n > gatherRuns || bytes+h.bytes+int64(max(zeros, h.zeros)) > ondisk.SegmentData {
			continue // another may
		}
		n, bytes, zeros = n+h.n, bytes+h.bytes, max(zeros, h.zeros)
		fit = append(fit, h)
	}
	return fit
}

// eachRefused visits the deferred parts, in runs, and what was passed by.
func (c *Cache) eachRefused(runs []run, visit func(*run)) *ondisk.Damage {
	for i := range runs {
		visit(&runs[i])
	}
	s := &c.writeback.skipped
	if !s.on || c.writeback.sweep.on {
		return nil
	}
	x := c.newUnwritten()
	return x.walk(s.from, func(logPoint) bool {
		for _, p := range x.parts {
			visit(&run{part: p})
		}
		x.parts = x.parts[:0]
		return true
	})
}

// gather copies deferred parts in several segments into one, and reports whether there
// was anything to copy.
func (c *Cache) gather(runs []run) (moved bool, err error) {
	head := c.journal.point()
	if c.available() > c.segments.reserve || c.writeback.at.ksets < head.ksets {
		return false, nil // what is still to be written may hold the same segments
	}
	worth := c.holdings(runs)
	if worth == nil {
		return false, nil
	}
	// The log may need one, too.
	keep, log := relogReserve, uint32(ondisk.MaxKsetSize)
	for _, h := range worth {
		for _, r := range h.runs {
			log += ondisk.KsetSize(c.keysIn(&r.part))
		}
	}
	if log < roomAt(head.pos) {
		keep = 0
	}
	seg, ok := c.segments.take(keep)
	if !ok {
		return false, nil
	}
	c.segments.all[seg].refs.Store(1)
	defer c.drop(seg)
	c.stale.begin(seg)
	if c.crc {
		c.sumsOf(seg).clear()
	}
	off, err := c.copyZeros(worth, seg)
	for _, h := range worth {
		for _, r := range h.runs {
			if err == nil && !r.zero() {
				off, err = c.copyRun(r, seg, off)
			}
		}
	}
	if err != nil {
		c.badStore("data to be stored", seg, off, ondisk.SectorSize, err)
		return false, nil
	}
	// While nobody waits for the log. The data may have been flushed before: the copy
	// must not be lost where its key is not.
	if err := c.persist(); err != nil {
		return false, fmt.Errorf("sync what was copied: %w", err)
	}
	defer c.flushOn() // what was passed by is named at its new place alone
	for _, h := range worth {
		for _, r := range h.runs {
			done, err := c.enterCopy(r)
			if err == errLogFull {
				return moved, nil
			} else if err != nil {
				return moved, err
			}
			moved = moved || done
		}
	}
	return moved, nil
}

// copyZeros stores as many zeros as the longest run of zeros has, makes the keys of all
// such runs for them, and returns where they end.
func (c *Cache) copyZeros(worth []*holding, seg uint32) (end uint32, err error) {
	for _, h := range worth {
		end = max(end, h.zeros)
	}
	if end > 0 {
		err = c.mem.Zero(c.layout.Offset(seg, 0), int64(end))
	}
	for _, h := range worth {
		for _, r := range h.runs {
			if r.zero() {
				r.keys = []ondisk.Key{{Off: uint64(r.off), Len: uint32(r.len()), Flags: ondisk.KeyZero, Seg: seg, Gen: c.segments.all[seg].gen.Load()}}
				if c.crc {
					r.keys[0].CRC = zeroSum(uint32(r.len()))
				}
			}
		}
	}
	return end, err
}

// copyRun stores the data of a run once more, makes the keys for that, and returns
// where it ends. It makes none if the data cannot be read. Damaged data stays damaged.
func (c *Cache) copyRun(r *run, seg, off uint32) (end uint32, err error) {
	r.keys = nil
	buf := make([]byte, r.len())
	damaged := c.readExtent(buf, r.e, &c.writeback.whole) != nil
	if damaged {
		_, err := c.mem.ReadAt(buf, c.layout.Offset(r.e.seg, uint32(r.e.pos)<<sectorShift))
		if err != nil || !r.lost || !c.crc {
			return off, nil
		}
	}
	if _, err := c.mem.WriteAt(buf, c.layout.Offset(seg, off)); err != nil {
		return off, err
	}
	for at := uint64(r.off); len(buf) > 0; {
		n := len(buf)
		k := ondisk.Key{Off: at, Seg: seg, SegOff: off, Gen: c.segments.all[seg].gen.Load()}
		if c.crc {
			n = min(n, maxSummed)
			if k.CRC = ondisk.Checksum(buf[:n]); damaged {
				k.Flags, k.CRC = ondisk.KeyBad, ^k.CRC
			}
			c.sumsOf(seg).add(sum{uint16(off >> sectorShift), uint16(n >> sectorShift), k.CRC})
		}
		k.Len = uint32(n)
		r.keys = append(r.keys, k)
		buf, at, off = buf[n:], at+uint64(n), off+uint32(n)
	}
	return off, nil
}

// enterCopy makes the copy of a run count, unless there is none or the index does not
// have all of the run at the old place any more.
func (c *Cache) enterCopy(r *run) (done bool, err error) {
	if len(r.keys) == 0 {
		return false, nil
	}
	w := &c.writeback
	at, ok, err := c.logCopy(r)
	if err != nil || !ok {
		return false, err
	}
	w.publisher.publish(c, r.keys)
	for i := r.from; i < r.to; i++ {
		p := &w.deferred[i].part
		p.e.seg, p.e.pos, p.key = r.keys[0].Seg, uint16(r.keys[0].SegOff>>sectorShift)+p.e.off-r.e.off, at
	}
	return true, nil
}

// logCopy is the part of enterCopy that is done under the journal's lock. The keys of
// a run, of a stripe at most, fit into a kset. With ok it leaves their shards locked.
func (c *Cache) logCopy(r *run) (at logPoint, ok bool, err error) {
	j := &c.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	held := 0
	for _, e := range c.dirtyParts(r.s, r.s.place(r.e.seg, r.e.pos)) {
		held += int(e.n) << sectorShift
	}
	if held != r.len() {
		return logPoint{}, false, nil
	}
	at = logPoint{j.mu.head, j.mu.written, j.mu.keys}
	if err := c.appendLocked(r.keys, 0); err != nil {
		return logPoint{}, false, err
	}
	for i := range r.keys {
		c.segments.all[r.keys[i].Seg].refs.Add(1)
	}
	c.writeback.publisher.lockShards(c.index, r.keys)
	return at, true, nil
}
