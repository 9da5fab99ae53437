package engine

import (
	"math/rand/v2"
	"slices"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestBulkLoad: keys that are loaded in bulk, more of them than all loaders hold at once,
// make the index that they make one after the other.
func TestBulkLoad(t *testing.T) {
	const stripes, sectors = 600, 1024
	seed := rand.Uint64()
	dice := rand.New(rand.NewPCG(seed, 0))
	parallel, plain := newIndex(stripes*ondisk.StripeSize), newIndex(stripes*ondisk.StripeSize)
	var load bulkLoad
	for i := range uint32(20 * bulkBatch) {
		lba := dice.Int64N(stripes)*stripeSectors + dice.Int64N(sectors)
		n := 1 + dice.IntN(64)
		p := placed{e: extent{seg: i}, dead: dice.IntN(8) == 0}
		p.s = parallel.span(lba, n)
		load.add(&ondisk.Key{Off: uint64(lba * sectorSize)}, p)
		p.s = plain.span(lba, n)
		enterAll([]placed{p})
	}
	load.finish()
	if got, want := parallel.all(), plain.all(); !slices.Equal(got, want) {
		t.Fatalf("seed %d: there are %d extents, which are not the %d that there should be", seed, len(got), len(want))
	}
}

// TestReplayInOrder replays a log in which every sector was written dozens of
// times, in writes that overlap.
func TestReplayInOrder(t *testing.T) {
	const sectors, stripes, writes = 256, 6, 16_000
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 16, false, 90)
	disk := backing.NewFake(stripes*ondisk.StripeSize, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	seed := rand.Uint64()
	dice := rand.New(rand.NewPCG(seed, 0))
	var want [stripes][sectors]uint64
	for i := uint64(1); i <= writes; {
		var batch []func() error
		for range 64 {
			stripe, from := dice.IntN(stripes), dice.IntN(sectors)
			n := 1 + dice.IntN(min(8, sectors-from))
			lba := int64(stripe*stripeSectors + from)
			batch = append(batch, r.begin(0, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, n, i)}))
			for s := from; s < from+n; s++ {
				want[stripe][s] = i
			}
			i++
		}
		for _, wait := range batch {
			if err := wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, mem, disk, 1)
	for stripe := range want {
		for s, version := range want[stripe] {
			if got := r.version(t, int64(stripe*stripeSectors+s)); got != version {
				t.Fatalf("seed %d: sector %d of stripe %d has version %d, not %d", seed, s, stripe, got, version)
			}
		}
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
