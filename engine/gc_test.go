package engine

import (
	"context"
	"errors"
	"math"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// tailFirst is a memory that counts generations raised, and those raised while
// a key_tail that the same thread stored before may still be lost.
type tailFirst struct {
	*pmem.Region
	mu struct {
		sync.Mutex
		open          map[int]bool // threads with a key_tail after their last fence
		raised, early int
	}
}

func (m *tailFirst) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	const generations = 8 << 10 // of a segment
	switch in := off - ondisk.SegmentsOff; {
	case off >= ondisk.CtrlOff && off < ondisk.CtrlOff+2*ondisk.PositionSize:
		m.mu.open[unix.Gettid()] = true
	case in >= 0 && in%ondisk.SegmentSize/ondisk.GenerationSize == generations/ondisk.GenerationSize,
		in >= 0 && in%ondisk.SegmentSize/ondisk.GenerationSize == generations/ondisk.GenerationSize+1:
		m.mu.raised++
		if m.mu.open[unix.Gettid()] {
			m.mu.early++
		}
	}
	return m.Region.WriteAt(p, off)
}

func (m *tailFirst) Fence() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.open[unix.Gettid()] = false
	m.Region.Fence()
}

// TestKeyTailBeforeGenerations: at no moment can a power cut leave a log that
// names a segment whose generation has moved on.
func TestKeyTailBeforeGenerations(t *testing.T) {
	m := &tailFirst{Region: pmem.Heap(ondisk.MinSize)}
	m.mu.open = map[int]bool{}
	formatSmall(t, m.Region, 8, false, 0)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, m, disk, 1)
	counted := func() (raised, early int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.mu.raised, m.mu.early
	}
	opening, _ := counted()
	for i := range int64(40) {
		r.write(t, i<<20, make([]byte, 1<<20))
	}
	raised, early := counted()
	for ; raised == opening; raised, early = counted() {
		time.Sleep(time.Millisecond)
	}
	if early > 0 {
		t.Errorf("%d of %d generations were raised before the key_tail was safe", early, raised-opening)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestOlderKeyTail: with the newer copy of key_tail lost, the log is read from
// where the other one says. What overwrote data that is still in the cache has
// gone from it since, and the data does not come back for that.
func TestOlderKeyTail(t *testing.T) {
	const megabyte, kept = 1 << 20 >> sectorShift, 48 << 20 >> sectorShift
	m := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, m, 8, false, 90) // so that nothing is collected yet
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	badBlocks(disk, kept, 1)
	r := newRig(t, m, disk, 2)
	begin := r.tails.keyTail()
	write := func(queue int, lba int64, sectors int, version uint64) {
		t.Helper()
		if err := r.do(queue, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, sectors, version)}); err != nil {
			t.Fatal(err)
		}
	}
	write(0, 0, 8, 1)
	write(1, 0, 8, 2)
	overwritten := r.extents(0, 8)[0].seg
	if err := r.setGC(0); err != nil {
		t.Fatal(err)
	}
	for i := range int64(16) { // the second queue leaves its segment
		write(1, (16+i)*megabyte, megabyte, 2)
	}
	write(0, kept, 1, 3) // in the segment of the first write; the disk refuses it
	if err := r.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	within(t, "collecting the overwritten segment", func() {
		for r.segments.all[overwritten].gen.Load() == r.layout.Gens[overwritten] {
			time.Sleep(time.Millisecond)
		}
	})
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	l, err := ondisk.ReadLayout(m, m.Size())
	if err != nil {
		t.Fatal(err)
	}
	var buf [ondisk.PositionSize]byte
	at := l.KeyTailCopies.Newest.Next()
	store(t, m, buf[:], ondisk.EncodePosition(buf[:], ondisk.KeyTail, at, begin))
	r = newRig(t, m, disk, 2)
	for lba := range int64(8) {
		if v := r.version(t, lba); v != 2 {
			t.Errorf("sector %d has version %d", lba, v)
		}
	}
	if v := r.version(t, kept); v != 3 {
		t.Errorf("sector %d has version %d", kept, v)
	}
	r.kill()
}

// steadySegments is so few that a log of that many comes around soon.
const steadySegments = 8

// steadyClient returns one of a cache in m that reads and writes the same blocks, while
// all is written back and collected.
func steadyClient(t testing.TB, m benchMemory) *client {
	const blocks = 4 << 10
	formatSmall(t, m, steadySegments, false, 70)
	c, err := Open(m, &benchDisk{size: blocks << 12}, Options{Queues: 1, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	w := &client{q: c.Queue(0), reqs: make([]Request, 16), offs: make([]int64, blocks)}
	for i := range w.offs {
		w.offs[i] = int64(i) << 12
	}
	for i := range w.reqs {
		w.reqs[i] = Request{Op: Write, Buf: make([]byte, 4096)}
		if i%4 == 3 {
			w.reqs[i].Op = Read
		}
	}
	return w
}

// TestSteadyStateAllocatesNothing writes and reads the same blocks for many laps of the
// log. The runtime collects its own garbage whenever some megabytes have been allocated,
// and takes a processor from the queues for it; a lap that takes kilobytes makes that rare.
func TestSteadyStateAllocatesNothing(t *testing.T) {
	w := steadyClient(t, benchMemory{pmem.Heap(ondisk.MinSize)})
	const lap = steadySegments * ondisk.SegmentData >> 12 * 4 / 3
	const most = steadySegments * 4 << 10 // a walker of the log made for each walk costs more
	least := uint64(math.MaxUint64)       // buffers may still grow with the rounds of write-back
	for range 12 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		w.run(lap)
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	t.Logf("%d bytes a lap", least)
	if least > most {
		t.Errorf("%d bytes are allocated in a lap of %d requests, more than %d", least, lap, most)
	}
}
