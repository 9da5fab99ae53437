package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"ublk-pcache/ondisk"
)

// replay rebuilds the index from the log: later keys override earlier ones,
// and what lies before dirty_tail, or is flagged clean, is clean. The data of a
// key whose generation has passed may be somebody else's by now: that key is
// dead. But it overrides earlier ones as well, whose data may still be there: a
// key that died was on the disk before. There are such keys where only an older
// copy of key_tail can be read, or where the kernel was cut off in its gc.
//
// The data itself is not looked at, except for what no sync of the region has
// covered: whoever uses it verifies it.
//
// A log that is damaged rather than ended is refused, and so is a key that
// cannot be true, and dirty data for a disk that was changed, unless choice
// says what becomes of it; nothing is written then. Otherwise the segments
// found free get a new generation, since a crash may have come between the
// key_tail that freed them and the one it was to have, and everything found,
// which may never have left the page cache, is made durable. Where memory takes
// none of that, the cache opens all the same, to be read and written back.
func (c *Cache) replay(choice Choice) error {
	l := c.layout
	r := newReplayer(c)
	end, err := l.WalkLog(c.mem, l.KeyTail, r.kset)
	r.index.finish()
	torn := err == errTorn
	if err != nil && !torn {
		return err
	}
	next := end.NextSeq()
	if end.Seq == 0 && l.SyncMark != 0 {
		next = ondisk.SeqBeyond(l.SyncMark)
	}
	if end.Damage != nil {
		lost := next
		if end.Seq == 0 {
			// No kset in front tells the number of the one that is lost.
			lost = end.Damage.AheadSeq
		}
		// A power cut makes no media errors.
		if torn = c.unsynced(lost) && end.Damage.DirtyTail == nil && !errors.Is(end.Damage, ondisk.ErrUnreadable); !torn {
			return end.Damage
		}
	}
	if torn {
		c.log.Error(fmt.Sprintf("a power cut took writes that had not been flushed: the log ends at %v", end.Pos), nil)
	}
	r.logEnds(Head{end.Pos, next})
	if err := r.enterSums(); err != nil {
		return err
	}
	if err := c.compareDisk(choice, r.foreign); err != nil {
		return err
	}
	if err := r.checkSegments(); err != nil {
		return err
	}
	// What is stored from here on goes over the copies that these are made of.
	c.heal()
	// A kset cut short has the number that the next one here gets: what is left
	// of it could complete that one, or that one it.
	// And one whose number does not continue the log would begin it, once all
	// in front has been collected and key_tail stands here.
	rest := int64(ondisk.KsetHeaderSize)
	if torn || end.Seq == 0 && !c.mem.Durable() {
		// What follows would continue the new log's numbers. Behind an empty log
		// nobody has looked.
		rest = int64(ondisk.SegmentData - end.Pos.Off)
	}
	if err := c.mem.Zero(l.Offset(end.Pos.Seg, end.Pos.Off), rest); err != nil {
		c.badStore("log", end.Pos.Seg, end.Pos.Off, int(rest), err)
		c.fail(fmt.Errorf("%w: %w", ErrBadHead, err))
	}
	// What has been dropped from the log is gone before its segments get a new
	// generation. With that it would be a dead key if it came back after another
	// power cut, and override what it was to overwrite.
	if err := c.persist(); err != nil {
		return err
	}
	r.sortSegments()
	if !c.fingerprint.outdated {
		c.readDisk()
	}
	if err := c.firstFingerprint(); err != nil {
		return err
	}
	if err := c.persist(); err != nil {
		return err
	}
	if err := c.markSynced(ondisk.PrevSeq(next)); err != nil {
		c.fail(err)
	}
	if l.SyncMark != 0 {
		return nil
	}
	return c.persist() // a first sync mark, without which the next power cut is damage
}

// unsynced reports whether the kset numbered seq was never part of a sync, on
// a region that needs one.
func (c *Cache) unsynced(seq uint64) bool {
	mark := c.layout.SyncMark
	return !c.mem.Durable() && seq != 0 && mark != 0 && ondisk.SeqAfter(seq, mark)
}

// errTorn ends the replay before a kset that a power cut kept without the data
// of its keys. Nobody was promised it, nor what follows, and what its keys were
// to overwrite is still there.
var errTorn = errors.New("a kset without its data")

type replayer struct {
	c       *Cache
	live    bool     // the log is being written, so none of it is torn
	dirty   bool     // dirty_tail has been reached
	ksets   uint64   // so far
	keys    uint64   // likewise
	clean   logPoint // before dirty_tail
	index   bulkLoad
	filled  []uint32
	log     []bool
	sums    map[uint32][]named
	buf     []byte
	foreign bool // ksets without a number lie behind dirty_tail
}

func newReplayer(c *Cache) *replayer {
	l := c.layout
	r := &replayer{c: c, dirty: l.KeyTail == l.DirtyTail, filled: make([]uint32, len(l.Chain)), log: make([]bool, len(l.Chain)), sums: map[uint32][]named{}}
	r.log[l.KeyTail.Seg] = true
	c.journal.mu.path = []uint32{l.KeyTail.Seg}
	c.journal.mu.named = make([]int64, len(l.Chain))
	return r
}

// logEnds: the log has been replayed up to its end.
func (r *replayer) logEnds(end Head) {
	c := r.c
	c.journal.mu.head, c.journal.mu.seq, c.journal.mu.written, c.journal.mu.keys = end.Pos, end.Seq, r.ksets, r.keys
	if !r.dirty {
		r.clean = logPoint{ksets: r.ksets, keys: r.keys}
	}
	r.clean.pos = c.layout.DirtyTail
	c.writeback.at, c.tails.mu.cleaned = r.clean, r.clean.ksets
	c.writeback.backlog.init(len(c.segments.all), r.ksets)
}

// enterSums enters the checksums of what has been replayed.
func (r *replayer) enterSums() error {
	for seg, list := range r.sums {
		t := r.c.sumsOf(seg)
		if int(t.n.Load()) == len(list) {
			continue // nothing has been added since the last time
		}
		t.clear()
		if err := t.enter(list); err != nil {
			return fmt.Errorf("segment %d: %w", seg, err)
		}
	}
	return nil
}

func (r *replayer) kset(at ondisk.Position, k *ondisk.Kset) error {
	if !r.dirty && at == r.c.layout.DirtyTail {
		r.dirty, r.clean = true, logPoint{ksets: r.ksets, keys: r.keys}
	}
	if r.c.crc && r.dirty && !r.live && r.c.unsynced(k.Seq) {
		for i := range k.Keys {
			if k := &k.Keys[i]; k.Gen == r.c.layout.Gens[k.Seg] && k.Flags&(ondisk.KeyZero|ondisk.KeyBad) == 0 && !r.intact(k) {
				return errTorn
			}
		}
	}
	r.foreign = r.foreign || r.dirty && k.Seq == 0
	r.ksets++
	r.keys += uint64(len(k.Keys))
	if k.Last {
		r.log[k.Next] = true
		r.c.journal.mu.path = append(r.c.journal.mu.path, k.Next)
	}
	for i := range k.Keys {
		if err := r.key(&k.Keys[i]); err != nil {
			return fmt.Errorf("key %d of the kset at %v: %w", i, at, err)
		}
	}
	return nil
}

func (r *replayer) key(k *ondisk.Key) error {
	c := r.c
	switch gen := c.layout.Gens[k.Seg]; {
	case k.Gen < gen && int64(k.Off) >= c.size:
		return nil
	case k.Gen < gen:
		s, _ := c.keySpan(k)
		r.index.add(k, placed{s: s, dead: true})
		return nil
	case k.Gen > gen:
		return fmt.Errorf("%w: %d of segment %d, which is at %d", ErrKeyGeneration, k.Gen, k.Seg, gen)
	case int64(k.Off)+int64(k.Len) > c.size:
		return fmt.Errorf("%w: data up to %d, device of %d bytes", ErrDiskTooSmall, k.Off+uint64(k.Len), c.size)
	}
	c.segments.all[k.Seg].refs.Add(1)
	c.journal.mu.named[k.Seg]++
	r.filled[k.Seg] = max(r.filled[k.Seg], k.SegOff+k.Len)

	flags := keyState(k, r.dirty)
	if c.crc && flags&extZero == 0 {
		r.sums[k.Seg] = append(r.sums[k.Seg], named{
			sum: sum{uint16(k.SegOff >> sectorShift), uint16(k.Len >> sectorShift), k.CRC},
			at:  k.Off - uint64(k.SegOff),
		})
	}
	s, p := c.keySpan(k)
	r.index.add(k, placed{s: s, e: extent{seg: p.seg, pos: s.off + p.delta, flags: flags}})
	return nil
}

// intact reports whether the data of a key is what its checksum says, as far as
// it can be read.
func (r *replayer) intact(k *ondisk.Key) bool {
	buf := grow(&r.buf, int(k.Len))
	_, err := r.c.mem.ReadAt(buf, r.c.layout.Offset(k.Seg, k.SegOff))
	return err != nil || ondisk.Checksum(buf) == k.CRC
}

// checkSegments makes sure that no segment is both, of the log and of data.
func (r *replayer) checkSegments() error {
	for i := range r.log {
		if r.log[i] && r.c.segments.all[i].refs.Load() > 0 {
			return fmt.Errorf("%w: segment %d", ErrKeyInLog, i)
		}
	}
	return nil
}

// sortSegments tells log, data and free segments apart.
func (r *replayer) sortSegments() {
	s := &r.c.segments
	for i := range s.all {
		seg, refs := uint32(i), s.all[i].refs.Load()
		switch {
		case r.log[i]:
			s.all[i].refs.Store(1)
		case refs == 0:
			r.c.raiseGeneration(seg)
			s.addFree(seg)
		case !s.all[i].bad.Load():
			// No key without a place of its own, see storeZeros.
			block := int64(r.c.disk.BlockSize())
			off := max((int64(r.filled[i])+block-1)/block, int64(refs)) * block
			if off < ondisk.SegmentData {
				s.resumable = append(s.resumable, resumable{seg, uint32(off)})
			}
		}
	}
	slices.SortFunc(s.resumable, func(a, b resumable) int { return cmp.Compare(a.off, b.off) })
}
