package engine

import (
	"slices"
	"ublk-pcache/ondisk"
)

// A write takes a place in the segment that its queue fills, its data is stored there at
// once, and its key goes into the batch that the queue commits at the end of the turn
// (log.go). Where there is no place left, it waits in line (space.go); its queue, and only
// that, goes on with it.
//
// A write of zeros stores none: it names a run of zeros that the segment has once.

// write gives the data of r its place, as far as there is space. The rest waits in
// line, and so does every other request that comes while anybody is ahead.
func (q *Queue) write(r *Request) {
	c := q.c
	if err := c.failure(); err != nil {
		q.leaveLine(r)
		if r.Err = err; r.through {
			c.through.forget(r)
		}
		q.finished = append(q.finished, r)
		return
	}
	if r.Op == Write && goesAround(c.settings.mode()) && q.writeDirect(r) {
		return
	}
	if q.stalled.Load() || r.ticket == 0 && (len(q.line) > 0 || c.space.parked.Load() > 0) {
		q.wait(r, false)
		return
	}
	if r.Op == Write && q.writeAtOnce(r) {
		return
	}
	for r.done < r.size() {
		k, ok := q.storeNext(r)
		if !ok {
			q.wait(r, true)
			return
		}
		q.keys = append(q.keys, k)
		q.stored++
		r.done += int(k.Len)
	}
	q.leaveLine(r)
	r.last = q.stored
	q.turn = append(q.turn, r)
}

// writeAtOnce does the work of write and reports true, or does nothing that counts
// where there is more work than usual: where r has waited, its data does not fit into
// the segment that the queue fills, or has checksums, or where memory fails.
func (q *Queue) writeAtOnce(r *Request) bool {
	c, n := q.c, uint32(len(r.Buf))
	if c.crc || r.ticket != 0 || !q.head.open || n > ondisk.SegmentData-q.head.off {
		return false
	}
	s := &c.segments.all[q.head.seg]
	if s.bad.Load() {
		return false
	}
	if _, err := c.mem.WriteAt(r.Buf, c.layout.Offset(q.head.seg, q.head.off)); err != nil {
		c.badStore("data to be stored", q.head.seg, q.head.off, len(r.Buf), err)
		q.closeHead()
		return false
	}
	q.keys = append(q.keys, ondisk.Key{Off: uint64(r.Off), Len: n, Seg: q.head.seg, SegOff: q.head.off, Gen: s.gen.Load()})
	q.head.off += n
	q.head.owed++
	q.stored++
	r.done, r.last = int(n), q.stored
	q.turn = append(q.turn, r)
	return true
}

// storeNext stores the next part of a write or zero.
func (q *Queue) storeNext(r *Request) (k ondisk.Key, ok bool) {
	off := r.Off + int64(r.done)
	if r.Op == Zero {
		return q.storeZeros(min(r.Len-r.done, stripeLeft(off)), r, off)
	}
	return q.store(r.Buf[r.done:], off, 0, r)
}

// store puts data of r into the region and returns the key for it, with less than
// all of p where the segment or a checksum ended. ok is false where there is
// no space.
func (q *Queue) store(p []byte, off int64, flags ondisk.KeyFlags, r *Request) (k ondisk.Key, ok bool) {
	if q.c.crc {
		p = p[:min(len(p), maxSummed)]
	}
	seg, segOff, n, ok := q.put(len(p), r, func(n int, at int64) error {
		_, err := q.c.mem.WriteAt(p[:n], at)
		return err
	})
	if !ok {
		return k, false
	}
	k = ondisk.Key{
		Off: uint64(off), Len: uint32(n), Flags: flags,
		Seg: seg, SegOff: segOff, Gen: q.c.segments.all[seg].gen.Load(),
	}
	if q.c.crc {
		k.CRC = ondisk.Checksum(p[:n])
		q.c.segments.all[seg].sums.Load().add(sum{uint16(segOff >> sectorShift), uint16(n >> sectorShift), k.CRC})
	}
	return k, true
}

// wait puts r in line, dry if the queue has no room left for it. The collector
// looks after everybody there: it makes room, and it answers for a cache that has
// failed. It may rest, so a cache that was aborted meanwhile is looked at here, and
// so is room that has been made meanwhile.
func (q *Queue) wait(r *Request, dry bool) {
	r.stage = stageWrite
	if r.ticket == 0 {
		q.line = append(q.line, r)
	}
	q.c.space.park(r, dry)
	if q.c.failure() == ErrAborted {
		q.c.wakeWriters()
	}
	q.c.serve()
	q.c.gc.kick()
}

// leaveLine is called for a request that waits no longer, if it ever did: the first
// of the queue's.
func (q *Queue) leaveLine(r *Request) {
	if r.ticket != 0 {
		q.c.space.leave(r)
		q.line = slices.Delete(q.line, 0, 1)
		q.left = true
	}
}

// alloc returns a place for up to n bytes of data of r, with a reference to its
// segment for the key that will name it. It begins a new segment only if r may
// take one.
func (q *Queue) alloc(n int, r *Request) (seg, off uint32, got int, ok bool) {
	if q.head.open && (q.head.off == ondisk.SegmentData || q.c.segments.all[q.head.seg].bad.Load()) {
		q.closeHead()
	}
	if !q.head.open {
		seg, ok := q.c.takeData(q, r)
		if !ok {
			return 0, 0, 0, false
		}
		q.head.open, q.head.seg, q.head.off = true, seg, 0
	}
	seg, off = q.head.seg, q.head.off
	got = min(n, int(ondisk.SegmentData-off))
	q.head.off += uint32(got)
	q.head.owed++
	return seg, off, got, true
}

// payOwed takes the references that are owed.
func (q *Queue) payOwed() {
	if q.head.owed > 0 {
		q.c.segments.all[q.head.seg].refs.Add(q.head.owed)
		q.head.owed = 0
	}
}

// put allocates a place and has store write to it. A segment of which the
// memory fails is given up for another; its content stays.
func (q *Queue) put(n int, r *Request, store func(n int, at int64) error) (seg, off uint32, got int, ok bool) {
	for {
		seg, off, got, ok = q.alloc(n, r)
		if !ok {
			return 0, 0, 0, false
		}
		err := store(got, q.c.layout.Offset(seg, off))
		if err == nil {
			return seg, off, got, true
		}
		q.c.badStore("data to be stored", seg, off, got, err)
		q.head.owed--
		q.closeHead()
	}
}

func (q *Queue) closeHead() {
	q.payOwed()
	if q.zeros.n > 0 {
		q.zeros.n = 0
		q.c.drop(q.head.seg)
	}
	q.head.open = false
	q.c.segments.all[q.head.seg].filling.Store(false)
	q.c.drop(q.head.seg)
}

const (
	// zeroRun is how long a run of zeros is made, in bytes, unless the segment
	// ends before: a sixteenth of it. Where more is zeroed at once the run becomes
	// as long as a key may be, a stripe, which makes a discard of a disk of 1 TiB
	// a quarter of a million keys instead of a million.
	zeroRun = 1 << 20
	// zeroRunMin is how long it must be. A shorter rest of a segment is given
	// up.
	zeroRunMin = 64 << 10
)

var zeros [ondisk.StripeSize]byte

// zeroSum returns the checksum of n zeros, at most a stripe of them.
func zeroSum(n uint32) uint32 { return ondisk.Checksum(zeros[:n]) }

// storeZeros returns a key for zeros like store does for data: without storing
// any, if the head's segment has a run of them already.
//
// A block of the segment is left empty for it. Keys fill the log, and one run has
// room for any number of them. With a place of its own each is to the cache like a
// write of a block: it waits where that would wait, and the keys of zeros are bounded
// as those of data are. And data that the end of the segment divides is divided
// between blocks, or the disk would not take it.
func (q *Queue) storeZeros(n int, r *Request, off int64) (k ondisk.Key, ok bool) {
	if left := q.headLeft(); left == 0 || q.zeros.n == 0 && left < zeroRunMin {
		q.closeHead()
	}
	if q.zeros.n == 0 && !q.makeZeros(zeroRun, r) {
		return k, false
	}
	if n > zeroRun && q.zeros.n < ondisk.StripeSize && q.headLeft() > ondisk.StripeSize && !q.makeZeros(ondisk.StripeSize, r) {
		return k, false
	}
	seg := q.head.seg
	q.head.off += q.block()
	q.head.owed++
	k = ondisk.Key{
		Off: uint64(off), Len: min(uint32(n), q.zeros.n), Flags: ondisk.KeyZero,
		Seg: seg, SegOff: q.zeros.off, Gen: q.c.segments.all[seg].gen.Load(),
	}
	if q.c.crc {
		k.CRC = zeroSum(k.Len)
	}
	return k, true
}

// block is the least that is read and written, in bytes.
func (q *Queue) block() uint32 { return uint32(q.c.disk.BlockSize()) }

// makeZeros begins a run of zeros, which leaves a block of the segment for a key.
func (q *Queue) makeZeros(n uint32, r *Request) bool {
	n = min(n, q.headLeft()-q.block())
	_, off, got, ok := q.put(int(n), r, func(n int, at int64) error { return q.c.mem.Zero(at, int64(n)) })
	if !ok {
		return false
	}
	if q.zeros.n > 0 {
		q.head.owed-- // there was a run in this segment, and a reference for it
	}
	q.zeros.off, q.zeros.n = off, uint32(got)
	return true
}

// headLeft returns how much room there is in the segment that the queue fills, or
// in the one that it would begin.
func (q *Queue) headLeft() uint32 {
	switch {
	case !q.head.open:
		return ondisk.SegmentData
	case q.c.segments.all[q.head.seg].bad.Load():
		return 0
	}
	return ondisk.SegmentData - q.head.off
}
