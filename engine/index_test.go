package engine

import (
	"math/bits"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"ublk-pcache/ondisk"
)

// checkStripe walks the whole tree of a stripe, or its table, and fails on a broken
// invariant.
func checkStripe(t interface{ Fatalf(string, ...any) }, s *slab, stripe uint32) (extents, nodes int) {
	root := s.roots[stripe]
	if classOf(root) == tableClass {
		tab := &s.tables[indexOf(root)]
		for i, v := range tab.slots {
			if v == 0 {
				continue
			}
			if extents++; slotOf(v.extent(i)) != v {
				t.Fatalf("slot %d has %x", i, v)
			}
		}
		if tab.stripe != stripe || int(tab.n) != extents || extents == 0 {
			t.Fatalf("the table of stripe %d is one of stripe %d with %d slots in use, of which %d are", stripe, tab.stripe, tab.n, extents)
		}
		return extents, 0
	}
	last, leafDepth := -1, -1
	var walk func(id uint32, depth, lo, hi int)
	walk = func(id uint32, depth, lo, hi int) {
		nd := s.at(id)
		nodes++
		if nd.n() == 0 {
			t.Fatalf("empty node")
		}
		if nd[0].seg != stripe {
			t.Fatalf("node of stripe %d in the tree of %d", nd[0].seg, stripe)
		}
		if k := classOf(id); id != root && k != largest || nd.n() > capacity[k] || id == root && k > 0 && nd.n() == 1 {
			t.Fatalf("node of class %d with %d entries", k, nd.n())
		}
		if !nd.inner() {
			if leafDepth == -1 {
				leafDepth = depth
			} else if leafDepth != depth {
				t.Fatalf("leaves at depths %d and %d", leafDepth, depth)
			}
		}
		for i, e := range nd.entries() {
			if nd.inner() {
				l, h := lo, hi
				if i > 0 {
					l = int(e.off)
				}
				if i+1 < nd.n() {
					h = int(nd.at(i + 1).off)
				}
				if l >= h {
					t.Fatalf("separators out of order: %d >= %d", l, h)
				}
				walk(e.seg, depth+1, l, h)
				continue
			}
			extents++
			if int(e.off) < lo || int(e.off) >= hi {
				t.Fatalf("extent at %d outside its separators [%d,%d)", e.off, lo, hi)
			}
			if e.n == 0 || int(e.off) < last {
				t.Fatalf("extent [%d,+%d) begins before %d", e.off, e.n, last)
			}
			last = int(e.end())
		}
	}
	if root != 0 {
		walk(root, 0, 0, 1<<16)
	}
	return extents, nodes
}

// TestIndexAgainstArray drives three stripes of one shard with random sets,
// cuts, forgets and cleans, mirrored in plain arrays with one entry per sector.
func TestIndexAgainstArray(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const stripes = 3
		x := newIndex(stripes * shardCount * ondisk.StripeSize)
		at := func(stripe int) int64 { return int64(stripe) * shardCount * stripeSectors }
		type sector struct {
			seg   uint32
			pos   uint16
			flags uint16
			set   bool
		}
		var models [stripes][stripeSectors]sector
		grain := rapid.SampledFrom([]int{1, 1, 8, 64}).Draw(t, "grain")
		maxLen := rapid.SampledFrom([]int{1, 4, 64, 2048}).Draw(t, "maxLen")
		var next uint32
		const ops, prefilled = 600, 8 // keys, four to a segment
		var stale staleSectors
		stale.init((prefilled+8+ops)/4 + 1)
		for seg := range stale.of {
			stale.begin(uint32(seg))
		}
		type place struct {
			seg uint32
			pos uint16
		}
		lost := map[place]bool{}
		// Every second sector makes a tree of three levels.
		if rapid.Bool().Draw(t, "deep") {
			for i := 0; i < stripeSectors; i += 2 {
				s := x.span(at(0)+int64(i), 1)
				s.setLocked(extent{seg: 1, pos: s.off}, nil)
				models[0][i] = sector{1, s.off, 0, true}
			}
			next = prefilled
		}
		// All blocks make a table, soon.
		if rapid.Bool().Draw(t, "dense") {
			for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(tableSlots) {
				s := x.span(at(1)+int64(i)*blockSectors, blockSectors)
				s.setLocked(extent{seg: uint32(i%2) + 2, pos: s.off, flags: extDirty}, nil)
				for j := s.off; j < s.end(); j++ {
					models[1][j] = sector{uint32(i%2) + 2, j, extDirty, true}
				}
			}
			if x.span(at(1), 1).tableLocked() == nil {
				t.Fatalf("a stripe of %d blocks has no table", tableSlots)
			}
			next = prefilled + 8
		}
		// Mostly one of a segment that is there.
		segment := func(there sector) uint32 {
			if there.set && rapid.IntRange(0, 3).Draw(t, "hit") > 0 {
				return there.seg
			}
			return uint32(rapid.IntRange(0, int(next/4)).Draw(t, "seg"))
		}
		for range rapid.IntRange(1, ops).Draw(t, "ops") {
			stripe := rapid.IntRange(0, stripes-1).Draw(t, "stripe")
			model := &models[stripe]
			off := rapid.IntRange(0, (stripeSectors-1)/grain).Draw(t, "at") * grain
			n := min(rapid.IntRange(1, maxLen).Draw(t, "len")*grain, stripeSectors-off)
			s := x.span(at(stripe)+int64(off), n)
			switch rapid.IntRange(0, 10).Draw(t, "op") {
			default:
				e := extent{seg: next / 4, pos: s.off, flags: rapid.SampledFrom([]uint16{0, extDirty, extZero, extZero | extDirty}).Draw(t, "state")}
				next++
				s.sh.Lock()
				s.setLocked(e, &stale)
				s.sh.Unlock()
				for i := s.off; i < s.end(); i++ {
					if old := model[i]; old.set && old.flags&extZero == 0 {
						lost[place{old.seg, old.pos}] = true
					}
					model[i] = sector{e.seg, e.pos + i - s.off, e.flags, true}
				}
			case 0, 1:
				s.sh.Lock()
				s.cutLocked(nil)
				s.sh.Unlock()
				for i := s.off; i < s.end(); i++ {
					model[i] = sector{}
				}
			case 2, 3:
				seg := segment(model[off])
				x.forget(s, s.place(seg, s.off), nil)
				for i := s.off; i < s.end(); i++ {
					if model[i].set && model[i].seg == seg && model[i].flags&extDirty == 0 {
						model[i] = sector{}
					}
				}
			case 4:
				seg := segment(model[off])
				x.clean(s, s.place(seg, s.off), nil)
				for i := s.off; i < s.end(); i++ {
					if model[i].seg == seg {
						model[i].flags &^= extDirty
					}
				}
			case 6:
				s.toggle()
			case 5:
				fetchNodes([]span{s, x.span(at(stripe), stripeSectors), x.span(at((stripe+1)%stripes), 1), s})
			}
		}
		sh := x.span(0, 1).sh
		var count [3]int64
		extents, nodes := 0, 0
		for stripe := range stripes {
			model := &models[stripe]
			s := x.span(at(stripe), stripeSectors)
			e, n := checkStripe(t, &sh.slab, s.root)
			extents, nodes = extents+e, nodes+n
			var got [stripeSectors]sector
			var prev extent
			for _, e := range s.partsLocked(nil, func(extent) bool { return true }) {
				if prev.n > 0 && prev.abuts(e) {
					t.Fatalf("%+v and %+v are not joined", prev, e)
				}
				prev = e
				flags := e.flags &^ extHit
				switch flags {
				case extZero:
				case extZero | extDirty:
					count[2] += int64(e.n)
				default:
					count[flags] += int64(e.n)
				}
				for i := range e.n {
					got[e.off+i] = sector{e.seg, e.pos + i, flags, true}
				}
			}
			for i := range got {
				if got[i] != model[i] {
					t.Fatalf("sector %d: %+v, want %+v", i, got[i], model[i])
				}
			}
			for i := 0; i < stripeSectors; i += 61 {
				here := x.span(at(stripe)+int64(i), 1)
				v := here.hitLocked()
				if (sector{v.seg(), v.pos(), v.flags() &^ extHit, v != 0}) != model[i] {
					t.Fatalf("sector %d is covered by %#x, want %+v", i, v, model[i])
				}
				if v != 0 && here.partsLocked(nil, func(e extent) bool { return e.flags&extHit != 0 }) == nil {
					t.Fatalf("sector %d was not hit", i)
				}
				if s.tableLocked() != nil {
					continue
				}
				c := s.seekLocked(uint16(i))
				for c.ok() && int(c.at().off) <= i && int(c.at().end()) <= i {
					t.Fatalf("seek(%d) stopped at %+v", i, *c.at())
				}
				if c.ok() != false && model[i].set && !(int(c.at().off) <= i && i < int(c.at().end())) {
					t.Fatalf("seek(%d) found %+v", i, *c.at())
				}
			}
		}
		if extents != int(sh.extents) || nodes != sh.slab.used {
			t.Fatalf("the trees hold %d extents in %d nodes, counted %d in %d", extents, nodes, sh.extents, sh.slab.used)
		}
		if count != sh.sectors {
			t.Fatalf("counted %v sectors, kept %v", count, sh.sectors)
		}
		told := 0
		for seg := range stale.of {
			for i := range stale.of[seg].Load() {
				told += bits.OnesCount64(stale.of[seg].Load()[i].Load())
			}
		}
		for p := range lost {
			if !stale.has(&ondisk.Key{Seg: p.seg, SegOff: uint32(p.pos) << sectorShift, Len: sectorSize}) {
				t.Fatalf("what was set over %d of segment %d has not been told", p.pos, p.seg)
			}
		}
		if told != len(lost) {
			t.Fatalf("told of %d sectors, %d were set over", told, len(lost))
		}
	})
}

// setAnywhere makes n sectors at lba point anywhere.
func setAnywhere(x *index, dice *rand.Rand, lba int64, n int) {
	s := x.span(lba, n)
	s.setLocked(extent{seg: dice.Uint32N(1 << 20), pos: uint16(dice.IntN(30000)) &^ 1}, nil)
}

// scattered returns an index of random blocks of 4 KiB, so many in each stripe.
func scattered(dice *rand.Rand, perStripe int) *index {
	stripes := int64(1<<19/perStripe + 1)
	x := newIndex(stripes * ondisk.StripeSize)
	for range stripes * int64(perStripe) {
		setAnywhere(x, dice, dice.Int64N(stripes*stripeSectors/8)*8, 8)
	}
	return x
}

// eachStripe visits all stripes.
func eachStripe(x *index, visit func(s span)) {
	for shard := range shardCount {
		for s := range x.stripes(shard) {
			visit(s)
		}
	}
}

// everySecondSector returns an index of which no two extents touch.
func everySecondSector(dice *rand.Rand) *index {
	x := newIndex(1 << 8 * ondisk.StripeSize)
	for i := range int64(1 << 20) {
		setAnywhere(x, dice, i*2, 1)
	}
	return x
}

// costlyIndex is a way of filling and emptying one.
type costlyIndex struct {
	name string
	make func(dice *rand.Rand) (x *index, most int64)
}

// bytesEach returns what an extent costs in it, everything included, and how many extents it
// ever had.
func (c *costlyIndex) bytesEach(dice *rand.Rand) (each float64, most int64) {
	x, most := c.make(dice)
	return float64(x.usage().bytes) / float64(most), most
}

// dense is the way to fill an index that costs least of those that are random.
const dense = "all blocks, in any order"

// costlyIndexes are the ways of filling and emptying an index that cost most, and one that
// costs little. Memory that is free again is kept, so an index is returned with the most
// extents that it ever had.
var costlyIndexes = []costlyIndex{
	{"1 extent in each stripe", func(dice *rand.Rand) (*index, int64) {
		x := newIndex(1 << 20 * ondisk.StripeSize)
		for i := range int64(1 << 20) {
			setAnywhere(x, dice, i*stripeSectors, 8)
		}
		return x, x.usage().extents
	}},
	{"3 in each stripe", func(dice *rand.Rand) (*index, int64) {
		x := newIndex(1 << 18 * ondisk.StripeSize)
		for i := range int64(3 << 18) {
			setAnywhere(x, dice, i/3*stripeSectors+i%3*16, 8)
		}
		return x, x.usage().extents
	}},
	{"43 in each stripe: a root and two leaves", func(dice *rand.Rand) (*index, int64) {
		x := newIndex(1 << 14 * ondisk.StripeSize)
		for _, i := range dice.Perm(43 << 14) {
			setAnywhere(x, dice, int64(i)/43*stripeSectors+int64(i)%43*16, 8)
		}
		return x, x.usage().extents
	}},
	{"random 4 KiB, 5 to a stripe", func(dice *rand.Rand) (*index, int64) {
		x := scattered(dice, 5)
		return x, x.usage().extents
	}},
	{"random 4 KiB, 40 to a stripe", func(dice *rand.Rand) (*index, int64) {
		x := scattered(dice, 40)
		return x, x.usage().extents
	}},
	{"random 4 KiB, 400 to a stripe", func(dice *rand.Rand) (*index, int64) {
		x := scattered(dice, 400)
		return x, x.usage().extents
	}},
	{dense, func(dice *rand.Rand) (*index, int64) {
		x := newIndex(1 << 12 * ondisk.StripeSize)
		for _, i := range dice.Perm(tableSlots << 12) {
			setAnywhere(x, dice, int64(i)*blockSectors, blockSectors)
		}
		return x, x.usage().extents
	}},
	{"every second sector, in order", func(dice *rand.Rand) (*index, int64) {
		x := everySecondSector(dice)
		return x, x.usage().extents
	}},
	{"random 4 KiB, half of them removed again", func(dice *rand.Rand) (*index, int64) {
		x := scattered(dice, 400)
		most := x.usage().extents
		eachStripe(x, func(s span) {
			for _, e := range s.partsLocked(nil, func(extent) bool { return dice.IntN(2) == 0 }) {
				s.sub(e).cutLocked(nil)
			}
		})
		return x, most
	}},
	{"neighbours just too full to be joined", func(dice *rand.Rand) (*index, int64) {
		x := everySecondSector(dice)
		most := x.usage().extents
		eachStripe(x, func(s span) {
			for k, e := range s.partsLocked(nil, func(extent) bool { return true }) {
				if k%41 >= mergeBelow/2+1 {
					s.sub(e).cutLocked(nil)
				}
			}
		})
		return x, most
	}},
}

// TestIndexBytes computes what an extent costs, everything included.
func TestIndexBytes(t *testing.T) {
	dice := rand.New(rand.NewPCG(1, 0))
	for _, c := range costlyIndexes {
		each, most := c.bytesEach(dice)
		t.Logf("%5.1f bytes an extent: %s (%d extents)", each, c.name, most)
		if each > 32 {
			t.Errorf("%s: %.1f bytes an extent", c.name, each)
		}
	}
}
