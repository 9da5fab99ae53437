package engine

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// badBlocks makes the disk refuse all writes and zeroings that touch the
// sectors, until it is scripted otherwise.
func badBlocks(disk *backing.Fake, lba, n int64) {
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind != backing.OpRead && op.Off < (lba+n)*sectorSize && (lba)*sectorSize < op.Off+op.Len {
			f.Err = syscall.EIO
		}
		return f
	})
}

// TestBadSector: one sector that the disk refuses costs nothing but itself. The
// rest is written, the cache can be filled many times over, the sector's data
// is there all the time and after a restart, and on the disk once it is mended.
func TestBadSector(t *testing.T) {
	for _, crc := range []bool{false, true} {
		for _, zero := range []bool{false, true} {
			t.Run(fmt.Sprintf("crc=%t,zero=%t", crc, zero), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { badSector(t, crc, zero) })
			})
		}
	}
}

func badSector(t *testing.T, crc, zero bool) {
	const bad, version = 3000, 5
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, crc, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	disk.WriteAt(stamped(bad-100, 200, 1), (bad-100)*sectorSize)
	badBlocks(disk, bad, 1)
	r := newRig(t, mem, disk, 1)
	r.write(t, (bad-100)*sectorSize, stamped(bad-100, 200, version))
	if zero {
		r.zero(t, (bad-4)*sectorSize, 8*sectorSize)
	}
	r.write(t, 8<<20, stamped(8<<11, 2048, version))
	want := func(lba int64) uint64 {
		if zero && lba >= bad-4 && lba < bad+4 {
			return 0
		}
		return version
	}
	check := func(when string) {
		t.Helper()
		for lba := int64(bad - 100); lba < bad+100; lba++ {
			if v := r.version(t, lba); v != want(lba) {
				t.Fatalf("%s: sector %d has version %d, want %d", when, lba, v, want(lba))
			}
		}
	}
	if err := r.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush of what the disk refuses: %v", err)
	}
	within(t, "writing all but the sector", func() {
		for r.Status().DirtyBytes+r.Status().ZeroBytes > sectorSize {
			time.Sleep(time.Millisecond)
		}
	})
	if s := r.Status(); s.State != Degraded {
		t.Errorf("%v, %q", s.State, s.Error)
	}
	check("before")
	within(t, "filling the cache four times", func() {
		for i := range int64(4 * 6 * 16) {
			off := (16 + i%32) << 20
			r.write(t, off, stamped(off/sectorSize, 2048, uint64(i)))
		}
	})
	check("after")
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, mem, disk, 1)
	check("after a restart")
	disk.Script(nil)
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := r.Status(); s.State != Healthy {
		t.Errorf("%v, %q", s.State, s.Error)
	}
	r.kill()
	p := make([]byte, 200*sectorSize)
	disk.ReadAt(p, (bad-100)*sectorSize)
	for i := range int64(200) {
		if v, err := stamp(p[i*sectorSize:][:sectorSize], bad-100+i); err != nil || v != want(bad-100+i) {
			t.Fatalf("sector %d of the disk: version %d, %v", bad-100+i, v, err)
		}
	}
}

// gate is a region of which one read waits to be let through.
type gate struct {
	*pmem.Fake
	shut          atomic.Bool
	reached, open chan struct{}
}

func (g *gate) ReadAt(p []byte, off int64) (int, error) {
	if g.shut.CompareAndSwap(true, false) {
		close(g.reached)
		<-g.open
	}
	return g.Fake.ReadAt(p, off)
}

// TestFlushDuringRelog: a flush that has begun when dirty_tail passes data that
// is deferred, because that was logged again, does not take it for written.
func TestFlushDuringRelog(t *testing.T) {
	const bad = 3000
	mem := &gate{Fake: pmem.NewFake(ondisk.MinSize), reached: make(chan struct{}), open: make(chan struct{})}
	formatSmall(t, mem, 6, true, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	badBlocks(disk, bad, 1)
	r := newRig(t, mem, disk, 1)
	r.write(t, bad*sectorSize, stamped(bad, 1, 1))
	for i := range int64(4) {
		r.write(t, i<<20, stamped(i<<11, 1, 1))
	}
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a flush of what the disk refuses: %v", err)
	}
	mem.shut.Store(true)
	_, cleaned := r.tails.dirtyTail()
	r.pressWriteback(cleaned)
	<-mem.reached // logging it again begins with its checksum
	flushed := make(chan error)
	go func() { flushed <- r.Flush(t.Context()) }()
	for begun := false; !begun; {
		r.writeback.mu.Lock()
		begun = len(r.writeback.mu.waiters) > 0
		r.writeback.mu.Unlock()
	}
	close(mem.open)
	within(t, "a flush", func() {
		if err := <-flushed; !errors.Is(err, syscall.EIO) {
			t.Errorf("a flush while it was logged again: %v", err)
		}
	})
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestDeferredIsOverwritten: what is deferred and then overwritten is gone, also where
// the new data is at the same address and not deferred.
func TestDeferredIsOverwritten(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	badBlocks(disk, 10, 1)
	r := newRig(t, mem, disk, 1)
	r.write(t, 0, stamped(0, 64, 1))
	r.write(t, 8<<20, stamped(8<<11, 64, 1))
	if err := r.Flush(context.Background()); err == nil {
		t.Error("the disk does not refuse")
	}
	disk.Script(nil)
	r.write(t, 0, stamped(0, 64, 2))
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.kill()
	p := make([]byte, 64*sectorSize)
	disk.ReadAt(p, 0)
	for i := range int64(64) {
		if v, err := stamp(p[i*sectorSize:][:sectorSize], i); v != 2 || err != nil {
			t.Fatalf("sector %d of the disk: version %d, %v", i, v, err)
		}
	}
}

// TestDamageIsLoggedAgain: dirty data that is damaged does not become good by
// being logged again, nor does it hold the cache.
func TestDamageIsLoggedAgain(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, true, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.write(t, 0, stamped(0, 256, 1))
	r.write(t, 100*sectorSize, stamped(100, 8, 2)) // what is left of the first piece is not all of it
	spoil(t, r, 20)
	within(t, "filling the cache four times", func() {
		for i := range int64(4 * 6 * 16) {
			off := (16 + i%32) << 20
			r.write(t, off, stamped(off/sectorSize, 2048, uint64(i)))
		}
	})
	for _, when := range []string{"after", "after a restart"} {
		for lba, damaged := range map[int64]bool{0: true, 20: true, 100: false, 107: false, 108: true, 127: true, 128: false, 255: false} {
			err := r.do(0, &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, sectorSize)})
			if damaged != errors.Is(err, ErrDamaged) {
				t.Errorf("%s: sector %d: %v", when, lba, err)
			}
		}
		if err := r.kill(); err != nil {
			t.Fatal(err)
		}
		r = newRig(t, mem, disk, 1)
	}
	r.write(t, 0, stamped(0, 128, 3))
	if err := r.Flush(context.Background()); err != nil {
		t.Error(err)
	}
	r.kill()
}

// TestDamageSurvivesKill: data that was damaged when it was logged again is not
// taken for data that a power cut has torn. What was written behind it is there.
func TestDamageSurvivesKill(t *testing.T) {
	m := newPageCache()
	formatSmall(t, m, 6, true, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, m, disk, 1)
	r.mustRest(t)
	r.write(t, 0, stamped(0, 128, 1))
	spoil(t, r, 20)
	within(t, "filling the cache four times", func() {
		for i := range int64(4 * 6 * 16) {
			off := (16 + i%32) << 20
			r.write(t, off, stamped(off/sectorSize, 2048, uint64(i)))
		}
	})
	r.write(t, 1<<20, stamped(1<<11, 8, 7))
	after := m.cut(func(int64) bool { return true })
	r.kill()
	r = newRig(t, after, disk, 1)
	if v := r.version(t, 1<<11); v != 7 {
		t.Errorf("the last write is gone: version %d", v)
	}
	if err := r.do(0, &Request{Op: Read, Buf: make([]byte, sectorSize)}); !errors.Is(err, ErrDamaged) {
		t.Errorf("the damaged data: %v", err)
	}
	r.kill()
}

// TestRetryOverwritten: what is overwritten while it is about to be written once
// more must not come to the disk behind what overwrote it.
func TestRetryOverwritten(t *testing.T) {
	const pieces, rounds = 1000, 40
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 90)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	want := make([]uint64, pieces)
	write := func(i int) {
		want[i]++
		lba := int64(2 * i) // no two are neighbours
		r.write(t, lba*sectorSize, stamped(lba, 1, want[i]))
	}
	for round := range rounds {
		badBlocks(disk, 0, 2*pieces)
		for i := range pieces {
			write(i)
		}
		if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a flush to a disk that refuses: %v", err)
		}
		// Up to the first transfer: another write would make up for a mistake.
		var writing atomic.Bool
		disk.Script(func(op backing.Op) backing.Fault {
			if op.Kind == backing.OpWrite {
				writing.Store(true)
			}
			return backing.Fault{}
		})
		flushed := make(chan error, 1)
		var ended atomic.Bool // it has nothing to write if all was overwritten while it looked
		go func() {
			err := r.Flush(t.Context())
			ended.Store(true)
			flushed <- err
		}()
		for i := 0; !writing.Load() && !ended.Load(); i++ {
			write(i % pieces)
		}
		if err := errors.Join(<-flushed, r.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
		for i, version := range want {
			p := make([]byte, sectorSize)
			disk.ReadAt(p, int64(2*i*sectorSize))
			if v, err := stamp(p, int64(2*i)); v != version || err != nil {
				t.Fatalf("round %d: after a flush the disk has version %d of sector %d, %v, not %d", round, v, 2*i, err, version)
			}
		}
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestRestIsNoReason breaks a retry off: what was deferred has not been written for
// the reason it had before, and a flush says so.
func TestRestIsNoReason(t *testing.T) {
	disk := backing.NewFake(changedDisk, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, formatted(t, false), disk, 1)
	badBlocks(disk, elsewhere/sectorSize, 1)
	r.write(t, elsewhere, filled(1))
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a flush to a disk that refuses: %v", err)
	}
	disk.Script(func(op backing.Op) backing.Fault {
		return backing.Fault{Hold: op.Kind == backing.OpWrite}
	})
	flushed := make(chan error, 1)
	go func() { flushed <- r.Flush(t.Context()) }()
	held(t, disk, 1)
	rested := make(chan struct{})
	go func() {
		defer close(rested)
		r.mustRest(t)
	}()
	within(t, "being told to rest", func() { <-r.workers.stop })
	disk.Release()
	within(t, "resting", func() { <-rested })
	badBlocks(disk, elsewhere/sectorSize, 1)
	for _, d := range r.writeback.deferred {
		if !errors.Is(d.err, syscall.EIO) {
			t.Errorf("deferred because of %v", d.err)
		}
	}
	if len(r.writeback.deferred) != 1 {
		t.Errorf("%d parts are deferred", len(r.writeback.deferred))
	}
	r.Resume()
	if err := <-flushed; !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush that a rest has interrupted: %v", err)
	}
	disk.Script(nil)
	r.mustFlush(t)
	r.mustEnd(t)
}

// TestRetryWhileFull: what is deferred is tried again also while writers wait for space
// all the time, each of whom has it looked at.
func TestRetryWhileFull(t *testing.T) {
	const lba = 40
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 7, false, 30)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	var refused atomic.Int64
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite && op.Off <= lba*sectorSize && lba*sectorSize < op.Off+op.Len && refused.Add(1) <= 5 {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	r.write(t, lba*sectorSize, stamped(lba, 1, 1))
	p := make([]byte, sectorSize)
	within(t, "writing what the disk takes by now", func() {
		for v := uint64(1); ; v++ {
			at := int64(1+v%12) << 22
			r.write(t, at, stamped(at/sectorSize, 4096, v))
			disk.ReadAt(p, lba*sectorSize)
			if got, err := stamp(p, lba); got == 1 && err == nil {
				return
			}
		}
	})
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}
