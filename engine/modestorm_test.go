package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
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

// tally knows what sectors may hold that several clients write to at once. A write is
// over, or has had no effect, when it is answered: so a version is out of the
// question once a write is acknowledged that began after the end of the version's own.
type tally struct {
	cold atomic.Int64 // places taken, see nextCold
	mu   struct {
		sync.Mutex
		clock   int64
		ends    []int64 // of each version; those of 0 are the sectors' own
		sectors []tallied
	}
}

// tallied is a sector.
type tallied struct {
	acked  int64 // the latest beginning of an acknowledged write
	zeroed int64 // the latest end of a Zero
	zeroes int   // how many are under way
}

const notEnded = math.MaxInt64

func newTally(sectors int64) *tally {
	g := &tally{}
	g.mu.ends = make([]int64, 1)
	g.mu.sectors = make([]tallied, sectors)
	return g
}

// begin gives a write a version, and stamps its data with that.
func (g *tally) begin(r *Request) (version uint64, at int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mu.clock++
	version = uint64(len(g.mu.ends))
	g.mu.ends = append(g.mu.ends, notEnded)
	if r.Op == Zero {
		for i := range g.of(r) {
			g.of(r)[i].zeroes++
		}
	}
	return version, g.mu.clock
}

func (g *tally) of(r *Request) []tallied {
	return g.mu.sectors[r.Off/sectorSize:][:r.size()/sectorSize]
}

// end is told of a write's answer.
func (g *tally) end(r *Request, version uint64, began int64, acked bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mu.clock++
	g.mu.ends[version] = g.mu.clock
	for i := range g.of(r) {
		s := &g.of(r)[i]
		if acked {
			s.acked = max(s.acked, began)
		}
		if r.Op == Zero {
			s.zeroed = g.mu.clock
			s.zeroes--
		}
	}
}

// acked returns what acknowledged writes rule out now.
func (g *tally) acked(lba int64, n int) []int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	acked := make([]int64, n)
	for i := range acked {
		acked[i] = g.mu.sectors[lba+int64(i)].acked
	}
	return acked
}

// check compares sectors, which were read after acked was asked for.
func (g *tally) check(p []byte, lba int64, acked []int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range acked {
		v, err := stamp(p[i*sectorSize:][:sectorSize], lba+int64(i))
		if err != nil {
			return err
		}
		if v >= uint64(len(g.mu.ends)) {
			return fmt.Errorf("sector %d has version %d, which nobody wrote", lba+int64(i), v)
		}
		end := g.mu.ends[v]
		if v == 0 {
			if end = g.mu.sectors[lba+int64(i)].zeroed; g.mu.sectors[lba+int64(i)].zeroes > 0 {
				end = notEnded
			}
		}
		if end < acked[i] {
			return fmt.Errorf("sector %d has version %d, of a write that ended at %d, although one is acknowledged that began at %d", lba+int64(i), v, end, acked[i])
		}
	}
	return nil
}

// modeStorm is a storm of clients that write to the same sectors.
type modeStorm struct {
	storm
	durable bool
	writes  int // one of so many writes of the disk fails, 0 for none
	flushes int // likewise
}

// hotSpots are where clients meet: around the border of two stripes, and in the middle of
// one.
var hotSpots = [...]int64{stripeSectors - hotSectors/2, stripeSectors + 3000}

const hotSectors = 64

// TestModeStorm lets several clients write to the same sectors while the mode changes, the
// cache rests and changes hands, and the disk refuses some writes. In a mode
// that promises a clean cache the disk alone has all that is acknowledged, at any moment, and
// each round ends with a power cut in which the region is lost, too, where that is promised.
func TestModeStorm(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	for i, s := range modeStorms {
		t.Run(fmt.Sprintf("%d-%dq-%dmib", i, s.queues, s.diskMiB), func(t *testing.T) { s.run(t, seed+uint64(i)) })
	}
}

var modeStorms = []modeStorm{
	{storm: storm{queues: 1, clients: 4, segments: 6, diskMiB: 16, maxIO: 256 << 10, gcPercent: 0}, durable: true},
	{storm: storm{queues: 2, clients: 6, segments: 8, diskMiB: 96, maxIO: 1 << 20, gcPercent: 30, crc: true}, durable: true, writes: 200, flushes: 200},
	{storm: storm{queues: 3, clients: 12, segments: 8, diskMiB: 32, maxIO: 64 << 10, gcPercent: 0}, writes: 200, flushes: 50},
}

// modeNow is the mode that is in force for sure while its lock is held.
type modeNow struct {
	sync.RWMutex
	ondisk.Mode
}

func (s modeStorm) run(t *testing.T, seed uint64) {
	dice := rand.New(rand.NewPCG(seed, 0))
	disk := backing.NewFake(s.diskMiB<<20, sectorSize, seed)
	defer func() { disk.Close() }()
	g := newTally(disk.Size() / sectorSize)
	mem := s.format(t)
	changes, looks, lost := 0, 0, 0
	for range *rounds {
		s.trouble(disk, dice.Uint64())
		first := newRig(t, mem, disk, s.queues)
		r := &relay{current: first}
		var mode modeNow
		mode.Mode = first.Settings().Mode

		var clients, others sync.WaitGroup
		for range s.clients {
			dice := rand.New(rand.NewPCG(dice.Uint64(), 1))
			clients.Go(func() { s.client(t, r, g, dice) })
		}
		ended, stop := make(chan struct{}), make(chan struct{})
		go func() { clients.Wait(); close(ended) }()
		setter, looker := rand.New(rand.NewPCG(dice.Uint64(), 2)), rand.New(rand.NewPCG(dice.Uint64(), 3))
		others.Go(func() { changes += s.changeModes(t, r, &mode, stop, setter) })
		others.Go(func() { looks += s.look(t, disk, g, &mode, stop, looker) })
		s.changeHands(t, r, mem, disk, g, ended, dice)
		close(stop)
		others.Wait()
		if t.Failed() {
			r.current.kill()
			return
		}

		last := r.current
		clean := promisesClean(last.Settings().Mode)
		if err := last.kill(); err != nil {
			t.Fatal(err)
		}
		after := disk.Crash()
		disk.Close()
		if disk = after; clean {
			lost++
			mem = s.format(t)
		}
		again := newRig(t, mem, disk, s.queues)
		s.verify(t, again, g)
		if err := again.kill(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d changes of mode, %d looks at the disk alone, the region was lost %d times", changes, looks, lost)
}

func (s modeStorm) format(t *testing.T) Memory {
	t.Helper()
	var mem Memory = pmem.Heap(ondisk.MinSize)
	if s.durable {
		mem = durableHeap{mem}
	}
	formatSmall(t, mem, uint32(s.segments), s.crc, s.gcPercent)
	return &firstPage{Memory: mem}
}

// durableHeap passes for a region that needs no syncs.
type durableHeap struct{ Memory }

func (durableHeap) Durable() bool { return true }

// trouble lets the disk take its time, and refuse some of what it is to do.
func (s modeStorm) trouble(disk *backing.Fake, seed uint64) {
	dice := rand.New(rand.NewPCG(seed, 0))
	disk.Script(func(op backing.Op) (f backing.Fault) { // under the disk's lock
		if dice.IntN(4) == 0 {
			f.Delay = time.Duration(dice.IntN(500)) * time.Microsecond
		}
		if op.Kind == backing.OpWrite && dice.IntN(16) == 0 {
			f.Delay = time.Duration(dice.IntN(5000)) * time.Microsecond // others overtake it
		}
		switch {
		case op.Kind == backing.OpFlush && s.flushes > 0 && dice.IntN(s.flushes) == 0,
			(op.Kind == backing.OpWrite || op.Kind == backing.OpZero) && s.writes > 0 && dice.IntN(s.writes) == 0:
			f.Err = syscall.EIO
		}
		return f
	})
}

// nextCold returns sectors that nobody has written to for long, so that the cache knows
// nothing of them: a write may go around it.
func (g *tally) nextCold() (lba int64) { return coldSpot(g.cold.Add(1)) }

func coldSpot(n int64) int64 { return 2*stripeSectors + n*coldSectors%stripeSectors }

const coldSectors = 8

func (s modeStorm) client(t *testing.T, r *relay, g *tally, dice *rand.Rand) {
	for range *stormOps {
		lba, n := hotSpots[dice.IntN(len(hotSpots))], int64(hotSectors)
		if dice.IntN(4) == 0 {
			lba, n = dice.Int64N(s.diskMiB<<20/sectorSize), int64(s.maxIO/sectorSize)
		}
		skip := dice.Int64N(n)
		lba, n = lba+skip, 1+dice.Int64N(n-skip)
		lba = min(lba, s.diskMiB<<20/sectorSize-1)
		n = min(n, stripeSectors-lba%stripeSectors, s.diskMiB<<20/sectorSize-lba)
		req := &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, n*sectorSize)}
		queue := dice.IntN(s.queues)
		op := dice.IntN(8)
		if op < 3 {
			acked := g.acked(lba, int(n))
			switch err := r.do(queue, req); {
			case errors.Is(err, syscall.EIO):
				continue
			case err != nil:
				t.Errorf("read: %v", err)
				return
			}
			if err := g.check(req.Buf, lba, acked); err != nil {
				t.Errorf("read: %v", err)
				return
			}
			continue
		}
		if req.Op = Write; op == 3 {
			req.Op, req.Len, req.Buf = Zero, len(req.Buf), nil
		}
		var other sync.WaitGroup
		if op == 4 { // two at once where neither may find anything
			req.Off, req.Buf = g.nextCold()*sectorSize, req.Buf[:sectorSize]
			second := &Request{Op: Write, Off: req.Off, Buf: make([]byte, coldSectors*sectorSize)}
			queue := dice.IntN(s.queues)
			other.Go(func() { s.write(t, r, g, queue, second) })
		}
		s.write(t, r, g, queue, req)
		other.Wait()
	}
}

func (s modeStorm) write(t *testing.T, r *relay, g *tally, queue int, req *Request) {
	version, began := g.begin(req)
	if req.Op == Write {
		fillStamp(req.Buf, req.Off/sectorSize, version)
	}
	err := r.do(queue, req)
	if err != nil && (s.writes+s.flushes == 0 || !errors.Is(err, syscall.EIO)) {
		t.Errorf("op %d: %v", req.Op, err)
	}
	g.end(req, version, began, err == nil)
}

// changeModes changes the mode until it is told to stop, and returns how often it has.
func (s modeStorm) changeModes(t *testing.T, r *relay, mode *modeNow, stop <-chan struct{}, dice *rand.Rand) (changes int) {
	for {
		select {
		case <-stop:
			return changes
		case <-time.After(time.Duration(dice.IntN(20_000)) * time.Microsecond):
		}
		wanted := ondisk.Mode(dice.IntN(int(ondisk.PassThrough) + 1))
		ctx, cancel := context.WithCancel(context.Background())
		if dice.IntN(4) == 0 {
			patience := time.Duration(dice.IntN(2000)) * time.Microsecond
			go func() {
				select {
				case <-stop:
				case <-time.After(patience):
				}
				cancel()
			}()
		}
		mode.Lock()
		r.mu.RLock()
		now := r.current
		r.mu.RUnlock()
		err := now.Set(ctx, func(set *Settings) error { set.Mode = wanted; return nil })
		cancel()
		switch {
		case err == nil:
			changes++
			mode.Mode = wanted
		case errors.Is(err, context.Canceled), errors.Is(err, ErrResting), errors.Is(err, ErrStopped):
		case s.writes+s.flushes > 0 && errors.Is(err, syscall.EIO):
		default:
			t.Errorf("mode %v: %v", wanted, err)
		}
		if got := now.Settings().Mode; got != mode.Mode {
			t.Errorf("the mode is %v, want %v (%v)", got, mode.Mode, err)
		}
		mode.Unlock()
	}
}

// look looks at the disk as a power cut would leave it while the mode promises that it has
// everything, and returns how often it has.
func (s modeStorm) look(t *testing.T, disk *backing.Fake, g *tally, mode *modeNow, stop <-chan struct{}, dice *rand.Rand) (looks int) {
	buf := make([]byte, 256<<10)
	for {
		select {
		case <-stop:
			return looks
		case <-time.After(time.Duration(dice.IntN(300)) * time.Microsecond):
		}
		lba, p := hotSpots[dice.IntN(len(hotSpots))], buf[:hotSectors*sectorSize]
		if dice.IntN(8) == 0 {
			lba, p = dice.Int64N((s.diskMiB<<20-int64(len(buf)))/sectorSize), buf
		}
		mode.RLock()
		if promisesClean(mode.Mode) {
			looks++
			acked := g.acked(lba, len(p)/sectorSize)
			disk.CrashAt(p, lba*sectorSize)
			if err := g.check(p, lba, acked); err != nil {
				t.Errorf("on the disk alone, in mode %v: %v", mode.Mode, err)
			}
		}
		mode.RUnlock()
	}
}

// changeHands has the cache rest and change hands until the clients have ended.
func (s modeStorm) changeHands(t *testing.T, r *relay, mem Memory, disk *backing.Fake, g *tally, ended <-chan struct{}, dice *rand.Rand) {
	o, checked := Options{Queues: s.queues, Log: &testLog{}}, g.cold.Load()
	for {
		for until := r.served.Load() + int64(dice.IntN(300)); r.served.Load() < until; {
			select {
			case <-ended:
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
		old := r.current
		head, err := old.Rest(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, lba := range hotSpots {
			checkClean(t, old.Cache, disk, lba, hotSectors)
		}
		for now := g.cold.Load(); checked < now; checked++ {
			checkClean(t, old.Cache, disk, coldSpot(checked), coldSectors)
		}
		if dice.IntN(4) == 0 {
			old.Resume()
			continue
		}
		f, err := Follow(mem, fakeDisk{disk}, o, head)
		if err != nil {
			t.Fatal(err)
		}
		r.mu.Lock()
		old.leave()
		last, err := old.Retire()
		if err != nil {
			t.Fatal(err)
		}
		c, err := f.TakeOver(last)
		if err != nil {
			t.Fatal(err)
		}
		r.current = startRig(c)
		r.mu.Unlock()
	}
}

// checkClean fails unless the disk has what a cache at rest calls clean.
func checkClean(t *testing.T, c *Cache, disk *backing.Fake, lba, n int64) {
	t.Helper()
	var scratch []byte
	for end := lba + n; lba < end; lba++ {
		at := c.index.span(lba, 1)
		at.sh.Lock()
		parts := at.partsLocked(nil, func(e extent) bool { return e.flags&(extClaim|extDirty) == 0 })
		at.sh.Unlock()
		var cached, there [sectorSize]byte
		for _, e := range parts {
			if e.flags&extZero == 0 {
				if err := c.readExtent(cached[:], e, &scratch); err != nil {
					t.Errorf("sector %d: %v", lba, err)
					return
				}
			}
			disk.ReadAt(there[:], lba*sectorSize)
			if cached != there {
				t.Errorf("sector %d is clean and begins with %x, on the disk with %x", lba, cached[:16], there[:16])
			}
		}
	}
}

// verify reads the whole device.
func (s modeStorm) verify(t *testing.T, r server, g *tally) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < s.diskMiB<<20; off += int64(len(buf)) {
		lba := off / sectorSize
		acked := g.acked(lba, len(buf)/sectorSize)
		if err := r.do(0, &Request{Op: Read, Off: off, Buf: buf}); err != nil {
			t.Fatal(err)
		}
		if err := g.check(buf, lba, acked); err != nil {
			t.Errorf("after a power cut: %v", err)
			return
		}
	}
}
