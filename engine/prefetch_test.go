package engine

import (
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestPrefetchOfDeadKeys: a key that does not count any more may be for a place
// that the disk does not have.
func TestPrefetchOfDeadKeys(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	c := open(t, mem, disk)
	defer c.Close()
	sh := &c.index.shards[0]
	sh.Lock()
	for i := int64(0); i < stripeSectors; i += 2 {
		s := c.index.span(i, 1)
		s.setLocked(extent{seg: 1, pos: s.off}, nil)
	}
	sh.Unlock()
	if !sh.large() {
		t.Fatal("the index is too small to be prefetched")
	}
	gen := c.segments.all[1].gen.Load()
	c.prefetchKeys([]ondisk.Key{
		{Off: 0, Len: 512, Seg: 1, Gen: gen},
		{Off: 1 << 40, Len: 512, Seg: 1, Gen: gen + 1},
		{Off: 1 << 20, Len: 512, Seg: 1, Gen: gen},
	}, 0)
}

// TestReadsOfOneTurn: each of many reads that are looked up together gets its own
// data, in a large index, whether one extent has it, several, or none.
func TestReadsOfOneTurn(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 16, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	c := open(t, mem, disk)
	defer c.Close()
	q := c.Queue(0)
	back := make(chan struct{}, 1)
	q.OnWake(func() {
		select {
		case back <- struct{}{}:
		default:
		}
	})
	all := make([]byte, disk.Size())
	fillStamp(all, 0, 1)
	disk.WriteAt(all, 0)
	// Every other sector of the first stripe, and none of the second.
	var reqs []*Request
	for off := int64(0); off < ondisk.StripeSize; off += 2 * sectorSize {
		fillStamp(all[off:off+sectorSize], off/sectorSize, 2)
		reqs = append(reqs, &Request{Op: Write, Off: off, Buf: all[off : off+sectorSize]})
	}
	for len(reqs) > 0 {
		turn(t, q, reqs[:64]...)
		reqs = reqs[64:]
	}
	for first := int64(0); first < ondisk.StripeSize; first += ondisk.StripeSize / 8 {
		left := 0
		for i := range int64(3*readBatch + 1) {
			off, n := (first+i*i*2*sectorSize)%(ondisk.StripeSize-8*sectorSize), int(1+i%3)*sectorSize
			if i%4 == 3 {
				off += ondisk.StripeSize
			}
			q.Submit(&Request{Op: Read, Off: off, Buf: make([]byte, n)})
			left++
		}
		for {
			for _, r := range q.Turn() {
				if r.Err != nil || string(r.Buf) != string(all[r.Off:r.Off+int64(len(r.Buf))]) {
					t.Fatalf("%d bytes at %d: %v, or wrong data", len(r.Buf), r.Off, r.Err)
				}
				left--
			}
			if left == 0 {
				break
			}
			<-back
		}
	}
}
