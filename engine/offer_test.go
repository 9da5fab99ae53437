package engine

import (
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// jamLongest is how many turns of an empty loop are three times spinFor, more or less.
const jamLongest = 80_000

// jam has the journal locked for a moment, now and then, so that keys are offered: for
// less than a queue spins, or for more. It counts, since a sleep is a hundred times as
// long, and the clock of a bubble of testing/synctest stands while somebody looks at it.
func (c *Cache) jam(dice *rand.Rand) {
	if dice.IntN(16) == 0 {
		long := dice.IntN(jamLongest)
		go func() {
			c.journal.mu.Lock()
			defer c.journal.mu.Unlock()
			for range long {
			}
		}()
	}
}

// unlockOnceOffered unlocks the journal when so many have offered keys.
func (r *rig) unlockOnceOffered(t *testing.T, want int) {
	t.Helper()
	defer r.journal.mu.Unlock()
	within(t, "offering keys", func() {
		for n := 0; n < want; time.Sleep(time.Millisecond) {
			n = 0
			for o := r.journal.offers.first.Load(); o != nil; o = o.next {
				n++
			}
		}
	})
}

// TestOffers has four queues write to the same place while the journal is locked. What
// they write is in as few ksets as have room for it, and either all of it counts, in the
// order of the log, or each of them is told.
func TestOffers(t *testing.T) {
	const queues = 4
	for _, c := range []struct {
		name   string
		keys   int // of each write
		ksets  uint64
		broken bool // memory behind the head is gone
	}{
		{name: "for one kset", keys: 1, ksets: 1},
		{name: "that just have room", keys: ondisk.MaxKeys / queues, ksets: 1},
		{name: "for two", keys: ondisk.MaxKeys/3 + 1, ksets: 2},
		{name: "with no way on", keys: 1, broken: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := pmem.NewFake(ondisk.MinSize)
			formatSmall(t, mem, 16, true, 70)
			disk := backing.NewFake(8<<20, 512, 1)
			defer disk.Close()
			r := newRig(t, mem, disk, queues)
			for i := range queues { // to begin a segment takes the journal's lock
				if err := r.do(i, &Request{Op: Write, Off: 4 << 20, Buf: stamped(8<<10, 1, 1)}); err != nil {
					t.Fatal(err)
				}
			}
			r.journal.mu.Lock()
			if head := r.journal.mu.head; c.broken {
				mem.Punch(r.offset(head), ondisk.KsetHeaderSize)
			}
			before := r.journal.mu.written
			var waits []func() error
			for i := range queues {
				data := stamped(0, c.keys*maxSummed/sectorSize, uint64(i+1))
				waits = append(waits, r.begin(i, &Request{Op: Write, Buf: data}))
			}
			r.unlockOnceOffered(t, queues)
			for i, wait := range waits {
				err := wait()
				if c.broken != errors.Is(err, ErrBadHead) || !c.broken && err != nil {
					t.Errorf("the write of queue %d ended with: %v", i, err)
				}
			}
			if c.broken {
				r.kill()
				return
			}
			if _, written := r.journal.head(); written != before+c.ksets {
				t.Errorf("%d ksets, not %d", written-before, c.ksets)
			}
			is := func() (version uint64) {
				t.Helper()
				got := r.read(t, 0, c.keys*maxSummed)
				for lba := range c.keys * maxSummed / sectorSize {
					v, err := stamp(got[lba*sectorSize:][:sectorSize], int64(lba))
					if err != nil || lba > 0 && v != version {
						t.Fatalf("sector %d is of write %d (%v), those before of %d", lba, v, err, version)
					}
					version = v
				}
				return version
			}
			was := is()
			if err := r.kill(); err != nil {
				t.Fatal(err)
			}
			r = newRig(t, mem, disk, queues)
			if now := is(); now != was {
				t.Errorf("write %d was read, and %d after a restart", was, now)
			}
			r.kill()
		})
	}
}

// TestOffersWithoutRoom has the log come to where its segment has room for one more key
// but not for those of all, and no other segment is free. One of them is logged all the
// same, and the others when there is room.
func TestOffersWithoutRoom(t *testing.T) {
	const queues = 4
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 16, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, queues)
	defer r.kill()
	write := func(queue, lba int) func() error {
		return r.begin(queue, &Request{Op: Write, Off: int64(lba) * sectorSize, Buf: stamped(int64(lba), 1, 1)})
	}
	for i := range queues {
		if err := write(i, i)(); err != nil {
			t.Fatal(err)
		}
	}
	r.mustRest(t)
	keys := []ondisk.Key{{Len: sectorSize, Seg: r.loops[0].q.head.seg, Flags: ondisk.KeyClean}}
	keys[0].Gen = r.segments.all[keys[0].Seg].gen.Load() + 1 // a dead one
	r.journal.mu.Lock()
	for roomAt(r.journal.mu.head) >= 2*ondisk.KsetSize(1)+ondisk.MaxKsetSize {
		if err := r.appendLocked(keys, 0); err != nil {
			t.Fatal(err)
		}
	}
	r.segments.mu.Lock()
	free := r.segments.mu.freeList
	r.segments.mu.freeList = nil
	r.segments.mu.Unlock()
	var wait sync.WaitGroup
	ended := make(chan error, queues)
	for i := range queues {
		w := write(i, queues+i)
		wait.Go(func() { ended <- w() })
	}
	r.unlockOnceOffered(t, queues)
	within(t, "the write that there is room for", func() {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	r.segments.mu.Lock()
	r.segments.mu.freeList = append(r.segments.mu.freeList, free...)
	r.segments.mu.Unlock()
	r.Resume()
	r.gc.kick()
	within(t, "the other writes", wait.Wait)
	for range queues - 1 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// TestWritersInTurns has two queues write, one block in each turn, as fast as they can and
// with nobody else at the processors, so that they meet at the journal all the time. A key
// that were logged twice would be seen when all is collected: as an extent that stays, or
// as a segment with fewer references than none.
func TestWritersInTurns(t *testing.T) {
	const queues, block, rounds = 2, 4 << 10, 4
	mem := benchMemory{pmem.Heap(ondisk.MinSize)}
	if err := ondisk.Format(mem, ondisk.FormatOptions{GCPercent: 90}); err != nil {
		t.Fatal(err)
	}
	x := &bench{disk: &benchDisk{size: benchSet}}
	var err error
	if x.Cache, err = Open(mem, x.disk, Options{Queues: queues, Log: &testLog{}}); err != nil {
		t.Fatal(err)
	}
	defer x.end(t)
	var each []func(int)
	for i := range queues {
		each = append(each, newClient(x, i, 1, block, Write).run)
	}
	for range rounds {
		x.disk.close()
		threads(300<<20/block, each)
		x.empty(t)
		for i := range x.segments.all {
			if n := x.segments.all[i].refs.Load(); n < 0 {
				t.Fatalf("segment %d has %d references", i, n)
			}
		}
	}
}
