package engine

import (
	"errors"
	"testing"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestTooManyQueues: each queue holds a segment open.
func TestTooManyQueues(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 31, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	most := 0
	for n := 1; n < 40; n++ {
		c, err := Open(mem, fakeDisk{disk}, Options{Queues: n, Log: &testLog{}})
		if err == nil {
			c.Close()
			most = n
		} else if !errors.Is(err, ErrOptions) {
			t.Fatal(err)
		}
	}
	if most != MaxQueues(31) || most == 0 {
		t.Errorf("%d queues can be opened, MaxQueues says %d", most, MaxQueues(31))
	}
	for n, want := range []int{0, 0, 0, 0, 0, 1, 2} {
		if got := MaxQueues(n); got != want {
			t.Errorf("MaxQueues(%d) = %d, want %d", n, got, want)
		}
	}
	r := newRig(t, mem, disk, most)
	for q := range most {
		within(t, "a first write", func() {
			if err := r.do(q, &Request{Op: Write, Off: int64(q) << 20, Buf: make([]byte, 512)}); err != nil {
				t.Error(err)
			}
		})
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
