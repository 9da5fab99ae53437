package engine

import (
	"iter"
	"unsafe"

	"ublk-pcache/ondisk"
)

// The index maps the sectors of the cached device to their place in the
// cache. It is striped by 4 MiB of logical address, as the media format asks
// (no key crosses a stripe), and stripes share a fixed number of locks, so
// that the lock of a stripe costs no memory of its own.
//
// A shard's lock is never held to copy data or compute a crc, nor over a fence
// or a system call. A reader of what an extent names pins its segment under the
// lock, unlocks, copies, and unpins.

const (
	sectorShift   = 9
	stripeSectors = ondisk.StripeSize >> sectorShift
	// shardCount locks: enough that two queues with 128 requests each seldom
	// meet at one, few enough that a status command may visit them all.
	shardCount = 256
)

type shard struct {
	spinning
	slab    slab
	extents int64
	sectors [3]int64 // clean, dirty, dirty zeros; claims and clean zeros are not counted

	// sets in trees since one was last looked at for a table, and how many there are to
	// be until the next is (table.go).
	sets, tableEvery uint16

	_ [32]byte // keeps neighbours' locks out of each other's cache line
}

type index struct {
	shards [shardCount]shard
}

func newIndex(size int64) *index {
	x := &index{}
	stripes := (size + ondisk.StripeSize - 1) / ondisk.StripeSize
	for i := range x.shards {
		x.shards[i].slab.roots = make([]uint32, (stripes+shardCount-1)/shardCount)
	}
	return x
}

// shardOf returns the number of the shard that has a place of the device, in
// bytes.
func shardOf(off uint64) uint8 { return uint8(off / ondisk.StripeSize % shardCount) }

// span is a run of sectors inside one stripe, and the shard that owns it.
type span struct {
	sh     *shard
	root   uint32 // of the shard's stripes
	off, n uint16
}

// span locates n sectors at lba, which must not cross a stripe.
func (x *index) span(lba int64, n int) span {
	u := uint64(lba) // no place is negative, and to divide a signed number takes longer
	stripe := u / stripeSectors
	sh := &x.shards[stripe%shardCount]
	return span{sh: sh, root: uint32(stripe / shardCount), off: uint16(u % stripeSectors), n: uint16(n)}
}

// spanOf locates a read.
func (x *index) spanOf(r *Request) span {
	return x.span(r.Off>>sectorShift, len(r.Buf)>>sectorShift)
}

func (s span) end() uint16 { return s.off + s.n }

// seekLocked places a cursor at the first extent of a tree that ends after off.
func (s span) seekLocked(off uint16) cursor { return seek(&s.sh.slab, s.root, off) }

// hitLocked returns the span as the extent has it that has all of it, which is hit by that,
// and 0 if none has.
func (s span) hitLocked() slot {
	if t := s.tableLocked(); t != nil {
		return s.hitTableLocked(t)
	}
	e := s.sh.slab.last(s.root, s.off)
	if e == nil || e.end() < s.end() {
		return 0
	}
	if e.flags&extHit == 0 {
		e.flags |= extHit
	}
	return slotOf(*e) + slot(s.off-e.off)<<posShift
}

// extent returns the span's extent, of which v is the rest.
func (s span) extent(v slot) extent {
	return extent{off: s.off, n: s.n, pos: v.pos(), flags: v.flags(), seg: v.seg()}
}

func (sh *shard) countLocked(e extent, sign int64) {
	sh.extents += sign
	sh.sectorsLocked(e, sign*int64(e.n))
}

func (sh *shard) sectorsLocked(e extent, n int64) {
	switch {
	case e.flags&extClaim != 0:
	case e.flags&extZero == 0:
		sh.sectors[e.flags&extDirty] += n
	case e.flags&extDirty != 0:
		sh.sectors[2] += n
	}
}

// cutLocked takes every extent, or part of one, out of the span. An extent
// may stick out on the left, on the right, on both sides, or lie inside. Where
// stale is not nil, it is told what has been taken out.
func (s span) cutLocked(stale *staleSectors) {
	if t := s.tableLocked(); t != nil {
		if s.blocks() {
			s.cutTableLocked(t, stale)
			return
		}
		s.splitTableLocked()
	}
	s.cutTreeLocked(stale)
}

// cutTreeLocked is cutLocked for a tree.
func (s span) cutTreeLocked(stale *staleSectors) {
	for {
		c := s.seekLocked(s.off)
		if !c.ok() {
			return
		}
		e := *c.at()
		if e.off >= s.end() {
			return
		}
		if stale != nil {
			stale.add(s.clip(e))
		}
		head, tail := e.off < s.off, e.end() > s.end()
		switch {
		case head && tail:
			*c.at() = e.to(s.off)
			s.sh.sectorsLocked(e, -int64(s.n))
			s.sh.extents++
			insert(&s.sh.slab, s.root, e.from(s.end()))
			return
		case head:
			*c.at() = e.to(s.off)
			s.sh.sectorsLocked(e, -int64(e.end()-s.off))
		case tail:
			// It may begin behind the next leaf's separator now, so it cannot
			// be shortened in place.
			c.remove()
			insert(&s.sh.slab, s.root, e.from(s.end()))
			s.sh.sectorsLocked(e, -int64(s.end()-e.off))
			return
		default:
			s.sh.countLocked(e, -1)
			c.remove()
		}
	}
}

// setLocked makes the span point at e, which has the span's bounds, over
// whatever was there, and joins it with its neighbours where they continue
// each other. Where stale is not nil, it is told what was there: only if e is at a
// place that the index does not have yet.
func (s span) setLocked(e extent, stale *staleSectors) {
	e.off, e.n = s.off, s.n
	if t := s.tableLocked(); t != nil {
		switch {
		case !s.blocks():
			s.splitTableLocked()
		case s.n > tableLongest:
			s.cutTableLocked(t, stale) // so little is left that it becomes a tree
		default:
			s.setTableLocked(t, e, stale)
			return
		}
	}
	if !s.setAtOnceLocked(e, stale) {
		s.setTreeLocked(e, stale)
	}
	s.tryTableLocked()
}

// setTreeLocked is setLocked for a tree.
func (s span) setTreeLocked(e extent, stale *staleSectors) {
	s.cutTreeLocked(stale)
	s.sh.countLocked(e, 1)
	c := s.seekLocked(s.end())
	if c.ok() && e.abuts(*c.at()) {
		next := *c.at()
		c.remove()
		e.n += next.n
		e.flags |= next.flags & extHit
		s.sh.extents--
	}
	if s.off > 0 {
		c = s.seekLocked(s.off - 1)
		if c.ok() && c.at().abuts(e) {
			c.at().n += e.n
			c.at().flags |= e.flags & extHit
			s.sh.extents--
			return
		}
	}
	insert(&s.sh.slab, s.root, e)
}

// setAtOnceLocked does what setTreeLocked is to do and reports true, or nothing, where
// one way down the tree is not enough: where extents are cut, or joined with the
// one behind. Writers and replay mostly overwrite the same blocks, come to new
// ones, or go on where they left off.
func (s span) setAtOnceLocked(e extent, stale *staleSectors) bool {
	c := descend(&s.sh.slab, s.root, s.off)
	if c.depth == 0 {
		return false
	}
	before, follows := c.before()
	if follows && before.off == e.off && before.n == e.n {
		c.prev()
		return s.replaceLocked(c, e, stale)
	}
	if follows && before.end() > e.off {
		return false
	}
	if after, ok := c.from(0); ok && (after.off < e.end() || e.abuts(after)) {
		return false
	}
	if follows && before.abuts(e) {
		c.prev()
		c.at().n += e.n
		c.at().flags |= e.flags & extHit
		s.sh.sectorsLocked(e, int64(e.n))
		return true
	}
	c.insert(e)
	s.sh.countLocked(e, 1)
	return true
}

// replaceLocked puts e in the place of an extent with the same bounds, unless it
// is to be joined with a neighbour.
func (s span) replaceLocked(c cursor, e extent, stale *staleSectors) bool {
	if before, ok := c.before(); ok && before.abuts(e) {
		return false
	}
	if after, ok := c.from(1); ok && e.abuts(after) {
		return false
	}
	old := c.at()
	if stale != nil {
		stale.add(*old)
	}
	s.sh.sectorsLocked(*old, -int64(old.n))
	s.sh.sectorsLocked(e, int64(e.n))
	*old = e
	return true
}

// place is where the sectors of a key are: the segment, and the distance from
// a sector's offset in its stripe to its position in the segment, which is the
// same for every part of the key that survives.
type place struct {
	seg   uint32
	delta uint16
}

func (s span) place(seg uint32, pos uint16) place { return place{seg, pos - s.off} }

func (p place) holds(e extent) bool {
	return e.flags&extClaim == 0 && e.seg == p.seg && e.pos-e.off == p.delta
}

// clip returns the part of e that lies inside the span.
func (s span) clip(e extent) extent {
	if e.off < s.off {
		e = e.from(s.off)
	}
	if e.end() > s.end() {
		e = e.to(s.end())
	}
	return e
}

// partsLocked appends the parts of the span for which keep holds, clipped to
// the span.
func (s span) partsLocked(parts []extent, keep func(extent) bool) []extent {
	if t := s.tableLocked(); t != nil {
		return s.partsTableLocked(t, parts, keep)
	}
	for c := s.seekLocked(s.off); c.ok() && c.at().off < s.end(); c.next() {
		if keep(*c.at()) {
			parts = append(parts, s.clip(*c.at()))
		}
	}
	return parts
}

// replaceClaimLocked puts e, which has the span's bounds, in the place of a fill's claim that
// has them, and reports whether there is that.
func (s span) replaceClaimLocked(f *fill, e extent) bool {
	if t := s.tableLocked(); t != nil {
		if !s.blocks() {
			return false
		}
		if old := t.run(s.slotRange()); old.n != s.n || !f.claims(old) {
			return false
		}
		s.setTableLocked(t, e, nil)
		return true
	}
	old := s.sh.slab.last(s.root, s.off)
	if old == nil || old.off != s.off || old.n != s.n || !f.claims(*old) {
		return false
	}
	*old = e
	s.sh.sectorsLocked(e, int64(e.n))
	return true
}

// hitPartsLocked takes note that all extents of the span were hit.
func (s span) hitPartsLocked() {
	if t := s.tableLocked(); t != nil {
		for i, to := s.slotRange(); i < to; i++ {
			if t.slots[i] != 0 {
				t.slots[i] |= slotHit
			}
		}
		return
	}
	for c := s.seekLocked(s.off); c.ok() && c.at().off < s.end(); c.next() {
		c.at().flags |= extHit
	}
}

// sub returns the span of e, which lies inside s.
func (s span) sub(e extent) span {
	s.off, s.n = e.off, e.n
	return s
}

// forget removes the clean extents that still point at the place. A dirty one
// there belongs to a younger key, for the same zeros.
func (x *index) forget(s span, p place, scratch []extent) []extent {
	s.sh.Lock()
	defer s.sh.Unlock()
	scratch = s.partsLocked(scratch[:0], func(e extent) bool { return p.holds(e) && e.flags&extDirty == 0 })
	for _, e := range scratch {
		s.sub(e).cutLocked(nil)
	}
	return scratch
}

// forgetClean removes all that is clean.
func (x *index) forgetClean() {
	var scratch []extent
	for i := range shardCount {
		for s := range x.stripes(i) {
			s.sh.Lock()
			scratch = s.partsLocked(scratch[:0], func(e extent) bool { return e.flags&(extDirty|extClaim) == 0 })
			for _, e := range scratch {
				s.sub(e).cutLocked(nil)
			}
			s.sh.Unlock()
		}
	}
}

// stripes yields every stripe of a shard that may have extents, as a span, and
// where it begins on the device, in bytes.
func (x *index) stripes(shard int) iter.Seq2[span, int64] {
	return func(yield func(span, int64) bool) {
		sh := &x.shards[shard]
		for i := range sh.slab.roots {
			s := span{sh: sh, root: uint32(i), n: stripeSectors}
			if !yield(s, (int64(i)*shardCount+int64(shard))*ondisk.StripeSize) {
				return
			}
		}
	}
}

// clean makes clean what still points at the place: it has been written back.
func (x *index) clean(s span, p place, scratch []extent) []extent {
	s.sh.Lock()
	defer s.sh.Unlock()
	if t := s.tableLocked(); t != nil && s.blocks() {
		s.cleanTableLocked(t, p)
		return scratch
	}
	scratch = s.partsLocked(scratch[:0], p.holds)
	for _, e := range scratch {
		e.flags &^= extDirty
		s.sub(e).setLocked(e, nil)
	}
	return scratch
}

// usage is what the index holds at one moment, shard by shard.
type usage struct {
	extents      int64
	clean, dirty int64 // bytes
	zero         int64 // bytes of dirty zeros
	bytes        int64 // of memory
}

func (x *index) usage() usage {
	var u usage
	for i := range x.shards {
		sh := &x.shards[i]
		sh.Lock()
		u.extents += sh.extents
		u.clean += sh.sectors[0] << sectorShift
		u.dirty += sh.sectors[extDirty] << sectorShift
		u.zero += sh.sectors[2] << sectorShift
		u.bytes += sh.slab.bytes() + int64(unsafe.Sizeof(*sh))
		sh.Unlock()
	}
	return u
}
