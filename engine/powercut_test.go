package engine

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

const pageSize = 4096

// pageCache is a region in the page cache of a file: a page that was written
// since the last sync may or may not survive a power cut, each for itself.
type pageCache struct {
	*pmem.Region
	mu     sync.Mutex
	off    bool             // the power is off: nothing is stored any more
	synced map[int64][]byte // content at the last sync of the pages written since
	onSync func()           // called before each Sync
	power  sync.RWMutex     // read-locked by who reads: a cut changes what is there
}

var errPowerOff = errors.New("the power is off")

func newPageCache() *pageCache {
	return &pageCache{Region: pmem.Heap(ondisk.MinSize), synced: map[int64][]byte{}}
}

func (m *pageCache) noteLocked(off, n int64) {
	for p := off / pageSize; p*pageSize < off+n; p++ {
		if m.synced[p] == nil {
			m.synced[p] = make([]byte, pageSize)
			m.Region.ReadAt(m.synced[p], p*pageSize)
		}
	}
}

func (m *pageCache) Durable() bool { return false }

func (m *pageCache) ReadAt(p []byte, off int64) (int, error) {
	m.power.RLock()
	defer m.power.RUnlock()
	return m.Region.ReadAt(p, off)
}

func (m *pageCache) ReadEach(bufs [][]byte, offs []int64) (int, error) {
	m.power.RLock()
	defer m.power.RUnlock()
	return m.Region.ReadEach(bufs, offs)
}

func (m *pageCache) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return len(p), nil
	}
	m.noteLocked(off, int64(len(p)))
	return m.Region.WriteAt(p, off)
}

func (m *pageCache) Zero(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return nil
	}
	m.noteLocked(off, n)
	return m.Region.Zero(off, n)
}

// Sync fails once the power is off, so that nobody goes on to write to a disk
// whose crash is taken a moment later.
func (m *pageCache) Sync() error {
	m.mu.Lock()
	onSync := m.onSync
	m.mu.Unlock()
	if onSync != nil {
		onSync()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return errPowerOff
	}
	clear(m.synced)
	return nil
}

// cut cuts the power and returns the region as it is found afterwards: of the
// pages written since the last sync those survive that keep says.
func (m *pageCache) cut(keep func(page int64) bool) *pageCache {
	m.power.Lock()
	defer m.power.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range slices.Sorted(maps.Keys(m.synced)) {
		if !keep(p) {
			m.Region.WriteAt(m.synced[p], p*pageSize)
		}
	}
	m.off = true
	return &pageCache{Region: m.Region, synced: map[int64][]byte{}}
}

// cutWhenSyncing keeps what would be found after a power cut while the next
// sync is under way, with just the pages that keep says written.
func (m *pageCache) cutWhenSyncing(disk *backing.Fake, keep func(page int64) bool) (after func() (*pageCache, *backing.Fake)) {
	copied := newPageCache()
	var cut *backing.Fake
	var once sync.Once
	m.mu.Lock() // rounds are syncing
	defer m.mu.Unlock()
	m.onSync = func() {
		once.Do(func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			cut = disk.Crash()
			buf := make([]byte, 1<<20)
			for off := int64(0); off < m.Size(); off += int64(len(buf)) {
				m.Region.ReadAt(buf, off)
				copied.Region.WriteAt(buf, off)
			}
			for p, content := range m.synced {
				if !keep(p) {
					copied.Region.WriteAt(content, p*pageSize)
				}
			}
		})
	}
	return func() (*pageCache, *backing.Fake) { return copied, cut }
}

func (r *rig) flush(t *testing.T) {
	t.Helper()
	if err := r.do(0, &Request{Op: Flush}); err != nil {
		t.Fatal(err)
	}
}

func stamped(lba int64, sectors int, version uint64) []byte {
	p := make([]byte, sectors*sectorSize)
	fillStamp(p, lba, version)
	return p
}

func (r *rig) version(t *testing.T, lba int64) uint64 {
	t.Helper()
	v, err := stamp(r.read(t, lba*sectorSize, sectorSize), lba)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestPowerCutPages: what was flushed is there whichever pages survive, and
// the rest is as if it had never been written, or had all been.
func TestPowerCutPages(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	dice := rand.New(rand.NewPCG(seed, 0))
	disk := backing.NewFake(32<<20, 512, seed)
	m := newPageCache()
	formatSmall(t, m.Region, 8, true, 70)
	// One sector each, so that the log soon has more pages than data has.
	const sectors = 512
	var flushed, newest [sectors]uint64
	version := uint64(0)
	for range 60 {
		r := newRig(t, m, disk, 1)
		for lba := range int64(sectors) {
			v := r.version(t, lba)
			if v < flushed[lba] || v > newest[lba] {
				t.Fatalf("sector %d: version %d, flushed %d, written %d", lba, v, flushed[lba], newest[lba])
			}
			flushed[lba], newest[lba] = v, v
		}
		for range dice.IntN(4) {
			for range dice.IntN(300) {
				lba := dice.Int64N(sectors)
				version++
				r.write(t, lba*sectorSize, stamped(lba, 1, version))
				newest[lba] = version
			}
			switch dice.IntN(4) {
			case 0:
				if err := r.Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
			case 1, 2:
				r.flush(t)
				flushed = newest
			}
		}
		for _, l := range r.loops {
			close(l.quit)
			<-l.ended
		}
		survivors := dice.IntN(101)
		after := m.cut(func(int64) bool { return dice.IntN(100) < survivors })
		next := disk.Crash()
		r.Close()
		m = after
		disk.Close()
		disk = next
	}
	disk.Close()
}

// TestPowerCutTailFirst: a round's new dirty_tail must not be durable before
// what it relies on.
func TestPowerCutTailFirst(t *testing.T) {
	disk := backing.NewFake(256<<20, 512, 1)
	defer func() { disk.Close() }()
	m := newPageCache()
	formatSmall(t, m.Region, 20, true, 70)
	r := newRig(t, m, disk, 1)
	r.write(t, 0, stamped(0, 8, 1))
	for i := int64(1); i < 70; i++ { // more than a round
		r.write(t, i<<20, stamped(i<<11, 2048, 1))
	}
	for i := range uint64(200) { // the next kset is on another page of the log
		r.write(t, 100<<20, stamped(100<<11, 1, i+1))
	}
	r.flush(t)
	r.write(t, 0, stamped(0, 8, 2))
	after := m.cutWhenSyncing(disk, func(p int64) bool { return p == ondisk.CtrlOff/pageSize })
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	disk.Close()
	m, disk = after()
	r = newRig(t, m, disk, 1)
	// 2 if a round of its own accord synced it before the cut.
	if v := r.version(t, 0); v != 1 && v != 2 {
		t.Errorf("version %d, flushed 1", v)
	}
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.kill()
	p := make([]byte, sectorSize)
	disk.ReadAt(p, 0)
	if v, err := stamp(p, 0); v == 0 || err != nil {
		t.Errorf("after a flush of the cache the disk has version %d, %v", v, err)
	}
}

// TestPowerCutOverwrite: the key of an overwrite survives and its data does
// not. What was overwritten had been flushed.
func TestPowerCutOverwrite(t *testing.T) {
	disk := backing.NewFake(32<<20, 512, 1)
	defer disk.Close()
	m := newPageCache()
	formatSmall(t, m.Region, 8, true, 70)
	r := newRig(t, m, disk, 1)
	r.mustRest(t) // or a round would sync the data
	log := r.layout.Offset(0, 0) / pageSize
	r.write(t, 0, stamped(0, 8, 1))
	r.flush(t)
	r.write(t, 0, stamped(0, 8, 2))
	after := m.cut(func(p int64) bool { return p == log })
	r.kill()
	r = newRig(t, after, disk, 1)
	if v := r.version(t, 0); v != 1 {
		t.Errorf("version %d, flushed 1", v)
	}
	r.kill()
}

// TestPowerCutAgain: a kset without its data is dropped, and the segment that
// nothing names any more gets a new generation. If the power is cut at that
// moment, and the kset is there again, it must not be taken for one that died of
// old age, which would hide what it was to overwrite.
func TestPowerCutAgain(t *testing.T) {
	disk := backing.NewFake(32<<20, 512, 1)
	defer func() { disk.Close() }()
	m := newPageCache()
	formatSmall(t, m.Region, 12, true, 70)
	r := newRig(t, m, disk, 2)
	r.mustRest(t)
	log := r.layout.Offset(0, 0) / pageSize
	r.write(t, 0, stamped(0, 8, 1))
	r.flush(t)
	// The other queue's segment is named by this one alone.
	if err := r.do(1, &Request{Op: Write, Buf: stamped(0, 8, 2)}); err != nil {
		t.Fatal(err)
	}
	m2 := m.cut(func(p int64) bool { return p == log })
	r.kill()
	after := m2.cutWhenSyncing(disk, func(p int64) bool { return p != log })
	newRig(t, m2, disk, 2).kill()
	disk.Close()
	m, disk = after()
	r = newRig(t, m, disk, 2)
	if v := r.version(t, 0); v != 1 {
		t.Errorf("version %d, flushed 1", v)
	}
	r.kill()
}

// TestPowerCutHole: a page of the log is lost and later ones are not. The log
// ends at the hole, and nothing of what was behind it is left to be found.
func TestPowerCutHole(t *testing.T) {
	disk := backing.NewFake(32<<20, 512, 1)
	defer disk.Close()
	m := newPageCache()
	formatSmall(t, m.Region, 8, true, 70)
	r := newRig(t, m, disk, 1)
	log := r.layout.Offset(0, 0) / pageSize
	r.write(t, 0, stamped(0, 1, 1))
	r.flush(t)
	for i := range uint64(400) {
		r.write(t, 0, stamped(0, 1, i+2))
	}
	after := m.cut(func(p int64) bool { return p != log+1 })
	r.kill()
	r = newRig(t, after, disk, 1)
	if v := r.version(t, 0); v < 1 || v > 401 {
		t.Errorf("version %d", v)
	}
	head, _ := r.journal.head()
	if head.Off >= 2*pageSize {
		t.Fatalf("the log ends at %v, behind the hole", head)
	}
	rest, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	after.ReadAt(rest, r.layout.Offset(head.Seg, head.Off))
	if !bytes.Equal(rest, zero) {
		t.Error("ksets are left behind the end of the log")
	}
	r.kill()
}

// TestDamageBeforeSyncMark: a hole in what was flushed, or closed in order, is
// not the end of the log.
func TestDamageBeforeSyncMark(t *testing.T) {
	for _, flushes := range []int{2, 0} {
		disk := backing.NewFake(32<<20, 512, 1)
		m := newPageCache()
		formatSmall(t, m.Region, 8, true, 70)
		r := newRig(t, m, disk, 1)
		for i := range uint64(20) {
			r.write(t, 0, stamped(0, 1, i+1))
		}
		for range flushes {
			r.flush(t)
		}
		second := r.layout.Offset(0, ondisk.KsetSize(1))
		r.kill()
		if err := m.Region.Zero(second, 24); err != nil {
			t.Fatal(err)
		}
		if r, err := openRig(m, disk, 1); err == nil {
			r.kill()
			t.Errorf("a log with a hole was opened, after %d flushes", flushes)
		}
		disk.Close()
	}
}

// TestLeftoversAboveSyncMark: a log that has no numbers left goes on with ones
// that nothing found behind them can be taken to follow, although the sync mark
// knows less than was written.
func TestLeftoversAboveSyncMark(t *testing.T) {
	disk := backing.NewFake(32<<20, 512, 1)
	defer disk.Close()
	m := newMedium(false)
	formatSmall(t, m, 8, true, 70)
	r := newRig(t, m, disk, 1)
	for i := range uint64(20) {
		r.write(t, 0, stamped(0, 1, i+1))
	}
	m.crash(nil, func() {})
	r.kill()
	m = m.restarted()
	// Two ksets from the segment's start; the other eighteen lie behind them.
	if err := relog(m, relogging{PerKset: 10, Room: ondisk.SegmentData}); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, m, disk, 1)
	r.write(t, 0, stamped(0, 1, 21))
	r.kill()
	if _, _, _, _, err := readLog(m); err != nil {
		t.Error(err)
	}
}

// within fails the test if f takes longer than anything that works could.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { f(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Minute):
		t.Fatalf("%s does not end", what)
	}
}

// TestPowerCutLeavesNoStart lets a power cut take one page of the log, and leave the segment
// that the log went on to. That would be the continuation of what is written afterwards.
func TestPowerCutLeavesNoStart(t *testing.T) {
	disk := backing.NewFake(32<<20, sectorSize, 1)
	defer disk.Close()
	m := newPageCache()
	formatSmall(t, m.Region, 8, true, 70)
	l, err := ondisk.ReadLayout(m, m.Size())
	if err != nil {
		t.Fatal(err)
	}
	// 1,200 ksets of one key each are to go over the end of the segment.
	beginLog(t, m, ondisk.Position{Off: ondisk.SegmentData - 64<<10})
	r := newRig(t, m, disk, 1)
	r.mustRest(t)
	version := uint64(0)
	write := func(times int) {
		for range times {
			version++
			r.write(t, 0, stamped(0, 1, version))
		}
	}
	write(100)
	for range 2 { // the sync mark is one behind
		if err := r.do(0, &Request{Op: Flush}); err != nil {
			t.Fatal(err)
		}
	}
	synced, _ := r.journal.head()
	write(1200)
	if head, _ := r.journal.head(); head.Seg == synced.Seg {
		t.Fatalf("the log goes from %v to %v", synced, head)
	}
	lost := l.Offset(synced.Seg, synced.Off+8192) / pageSize
	m = m.cut(func(page int64) bool { return page != lost })
	r.kill()

	r = newRig(t, m, disk, 1)
	write(10)
	r.mustFlush(t)
	r.mustEnd(t)
	if rep := ondisk.Check(m, m.Size(), false); len(rep.Problems) > 0 {
		t.Errorf("a cache that was closed in order: %v", rep.Problems)
	}
}
