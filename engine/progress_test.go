package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// small returns Zeros of single sectors, n of them, that leave as many between them.
func smallZeros(n int) (rs []*Request) {
	for i := range int64(n) {
		rs = append(rs, &Request{Op: Zero, Off: 2 * i * sectorSize, Len: sectorSize})
	}
	return rs
}

// held makes a disk hold all that would make room, until it is released.
func heldDisk(size int64) (disk *backing.Fake, fate *diskFate) {
	disk, fate = backing.NewFake(size, sectorSize, 1), newFate()
	fate.hold(backing.OpWrite, true)
	fate.hold(backing.OpZero, true)
	disk.Script(fate.script)
	return disk, fate
}

func mustDriver(t *testing.T, mem Memory, disk *backing.Fake, queues int) *driver {
	t.Helper()
	d, err := newDriver(mem, disk, Options{Queues: queues})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *driver) mustAwait(t *testing.T, rs ...*Request) {
	t.Helper()
	if err := d.await(func() bool { return !slices.ContainsFunc(rs, func(r *Request) bool { return d.under[r] }) }); err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

// TestZerosAreBounded: while the disk takes nothing, no number of discards takes more
// than the log has room for, not even across restarts: the log goes on by itself, has
// a segment left for deferred parts, and the discard that finds no room waits.
func TestZerosAreBounded(t *testing.T) {
	const segments, queues = 7, 3
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, segments, false, 70)
	disk, _ := heldDisk(64 << 20)
	for range 8 {
		d := mustDriver(t, mem, disk, queues)
		for n := 0; d.space.waiting.Load() < 10; n++ {
			if n > segments*segmentSectors {
				t.Fatalf("%d discards of a disk that does nothing, and none waits", n)
			}
			rs := smallZeros(1) // of which each makes a kset, as large as a key can make it
			d.submit(n, rs[0])
			d.Queue(n % queues).Turn()
			if d.Queue(n % queues).stalled.Load() {
				t.Fatal("the log is full")
			}
		}
		if n := d.segments.free(); n < relogReserve {
			t.Errorf("%d segments are free", n)
		}
		d.Abort()
		d.turn()
		if err := d.Close(); !errors.Is(err, ErrAborted) {
			t.Error(err)
		}
	}
	disk.Release()
	disk.Close()
}

// TestLogReserve: what the queues can log once data gets no more segments, fits into
// the segments that are kept for it, wherever the log's head is.
func TestLogReserve(t *testing.T) {
	usable := ondisk.SegmentData - ondisk.MaxKsetSize - ondisk.KsetHeaderSize - 64
	for queues := 1; queues <= 64; queues++ {
		bytes := queues * segmentSectors * 64
		took := 1 + (bytes-1)/int(usable) // the first on the very first key
		if kept := logReserve(queues) - relogReserve; took > kept {
			t.Errorf("%d queues: %d segments are kept for %d bytes", queues, kept, bytes)
		}
	}
}

// TestServedInOrder: who waits for room is overtaken by nobody who comes later,
// whatever that asks for, by the same queue or another, with room in its queue's
// segment or not; and goes on in that order, too.
func TestServedInOrder(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 7, false, 70)
	disk, fate := heldDisk(256 << 20)
	defer disk.Close()
	d := mustDriver(t, mem, disk, 2)
	begin := &Request{Op: Zero, Off: 200 << 20, Len: sectorSize}
	d.submit(1, begin) // a run of zeros and much room behind it
	d.mustAwait(t, begin)
	var waiting []*Request
	queueOf := map[*Request]int{}
	for i := int64(0); d.space.waiting.Load() == 0; i++ {
		r := &Request{Op: Write, Off: i << 20, Buf: make([]byte, 1<<20)}
		d.submit(0, r)
		d.turn()
		if d.under[r] {
			waiting = append(waiting, r)
		}
	}
	for i := range int64(4) {
		off := (210 + i) << 20
		for queue := range 2 {
			for _, r := range []*Request{
				{Op: Zero, Off: off, Len: sectorSize}, {Op: Write, Off: off + 4096, Buf: make([]byte, sectorSize)},
				{Op: Zero, Off: off, Len: 4 << 20}, {Op: Write, Off: off, Buf: make([]byte, 1<<20)},
			} {
				d.submit(queue, r)
				waiting = append(waiting, r)
				queueOf[r] = queue
			}
			d.turn()
		}
	}
	for i, r := range waiting {
		if !d.under[r] {
			t.Fatalf("request %d of %d overtakes those who wait", i, len(waiting))
		}
	}
	before := d.Status().LongestWait
	fate.heal()
	disk.Release()
	left := slices.Clone(waiting)
	if err := d.await(func() bool {
		if now := d.Status().LongestWait; now < before {
			t.Fatalf("the longest wait went from %v to %v", before, now)
		} else {
			before = now
		}
		// Of those that are awake together those of one queue may be served first.
		for i, r := range left {
			for _, before := range left[:i] {
				if !d.under[r] && d.under[before] && (before == waiting[0] || queueOf[before] == queueOf[r]) {
					t.Fatalf("a request at %d of length %d is served before one that has waited for longer", r.Off, r.size())
				}
			}
		}
		left = slices.DeleteFunc(left, func(r *Request) bool { return !d.under[r] })
		return len(left) == 0
	}); err != nil {
		t.Fatal(err)
	}
	if n, parked := d.space.waiting.Load(), d.space.parked.Load(); n != 0 || parked != 0 || len(d.queues[0].line)+len(d.queues[1].line) != 0 {
		t.Errorf("%d are in line and %d of them asleep after all were served", n, parked)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLineOrder: who is woken, and who may take a segment, by what there is.
func TestLineOrder(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 9, false, 70)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	d := mustDriver(t, mem, disk, 3)
	if _, err := d.Rest(context.Background()); err != nil { // nobody else looks after the line
		t.Fatal(err)
	}
	a, b, c := d.queues[0], d.queues[1], d.queues[2]
	line := []*Request{{q: a}, {q: a}, {q: b}, {q: a}, {q: c}}
	for i, r := range line {
		r.stage, r.Op, r.Len = stageAnswered, Write, 0 // comes back and is nothing else
		d.space.park(r, i == 0 || i == 2)
	}
	var taken []uint32
	free := func(n int) {
		t.Helper()
		for d.segments.free() > d.segments.reserve+n {
			seg, _ := d.segments.take(0)
			taken = append(taken, seg)
		}
		for d.segments.free() < d.segments.reserve+n {
			d.segments.addFree(taken[0])
			taken = taken[1:]
		}
	}
	woken := func() (list []bool) {
		d.serve()
		for _, r := range line {
			list = append(list, !r.parked)
		}
		return list
	}
	check := func(when string, want ...bool) {
		t.Helper()
		if got := woken(); !slices.Equal(got, want) {
			t.Errorf("%s: %t, want %t", when, got, want)
		}
	}
	free(0)
	check("nothing is free", false, false, false, false, false)
	free(1)
	check("one is free", true, true, false, false, false)
	late := &Request{q: c, Op: Write}
	for _, r := range []struct {
		r    *Request
		free int
		may  bool
	}{{line[0], 1, true}, {line[1], 1, true}, {line[2], 1, false}, {line[2], 2, true}, {line[4], 2, false}, {line[4], 3, true}, {late, 2, false}, {late, 3, true}} {
		free(r.free)
		if got := d.mayTake(r.r.q, r.r); got != r.may {
			t.Errorf("with %d free the one at %d may take a segment: %t", r.free, slices.Index(line, r.r), got)
		}
	}
	free(3)
	check("the first has not taken its own yet", true, true, false, false, false)
	d.space.gotSegment(a)
	check("the first has taken its own", true, true, true, false, false)
	d.space.gotSegment(b)
	b.stalled.Store(true)
	check("the log is full", true, true, true, false, false)
	b.stalled.Store(false)
	check("there is room for all", true, true, true, true, true)
	for _, r := range line {
		d.space.leave(r)
	}
	for _, seg := range taken {
		d.segments.addFree(seg)
	}
	d.turn()
	d.Resume()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLastSegment: the log leaves the last free segment to deferred parts, and that
// makes room for all.
func TestLastSegment(t *testing.T) {
	const bad = 1000
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 70)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	badBlocks(disk, bad, 1)
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.write(t, bad*sectorSize, stamped(bad, 1, 1))
	data := stamped(0, 1, 1)
	for {
		r.write(t, 0, data)
		if head, _ := r.journal.head(); roomAt(head) < ondisk.MaxKsetSize+1000 {
			break
		}
	}
	for _, ok := r.segments.take(relogReserve); ok; {
		_, ok = r.segments.take(relogReserve)
	}
	written := make(chan error, 1)
	go func() {
		var err error
		for range 100 {
			err = errors.Join(err, r.do(0, &Request{Op: Write, Off: 0, Buf: data}))
		}
		written <- err
	}()
	within(t, "filling the log", func() {
		for !r.queues[0].stalled.Load() {
			time.Sleep(time.Millisecond)
		}
	})
	if n := r.segments.free(); n != relogReserve {
		t.Errorf("%d segments are free", n)
	}
	if r.longestWait() <= 0 {
		t.Error("the longest wait is nothing")
	}
	r.Resume()
	within(t, "writes to a log that has come to the last segment", func() {
		if err := <-written; err != nil {
			t.Error(err)
		}
	})
	if v := r.version(t, bad); v != 1 {
		t.Errorf("the deferred sector has version %d", v)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestLogTakesSegment: the collector and write-back hear of it.
func TestLogTakesSegment(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 10)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.write(t, 0, stamped(0, 1, 1))
	_, keys, _, _, err := readLog(mem)
	if err != nil {
		t.Fatal(err)
	}
	for len(r.gc.kicked) > 0 {
		<-r.gc.kicked
	}
	head, _ := r.journal.head()
	for at := head; at.Seg == head.Seg; at, _ = r.journal.head() {
		r.journal.mu.Lock()
		err := r.appendLocked([]ondisk.Key{keys[0].Key}, relogReserve)
		r.journal.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(r.gc.kicked) == 0 || r.writeback.want.Load() == 0 {
		t.Errorf("the collector hears of it: %t; write-back is asked for %d ksets", len(r.gc.kicked) > 0, r.writeback.want.Load())
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// fullLog makes a closed cache's log take every segment, as an older version let
// discards do: up to where a kset would need another one.
func fullLog(t *testing.T, mem Memory, disk *backing.Fake) {
	t.Helper()
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.zero(t, 0, sectorSize)
	head := &r.queues[0].head
	keys := make([]ondisk.Key, ondisk.MaxKeys)
	for i := range keys {
		keys[i] = ondisk.Key{Off: uint64(2*i) * sectorSize, Len: sectorSize, Flags: ondisk.KeyZero, Seg: head.seg, SegOff: r.queues[0].zeros.off, Gen: r.segments.all[head.seg].gen.Load()}
		if r.crc {
			keys[i].CRC = zeroSum(sectorSize)
		}
	}
	r.journal.mu.Lock()
	for r.segments.free() > 0 || roomAt(r.journal.mu.head) >= ondisk.MaxKsetSize+ondisk.KsetSize(1) {
		if r.segments.free() == 0 && roomAt(r.journal.mu.head) < 2*ondisk.MaxKsetSize {
			keys = keys[:1]
		}
		if err := r.appendLocked(keys, 0); err != nil {
			t.Fatal(err)
		}
	}
	r.journal.mu.Unlock()
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestFullLogOpens: a cache that was left without any free segment, with one sector
// that the disk refuses at the very beginning of the log, goes on once it is opened.
func TestFullLogOpens(t *testing.T) {
	const bad = 100_000
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("crc=%t", crc), func(t *testing.T) {
			mem := pmem.NewFake(ondisk.MinSize)
			formatSmall(t, mem, 5, crc, 70)
			disk := backing.NewFake(64<<20, sectorSize, 1)
			defer disk.Close()
			badBlocks(disk, bad, 1)
			r := newRig(t, mem, disk, 1)
			r.mustRest(t)
			r.write(t, bad*sectorSize, stamped(bad, 1, 1))
			if err := r.kill(); err != nil {
				t.Fatal(err)
			}
			fullLog(t, mem, disk)
			r = newRig(t, mem, disk, 1)
			within(t, "a write of more than there is room for", func() {
				for i := range int64(3) {
					r.write(t, i<<20, stamped(i<<11, 2048, 2))
				}
			})
			if v := r.version(t, bad); v != 1 {
				t.Errorf("the sector that the disk refuses has version %d", v)
			}
			within(t, "overwriting that sector", func() { r.write(t, bad*sectorSize, stamped(bad, 1, 3)) })
			disk.Script(nil)
			if err := r.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.kill()
			p := make([]byte, sectorSize)
			disk.ReadAt(p, bad*sectorSize)
			if v, err := stamp(p, bad); v != 3 || err != nil {
				t.Errorf("the disk has version %d, %v", v, err)
			}
		})
	}
}

// TestSlowDisk: dirty_tail moves every few steps of a disk that does little at a time,
// although a round could take all that is dirty.
func TestSlowDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const count = 4000
		for _, op := range []Op{Zero, Write} {
			mem := pmem.Heap(ondisk.MinSize)
			formatSmall(t, mem, 8, false, 70)
			disk := backing.NewFake(8<<20, sectorSize, 1)
			defer disk.Close()
			var healed atomic.Bool
			disk.Script(func(op backing.Op) (f backing.Fault) {
				if !healed.Load() && op.Kind != backing.OpRead {
					f.Delay = 50 * time.Millisecond
				}
				return f
			})
			c, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, WritebackDepth: 4, Log: &testLog{}})
			if err != nil {
				t.Fatal(err)
			}
			r := startRig(c)
			r.mustRest(t)
			for i := range int64(count) {
				lba := i * 37 % count * 2
				if op == Zero {
					r.zero(t, lba*sectorSize, sectorSize)
				} else {
					r.write(t, lba*sectorSize, stamped(lba, 1, 1))
				}
			}
			r.writeback.step = 100 * time.Millisecond
			r.neverWait()
			r.Resume()
			_, begin := r.tails.dirtyTail()
			within(t, "some steps of dirty_tail", func() {
				last, steps := begin, 0
				for steps < 3 && last < begin+count {
					if _, now := r.tails.dirtyTail(); now > last {
						steps++
						last = now
					}
					time.Sleep(time.Millisecond)
				}
			})
			if _, now := r.tails.dirtyTail(); now >= begin+count/2 {
				t.Errorf("%d of %d ksets were written before dirty_tail had moved three times", now-begin, count)
			}
			healed.Store(true)
			if err := r.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.kill()
			p := make([]byte, sectorSize)
			for lba := int64(0); lba < 2*count; lba += 2 {
				disk.ReadAt(p, lba*sectorSize)
				want := uint64(1)
				if op == Zero {
					want = 0
				}
				if v, err := stamp(p, lba); v != want || err != nil {
					t.Fatalf("sector %d of the disk: version %d, %v", lba, v, err)
				}
			}
		}
	})
}

// TestZeroesPace: transfers of zeros grow where the disk makes them at once, and
// shrink where it has to write them.
func TestZeroesPace(t *testing.T) {
	w := writeback{step: roundTime, zeroes: ondisk.StripeSize}
	for _, x := range []struct {
		n, times int
		took     time.Duration
		want     int
	}{
		{4096, 1, time.Millisecond, ondisk.StripeSize}, {MaxZero, 2, time.Millisecond, 16 << 20}, {MaxZero, 9, time.Millisecond, MaxZero},
		{MaxZero, 9, roundTime / 10, MaxZero}, {4096, 1, roundTime, MaxZero / 2}, {MaxZero, 9, roundTime, ondisk.StripeSize},
	} {
		for range x.times {
			w.zeroesTook(x.n, x.took)
		}
		if w.zeroes != x.want {
			t.Errorf("after %d that took %v: %d bytes, want %d", x.times, x.took, w.zeroes, x.want)
		}
	}
}

// voidDisk takes no time and no memory.
type voidDisk struct{ size int64 }

func (d voidDisk) Read(buf []byte, _ int64, done func(error)) {
	clear(buf)
	go done(nil)
}
func (d voidDisk) Write(_ []byte, _ int64, done func(error)) { go done(nil) }
func (d voidDisk) Zero(_, _ int64, done func(error))         { go done(nil) }
func (d voidDisk) Flush(done func(error))                    { go done(nil) }
func (d voidDisk) Size() int64                               { return d.size }
func (d voidDisk) BlockSize() int                            { return sectorSize }
func (d voidDisk) Buffer(n int) []byte                       { return make([]byte, n) }

// TestDiscardsAndWrites: a client that discards all the time leaves room to one that
// writes.
func TestDiscardsAndWrites(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 7, false, 70)
	c, err := Open(mem, voidDisk{1 << 40}, Options{Queues: 2, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	r := startRig(c)
	var clients sync.WaitGroup
	stop := make(chan struct{})
	for id := range int64(16) {
		clients.Go(func() {
			for i := id; ; i += 16 {
				select {
				case <-stop:
					return
				default:
				}
				if err := r.do(0, &Request{Op: Zero, Off: i % 4_000_000 * 8192, Len: 4096}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for r.Status().Waiting == 0 { // until the cache has been full once
		time.Sleep(time.Millisecond)
	}
	within(t, "writing four times the cache beside discards", func() {
		for i := range int64(4 * 7 * 16) {
			if err := r.do(1, &Request{Op: Write, Off: 500<<30 + i<<20, Buf: make([]byte, 1<<20)}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	if s := r.Status(); s.LongestWait > time.Minute {
		t.Errorf("a request has waited for %v", s.LongestWait)
	}
	close(stop)
	clients.Wait()
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestRefusedEverywhere: a sector that the disk refuses in each segment that is written
// does not fill the cache. The rest goes on, whatever the order, also after restarts
// and when what is deferred is overwritten, and the disk gets it all when it is well.
func TestRefusedEverywhere(t *testing.T) {
	for _, x := range []struct {
		name      string
		crc, zero bool
		most      int
	}{{"data", false, false, maxDeferred}, {"sums", true, false, maxDeferred}, {"zeros", true, true, maxDeferred}, {"passed by", true, true, 2}} {
		t.Run(x.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const bad, stripes = 40, 40
				mem := pmem.NewFake(ondisk.MinSize)
				formatSmall(t, mem, 6, x.crc, 70)
				disk := backing.NewFake(stripes<<20*4, sectorSize, 1)
				defer disk.Close()
				var healed atomic.Bool
				disk.Script(func(op backing.Op) (f backing.Fault) {
					first := (op.Off + ondisk.StripeSize - 1 - bad*sectorSize) / ondisk.StripeSize // that may be refused
					if !healed.Load() && op.Kind != backing.OpRead && first*ondisk.StripeSize+bad*sectorSize < op.Off+op.Len {
						f.Err = syscall.EIO
					}
					return f
				})
				open := func(queues int) *rig {
					r := newRig(t, mem, disk, queues)
					r.narrow(t, x.most, roundTime)
					return r
				}
				r := open(2)
				want := map[int64]uint64{}
				check := func(when string) {
					t.Helper()
					for lba, version := range want {
						if v := r.version(t, lba); v != version {
							t.Fatalf("%s: sector %d has version %d, want %d", when, lba, v, version)
						}
					}
				}
				for round := range uint64(3) {
					within(t, "writing around what the disk refuses", func() {
						for i := range int64(stripes) {
							lba := i * stripeSectors
							op := &Request{Op: Write, Off: (lba + bad) * sectorSize, Buf: stamped(lba+bad, 1, 2+round)}
							want[lba+bad] = 2 + round
							if x.zero && i%2 == 0 {
								op = &Request{Op: Zero, Off: op.Off, Len: sectorSize}
								want[lba+bad] = 0
							}
							rest := &Request{Op: Write, Off: (lba + 64) * sectorSize, Buf: stamped(lba+64, 4000, 2+round)}
							want[lba+4000] = 2 + round
							for _, req := range []*Request{op, rest} {
								if err := r.do(int(i/4)%len(r.loops), req); err != nil {
									t.Error(err)
									return
								}
							}
						}
					})
					check("with bad sectors")
					if round == 1 {
						if err := r.kill(); err != nil {
							t.Fatal(err)
						}
						r = open(1)
						check("after a restart")
					}
				}
				r.checkOverwritten(t)
				healed.Store(true)
				if err := r.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				r.kill()
				p := make([]byte, sectorSize)
				for lba, version := range want {
					disk.ReadAt(p, lba*sectorSize)
					if v, err := stamp(p, lba); v != version || err != nil {
						t.Fatalf("sector %d of the disk: version %d, %v, want %d", lba, v, err, version)
					}
				}
			})
		})
	}
}

// discarder is a client that discards single sectors, many at a time.
func (s storm) discarder(t *testing.T, r *rig, g *ledger, id int, dice *rand.Rand) {
	for range *stormOps / 4 {
		var waits []func() error
		var lbas []int64
		for range 64 {
			u := dice.IntN(int(s.diskMiB))
			u = u - u%s.clients + id
			lba := int64(u)<<11 + dice.Int64N(2048)
			if u >= int(s.diskMiB) || slices.Contains(lbas, lba) {
				continue
			}
			version := g.begun[lba].Load() + 1
			g.begun[lba].Store(version)
			g.zeroed[lba].Store(version)
			lbas = append(lbas, lba)
			waits = append(waits, r.begin(dice.IntN(s.queues), &Request{Op: Zero, Off: lba * sectorSize, Len: sectorSize}))
		}
		for i, wait := range waits {
			switch err := wait(); {
			case err == errKilled:
				return
			case err != nil:
				t.Errorf("zero: %v", err)
				return
			}
			g.acked[lbas[i]].Store(g.begun[lbas[i]].Load())
		}
	}
}

// TestProgress is a storm of writes and discards over a disk that is slow and refuses
// some sectors, killed and opened again now and then: every request finishes, also
// those for what is refused, and all is right.
func TestProgress(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	for i, s := range []storm{
		{queues: 1, clients: 4, segments: 5, diskMiB: 64, maxIO: 512 << 10, gcPercent: 70, discarders: 2},
		{queues: 3, clients: 6, segments: 7, diskMiB: 96, maxIO: 512 << 10, gcPercent: 70, crc: true, discarders: 3},
		{queues: 2, clients: 6, segments: 6, diskMiB: 32, maxIO: 16 << 10, gcPercent: 0, discarders: 5},
		{queues: 2, clients: 6, segments: 8, diskMiB: 160, maxIO: 1 << 20, gcPercent: 70, discarders: 1, most: 2},
	} {
		t.Run(fmt.Sprintf("%dq-%dmib", s.queues, s.diskMiB), func(t *testing.T) {
			dice := rand.New(rand.NewPCG(seed, uint64(i)))
			s.patient = true
			bad := dice.Int64N(4 << 20 >> sectorShift)
			s.script = func(op backing.Op) (f backing.Fault) { // one at a time
				const every = 4 << 20 // bytes have a sector that is refused
				next := (op.Off - bad*sectorSize + every - 1) / every
				switch {
				case op.Kind == backing.OpRead:
				case op.Kind != backing.OpFlush && max(0, next)*every+bad*sectorSize < op.Off+op.Len:
					f.Err = syscall.EIO
				default:
					f.Delay = time.Duration(dice.IntN(3)) * time.Millisecond
				}
				return f
			}
			s.run(t, seed+uint64(i))
		})
	}
}
