package engine

import (
	"errors"
	"fmt"
	"slices"

	"ublk-pcache/ondisk"
)

// # The commit protocol
//
// A write is three things: bytes in a data segment, a key in the log, an
// extent in the index. docs/design.md tells what comes of doing them one after
// the other, each queue for itself: reads that go back in time, a hole in the
// log, a log without an end.
//
// So a turn of a queue stores its data, and waits with a fence until it is
// there, without any lock. Then it commits its keys, as one kset, under the lock
// of the journal:
//
//	zero the end mark behind the kset to come
//	fence                                      (1) if there was none yet
//	store the kset
//	zero more of what lies behind              now and then
//	fence                                      (2)
//	lock the index where its keys belong
//
// It then releases the journal and enters the keys (publish.go). Those of queues that wait
// for the journal may be among them (offer.go).
//
// The first fence orders the data before the kset, and (1) the end mark: a kset
// never names bytes that are not there, and the log never runs on. (2) makes
// the kset durable before any reader can find its keys, before the next kset is
// begun, and before anybody is told. Because the index is locked under the same
// lock, its order is the log's.
//
// The end marks of many ksets to come are zeroed together with a kset, and durable with
// it: they need no (1). Each is stored once more all the same, since memory that is
// gone says so there, while the log can still be led away. The price of the log is then
// one fence for a few hundred bytes, now and then some KiB, under one lock for a whole
// turn of requests.
//
// Where the kset leaves no room for a full one behind it, the log goes on in
// another segment, and (1) is all the fence that there is for that: in place of
// the end mark the first step stores the LAST record that leads on, and the
// end mark at the start of the new segment. If the kset is lost, so is the way
// to the LAST.
//
// Memory that does not take the end mark, the LAST or the kset costs the rest of
// the segment: nothing that was stored counts yet, a torn kset least of all, so
// the place of the kset gets a LAST instead, which leads to where the kset can be
// stored. It is shorter, so nothing can be left of the torn one that would make
// either whole. Only if that place is bad itself the log cannot go on. All that
// was acknowledged lies in front of it.
//
// Invariants: the log holds, from key_tail to head, every key whose data the
// index knows; no kset is stored before all ksets in front of it are durable;
// behind the head stand 24 zero bytes.

// journal is the log's writing end.
type journal struct {
	offers offers
	mu     struct {
		spinning
		head    ondisk.Position
		seq     uint64 // of the kset to be written at head
		written uint64 // ksets in front of the head since key_tail at Open
		keys    uint64 // their keys
		zeroed  uint32 // offset in the head's segment: from the head to there are durable zeros; 0 if that is not known
		buf     [ondisk.MaxKsetSize]byte

		// The content of the log from key_tail on: how many keys that name each
		// segment, and the segments that it came through itself.
		named []int64
		path  []uint32
	}
}

// errLogFull: there is no segment for the log to go on in. Nothing has been
// changed.
var errLogFull = errors.New("no free segment for the log")

// head returns where the log ends and how many ksets lie before that. All of
// them are in the index, or will be before its lock can be had.
func (j *journal) head() (ondisk.Position, uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.mu.head, j.mu.written
}

// point returns the head.
func (j *journal) point() logPoint {
	j.mu.Lock()
	defer j.mu.Unlock()
	return logPoint{j.mu.head, j.mu.written, j.mu.keys}
}

// account returns the head, and how many keys in front of it name each segment.
func (j *journal) account() (head ondisk.Position, named []int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.mu.head, slices.Clone(j.mu.named)
}

// passed is called for a new key_tail, with the segments that the keys in front
// of it name. It returns those that the log has left behind.
func (j *journal) passed(tail ondisk.Position, dropped []references) (left []uint32) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range dropped {
		j.mu.named[r.seg] -= r.n
	}
	n := slices.Index(j.mu.path, tail.Seg)
	left, j.mu.path = j.mu.path[:n:n], j.mu.path[n:]
	return left
}

// last returns the number of the kset before the head.
func (j *journal) last() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return ondisk.PrevSeq(j.mu.seq)
}

// commit makes the oldest keys of the queue's batch part of the log and of the index,
// where another queue may still have their shards locked to enter them: one kset of
// them, fills in front of writes, since a fill holds what the disk had before any of
// these writes. After errLogFull the batch is as it was, without the fills.
func (c *Cache) commit(q *Queue) error {
	c.prefetchKeys(q.keys[:min(len(q.keys), ondisk.MaxKeys)], 0) // while nobody waits for the locks
	fills, n, err := c.logKeys(q)
	if err != nil {
		for i := range q.keys[:fills] {
			c.drop(q.keys[i].Seg)
		}
		q.keys = q.keys[:copy(q.keys, q.keys[fills:])]
		return err
	}
	q.publisher.publish(c, q.logged)
	q.keys = q.keys[:copy(q.keys, q.keys[n:])]
	q.committed += uint64(n - fills)
	return nil
}

// logKeys writes a kset of the first n keys of the queue's batch, of which fills are
// those of fills, and of those that others have offered. Without an error it leaves the
// shards of q.logged locked, the keys that are to be entered: none if another queue has
// done all that.
func (c *Cache) logKeys(q *Queue) (fills, n int, err error) {
	j := &c.journal
	q.logged = nil
	c.mem.Fence() // for the data
	if !j.lockFor(q) {
		return 0, len(q.offer.keys), q.offer.err
	}
	defer j.mu.Unlock()
	fills = q.fillKeysLocked()
	if n = min(len(q.keys), ondisk.MaxKeys); n == 0 {
		return 0, 0, nil
	}
	all, others := q.keys[:n], (*offer)(nil)
	if j.offers.first.Load() != nil {
		all, others = j.takeOffersLocked(q, all)
	}
	err = c.appendLocked(all, relogReserve)
	if err == errLogFull && others != nil {
		// There may be room for less. No queue is to wait because of what others
		// wanted.
		j.offers.pushAll(others)
		all, others = q.keys[:n], nil
		err = c.appendLocked(all, relogReserve)
	}
	if err == nil {
		q.logged = all
		q.publisher.lockShards(c.index, all)
	}
	others.finish(err)
	return fills, n, err
}

// keyState returns the state of a key's extent; dirty says whether the key
// lies behind dirty_tail.
func keyState(k *ondisk.Key, dirty bool) (flags uint16) {
	if dirty && k.Flags&ondisk.KeyClean == 0 {
		flags |= extDirty
	}
	if k.Flags&ondisk.KeyZero != 0 {
		flags |= extZero
	}
	if k.Flags&ondisk.KeyClean != 0 {
		flags |= extFill
	}
	return flags
}

// dead reports whether the generation of a key has passed: its data may be somebody
// else's by now.
func (c *Cache) dead(k *ondisk.Key) bool { return k.Gen != c.segments.all[k.Seg].gen.Load() }

// keySpan returns what a key covers and where.
func (c *Cache) keySpan(k *ondisk.Key) (span, place) {
	s := c.index.span(int64(k.Off>>sectorShift), int(k.Len>>sectorShift))
	return s, s.place(k.Seg, uint16(k.SegOff>>sectorShift))
}

// keyPart returns the part of a key, whose span it is called for, that an extent covers. The
// checksum is still that of all of it.
func (s span) keyPart(k *ondisk.Key, e extent) ondisk.Key {
	part := *k
	skip := uint32(e.off-s.off) << sectorShift
	part.Off += uint64(skip)
	part.SegOff += skip
	part.Len = uint32(e.n) << sectorShift
	return part
}

// appendLocked writes one kset at the head, and leaves keep free segments alone.
// Where memory does not take it, the log goes on in another segment; after any error
// but errLogFull it cannot, and ends properly with the kset before.
func (c *Cache) appendLocked(keys []ondisk.Key, keep int) error {
	j := &c.journal
	for {
		seg := j.mu.head.Seg
		if bad := c.segments.all[seg].bad.Load(); bad || roomAt(j.mu.head) < ondisk.KsetSize(len(keys)) {
			if err := c.leaveSegmentLocked(keep); err != nil {
				return err
			}
		}
		err := c.storeKsetLocked(keys, keep)
		if err == nil {
			for i := range keys {
				j.mu.named[keys[i].Seg]++
			}
			return nil
		}
		if err != errLeave {
			return err
		}
	}
}

// errLeave: the segment of the head has turned out to be bad. The head is where
// it was, with an end mark or a torn kset, which is as good.
var errLeave = errors.New("bad memory behind the end of the log")

// storeKsetLocked writes one kset, for which there is room, at the head. Where keep
// is 0 and no segment is free, it does without one behind it.
func (c *Cache) storeKsetLocked(keys []ondisk.Key, keep int) error {
	j := &c.journal
	at, size := j.mu.head, ondisk.KsetSize(len(keys))
	behind := ondisk.Position{Seg: at.Seg, Off: at.Off + size}
	end := behind
	if roomAt(behind) < ondisk.MaxKsetSize {
		switch next, err := c.beginSegmentLocked(keep); {
		case err == nil:
			if err := c.storeLastLocked(behind, ondisk.NextSeq(j.mu.seq), next); err != nil {
				c.giveBack(next)
				return errLeave
			}
			end = ondisk.Position{Seg: next}
		case keep > 0:
			return err
		}
	}
	marked := end == behind && j.mu.zeroed >= behind.Off+ondisk.KsetHeaderSize
	if end == behind && !c.zeroLocked(behind, ondisk.KsetHeaderSize) {
		return errLeave
	}
	kset := ondisk.EncodeKset(j.mu.buf[:], j.mu.seq, keys)
	if !marked {
		c.mem.Fence()
	}
	if _, err := c.mem.WriteAt(kset, c.offset(at)); err != nil {
		c.badStore("log", at.Seg, at.Off, len(kset), err)
		if j.mu.zeroed = 0; end != behind {
			c.giveBack(end.Seg)
		}
		return errLeave
	}
	if end == behind {
		c.zeroAheadLocked(behind)
	}
	c.mem.Fence()
	j.mu.keys += uint64(len(keys))
	j.movedLocked(behind)
	if end != behind {
		j.movedLocked(end)
	}
	return nil
}

// zeroAhead is how many bytes are zeroed at a time, behind the end mark of the longest
// kset that may come: those of a hundred ksets of one key each.
const zeroAhead = 8 << 10

// zeroAheadLocked makes end marks for ksets to come, if there is not one for the next,
// however long. Where memory does not take them, the next goes to another segment.
func (c *Cache) zeroAheadLocked(behind ondisk.Position) {
	from := ondisk.Position{Seg: behind.Seg, Off: c.journal.mu.zeroed}
	need := min(behind.Off+ondisk.MaxKsetSize+ondisk.KsetHeaderSize, ondisk.SegmentData)
	if from.Off < need {
		c.zeroLocked(from, min(need+zeroAhead, ondisk.SegmentData)-from.Off)
	}
}

// zeroLocked zeroes n bytes of the head's segment, in front of which all is zero or
// will be a kset, and reports whether that can be done.
func (c *Cache) zeroLocked(from ondisk.Position, n uint32) bool {
	if err := c.mem.Zero(c.offset(from), int64(n)); err != nil {
		c.badStore("log", from.Seg, from.Off, int(n), err)
		return false
	}
	c.journal.mu.zeroed = max(c.journal.mu.zeroed, from.Off+n)
	return true
}

// leaveSegmentLocked lets the log go on in another segment at once, because of
// bad memory, or near the segment's end: only a log that somebody else wrote,
// whose last kset a crash took, or that had no other segment, comes so near.
func (c *Cache) leaveSegmentLocked(keep int) error {
	j := &c.journal
	next, err := c.beginSegmentLocked(keep)
	if err != nil {
		return err
	}
	c.mem.Fence()
	// The LAST may have been stored after all, so next must stay a segment of
	// the log.
	if err := c.storeLastLocked(j.mu.head, j.mu.seq, next); err != nil {
		return fmt.Errorf("%w: %w", ErrBadHead, err)
	}
	c.mem.Fence()
	j.movedLocked(ondisk.Position{Seg: next})
	return nil
}

// beginSegmentLocked takes a segment for the log, if that leaves keep of them, and
// stores its end mark. The only error is errLogFull.
func (c *Cache) beginSegmentLocked(keep int) (next uint32, err error) {
	for {
		next, ok := c.segments.take(keep)
		if !ok {
			return 0, errLogFull
		}
		err := c.mem.Zero(c.layout.Offset(next, 0), ondisk.KsetHeaderSize)
		if err == nil {
			c.segments.all[next].refs.Store(1)
			c.took(c.journal.mu.written)
			return next, nil
		}
		c.badStore("log", next, 0, ondisk.KsetHeaderSize, err)
	}
}

// giveBack makes a segment that beginSegmentLocked has taken a free one.
func (c *Cache) giveBack(seg uint32) {
	c.segments.all[seg].refs.Store(0)
	c.segments.addFree(seg)
}

// storeLastLocked stores a LAST, and makes sure that it can be read: the place
// may be next to bad memory, and all that comes after hangs on it.
func (c *Cache) storeLastLocked(at ondisk.Position, seq uint64, next uint32) error {
	last := ondisk.EncodeLast(c.journal.mu.buf[:], seq, next)
	err := c.storeSurely(last, c.offset(at))
	if err != nil {
		c.badStore("log", at.Seg, at.Off, ondisk.KsetHeaderSize, err)
	}
	return err
}

func (c *Cache) offset(p ondisk.Position) int64 { return c.layout.Offset(p.Seg, p.Off) }

// roomAt returns how large a kset at p may be.
func roomAt(p ondisk.Position) uint32 {
	return ondisk.SegmentData - ondisk.KsetHeaderSize - p.Off
}

// movedLocked: a kset has been written and the head is behind it.
func (j *journal) movedLocked(head ondisk.Position) {
	if head.Seg != j.mu.head.Seg {
		j.mu.zeroed = 0
		j.mu.path = append(j.mu.path, head.Seg)
	}
	j.mu.head = head
	j.mu.seq = ondisk.NextSeq(j.mu.seq)
	j.mu.written++
}

// errStopWalk ends a walk of the log that has come far enough.
var errStopWalk = errors.New("far enough")

// walk visits the ksets of [from, to), both of which are places that the log
// came through, until visit returns false. after is where the kset ends.
func (c *Cache) walk(w *ondisk.Walker, from, to ondisk.Position, visit func(k *ondisk.Kset, after ondisk.Position) bool) *ondisk.Damage {
	damage, _ := w.WalkTo(c.layout, c.mem, from, to, func(k *ondisk.Kset, after ondisk.Position) error {
		if !visit(k, after) {
			return errStopWalk
		}
		return nil
	})
	return damage
}
