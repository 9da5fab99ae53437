package engine

import "ublk-pcache/ondisk"

// What was hit is kept: the collector stores it once more in a segment of its own and logs it
// at the head, as clean data. It comes from the window, when its segment there is emptied, or
// from the end of the log, where it gets another round.
//
// The obvious way, to log the copy and to let the index point there, brings back what a
// writer has replaced meanwhile. So it is done as for a fill: with the log's lock held it is
// seen what the index still has at the old place, and only that gets a key, whose shard is
// locked before that lock goes back.
//
// A promotion takes room that writers may want. It never waits for any, it gives way where
// somebody does, and of what is collected a sixteenth is dropped, so that collecting makes room
// although all of it may have been hit.

// promoter is what the collector's thread has for it.
type promoter struct {
	open      bool
	seg, off  uint32 // that it fills; bytes
	buf       []byte
	whole     []byte
	keys      []ondisk.Key // stored, not logged yet
	from      []place      // where each of them was
	all       []promoted   // since the last endPromotion
	scratch   []extent
	logged    []ondisk.Key
	publisher publisher
}

// promoted is what was to be promoted, and where it was.
type promoted struct {
	s span
	p place
}

// promote copies the extent e, part of the span s that begins at off of the device, in bytes,
// for logPromoted. It reports whether it has copied all of it.
func (c *Cache) promote(to *promoter, s span, off int64, e extent) bool {
	at := s.place(e.seg, e.pos-(e.off-s.off))
	to.all = append(to.all, promoted{s.sub(e), at})
	buf := grow(&to.buf, maxSummed)
	for rest := e; rest.n > 0; {
		if to.open && c.segments.all[to.seg].bad.Load() {
			c.closePromoted(to)
		}
		if c.failure() != nil || c.pressed() || !to.open && !c.openPromoted(to) {
			return false
		}
		n := min(int(rest.n)<<sectorShift, len(buf), int(ondisk.SegmentData-to.off))
		piece := rest.to(rest.off + uint16(n>>sectorShift))
		if err := c.readExtent(buf[:n], piece, &to.whole); err != nil {
			c.badData(piece, off+int64(rest.off-s.off)<<sectorShift, err, &to.whole)
			return false
		}
		if _, err := c.mem.WriteAt(buf[:n], c.layout.Offset(to.seg, to.off)); err != nil {
			c.badStore("data to be stored", to.seg, to.off, n, err)
			c.closePromoted(to)
			return false
		}
		k := ondisk.Key{
			Off: uint64(off) + uint64(rest.off-s.off)<<sectorShift, Len: uint32(n), Flags: ondisk.KeyClean,
			Seg: to.seg, SegOff: to.off, Gen: c.segments.all[to.seg].gen.Load(),
		}
		if c.crc {
			k.CRC = ondisk.Checksum(buf[:n])
			c.segments.all[to.seg].sums.Load().add(sum{uint16(to.off >> sectorShift), uint16(n >> sectorShift), k.CRC})
		}
		c.segments.all[to.seg].refs.Add(1)
		to.keys, to.from = append(to.keys, k), append(to.from, at)
		if to.off += uint32(n); to.off == ondisk.SegmentData {
			c.closePromoted(to)
		}
		if len(to.keys) == ondisk.MaxKeys {
			c.logPromoted(to)
		}
		rest = rest.from(piece.end())
	}
	return true
}

// endPromotion logs what has been copied and not logged yet, and forgets what of all that was to be
// promoted is still where it was: there was no room for it.
func (c *Cache) endPromotion(to *promoter) {
	c.logPromoted(to)
	for _, x := range to.all {
		to.scratch = c.index.forget(x.s, x.p, to.scratch)
	}
	to.all = to.all[:0]
}

// openPromoted begins a segment, if there is one that nobody else needs.
func (c *Cache) openPromoted(to *promoter) bool {
	seg, ok := c.segments.take(c.segments.reserve)
	if !ok {
		return false
	}
	to.open, to.seg, to.off = true, seg, 0
	c.beginData(seg)
	return true
}

// closePromoted gives up the segment that is filled, if there is one.
func (c *Cache) closePromoted(to *promoter) {
	if !to.open {
		return
	}
	to.open = false
	c.segments.all[to.seg].filling.Store(false)
	c.drop(to.seg)
}

// logPromoted logs what has been copied, as far as the index still has it at the old place.
func (c *Cache) logPromoted(to *promoter) {
	if len(to.keys) == 0 {
		return
	}
	// What the copy takes the place of may have been flushed: the key must not be durable
	// before the data.
	err := c.persist()
	if err == nil {
		err = c.logCopies(to)
	} else {
		to.logged = to.logged[:0]
	}
	if err == nil {
		to.publisher.publish(c, to.logged)
		c.writeback.wrote()
	} else {
		for i := range to.logged {
			c.drop(to.logged[i].Seg)
		}
		if err != errLogFull {
			c.fail(err)
		}
	}
	for i := range to.keys {
		c.drop(to.keys[i].Seg)
	}
	to.keys, to.from = to.keys[:0], to.from[:0]
}

// logCopies is the part of logPromoted that is done under the log's lock. Without an error it
// leaves the shards of to.logged locked.
func (c *Cache) logCopies(to *promoter) error {
	j := &c.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	to.logged = to.logged[:0]
	var parts [64]extent
	for i := range to.keys {
		k := &to.keys[i]
		s, _ := c.keySpan(k)
		s.sh.Lock()
		held := s.partsLocked(parts[:0], func(e extent) bool { return to.from[i].holds(e) && e.flags&extDirty == 0 })
		s.sh.Unlock()
		for _, e := range held {
			if len(to.logged) == ondisk.MaxKeys || c.crc && uint32(e.n)<<sectorShift != k.Len {
				break
			}
			c.segments.all[k.Seg].refs.Add(1)
			to.logged = append(to.logged, s.keyPart(k, e))
		}
	}
	if len(to.logged) == 0 {
		return nil
	}
	if err := c.appendLocked(to.logged, c.segments.reserve); err != nil {
		return err
	}
	to.publisher.lockShards(c.index, to.logged)
	return nil
}
