package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

var (
	stormSeed = flag.Uint64("storm.seed", 0, "seed of the storm tests; 0 draws one")
	stormOps  = flag.Int("storm.ops", 400, "requests per client and round of the storm tests")
	rounds    = flag.Int("storm.rounds", 3, "rounds of the storm tests, each ended by a crash")
)

// ledger knows, for each sector of the device, the newest version whose write
// was acknowledged and the newest whose write was begun. A sector has one
// writer, so a read must find a version between the first, as it was when the
// read began, and the second, as it is when the read has ended; and the sector
// must say that it is the one that was asked for.
type ledger struct {
	acked, begun []atomic.Uint64
	zeroed       []atomic.Uint64 // the newest version that was a Zero: what zeros stand for
}

func newLedger(sectors int64) *ledger {
	return &ledger{
		acked: make([]atomic.Uint64, sectors), begun: make([]atomic.Uint64, sectors), zeroed: make([]atomic.Uint64, sectors),
	}
}

const sectorSize = ondisk.SectorSize

// fillStamp writes the sectors' stamps into p: address, version, and a pattern of
// both to the end, so that a torn sector shows.
func fillStamp(p []byte, lba int64, version uint64) {
	for ; len(p) > 0; p = p[sectorSize:] {
		binary.LittleEndian.PutUint64(p, uint64(lba))
		binary.LittleEndian.PutUint64(p[8:], version)
		for done := 16; done < sectorSize; done *= 2 {
			copy(p[done:sectorSize], p[:done])
		}
		lba++
	}
}

// stamp reads one sector back. A sector of zeroes has version 0.
func stamp(p []byte, lba int64) (version uint64, err error) {
	found, version := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
	switch {
	case !bytes.Equal(p[16:sectorSize], p[:sectorSize-16]):
		return 0, fmt.Errorf("sector %d is torn: it begins as sector %d version %d", lba, found, version)
	case version != 0 && found != uint64(lba):
		return 0, fmt.Errorf("sector %d holds sector %d version %d", lba, found, version)
	}
	return version, nil
}

// check compares the sectors in p with the ledger; low is what was
// acknowledged when the read began.
func (g *ledger) check(p []byte, lba int64, low []uint64) error {
	for i := range low {
		v, err := stamp(p[i*sectorSize:][:sectorSize], lba+int64(i))
		if err != nil {
			return err
		}
		if v == 0 {
			v = g.zeroed[lba+int64(i)].Load()
		}
		if high := g.begun[lba+int64(i)].Load(); v < low[i] || v > high {
			return fmt.Errorf("sector %d has version %d, acknowledged %d, begun %d", lba+int64(i), v, low[i], high)
		}
	}
	return nil
}

func (g *ledger) low(lba int64, n int) []uint64 {
	low := make([]uint64, n)
	for i := range low {
		low[i] = g.acked[lba+int64(i)].Load()
	}
	return low
}

// settle takes over, after a crash, what is really there: a write that was
// not acknowledged either happened or did not, and that stays so.
func (g *ledger) settle(p []byte, lba int64) {
	for i := range len(p) / sectorSize {
		v, _ := stamp(p[i*sectorSize:][:sectorSize], lba+int64(i))
		if v == 0 {
			v = g.zeroed[lba+int64(i)].Load()
		}
		g.acked[lba+int64(i)].Store(v)
		g.begun[lba+int64(i)].Store(v)
	}
}

// server carries out requests; a queue that has gone gives errKilled.
type server interface {
	do(queue int, r *Request) error
}

// storm is a set of options for one run.
type storm struct {
	queues, clients, segments int
	diskMiB                   int64
	crc                       bool
	gcPercent                 int
	faults                    bool
	maxIO                     int
	script                    func(backing.Op) backing.Fault // of the disk until the last flush, where not faults says
	discarders                int                            // the first so many clients
	patient                   bool                           // the last round is let end by itself, and has to
	most                      int                            // that write-back defers, in rounds of a few ms, if not 0
}

// TestStorm lets clients read and write at random, on several queues and on a
// cache that is always full, kills the server at random moments, cuts the
// power of the disk with it, and checks every sector of every read.
func TestStorm(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	for i, s := range []storm{
		{queues: 1, clients: 1, segments: 5, diskMiB: 160, maxIO: 1 << 20, gcPercent: 70},
		{queues: 2, clients: 8, segments: 6, diskMiB: 160, maxIO: 1 << 20, gcPercent: 70},
		{queues: 2, clients: 8, segments: 6, diskMiB: 160, maxIO: 1 << 20, gcPercent: 70, crc: true, faults: true},
		{queues: 3, clients: 12, segments: 7, diskMiB: 16, maxIO: 64 << 10, gcPercent: 0, faults: true},
		{queues: 4, clients: 16, segments: 8, diskMiB: 8, maxIO: 8 << 10, gcPercent: 90, crc: true},
	} {
		t.Run(fmt.Sprintf("%d-%dq-%dmib", i, s.queues, s.diskMiB), func(t *testing.T) {
			s.run(t, seed+uint64(i))
		})
	}
}

func (s storm) run(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, uint32(s.segments), s.crc, s.gcPercent)
	disk := backing.NewFake(s.diskMiB<<20, 512, seed)
	g := newLedger(disk.Size() / sectorSize)
	for round := range *rounds {
		var faulty atomic.Bool
		faulty.Store(s.faults)
		if s.faults {
			var mu sync.Mutex
			dice := rand.New(rand.NewPCG(seed, uint64(round)))
			disk.Script(func(op backing.Op) (f backing.Fault) {
				mu.Lock()
				defer mu.Unlock()
				if faulty.Load() && dice.IntN(200) == 0 || op.Kind == backing.OpFlush && faulty.Load() && dice.IntN(10) == 0 {
					f.Err = syscall.EIO
				}
				return f
			})
		} else if s.script != nil {
			disk.Script(s.script)
		}
		r := newRig(t, mem, disk, s.queues)
		if s.most > 0 {
			r.narrow(t, s.most, 5*time.Millisecond)
		}
		s.verify(t, r, g, round > 0)

		var clients sync.WaitGroup
		for id := range s.clients {
			dice := rand.New(rand.NewPCG(rnd.Uint64(), 1))
			if id < s.discarders {
				clients.Go(func() { s.discarder(t, r, g, id, dice) })
			} else {
				clients.Go(func() { s.client(t, r, g, id, dice) })
			}
		}
		ended := make(chan struct{})
		go func() { clients.Wait(); close(ended) }()
		patience := time.Duration(rnd.IntN(1500)) * time.Millisecond
		if s.patient && round == *rounds-1 {
			patience = 2 * time.Minute
		}
		select {
		case <-ended:
		case <-time.After(patience):
			if s.patient && round == *rounds-1 {
				t.Errorf("requests do not finish: %+v", r.Status())
			}
		}
		faulty.Store(false)
		r.checkOverwritten(t)
		if err := r.kill(); err != nil {
			t.Fatal(err)
		}
		<-ended
		after := disk.Crash()
		disk.Close()
		disk = after
		if t.Failed() {
			return
		}
	}
	r := newRig(t, mem, disk, s.queues)
	s.verify(t, r, g, true)
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if u := r.index.usage(); u.dirty+u.zero != 0 {
		t.Fatalf("%d bytes are dirty after a flush", u.dirty+u.zero)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	after := disk.Crash()
	disk.Close()
	defer after.Close()
	disk = after
	buf := make([]byte, 1<<20)
	for off := int64(0); off < disk.Size(); off += int64(len(buf)) {
		disk.ReadAt(buf, off)
		lba := off / sectorSize
		if err := g.check(buf, lba, g.low(lba, len(buf)/sectorSize)); err != nil {
			t.Fatalf("on the disk alone, after a flush: %v", err)
		}
	}
}

// verify reads the whole device.
func (s storm) verify(t *testing.T, r server, g *ledger, settle bool) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < s.diskMiB<<20; off += int64(len(buf)) {
		lba := off / sectorSize
		low := g.low(lba, len(buf)/sectorSize)
		for err := error(syscall.EIO); err != nil; {
			if err = r.do(int(lba)%s.queues, &Request{Op: Read, Off: off, Buf: buf}); err != nil && !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
		}
		if err := g.check(buf, lba, low); err != nil {
			t.Fatal(err)
		}
		if settle {
			g.settle(buf, lba)
		}
	}
}

// client owns every MiB whose number is id modulo the number of clients, and
// writes only there. It reads everywhere.
func (s storm) client(t *testing.T, r server, g *ledger, id int, dice *rand.Rand) {
	const unit = 1 << 20
	units := int(s.diskMiB)
	for range *stormOps {
		write := dice.IntN(2) == 0
		u := dice.IntN(units)
		if write {
			u = u - u%s.clients + id
			if u >= units {
				continue
			}
		}
		n := (1 + dice.IntN(s.maxIO/sectorSize)) * sectorSize
		if dice.IntN(2) == 0 {
			n = min(n, (1+dice.IntN(16))*sectorSize)
		}
		off := int64(u)*unit + int64(dice.IntN((unit-n)/sectorSize+1))*sectorSize
		lba, count := off/sectorSize, n/sectorSize
		buf := make([]byte, n)
		queue := dice.IntN(s.queues)
		if !write {
			low := g.low(lba, count)
			switch err := r.do(queue, &Request{Op: Read, Off: off, Buf: buf}); {
			case err == errKilled:
				return
			case errors.Is(err, syscall.EIO):
				continue
			case err != nil:
				t.Errorf("read: %v", err)
				return
			}
			if err := g.check(buf, lba, low); err != nil {
				t.Error(err)
				return
			}
			continue
		}
		version := g.begun[lba].Load()
		for i := range count {
			version = max(version, g.begun[lba+int64(i)].Load())
		}
		version++
		for i := range count {
			g.begun[lba+int64(i)].Store(version)
		}
		req := &Request{Op: Write, Off: off, Buf: buf, FUA: dice.IntN(8) == 0}
		if dice.IntN(4) == 0 {
			req.Op, req.Buf, req.Len = Zero, nil, n
			for i := range count {
				g.zeroed[lba+int64(i)].Store(version)
			}
		}
		fillStamp(buf, lba, version)
		switch err := r.do(queue, req); {
		case err == errKilled:
			return
		case err != nil:
			t.Errorf("write: %v", err)
			return
		}
		for i := range count {
			g.acked[lba+int64(i)].Store(version)
		}
		if dice.IntN(16) == 0 {
			if err := r.do(queue, &Request{Op: Flush}); err != nil && err != errKilled {
				t.Errorf("flush: %v", err)
				return
			}
		}
	}
}
