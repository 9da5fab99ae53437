package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// relay gives requests to the server there is, again if it goes before it has
// answered, as the driver does.
type relay struct {
	mu      sync.RWMutex
	current *rig
	again   atomic.Int64
	served  atomic.Int64
}

func (r *relay) do(queue int, req *Request) error {
	for {
		r.mu.RLock()
		now := r.current
		r.mu.RUnlock()
		// The disk may still answer the server that has gone: each has buffers of
		// its own.
		try := Request{Op: req.Op, FUA: req.FUA, Off: req.Off, Len: req.Len}
		if req.Buf != nil {
			try.Buf = append([]byte(nil), req.Buf...)
		}
		err := now.do(queue, &try)
		if err == errKilled {
			r.again.Add(1)
			continue // with another, as soon as there is one
		}
		copy(req.Buf, try.Buf)
		r.served.Add(1)
		return err
	}
}

// firstPage is a region whose first page, where flushes leave their mark, may be
// read by another process while it is written: the record has a checksum, and
// two copies. For the race detector these are accesses of one process.
type firstPage struct {
	Memory
	mu sync.Mutex
}

func (m *firstPage) ReadAt(p []byte, off int64) (int, error) {
	if off < 4096 {
		m.mu.Lock()
		defer m.mu.Unlock()
	}
	return m.Memory.ReadAt(p, off)
}

func (m *firstPage) WriteAt(p []byte, off int64) (int, error) {
	if off < 4096 {
		m.mu.Lock()
		defer m.mu.Unlock()
	}
	return m.Memory.WriteAt(p, off)
}

// TestHandOver lets a cache change hands again and again under clients that
// read and write at random, now and then with a change of mind. No request may
// fail, every read must be right, and what the last server knows must be what
// a replay finds.
func TestHandOver(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	for i, s := range []storm{
		{queues: 1, clients: 2, segments: 20, diskMiB: 32, maxIO: 64 << 10, gcPercent: 70},
		{queues: 2, clients: 8, segments: 6, diskMiB: 96, maxIO: 128 << 10, gcPercent: 70},
		{queues: 3, clients: 8, segments: 24, diskMiB: 64, maxIO: 16 << 10, gcPercent: 70, crc: true},
	} {
		t.Run(fmt.Sprintf("%d-%dq-%dmib", i, s.queues, s.diskMiB), func(t *testing.T) { s.handOver(t, seed+uint64(i)) })
	}
}

func (s storm) handOver(t *testing.T, seed uint64) {
	dice := rand.New(rand.NewPCG(seed, 0))
	mem := &firstPage{Memory: pmem.Heap(ondisk.MinSize)}
	formatSmall(t, mem, uint32(s.segments), s.crc, s.gcPercent)
	disk := backing.NewFake(s.diskMiB<<20, 512, seed)
	g := newLedger(disk.Size() / sectorSize)
	r := &relay{current: newRig(t, mem, disk, s.queues)}
	o := Options{Queues: s.queues, Log: &testLog{}}

	var clients sync.WaitGroup
	for id := range s.clients {
		dice := rand.New(rand.NewPCG(dice.Uint64(), 1))
		clients.Go(func() { s.client(t, r, g, id, dice) })
	}
	ended := make(chan struct{})
	go func() { clients.Wait(); close(ended) }()
	changes := 0
	for busy := true; busy; changes++ {
		// At rest nobody makes room, so let some requests come through first.
		for until := r.served.Load() + int64(dice.IntN(100)); busy && r.served.Load() < until; {
			select {
			case <-ended:
				busy = false // and one more change, with nothing under way
			case <-time.After(100 * time.Microsecond):
			}
		}
		old := r.current
		head, err := old.Rest(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		f, err := Follow(mem, fakeDisk{disk}, o, head)
		if err != nil {
			t.Fatal(err)
		}
		if dice.IntN(4) == 0 {
			old.Resume()
			continue
		}
		r.mu.Lock()
		old.leave()
		last, err := old.Retire()
		if err != nil {
			t.Fatal(err)
		}
		head = last.Head
		c, err := f.TakeOver(last)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Rest(context.Background()); err != nil {
			t.Fatal(err)
		}
		if l, err := ondisk.ReadLayout(mem, mem.Size()); err != nil || l.SyncMark != ondisk.PrevSeq(head.Seq) {
			t.Fatalf("the sync mark is %d, want %d (%v)", l.SyncMark, ondisk.PrevSeq(head.Seq), err)
		}
		c.Resume()
		r.current = startRig(c)
		r.mu.Unlock()
	}
	<-ended
	if t.Failed() {
		return
	}
	s.verify(t, r, g, false)
	t.Logf("%d changes, %d requests given again", changes, r.again.Load())

	last := r.current
	if err := last.kill(); err != nil {
		t.Fatal(err)
	}
	again := newRig(t, mem, disk, s.queues)
	if got, want := last.Status(), again.Status(); got.DirtyBytes != want.DirtyBytes ||
		got.ZeroBytes != want.ZeroBytes || got.KeyHead != want.KeyHead {
		t.Errorf("the last server of %d had\n%+v, a replay finds\n%+v", changes, got, want)
	}
	if got, want := last.index.logged(), again.index.logged(); !slices.Equal(got, want) {
		t.Errorf("the index of the last server of %d has %d extents, which are not the %d that a replay finds", changes, len(got), len(want))
	}
	s.verify(t, again, g, false)
	if err := again.kill(); err != nil {
		t.Fatal(err)
	}
	disk.Close()
}

// TestFollowStoresNothing: the one that has the cache may go on as if nothing
// had been.
func TestFollowStoresNothing(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	defer r.kill()
	for i := range int64(40) {
		r.write(t, i<<20, make([]byte, 1<<20)[:(i+1)<<9])
	}
	head, err := r.Rest(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Follow(readOnly{mem, t}, fakeDisk{disk}, Options{Queues: 1, Log: &testLog{}}, head); err != nil {
		t.Fatal(err)
	}
	r.Resume()
}

// readOnly takes no stores.
type readOnly struct {
	Memory
	t *testing.T
}

func (m readOnly) WriteAt(p []byte, off int64) (int, error) {
	m.t.Errorf("%d bytes are stored at %d", len(p), off)
	return len(p), nil
}

func (m readOnly) Zero(off, n int64) error {
	m.t.Errorf("%d bytes are cleared at %d", n, off)
	return nil
}
