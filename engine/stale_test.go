package engine

import (
	"context"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// checkOverwritten fails if anything that the index has passes for overwritten.
// Any time.
func (c *Cache) checkOverwritten(t rapid.TB) {
	t.Helper()
	c.eachSector(func(lba int64, seg uint32, pos uint16) {
		if c.stale.has(&ondisk.Key{Seg: seg, SegOff: uint32(pos) << sectorShift, Len: sectorSize}) {
			t.Errorf("sector %d is in the index, at %d of segment %d, and overwritten", lba, pos, seg)
		}
	})
}

// checkPlaces fails if the index has two sectors in one place of a segment that has
// bits, without which they mean nothing, or one in a segment without references.
// While nothing is under way.
func (c *Cache) checkPlaces(t rapid.TB) {
	t.Helper()
	type at struct {
		seg uint32
		pos uint16
	}
	has := map[at]int64{}
	c.eachSector(func(lba int64, seg uint32, pos uint16) {
		if c.segments.all[seg].refs.Load() == 0 {
			t.Errorf("sector %d is in the index, at %d of segment %d, which has no references", lba, pos, seg)
		}
		if other, ok := has[at{seg, pos}]; ok {
			t.Errorf("sectors %d and %d are both at %d of segment %d", other, lba, pos, seg)
		}
		if c.stale.of[seg].Load() != nil {
			has[at{seg, pos}] = lba
		}
	})
}

// eachSector calls f for each sector of data in the index, under the lock of its
// shard.
func (c *Cache) eachSector(f func(lba int64, seg uint32, pos uint16)) {
	for shard := range shardCount {
		for s, at := range c.index.stripes(shard) {
			s.sh.Lock()
			for _, e := range s.partsLocked(nil, func(e extent) bool { return e.flags&(extClaim|extZero) == 0 }) {
				for i := range e.n {
					f(at>>sectorShift+int64(e.off+i), e.seg, e.pos+i)
				}
			}
			s.sh.Unlock()
		}
	}
}

// TestSectorBits compares the bits of a segment with a list of its sectors.
func TestSectorBits(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	var o staleSectors
	o.init(2)
	o.begin(1)
	var want [segmentSectors]bool
	draw := func() (pos, n int) {
		pos = rnd.IntN(segmentSectors)
		return pos, 1 + rnd.IntN(min(1+rnd.IntN(300), segmentSectors-pos))
	}
	for range 400 {
		pos, n := draw()
		o.add(extent{seg: 1, pos: uint16(pos), n: uint16(n)})
		for i := range n {
			want[pos+i] = true
		}
		for range 100 {
			pos, n := draw()
			all := true
			for i := range n {
				all = all && want[pos+i]
			}
			k := ondisk.Key{Seg: 1, SegOff: uint32(pos) << sectorShift, Len: uint32(n) << sectorShift}
			if got := o.has(&k); got != all {
				t.Fatalf("%d sectors from %d: %t, want %t", n, pos, got, all)
			}
		}
	}
	if got := o.bytes(); got != 4096 {
		t.Errorf("the bits take %d bytes", got)
	}
	o.begin(1)
	for pos := range uint32(segmentSectors) {
		if o.has(&ondisk.Key{Seg: 1, SegOff: pos << sectorShift, Len: sectorSize}) {
			t.Fatalf("sector %d is overwritten in the segment's next use", pos)
		}
	}
}

// keyAt returns a key for what the index has at a sector.
func (r *rig) keyAt(lba int64, sectors int) *ondisk.Key {
	e := r.extents(lba, sectors)[0]
	k := &ondisk.Key{Seg: e.seg, SegOff: uint32(e.pos) << sectorShift, Len: uint32(e.n) << sectorShift}
	if e.flags&extZero != 0 {
		k.Flags = ondisk.KeyZero
	}
	return k
}

// TestOverwritten: a key is known to be overwritten once all of it is, by whatever
// keys, and for no other reason.
func TestOverwritten(t *testing.T) {
	m := pmem.Heap(ondisk.MinSize)
	formatSmall(t, m, 8, true, 90)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, m, disk, 1)
	write := func(lba int64, sectors int) { r.write(t, lba*sectorSize, make([]byte, sectors*sectorSize)) }
	is := func(k *ondisk.Key, want bool, when string) {
		t.Helper()
		if got := r.stale.has(k); got != want {
			t.Errorf("%s: %t", when, got)
		}
		r.checkOverwritten(t)
	}

	write(100, 8)
	a := r.keyAt(100, 8)
	write(108, 8) // the index has both as one extent
	b := r.keyAt(108, 8)
	is(a, false, "just written")
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	is(a, false, "written back")
	write(96, 8)
	is(a, false, "the first half is overwritten")
	write(104, 2)
	write(106, 3)
	is(a, true, "all of it is overwritten, in three pieces")
	is(b, false, "but one sector")
	r.zero(t, 109*sectorSize, 4*sectorSize)
	write(113, 1)
	is(b, false, "but two sectors")
	write(114, 2)
	is(b, true, "by zeros, too")

	write(300, 8)
	c := r.keyAt(300, 8)
	write(300, 8)
	is(c, true, "overwritten as a whole")

	r.zero(t, 200*sectorSize, 8*sectorSize)
	r.zero(t, 400*sectorSize, 8*sectorSize)
	z := r.keyAt(400, 8)
	write(200, 8)
	is(z, false, "zeros share their place")

	old := r.keyAt(300, 8)
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, m, disk, 1)
	write(300, 8)
	is(old, false, "a key that was there before Open")
	next := r.keyAt(300, 8)
	for next.Seg == old.Seg {
		write(600, stripeSectors-600)
		write(300, 8)
		next = r.keyAt(300, 8)
	}
	write(300, 8)
	is(next, true, "in a segment begun since Open")
	life := r.segments.all[next.Seg].gen.Load()
	for r.segments.all[next.Seg].gen.Load() == life || r.keyAt(300, 8).Seg != next.Seg {
		write(600, stripeSectors-600)
		write(300, 8)
	}
	is(r.keyAt(300, 8), false, "in the segment's next use")
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
