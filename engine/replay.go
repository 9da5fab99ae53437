package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"ublk-pcache/ondisk"
)

// replay rebuilds the index from the log: later keys override earlier ones, and a key
// is clean if it lies before dirty_tail, or is flagged clean. The data of a key whose
// generation has passed may be somebody else's by now: that key is dead. But it
// overrides earlier ones as well, whose data may still be there: a key that died was on
// the disk before. There are such keys where only an older copy of key_tail can be
// read, or where the kernel was cut off in its gc.
//
// Data is verified when it is used. Replay looks only at data that no sync of the
// region has covered.
//
// A log that is damaged rather than ended is refused, and so is a key that
// cannot be true, and dirty data for a disk that was changed, unless choice
// says what becomes of it; nothing is written then. Otherwise the segments
// found free get a new generation, since a crash may have come between the
// key_tail that freed them and the one it was to have, and everything found,
// which may never have left the page cache, is made durable. Where memory takes
// none of that, the cache opens all the same, to be read and written back.
func (c *Cache) replay(choice Choice) error {
	r := newReplayer(c)
	end, err := r.readLog()
	if err != nil {
		return err
	}
	r.logEnds(end.Head)
	if err := r.enterSums(); err != nil {
		return err
	}
	if err := c.compareDisk(choice, r.foreign); err != nil {
		return err
	}
	if err := r.checkSegments(); err != nil {
		return err
	}
	// First of all stores: others go over the good copies that it reads.
	c.heal()
	c.clearBehind(end)
	// A key that has been dropped from the log is gone before its segment gets a new
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
	return c.firstSyncMark(end.Head)
}

// logEnd is where replay has found the log to end.
type logEnd struct {
	Head
	numberless bool // no kset in front has a number
	torn       bool // a power cut took what followed
}

// readLog replays the log and returns where it ends. Its error is what a power cut
// cannot have done to the log, or why a key cannot be true.
func (r *replayer) readLog() (end logEnd, err error) {
	c, l := r.c, r.c.layout
	found, err := l.WalkLog(c.mem, l.KeyTail, r.kset)
	r.index.finish()
	if err != nil && err != errTorn {
		return end, err
	}
	end = logEnd{Head{found.Pos, found.NextSeq()}, found.Seq == 0, err == errTorn}
	if end.numberless && l.SyncMark != 0 {
		end.Seq = ondisk.SeqBeyond(l.SyncMark)
	}
	if found.Damage != nil {
		if end.torn = c.tornAt(end, found.Damage); !end.torn {
			return end, found.Damage
		}
	}
	if end.torn {
		c.log.Error(PowerCutTookWrites, fmt.Sprintf("a power cut took writes that had not been flushed: the log ends at %v", end.Pos), nil)
	}
	return end, nil
}

// tornAt reports whether a power cut may have done the damage at the end of the log.
func (c *Cache) tornAt(end logEnd, d *ondisk.Damage) bool {
	lost := end.Seq
	if end.numberless {
		// No kset in front tells the number of the one that is lost.
		lost = d.AheadSeq
	}
	// A power cut makes no media errors.
	return c.unsynced(lost) && d.DirtyTail == nil && !errors.Is(d, ondisk.ErrUnreadable)
}

// clearBehind zeroes what could be taken for the log's continuation. It does not persist.
func (c *Cache) clearBehind(end logEnd) {
	// A kset cut short has the number that the next one here gets: what is left of one
	// could complete the other. And a kset whose number does not continue the log would
	// begin it, once all in front has been collected and key_tail stands here.
	n := int64(ondisk.KsetHeaderSize)
	if end.torn || end.numberless && !c.mem.Durable() {
		// Ksets further on would continue the new log's numbers. Behind an empty log
		// nobody has looked for them.
		n = int64(ondisk.SegmentData - end.Pos.Off)
	}
	zero := func(at ondisk.Position, n int64) {
		if err := c.mem.Zero(c.offset(at), n); err != nil {
			c.badStore("log", at.Seg, at.Off, int(n), err)
			c.fail(fmt.Errorf("%w: %w", ErrBadHead, err))
		}
	}
	zero(end.Pos, n)
	if end.torn {
		for _, seg := range c.layout.StartsAhead(c.mem, end.Pos, end.Seq) {
			zero(ondisk.Position{Seg: seg}, ondisk.KsetHeaderSize)
		}
	}
}

// firstSyncMark says that the log is durable up to its end, and persists that where
// there was no mark: without one the next power cut would be damage.
func (c *Cache) firstSyncMark(end Head) error {
	if err := c.markSynced(ondisk.PrevSeq(end.Seq)); err != nil {
		c.fail(err)
	}
	if c.layout.SyncMark != 0 {
		return nil
	}
	return c.persist()
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
	keys    uint64   // of these
	clean   logPoint // before dirty_tail
	index   bulkLoad
	filled  []uint32           // bytes of each segment, up to the end of its last data
	log     []bool             // which segments are of the log
	sums    map[uint32][]named // by segment
	buf     []byte             // data of intact
	foreign bool               // ksets without a number lie behind dirty_tail
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

// kset replays the next kset of the log, which lies at a place. Its error is errTorn, or
// says why one of its keys cannot be true.
func (r *replayer) kset(at ondisk.Position, k *ondisk.Kset) error {
	if !r.dirty && at == r.c.layout.DirtyTail {
		r.dirty, r.clean = true, logPoint{ksets: r.ksets, keys: r.keys}
	}
	if r.c.crc && r.dirty && !r.live && r.c.unsynced(k.Seq) && r.lacksData(k.Keys) {
		return errTorn
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

// lacksData reports whether a power cut has taken the data of any of the keys.
func (r *replayer) lacksData(keys []ondisk.Key) bool {
	for i := range keys {
		if k := &keys[i]; k.Gen == r.c.layout.Gens[k.Seg] && k.Flags&(ondisk.KeyZero|ondisk.KeyBad) == 0 && !r.intact(k) {
			return true
		}
	}
	return false
}

// key replays the next key of the log. Its error says why the key cannot be true.
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
			if off := r.resumeAt(seg, refs); off < ondisk.SegmentData {
				s.resumable = append(s.resumable, resumable{seg, uint32(off)})
			}
		}
	}
	slices.SortFunc(s.resumable, func(a, b resumable) int { return cmp.Compare(a.off, b.off) })
}

// resumeAt returns where a queue may go on to fill a segment: behind all data, and behind
// a block for each key, since each has a place of its own, see storeZeros.
func (r *replayer) resumeAt(seg uint32, keys int64) int64 {
	block := int64(r.c.disk.BlockSize())
	return max((int64(r.filled[seg])+block-1)/block, keys) * block
}
