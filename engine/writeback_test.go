package engine

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestYoungestStaysDirty: writers that overwrite the same blocks all the time, and
// fill the cache many times over by that, cost the disk next to nothing, and what
// is dirty is never more than three quarters of what the collector is allowed.
func TestYoungestStaysDirty(t *testing.T) {
	const segments, percent, block, blocks, times = 24, 90, 1 << 20, 16, 40
	const kept = segments * percent / 100 * 3 / 4
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, segments, false, percent)
	disk := backing.NewFake(blocks*block, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	set(t, r.Cache, func(s *Settings) { s.IdleAfter = time.Hour })
	for v := range uint64(times) {
		for i := range int64(blocks) {
			r.write(t, i*block, stamped(i*block/sectorSize, block/sectorSize, 1+v))
		}
	}
	const perSegment = ondisk.SegmentData / block // ksets: each write is one
	within(t, "write-back of all but the youngest", func() {
		for {
			if _, cleaned := r.tails.dirtyTail(); times*blocks-cleaned <= (kept+2)*(perSegment+1) {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	if n := r.writeback.written.Load(); n > 0 {
		t.Errorf("of %d MiB that were overwritten all the time, %d MiB were written to the disk", times*blocks*block>>20, n>>20)
	}
	for lba := int64(0); lba < blocks*block/sectorSize; lba += 97 {
		if v := r.version(t, lba); v != times {
			t.Fatalf("sector %d has version %d", lba, v)
		}
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestDirtyDataExpires: a writer that is never idle, and never makes the cache
// half full, does not keep its data from the disk for more than half a minute.
func TestDirtyDataExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := pmem.Heap(ondisk.MinSize)
		formatSmall(t, mem, 24, false, 90)
		disk := backing.NewFake(1<<20, sectorSize, 1)
		defer disk.Close()
		c := open(t, mem, disk)
		most := c.Settings().DirtyMaxAge
		begin := time.Now()
		for cleaned := uint64(0); cleaned == 0; _, cleaned = c.tails.dirtyTail() {
			if time.Since(begin) > most {
				t.Errorf("nothing was written back in %v", time.Since(begin))
				break
			}
			turn(t, c.Queue(0), &Request{Op: Write, Buf: make([]byte, sectorSize)})
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(begin); took < most/2 {
			t.Errorf("written back after %v, although the writer was not idle", took)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestExpiry(t *testing.T) {
	x := expiry{}
	for _, at := range []struct {
		second        int
		written, want uint64
	}{{100, 5, 0}, {109, 6, 0}, {110, 7, 5}, {119, 8, 5}, {125, 9, 7}, {135, 9, 9}, {1000, 20, 9}} {
		if got, _ := x.expired(time.Unix(int64(at.second), 0), at.written, 20*time.Second); got != at.want {
			t.Errorf("after %d s, %d ksets are old, want %d", at.second, got, at.want)
		}
	}
}

// TestSweepAfterFailedFlush: what a round of a sweep has written is written again
// when the flush after it has failed, also when what was deferred before is tried
// in between.
func TestSweepAfterFailedFlush(t *testing.T) {
	const block, blocks, lba = 1 << 20, 3 * roundBytes >> 20, 100
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 24, false, 90)
	disk := backing.NewFake(blocks*block, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	for i := range int64(blocks) {
		r.write(t, i*block, stamped(i*block/sectorSize, block/sectorSize, 1))
	}
	begin, _ := r.tails.dirtyTail()
	store(t, mem, make([]byte, ondisk.KsetHeaderSize), r.offset(begin))
	refused, flushes := false, 0
	disk.Script(func(op backing.Op) (f backing.Fault) {
		switch {
		case op.Kind == backing.OpFlush:
			if flushes++; flushes == 2 {
				f.Err = syscall.EIO
			}
		case op.Kind == backing.OpWrite && !refused && op.Off <= lba*sectorSize && lba*sectorSize < op.Off+op.Len:
			refused, f.Err = true, syscall.EIO
		}
		return f
	})
	r.Resume()
	within(t, "flushing", func() {
		for r.Flush(t.Context()) != nil {
		}
	})
	if !refused || flushes < 3 {
		t.Errorf("no write was refused (%t), or there were %d flushes of the disk", !refused, flushes)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	crashed := disk.Crash()
	defer crashed.Close()
	p := make([]byte, block)
	for i := range int64(blocks) {
		crashed.ReadAt(p, i*block)
		if v, err := stamp(p[:sectorSize], i*block/sectorSize); v != 1 || err != nil {
			t.Errorf("after a flush the disk has version %d of MiB %d, %v", v, i, err)
		}
	}
}

// TestFailedFlushKeepsDirtyTail: what was written before a flush that failed is
// written again, and only then counts as written.
func TestFailedFlushKeepsDirtyTail(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	var failing atomic.Bool
	failing.Store(true)
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpFlush && failing.Load() {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	data := make([]byte, 1<<20)
	fillStamp(data, 0, 1)
	r.write(t, 0, data)
	before, _ := r.tails.dirtyTail()
	if err := r.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("flush over a failing flush of the disk: %v", err)
	}
	if after, _ := r.tails.dirtyTail(); after != before {
		t.Fatalf("dirty_tail moved from %v to %v", before, after)
	}
	if s := r.Status(); s.State != Degraded {
		t.Errorf("state %q after a failed flush", s.State)
	}
	failing.Store(false)
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := r.Status(); s.State != Healthy || s.DirtyBytes != 0 {
		t.Errorf("state %q with %d dirty bytes after the disk healed", s.State, s.DirtyBytes)
	}
	r.kill()
	got := make([]byte, len(data))
	crashed := disk.Crash()
	defer crashed.Close()
	crashed.ReadAt(got, 0)
	if !bytes.Equal(got, data) {
		t.Error("the disk does not have what the second flush confirmed")
	}
}

// TestKeyLongerThanTransfer: the kernel makes keys of up to 4 MiB.
func TestKeyLongerThanTransfer(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	data := stamped(0, 4<<20/sectorSize, 1)
	r.write(t, 0, data)
	within(t, "a flush", func() {
		if err := r.Flush(context.Background()); err != nil {
			t.Error(err)
		}
	})
	r.kill()
	got := make([]byte, len(data))
	disk.ReadAt(got, 0)
	if !bytes.Equal(got, data) {
		t.Error("the disk does not have what was flushed")
	}
}

// TestPlan: when write-back makes a round, and until when it sleeps.
func TestPlan(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(0, 0).Add(time.Duration(s) * time.Second) }
	const never = -1
	for name, c := range map[string]struct {
		o     outlook
		round bool
		wake  int // never, or a second
		held  bool
	}{
		"nothing dirty":                               {outlook{written: 9, at: 9, until: 9, cleaned: 9}, false, never, false},
		"nothing demanded, writers are busy":          {outlook{written: 9, at: 3, until: 3, cleaned: 3}, false, 20, false},
		"demanded already written":                    {outlook{written: 9, at: 3, until: 2, cleaned: 3}, false, 20, false},
		"demanded":                                    {outlook{written: 9, at: 3, until: 4, cleaned: 3}, true, never, false},
		"demanded more than there is":                 {outlook{written: 9, at: 9, until: 12, cleaned: 9}, false, never, false},
		"all written, dirty_tail behind":              {outlook{written: 9, at: 9, until: 9, cleaned: 7}, true, never, false},
		"some written, dirty_tail behind":             {outlook{written: 9, at: 8, until: 8, cleaned: 7}, true, never, false},
		"dirty_tail behind what is deferred":          {outlook{written: 9, at: 9, until: 9, cleaned: 7, holds: true, retry: true, retryAt: at(15)}, false, 15, false},
		"deferred, due":                               {outlook{written: 9, at: 9, until: 9, cleaned: 7, holds: true, retry: true, retryAt: at(10)}, true, never, false},
		"deferred, due at once":                       {outlook{written: 9, at: 9, until: 9, cleaned: 7, holds: true, retry: true}, true, never, false},
		"deferred, writers idle before it is due":     {outlook{written: 9, at: 3, until: 3, cleaned: 3, holds: true, retry: true, retryAt: at(25)}, false, 20, false},
		"deferred, due before writers are idle":       {outlook{written: 9, at: 3, until: 3, cleaned: 3, holds: true, retry: true, retryAt: at(15)}, false, 15, false},
		"a flush waits, all is on the disk":           {outlook{written: 9, at: 9, until: 9, cleaned: 9, flushing: true}, true, never, false},
		"a flush waits for what is deferred":          {outlook{written: 9, at: 9, until: 9, cleaned: 7, flushing: true, holds: true, retry: true, retryAt: at(15)}, false, 15, false},
		"a flush waits, and not all has been written": {outlook{written: 9, at: 3, until: 9, cleaned: 3, flushing: true}, true, never, false},
		"held":                {outlook{written: 9, at: 3, until: 0, cleaned: 3}, false, never, true},
		"held, a flush waits": {outlook{written: 9, at: 3, until: 9, cleaned: 3, flushing: true}, true, never, true},
	} {
		c.o.now, c.o.lookAt, c.o.look = at(10), at(20), !c.held
		round, wake, ever := c.o.plan()
		if round != c.round || ever != (c.wake != never) || ever && !wake.Equal(at(c.wake)) {
			t.Errorf("%s: round %t, wake at %v, %t", name, round, wake, ever)
		}
	}
}
