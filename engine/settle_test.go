package engine

import (
	"bytes"
	"errors"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// failingFile is a region in the page cache of a file whose disk fails now and
// then. A sync that fails is reported once, and leaves its pages clean and
// unwritten: they can be read until they are evicted. As on ext4 such a page is
// lost for good, whatever is stored to it later, unless it is settled or evicted.
// It outlives those who open it.
type failingFile struct {
	*pmem.Region // what can be read
	fails        atomic.Bool
	slow         atomic.Int64 // nanoseconds a sync takes
	syncing      atomic.Int32
	overlapped   atomic.Bool // two syncs were under way at once
	mu           struct {
		sync.Mutex
		file  map[int64][]byte // what the file has, of the pages that differ or may
		dirty map[int64]bool   // that the next sync writes
		lost  map[int64]bool   // that one before did not
		off   bool             // the power is off
	}
}

func newFailingFile() *failingFile {
	m := &failingFile{Region: pmem.Heap(ondisk.MinSize)}
	m.mu.file, m.mu.dirty, m.mu.lost = map[int64][]byte{}, map[int64]bool{}, map[int64]bool{}
	return m
}

func (m *failingFile) Durable() bool { return false }

func (m *failingFile) noteLocked(off, n int64) {
	for p := off / pageSize; p*pageSize < off+n; p++ {
		if m.mu.file[p] == nil {
			m.mu.file[p] = make([]byte, pageSize)
			m.Region.ReadAt(m.mu.file[p], p*pageSize)
		}
		m.mu.dirty[p] = true
	}
}

func (m *failingFile) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.off {
		return len(p), nil
	}
	m.noteLocked(off, int64(len(p)))
	return m.Region.WriteAt(p, off)
}

func (m *failingFile) Zero(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.off {
		return nil
	}
	m.noteLocked(off, n)
	return m.Region.Zero(off, n)
}

func (m *failingFile) Sync() error {
	if m.syncing.Add(1) > 1 {
		m.overlapped.Store(true)
	}
	defer m.syncing.Add(-1)
	time.Sleep(time.Duration(m.slow.Load())) // as long as a disk takes at least
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.off {
		return errPowerOff
	}
	for p := range m.mu.dirty {
		if m.fails.Load() {
			m.mu.lost[p] = true
		} else if !m.mu.lost[p] {
			delete(m.mu.file, p)
		}
	}
	failed := m.fails.Load() && len(m.mu.dirty) > 0
	clear(m.mu.dirty)
	if failed {
		return syscall.EIO
	}
	return nil
}

func (m *failingFile) Settle(ranges iter.Seq2[int64, int64]) error {
	m.Sync()
	m.mu.Lock()
	for off, n := range ranges {
		for p := off / pageSize; p*pageSize < off+n; p++ {
			if m.fails.Load() {
				m.mu.Unlock()
				return syscall.EIO
			}
			delete(m.mu.file, p)
			delete(m.mu.lost, p)
		}
	}
	m.mu.Unlock()
	m.evict(func(int64) bool { return true })
	return nil
}

// evict has memory too short for the pages that are clean and that some says.
func (m *failingFile) evict(some func(page int64) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range slices.Sorted(maps.Keys(m.mu.file)) {
		if !m.mu.dirty[p] && some(p) {
			m.Region.WriteAt(m.mu.file[p], p*pageSize)
			delete(m.mu.file, p)
			delete(m.mu.lost, p)
		}
	}
}

// die has a server die at once, without a last sync.
func (m *failingFile) die(r *rig) {
	r.leave()
	m.mu.Lock()
	m.mu.off = true
	m.mu.Unlock()
	r.Close()
	m.mu.Lock()
	m.mu.off = false
	m.mu.Unlock()
}

// cut cuts the power under a server: dirty pages that keep says are written, and
// nothing else.
func (m *failingFile) cut(r *rig, keep func(page int64) bool) {
	m.die(r)
	m.mu.Lock()
	for p := range m.mu.dirty {
		if keep(p) && !m.mu.lost[p] {
			delete(m.mu.file, p)
		}
	}
	clear(m.mu.dirty)
	m.mu.Unlock()
	m.evict(func(int64) bool { return true })
}

// deadDisk makes a disk that takes nothing, so that all stays dirty.
func deadDisk(t *testing.T) *backing.Fake {
	disk := backing.NewFake(64<<20, 512, 1)
	t.Cleanup(func() { disk.Close() })
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind != backing.OpRead {
			f.Err = syscall.EIO
		}
		return f
	})
	return disk
}

// TestFailedSyncIsNotForgotten: a sync fails, the server dies, and the next one is
// told of nothing. What it acknowledges a flush for is durable, and nothing that
// the page cache still had is lost.
func TestFailedSyncIsNotForgotten(t *testing.T) {
	for _, crc := range []bool{false, true} {
		disk := deadDisk(t)
		m := newFailingFile()
		formatSmall(t, m, 8, crc, 70)
		m.Sync()
		r := newRig(t, m, disk, 1)
		want := map[int64]uint64{}
		write := func(from, to int64, version uint64) {
			for i := from; i < to; i++ {
				r.write(t, i<<16, stamped(i<<7, 128, version))
				want[i<<7], want[i<<7+127] = version, version
			}
		}
		check := func(when string) {
			t.Helper()
			for lba, version := range want {
				if v := r.version(t, lba); v != version {
					t.Errorf("crc %t, %s: sector %d has version %d, want %d", crc, when, lba, v, version)
					return
				}
			}
		}
		write(0, 40, 1)
		r.flush(t)
		m.fails.Store(true)
		write(20, 60, 2)
		if err := r.do(0, &Request{Op: Zero, Off: 50 << 16, Len: 1 << 16}); err != nil {
			t.Fatal(err)
		}
		want[50<<7], want[50<<7+127] = 0, 0
		if err := r.do(0, &Request{Op: Flush}); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a flush to a file that fails: %v", err)
		}
		check("after the sync failed")
		r.kill()
		for range 2 {
			if again, err := openRig(m, disk, 1); !errors.Is(err, syscall.EIO) {
				again.kill()
				t.Fatalf("opened on a file that still fails: %v", err)
			}
		}
		m.fails.Store(false)
		r = newRig(t, m, disk, 1)
		check("opened again")
		if s := r.Status(); s.State == Failed {
			t.Errorf("opened again: %v, %s", s.State, s.Error)
		}
		write(55, 70, 3)
		r.flush(t)
		m.cut(r, func(int64) bool { return false })
		r = newRig(t, m, disk, 1)
		check("after a flush and a power cut")
		r.kill()
	}
}

// TestMarkDoesNotPassAFailedSync: the last sync of a cache that is closed covers
// nothing that one before has lost.
func TestMarkDoesNotPassAFailedSync(t *testing.T) {
	m := newFailingFile()
	formatSmall(t, m, 8, true, 70)
	m.Sync()
	r := newRig(t, m, deadDisk(t), 1)
	r.write(t, 0, stamped(0, 8, 1))
	m.fails.Store(true)
	r.do(0, &Request{Op: Flush})
	m.fails.Store(false)
	if err := r.do(0, &Request{Op: Flush}); !errors.Is(err, syscall.EIO) {
		t.Errorf("a second flush: %v", err)
	}
	if err := r.kill(); !errors.Is(err, syscall.EIO) {
		t.Errorf("closed: %v", err)
	}
	l, err := ondisk.ReadLayout(m, m.Size())
	if err != nil {
		t.Fatal(err)
	}
	if last := r.journal.last(); !ondisk.SeqAfter(last, l.SyncMark) {
		t.Errorf("the sync mark is %d, and kset %d was lost", l.SyncMark, last)
	}
}

// TestNothingRestsOnAFailedSync: whichever sync fails, the cache has failed, and
// write-back does not write what the log may have lost.
func TestNothingRestsOnAFailedSync(t *testing.T) {
	m := newFailingFile()
	formatSmall(t, m, 8, true, 70)
	m.Sync()
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, m, disk, 1)
	r.mustRest(t)
	r.write(t, 0, stamped(0, 8, 1))
	m.fails.Store(true)
	if err := r.do(0, &Request{Op: Flush}); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush that could not sync: %v", err)
	}
	m.fails.Store(false)
	if s := r.Status(); s.State != Failed {
		t.Errorf("%v after a failed sync", s.State)
	}
	r.Resume()
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush that rests on a sync that failed: %v", err)
	}
	p := make([]byte, 8*sectorSize)
	if disk.ReadAt(p, 0); !bytes.Equal(p, make([]byte, len(p))) {
		t.Error("the disk was written to")
	}
	r.kill()
	r = newRig(t, m, disk, 1)
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if v := r.version(t, 0); v != 1 {
		t.Errorf("version %d after that", v)
	}
	r.kill()
}

// TestSyncsTakeTurns: a failure is reported to one of those who sync at the same
// time, and the others would take theirs for good.
func TestSyncsTakeTurns(t *testing.T) {
	m := newFailingFile()
	formatSmall(t, m, 8, true, 70)
	m.Sync()
	m.slow.Store(int64(100 * time.Microsecond))
	r := newRig(t, m, deadDisk(t), 2)
	var done sync.WaitGroup
	for q := range 2 {
		done.Go(func() {
			for i := range int64(50) {
				r.do(q, &Request{Op: Write, Off: i << 12, Buf: stamped(i<<3, 8, 1)})
				r.do(q, &Request{Op: Flush})
			}
		})
	}
	for i := range 50 {
		if err := r.setGC(50 + i%20); err != nil {
			t.Error(err)
		}
	}
	done.Wait()
	r.kill()
	if m.overlapped.Load() {
		t.Error("two syncs at once")
	}
}

// TestLogWithoutMark: nothing tells which part of a log that has no sync mark was
// ever synced, so all of it is made durable before anything is acknowledged.
func TestLogWithoutMark(t *testing.T) {
	disk := deadDisk(t)
	m := newFailingFile()
	formatSmall(t, m.Region, 8, true, 70)
	r := newRig(t, benchMemory{m.Region}, disk, 1) // which leaves no mark
	for i := range int64(300) {
		r.write(t, i<<16, stamped(i<<7, 128, 1))
	}
	r.kill()
	if l, err := ondisk.ReadLayout(m, m.Size()); err != nil || l.SyncMark != 0 {
		t.Fatalf("sync mark %d, %v", l.SyncMark, err)
	}
	// All of it was copied to a file whose disk has failed meanwhile.
	for p := int64(0); p < 9*ondisk.SegmentSize/pageSize; p++ {
		m.mu.file[p], m.mu.lost[p] = make([]byte, pageSize), true
	}
	r = newRig(t, m, disk, 1)
	r.flush(t)
	m.cut(r, func(int64) bool { return false })
	r = newRig(t, m, disk, 1)
	for i := range int64(300) {
		if v := r.version(t, i<<7); v != 1 {
			t.Errorf("sector %d has version %d", i<<7, v)
			break
		}
	}
	r.kill()
}

// TestSettlesBehindTheMark: what opening costs depends on what was stored since the
// last flush, not on how long the log is.
func TestSettlesBehindTheMark(t *testing.T) {
	m := &settled{failingFile: newFailingFile()}
	formatSmall(t, m, 8, true, 70)
	r := newRig(t, m, deadDisk(t), 1)
	for i := range int64(500) {
		r.write(t, i<<16, stamped(i<<7, 128, 1))
	}
	r.flush(t)
	if _, err := r.Rest(t.Context()); err != nil { // a round of write-back would sync
		t.Fatal(err)
	}
	for i := range int64(3) {
		r.write(t, i<<16, stamped(i<<7, 128, 2))
	}
	for range 1000 { // all of them name the same zeros, or those of the segment before
		if err := r.do(0, &Request{Op: Zero, Off: 40 << 20, Len: 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	last := r.journal.last()
	m.die(r)
	m.bytes = 0
	r = newRig(t, m, deadDisk(t), 1)
	least, most := int64(3<<16+zeroRunMin), int64(ondisk.SegmentsOff+4<<16+2<<20+1003*64+8*pageSize)
	if m.bytes < least || m.bytes > most {
		t.Errorf("settled %d bytes, not between %d and %d", m.bytes, least, most)
	}
	if r.journal.last() != last {
		t.Errorf("the log ends with %d, not %d", r.journal.last(), last)
	}
	r.kill()
}

// settled counts what is settled.
type settled struct {
	*failingFile
	bytes int64
}

func (m *settled) Settle(ranges iter.Seq2[int64, int64]) error {
	for _, n := range ranges {
		m.bytes += n
	}
	return m.failingFile.Settle(ranges)
}

// TestFailingFile lets syncs fail at random moments, memory be short, servers die
// and the power be cut. What a flush was acknowledged for is there. What was
// acknowledged without is there, too, unless the power was cut, or memory was
// short after a failure.
func TestFailingFile(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	dice := rand.New(rand.NewPCG(seed, 0))
	disk := backing.NewFake(32<<20, 512, seed)
	m := newFailingFile()
	formatSmall(t, m, 8, true, 70)
	m.Sync()
	const sectors = 512
	var flushed, newest [sectors]uint64
	version, failures, refused := uint64(0), 0, 0
	for range 60 {
		m.fails.Store(dice.IntN(4) == 0)
		r, err := openRig(m, disk, 1)
		if err != nil {
			if !m.fails.Load() {
				t.Fatal(err)
			}
			refused++
			m.fails.Store(false)
			r = newRig(t, m, disk, 1)
		}
		for lba := range int64(sectors) {
			v := r.version(t, lba)
			if v < flushed[lba] || v > newest[lba] {
				t.Fatalf("sector %d: version %d, flushed %d, written %d", lba, v, flushed[lba], newest[lba])
			}
			flushed[lba], newest[lba] = v, v
		}
		for range dice.IntN(5) {
			m.fails.Store(dice.IntN(4) == 0)
			failed := false
			for range dice.IntN(200) {
				lba := dice.Int64N(sectors)
				version++
				if err := r.do(0, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, 1, version)}); err != nil {
					failed = true
					break
				}
				newest[lba] = version
			}
			switch dice.IntN(4) {
			case 0:
				failed = r.Flush(t.Context()) != nil || failed
			case 1, 2:
				if err := r.do(0, &Request{Op: Flush}); err == nil {
					flushed = newest
				} else {
					failed = true
				}
			}
			if failed {
				failures++
				break
			}
		}
		short, power := dice.IntN(3) == 0, dice.IntN(4) == 0
		if power {
			survivors := dice.IntN(101)
			m.cut(r, func(int64) bool { return dice.IntN(100) < survivors })
			next := disk.Crash()
			disk.Close()
			disk = next
			continue
		}
		if dice.IntN(2) == 0 {
			m.die(r)
		} else {
			r.kill()
		}
		if short {
			evicted := dice.IntN(101)
			m.evict(func(int64) bool { return dice.IntN(100) < evicted })
			continue
		}
		flushed = newest // the next one finds all of it
	}
	disk.Close()
	t.Logf("%d failures, %d times refused", failures, refused)
}
