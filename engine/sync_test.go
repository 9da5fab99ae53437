package engine

import (
	"errors"
	"syscall"
	"testing"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestSyncs: where a fence is not enough, FLUSH and FUA sync, and a failed
// sync is the last word; where it is, they do not.
func TestSyncs(t *testing.T) {
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	requests := func() []*Request {
		return []*Request{
			{Op: Write, Buf: make([]byte, 4096)},
			{Op: Write, Buf: make([]byte, 4096), FUA: true},
			{Op: Flush},
		}
	}
	for _, durable := range []bool{true, false} {
		m := &countingMemory{Region: pmem.Heap(ondisk.MinSize), durable: durable}
		formatSmall(t, m.Region, 8, false, 70)
		r := newRig(t, m, disk, 1)
		r.mustRest(t) // rounds sync as well
		for i, req := range requests() {
			before := m.syncs.Load()
			if err := r.do(0, req); err != nil {
				t.Fatal(err)
			}
			want := int32(0)
			if !durable && i > 0 {
				want = 1
			}
			if n := m.syncs.Load() - before; n != want {
				t.Errorf("durable %t, request %d: %d syncs, want %d", durable, i, n, want)
			}
		}
		if !durable {
			m.fail.Store(true)
			for i, req := range append(requests()[2:], requests()[0]) {
				if err := r.do(0, req); !errors.Is(err, syscall.EIO) {
					t.Errorf("request %d after a failed sync: %v", i, err)
				}
			}
			m.fail.Store(false)
			if err := r.do(0, &Request{Op: Flush}); !errors.Is(err, syscall.EIO) {
				t.Errorf("flush after a failed sync: %v", err)
			}
			r.read(t, 0, 4096)
		}
		r.kill()
	}
}
