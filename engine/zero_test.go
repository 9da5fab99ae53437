package engine

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func (r *rig) zero(t testing.TB, off int64, n int) {
	t.Helper()
	if err := r.do(0, &Request{Op: Zero, Off: off, Len: n}); err != nil {
		t.Fatal(err)
	}
}

// checkZero fails unless the range reads as zeros and what lies around it as
// the sectors' version 1.
func checkZero(t *testing.T, r *rig, off, n int64) {
	t.Helper()
	for lba := int64(0); lba < r.disk.Size()/sectorSize; lba += 2048 {
		p := r.read(t, lba*sectorSize, 2048*sectorSize)
		for i := range int64(2048) {
			want := uint64(1)
			if at := (lba + i) * sectorSize; at >= off && at < off+n {
				want = 0
			}
			if v, err := stamp(p[i*sectorSize:][:sectorSize], lba+i); err != nil || v != want {
				t.Fatalf("sector %d: version %d, %v, want %d", lba+i, v, err, want)
			}
		}
	}
}

// TestZero: a Zero over many stripes, part of it cached dirty, part clean, part
// not at all, is there at once, after a restart, after a write-back, and on the
// disk alone; and it stores next to nothing.
func TestZero(t *testing.T) {
	for _, crc := range []bool{false, true} {
		mem := pmem.NewFake(ondisk.MinSize)
		formatSmall(t, mem, 8, crc, 70)
		disk := backing.NewFake(32<<20, 512, 1)
		defer disk.Close()
		for off := int64(0); off < disk.Size(); off += 1 << 20 {
			disk.WriteAt(stamped(off/sectorSize, 2048, 1), off)
		}
		r := newRig(t, mem, disk, 1)
		r.write(t, 6<<20, stamped(6<<11, 4096, 1))
		r.read(t, 9<<20, 1<<20)
		const off, n = 3<<20 + 512, 17<<20 + 1024
		disk.Script(func(op backing.Op) (f backing.Fault) {
			if op.Kind == backing.OpZero {
				f.Err = syscall.EIO
			}
			return f
		})
		r.zero(t, off, n)
		checkZero(t, r, off, n)
		if u := r.index.usage(); u.zero != n {
			t.Errorf("%d bytes to be zeroed, want %d", u.zero, n)
		}
		if err := r.kill(); err != nil {
			t.Fatal(err)
		}
		r = newRig(t, mem, disk, 1)
		checkZero(t, r, off, n)
		disk.Script(nil)
		if err := r.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := disk.Counters().BytesZeroed; got < n {
			t.Errorf("%d bytes of the disk were zeroed, want %d", got, n)
		}
		if u := r.index.usage(); u.zero != 0 {
			t.Errorf("%d bytes to be zeroed after a flush", u.zero)
		}
		checkZero(t, r, off, n)
		if err := r.kill(); err != nil {
			t.Fatal(err)
		}
		after := disk.Crash()
		defer after.Close()
		blank := pmem.NewFake(ondisk.MinSize)
		formatSmall(t, blank, 8, crc, 70)
		r = newRig(t, blank, after, 1)
		checkZero(t, r, off, n)
		r.kill()
	}
}

// TestZeroTwice: two Zeros of the same sectors have keys that name the same
// place. Garbage collection of the first must leave the second alone.
func TestZeroTwice(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	flush := func() {
		t.Helper()
		if err := r.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	r.zero(t, 0, 4096)
	flush()
	r.write(t, 0, stamped(0, 8, 1))
	flush()
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpZero {
			f.Err = syscall.EIO
		}
		return f
	})
	r.zero(t, 0, 4096)
	if err := r.setGC(0); err != nil {
		t.Fatal(err)
	}
	within(t, "a collection of all that is clean", func() {
		for done := false; !done; time.Sleep(time.Millisecond) {
			dirty, _ := r.tails.dirtyTail()
			done = r.tails.keyTail() == dirty
		}
	})
	if got := r.read(t, 0, 4096); !bytes.Equal(got, make([]byte, 4096)) {
		t.Error("a Zero is gone although the disk does not have it")
	}
	disk.Script(nil)
	flush()
	r.kill()
	got := make([]byte, 4096)
	if disk.ReadAt(got, 0); !bytes.Equal(got, make([]byte, 4096)) {
		t.Error("the disk does not have the zeros that were flushed")
	}
}

// TestResumeZeros: a queue goes on filling a segment that has nothing but
// zeros, and no checksums yet.
func TestResumeZeros(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.zero(t, 0, 4096)
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, mem, disk, 1)
	r.write(t, 4096, stamped(8, 8, 1))
	if v := r.version(t, 8); v != 1 {
		t.Errorf("version %d", v)
	}
	r.kill()
}

// TestZerosLeaveBlocksWhole: zeros take room in a segment, and whatever its end divides
// after that is still whole blocks of the disk.
func TestZerosLeaveBlocksWhole(t *testing.T) {
	const block = 4096
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(64<<20, block, 1)
	defer disk.Close()
	var refuses atomic.Bool
	refuses.Store(true)
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if refuses.Load() && op.Kind == backing.OpWrite {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	r.zero(t, 48<<20, block)
	for i := range int64(24) { // more than a segment
		r.write(t, i<<20, stamped(i<<11, 2048, 1))
	}
	// What is tried again is not joined with what lies beside it.
	for range 3 {
		if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
			t.Error(err)
		}
	}
	refuses.Store(false)
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}
