package engine

import (
	"math/rand/v2"
	"testing"

	"ublk-pcache/ondisk"
)

// TestTables fills some stripes of one shard with blocks, which makes tables of them,
// takes the tables away in each of the ways, and fills them again. All extents are where
// they should be, and memory that trees do not need any more is given back.
func TestTables(t *testing.T) {
	const stripes = 24
	x := newIndex(stripes * shardCount * ondisk.StripeSize)
	dice := rand.New(rand.NewPCG(1, 0))
	sh := &x.shards[0]
	at := func(stripe int) span { return span{sh: sh, root: uint32(stripe), n: stripeSectors} }
	block := func(stripe, i int) span {
		return span{sh: sh, root: uint32(stripe), off: uint16(i) * blockSectors, n: blockSectors}
	}
	var want [stripes][tableSlots]uint32 // segments, 0 for none
	next := uint32(0)
	set := func(stripe, i int) {
		next++
		want[stripe][i] = next
		block(stripe, i).setLocked(extent{seg: next, pos: 7}, nil)
	}
	check := func(when string, tables int) {
		t.Helper()
		extents, nodes := 0, 0
		for stripe := range stripes {
			e, n := checkStripe(t, &sh.slab, uint32(stripe))
			extents, nodes = extents+e, nodes+n
			var got [tableSlots]uint32
			for _, e := range at(stripe).partsLocked(nil, func(extent) bool { return true }) {
				got[e.off/blockSectors] = e.seg
			}
			if got != want[stripe] {
				t.Fatalf("%s: stripe %d is not what was set", when, stripe)
			}
		}
		if int64(extents) != sh.extents || nodes != sh.slab.used {
			t.Fatalf("%s: %d extents in %d nodes, counted %d in %d", when, extents, nodes, sh.extents, sh.slab.used)
		}
		if len(sh.slab.tables) != tables {
			t.Errorf("%s: %d tables, not %d", when, len(sh.slab.tables), tables)
		}
		if free, most := sh.slab.spare, max(slabNodes, int(sh.slab.class[largest].n)/8); tables == stripes && free > most {
			t.Errorf("%s: %d nodes are free, more than %d", when, free, most)
		}
	}
	fill := func() {
		for _, i := range dice.Perm(stripes * tableSlots) {
			set(i%stripes, i/stripes)
		}
	}
	fill()
	check("filled", stripes)
	if each := float64(sh.slab.bytes()) / float64(sh.extents); each > 10 {
		t.Errorf("%.1f bytes an extent", each)
	}
	for stripe := range stripes {
		i := dice.IntN(tableSlots)
		part := block(stripe, i)
		part.off, part.n = part.off+3, 2
		part.cutLocked(nil)
		if at(stripe).tableLocked() != nil {
			t.Fatal("a table has part of a block")
		}
		set(stripe, i)
	}
	check("cut in part", 0)
	for range 20 { // a shard that had such cuts is slow to make tables
		fill()
	}
	check("filled once more", stripes)
	for _, i := range dice.Perm(stripes * tableSlots)[:stripes*(tableSlots-tableKeeps/2)] {
		want[i%stripes][i/stripes] = 0
		block(i%stripes, i/stripes).cutLocked(nil)
	}
	check("emptied", 0)
	fill()
	check("filled again", stripes)
}
