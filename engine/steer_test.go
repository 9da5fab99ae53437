package engine

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// diskWatch is what an outside observer sees at the disk.
type diskWatch struct {
	mu    sync.Mutex
	bytes int64
	last  time.Time
	first time.Time
}

// watchWrites counts what is written to a disk.
func watchWrites(disk *backing.Fake) *diskWatch {
	w := &diskWatch{}
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.bytes += op.Len
			w.last = time.Now()
			if w.first.IsZero() {
				w.first = w.last
			}
		}
		return f
	})
	return w
}

func (w *diskWatch) written() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bytes
}

// when returns the times of the first and of the last write.
func (w *diskWatch) when() (first, last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.first, w.last
}

// steered runs a test of a cache with some settings in fake time, on a disk that is watched.
func steered(t *testing.T, change func(*Settings), test func(t *testing.T, c *Cache, w *diskWatch)) {
	synctest.Test(t, func(t *testing.T) {
		mem := pmem.Heap(ondisk.MinSize)
		formatSmall(t, mem, 24, false, 90)
		disk := backing.NewFake(256<<20, sectorSize, 1)
		defer disk.Close()
		c := open(t, mem, disk)
		set(t, c, change)
		w := watchWrites(disk)
		test(t, c, w)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// fillMiB writes n MiB from off on.
func fillMiB(t *testing.T, c *Cache, off, n int64) {
	t.Helper()
	for i := range n {
		turn(t, c.Queue(0), &Request{Op: Write, Off: (off + i<<20) % c.size, Buf: make([]byte, 1<<20)})
	}
}

// TestIdleAfter: the disk is written to as long after the last write as the setting says, or an
// eighth longer, and with 0 never.
func TestIdleAfter(t *testing.T) {
	for _, after := range []time.Duration{3 * time.Second, 40 * time.Second, 0} {
		steered(t, func(s *Settings) { s.IdleAfter, s.DirtyMaxAge = after, 0 }, func(t *testing.T, c *Cache, w *diskWatch) {
			for range 5 {
				fillMiB(t, c, 0, 1)
				time.Sleep(time.Second)
			}
			last := time.Now().Add(-time.Second)
			time.Sleep(time.Hour)
			_, wrote := w.when()
			if took := wrote.Sub(last); after > 0 && (took < after || took > after+after/idleLooks) || w.written() != int64(min(after, 1))<<20 {
				t.Errorf("idle_after %v: %d bytes were written %v after the last write", after, w.written(), took)
			}
		})
	}
}

// TestDirtyMaxAge: however busy the writer, its data is on the disk when it is that old, and is
// not before it is half as old; with 0 never.
func TestDirtyMaxAge(t *testing.T) {
	for _, age := range []time.Duration{10 * time.Second, 100 * time.Second, 0} {
		steered(t, func(s *Settings) { s.IdleAfter, s.DirtyMaxAge = 0, age }, func(t *testing.T, c *Cache, w *diskWatch) {
			time.Sleep(age / 3) // the looks are not in step with the writer
			begin := time.Now()
			fillMiB(t, c, 0, 1)
			for time.Since(begin) < 200*time.Second {
				time.Sleep(time.Second)
				fillMiB(t, c, 2<<20, 1)
			}
			wrote, _ := w.when()
			if took := wrote.Sub(begin); age == 0 && w.written() > 0 || age > 0 && (took > age || took < age/2) {
				t.Errorf("dirty_max_age %v: first written after %v, %d bytes in all", age, took, w.written())
			}
		})
	}
}

// TestDirtyHighAndLow: nothing is written up to dirty_high; from there on as much as leaves
// dirty_low.
func TestDirtyHighAndLow(t *testing.T) {
	const high, low = 60, 25 // of 24 segments: 14 and 6
	steered(t, func(s *Settings) {
		s.IdleAfter, s.DirtyMaxAge, s.DirtyHigh, s.DirtyLow = 0, 0, high, low
	}, func(t *testing.T, c *Cache, w *diskWatch) {
		const segment = 15 // MiB that fit into one
		dirtyAtBegin := int64(0)
		for i := range int64(14 * 16) {
			fillMiB(t, c, i<<20, 1)
			synctest.Wait()
			if w.written() > 0 {
				dirtyAtBegin = (i + 1) << 20
				break
			}
		}
		s := c.Status()
		if begins := dirtyAtBegin >> 20; begins < (14-3)*segment || begins > 14*16+1 {
			t.Errorf("write-back began with %d MiB dirty", begins)
		}
		if left := s.DirtyBytes >> 20; left < (6-3)*segment || left > (6+1)*16 {
			t.Errorf("it went on to %d MiB", left)
		}
		before := w.written()
		for i := range int64(4 * segment) {
			fillMiB(t, c, i<<20, 1)
			synctest.Wait()
		}
		if more := w.written() - before; more > 0 {
			t.Errorf("%d more bytes were written between low and high", more)
		}
	})
}

// TestWritebackRate: the disk gets what the rate allows and one transfer, while nobody waits; a
// flush gets all at once; a new rate counts at once.
func TestWritebackRate(t *testing.T) {
	const rate = 1 << 20
	steered(t, func(s *Settings) { s.WritebackRate = rate }, func(t *testing.T, c *Cache, w *diskWatch) {
		fillMiB(t, c, 0, 100)
		time.Sleep(2 * time.Second)
		begin, from := time.Now(), w.written()
		for range 20 {
			time.Sleep(2 * time.Second)
			most := int64(time.Since(begin).Seconds()*rate) + transferBytes
			if got := w.written() - from; got > most || got < most-3*transferBytes {
				t.Errorf("%d bytes in %v, at most %d are allowed", got, time.Since(begin), most)
			}
		}
		set(t, c, func(s *Settings) { s.WritebackRate = 4 * rate })
		from = w.written()
		time.Sleep(5 * time.Second)
		if got := w.written() - from; got < 18<<20 || got > 21<<20 {
			t.Errorf("%d bytes in 5 s at 4 MiB/s", got)
		}
		set(t, c, func(s *Settings) { s.WritebackRate = ondisk.MinWritebackRate })
		time.Sleep(20 * time.Second) // it pauses between two transfers
		begin = time.Now()
		if err := c.Flush(context.Background()); err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took > time.Second || w.written() != 100<<20 {
			t.Errorf("a flush took %v, %d bytes are written", took, w.written())
		}
	})
}

// TestWritebackHeld: nothing is written until a flush asks, or writers have no room.
func TestWritebackHeld(t *testing.T) {
	steered(t, func(s *Settings) { s.Writeback, s.GCPercent = false, 40 }, func(t *testing.T, c *Cache, w *diskWatch) {
		fillMiB(t, c, 0, 24*15*8/10) // above all percentages
		time.Sleep(time.Hour)
		if w.written() > 0 {
			t.Errorf("%d bytes were written", w.written())
		}
		if err := c.Flush(context.Background()); err != nil || c.Status().DirtyBytes > 0 {
			t.Errorf("a flush: %v, %d bytes are dirty", err, c.Status().DirtyBytes)
		}
		before := w.written()
		fillMiB(t, c, 0, 10)
		time.Sleep(time.Hour)
		if w.written() > before {
			t.Errorf("%d bytes were written after the flush", w.written()-before)
		}
		set(t, c, func(s *Settings) { s.Writeback = true })
		time.Sleep(2 * time.Second)
		if n := c.Status().DirtyBytes; n > 0 {
			t.Errorf("%d bytes are dirty when it goes on", n)
		}
	})
}

// TestHeldAndFull: a cache that is full has its writers served all the same.
func TestHeldAndFull(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(256<<20, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	set(t, r.Cache, func(s *Settings) { s.Writeback, s.WritebackRate = false, ondisk.MinWritebackRate })
	within(t, "writing more than fits", func() {
		for i := range int64(250) {
			r.write(t, i<<20, make([]byte, 1<<20))
		}
	})
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
