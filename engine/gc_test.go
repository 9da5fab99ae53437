package engine

import (
	"sync"
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
