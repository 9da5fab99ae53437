package engine

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestCrashStates looks at what power cuts can leave. Clients work on a small
// cache, over a recorder; at every fence or sync, and now and then between,
// the world is held, and of all the regions that a power cut of this moment
// could leave some dozens are opened. Each must hold every acknowledged write
// and nothing that was never written there.
//
// Some of them go on: more writes, write-back, garbage collection, a restart,
// and with the power cut once more in the middle of all that, replay included.
//
// A life is one cache with its own options. What is random in it comes from
// its seed, but for the scheduling of goroutines.

var (
	crashSeed   = flag.Uint64("crash.seed", 0, "seed of the first life of TestCrashStates; 0 draws one")
	crashStates = flag.Int64("crash.states", 20_000, "number of different states that TestCrashStates opens")
)

const (
	// The device is empty but for a window around the border of two stripes,
	// small because all of it is read in every state.
	windowOff     = ondisk.StripeSize - windowSize/2
	windowSize    = windowSectors * sectorSize
	windowSectors = 512

	// allStates is how many states of a moment are opened at most: all of them
	// where a kset with one key, of 8 words, is what is open. That is much work
	// for one moment, so most have to do with fewStates.
	allStates = 256
	fewStates = 12
	// bigMoment is how many open words make a state expensive.
	bigMoment = 4096
)

func TestCrashStates(t *testing.T) {
	x := &explorer{t: t, seed: *crashSeed, want: *crashStates, failed: make(chan struct{})}
	if x.seed == 0 {
		x.seed = rand.Uint64()
	}
	t.Logf("seed %d (-crash.seed)", x.seed)
	var shards sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		shards.Go(func() {
			for !x.done() {
				newLife(x, x.seed+x.lives.Add(1)-1).run()
			}
		})
	}
	shards.Wait()
	t.Logf("%d different states of %d moments, %d of them after a second power cut; %d lives with %d restarts, %d of them after a power cut; "+
		"%d went on, %d moments had a full cache, the log changed its segment %d times, key_tail moved %d times, memory was lost %d times",
		x.states.Load(), x.moments.Load(), x.second.Load(), x.lives.Load(), x.restarts.Load(), x.cuts.Load(),
		x.wentOn.Load(), x.full.Load(), x.crossed.Load(), x.collected.Load(), x.punched.Load())
	if x.err != nil {
		t.Fatal(x.err)
	}
}

// explorer is what all lives share.
type explorer struct {
	t      *testing.T
	seed   uint64
	want   int64
	lives  atomic.Uint64
	failed chan struct{}
	once   sync.Once
	err    error // set before failed is closed

	states, second, wentOn, moments, restarts, cuts, full, crossed, collected, punched atomic.Int64
}

func (x *explorer) fail(err error) {
	x.once.Do(func() {
		x.err = err
		close(x.failed)
	})
}

func (x *explorer) done() bool {
	select {
	case <-x.failed:
		return true
	default:
		return x.states.Load() >= x.want
	}
}

// life is one cache, with its log near the end of a segment. It ends soon after
// the log has gone on in another.
type life struct {
	*explorer
	seed      uint64
	durable   bool
	crc       bool
	segments  uint32
	queues    int
	clients   int
	gcPercent int
	encore    int          // steps of a client once the log is in its second segment
	bad       int          // sector of the window that the disk refuses to write, -1 for none
	holes     atomic.Int32 // how many more segments lose memory

	mu struct {
		sync.Mutex
		dice   *rand.Rand
		seen   map[uint64]struct{} // states, by their sums
		looks  int                 // at moments of the present run
		killAt int
		killed chan struct{} // closed at that look
		cut    *snapshot     // one of those moments
	}
}

func newLife(x *explorer, seed uint64) *life {
	dice := rand.New(rand.NewPCG(seed, 0))
	l := &life{explorer: x, seed: seed, durable: dice.IntN(3) > 0, queues: 1 + dice.IntN(3)}
	l.crc = !l.durable || dice.IntN(2) == 0
	l.segments = uint32(segmentsFor(l.queues) + dice.IntN(3))
	if dice.IntN(3) == 0 {
		l.holes.Store(1 + dice.Int32N(3))
		l.segments += uint32(l.holes.Load())
	}
	l.clients = l.queues + dice.IntN(2)
	l.gcPercent = []int{0, 30, 70, 90}[dice.IntN(4)]
	l.encore = []int{4, 4, 4, 60}[dice.IntN(4)]
	if l.bad = -1; dice.IntN(3) == 0 {
		l.bad = dice.IntN(windowSectors)
	}
	l.mu.dice, l.mu.seen = dice, map[uint64]struct{}{}
	return l
}

func (l *life) String() string {
	return fmt.Sprintf("seed %d: durable %v, crc %v, %d segments, %d queues, %d clients, gc_percent %d, bad sector %d, %d more holes",
		l.seed, l.durable, l.crc, l.segments, l.queues, l.clients, l.gcPercent, l.bad, l.holes.Load())
}

// draw returns dice for one goroutine.
func (l *life) draw() *rand.Rand {
	l.mu.Lock()
	defer l.mu.Unlock()
	return rand.New(rand.NewPCG(l.mu.dice.Uint64(), 0))
}

// snapshot is everything at one moment.
type snapshot struct {
	moment
	disk    []byte // the window as a power cut leaves it
	sectors []sectorHistory
	modes   []ondisk.Mode
}

func (l *life) run() {
	dice := l.draw()
	h := newHistory()
	content := make([]byte, windowSize)
	fillStamp(content, windowOff/sectorSize, h.next)
	disk := l.newDisk(content)
	l.spoil(disk)
	mem := newRecorder(l.format(dice, content), dice.Uint64(), l.durable)
	live := true // the power was not cut before this run
	for crossed := false; !crossed && !l.done(); {
		l.mu.Lock()
		l.mu.looks, l.mu.killAt, l.mu.cut = 0, 1+dice.IntN(400), nil
		l.mu.killed = make(chan struct{})
		l.mu.Unlock()
		l.watch(mem, disk, h, 0)
		r, err := l.reopen(mem, disk, h, live)
		if err != nil {
			l.fail(fmt.Errorf("%v: %w", l, err))
			break
		}
		first, _ := r.journal.head()
		tail := r.tails.keyTail()
		var clients sync.WaitGroup
		for id := range l.clients {
			dice := l.draw()
			clients.Go(func() {
				if err := l.client(r, h, id, l.clients, dice, 60); err != nil {
					l.fail(fmt.Errorf("%v: %w", l, err))
				}
			})
		}
		ended := make(chan struct{})
		go func() { clients.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-l.mu.killed:
		case <-l.failed:
		}
		l.mu.Lock()
		s := l.mu.cut
		l.mu.Unlock()
		live = s == nil || dice.IntN(2) == 0
		if err := r.kill(); err != nil {
			l.fail(fmt.Errorf("%v: %w", l, err))
		}
		<-ended
		if last, _ := r.journal.head(); last.Seg != first.Seg {
			crossed = true
			l.explorer.crossed.Add(1)
		}
		if r.tails.keyTail() != tail {
			l.collected.Add(1)
		}
		l.restarts.Add(1)
		if !live {
			l.cuts.Add(1)
			disk.Close()
			disk = l.newDisk(s.disk)
			l.spoil(disk)
			h = &history{next: h.next, sectors: s.sectors, modes: s.modes}
			choices := s.choices(dice, fewStates)
			region, sum := s.leave(choices[dice.IntN(len(choices))])
			mem = newRecorder(region, sum, l.durable)
		}
	}
	disk.Close()
}

// punch makes a hole in the memory where the log goes on, or is going to when it
// or a queue needs a segment. The place where the log ends stays good, so it can
// be led away from there.
func (l *life) punch(r *rig, mem *recorder, dice *rand.Rand) {
	if l.holes.Add(-1) < 0 {
		return
	}
	l.punched.Add(1)
	at := func(seg, off uint32) {
		mem.mu.live.Punch(r.layout.Offset(seg, off), int64(min(4096, ondisk.SegmentData-off)))
	}
	r.journal.mu.Lock()
	defer r.journal.mu.Unlock()
	r.segments.mu.Lock()
	defer r.segments.mu.Unlock()
	head := r.journal.mu.head
	if free := r.segments.mu.freeList; len(free) > 0 && dice.IntN(3) == 0 {
		at(free[0], 0)
	} else if off := head.Off + ondisk.KsetHeaderSize*uint32(1+dice.IntN(8)); off < ondisk.SegmentData {
		at(head.Seg, off)
	}
}

// format makes a cache that is soon full: its log begins near the end of a
// segment, and so does, behind one clean sector each, the room in some of the
// segments for data. On DAX valid ksets lie wherever the log may go on, as an
// earlier use of the segment has left them. In the page cache a power cut may
// keep a torn first kset and lose the end mark behind it, and then such a one
// is still taken for the successor of a damaged kset.
func (l *life) format(dice *rand.Rand, content []byte) *pmem.Fake {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(l.t, mem, l.segments, l.crc, l.gcPercent)
	at := func(seg, off uint32) int64 {
		return ondisk.SegmentsOff + int64(seg)*ondisk.SegmentSize + ondisk.SegmentHeader + int64(off)
	}
	var buf [ondisk.MaxKsetSize]byte
	kset := func(keys ...ondisk.Key) []byte { return ondisk.EncodeKset(buf[:], 1+dice.Uint64N(1<<40), keys) }

	log := ondisk.Position{Off: ondisk.SegmentData - 8*uint32(64+dice.IntN(2<<10))}
	beginLog(l.t, mem, log)
	leave := func(seg, from, to uint32) {
		for off := from; l.durable && off+ondisk.KsetSize(1) <= to; off += ondisk.KsetSize(1) {
			store(l.t, mem, kset(ondisk.Key{
				Off: uint64(windowOff + sectorSize*dice.IntN(windowSectors)), Len: sectorSize,
				Seg: 1 + uint32(dice.IntN(int(l.segments-1))), SegOff: ondisk.SegmentData - sectorSize,
			}), at(seg, off))
		}
	}
	leave(log.Seg, log.Off, ondisk.SegmentData)
	var keys []ondisk.Key
	for seg := uint32(1); seg < l.segments; seg++ {
		if dice.IntN(4) == 0 {
			leave(seg, 0, 4<<10)
			continue
		}
		p := content[(seg-1)*sectorSize:][:sectorSize]
		k := ondisk.Key{
			Off: uint64(windowOff + (seg-1)*sectorSize), Len: sectorSize, Flags: ondisk.KeyClean,
			Seg: seg, SegOff: ondisk.SegmentData - sectorSize*uint32(1+dice.IntN(512)),
		}
		if l.crc {
			k.CRC = ondisk.Checksum(p)
		}
		store(l.t, mem, p, at(seg, k.SegOff))
		keys = append(keys, k)
	}
	if len(keys) > 0 {
		store(l.t, mem, kset(keys...), at(log.Seg, log.Off))
		log.Off += ondisk.KsetSize(len(keys))
	}
	if err := mem.Zero(at(log.Seg, log.Off), ondisk.KsetHeaderSize); err != nil {
		l.t.Fatal(err)
	}
	return mem
}

func (l *life) newDisk(content []byte) *backing.Fake {
	disk := backing.NewFake(windowSize, sectorSize, l.draw().Uint64())
	disk.WriteAt(content, 0)
	return disk
}

// spoil lets the disk refuse what touches its bad sector. The data of it stays
// in the cache, which logs it again when it has no room left.
func (l *life) spoil(disk *backing.Fake) {
	if l.bad < 0 {
		return
	}
	at := int64(l.bad) * sectorSize
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if (op.Kind == backing.OpWrite || op.Kind == backing.OpZero) && op.Off <= at && at < op.Off+op.Len {
			f.Err = syscall.EIO
		}
		return f
	})
}

func (l *life) open(mem Memory, disk Disk) (*Cache, error) {
	return Open(mem, disk, Options{Queues: l.queues, WritebackDepth: 1, Log: &testLog{}})
}

// reopen opens a cache with its threads and settles what is found.
func (l *life) reopen(mem *recorder, disk *backing.Fake, h *history, live bool) (*rig, error) {
	mem.mu.live.Mend()
	mem.orphan()
	c, err := l.open(mem, windowDisk{fakeDisk{disk}})
	if err != nil {
		return nil, err
	}
	c.rest(context.Background()) // also before the disk is read, see peek
	now := make([]byte, windowSize)
	disk.ReadAt(now, 0)
	err = peek(c, now)
	if err == nil {
		err = h.judge(now, live)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	if mode := c.Settings().Mode; !slices.Contains(h.modes, mode) {
		c.Close()
		return nil, fmt.Errorf("the mode is %v, may be %v", mode, h.modes)
	}
	h.settle(now)
	h.modes = []ondisk.Mode{c.Settings().Mode}
	r := startRig(c)
	c.Resume()
	return r, nil
}

// watch looks at moments of a region and the disk behind it. cut tells how
// often the power has been cut before.
func (l *life) watch(mem *recorder, disk *backing.Fake, h *history, cut int) {
	mem.hook = func(e event) {
		dice := l.draw()
		if e == afterStore {
			for range dice.IntN(3) {
				runtime.Gosched()
			}
		}
		if l.done() || e == afterStore && dice.IntN(8) > 0 || cut > 0 && dice.IntN(16) > 0 {
			return
		}
		s := &snapshot{}
		mem.freeze(func(m moment) {
			s.moment = m
			// A write that goes around the cache may be answered meanwhile.
			before, modes := h.copy()
			crashed := disk.Crash()
			s.disk = make([]byte, windowSize)
			crashed.ReadAt(s.disk, 0)
			crashed.Close()
			s.sectors, s.modes = h.copy()
			s.modes = append(modes, s.modes...)
			for i := range s.sectors {
				before[i].begun, before[i].zeroed = s.sectors[i].begun, s.sectors[i].zeroed
			}
			s.sectors = before
		})
		l.moments.Add(1)
		most := fewStates / 2
		if cut == 0 {
			most = fewStates
			if s.words() <= bigMoment && dice.IntN(16) == 0 {
				most = allStates
			}
			l.mu.Lock()
			if l.mu.looks++; l.mu.looks == l.mu.killAt {
				close(l.mu.killed)
			}
			if dice.IntN(l.mu.looks) == 0 {
				l.mu.cut = s
			}
			l.mu.Unlock()
		}
		l.explore(s, most, cut, dice)
	}
}

// explore opens states of a moment that no moment had before.
func (l *life) explore(s *snapshot, most, cut int, dice *rand.Rand) {
	window, disk := make([]byte, windowSize), stillDisk{make([]byte, transferBytes)}
	for _, c := range s.choices(dice, most) {
		region, sum := s.leave(c)
		l.mu.Lock()
		_, seen := l.mu.seen[sum]
		l.mu.seen[sum] = struct{}{}
		l.mu.Unlock()
		if seen {
			continue
		}
		if err := l.check(s, region, sum, window, disk, cut, dice); err != nil {
			region, _ := s.leave(c)
			l.fail(fmt.Errorf("%v\npower cut %d: %w\n%s%s", l, cut+1, err, s.describe(c), s.story(region, err)))
		}
		if l.done() {
			return
		}
		l.states.Add(1)
		if cut > 0 {
			l.second.Add(1)
		}
	}
}

// check opens one state.
func (l *life) check(s *snapshot, region *pmem.Fake, sum uint64, window []byte, disk stillDisk, cut int, dice *rand.Rand) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if cut == 0 && dice.IntN(128) == 0 {
		return l.goOn(s, region, sum, dice)
	}
	if l.durable {
		if err := endsForAll(region); err != nil {
			return err
		}
	}
	h := history{sectors: s.sectors, modes: s.modes}
	clean, err := h.judgeMode(region, s.disk)
	if err != nil {
		return err
	}
	c, err := l.open(stillMemory{region, l.durable}, disk)
	if err != nil {
		return err
	}
	defer c.Close()
	c.rest(context.Background()) // stillDisk refuses everything, so what is dirty is deferred
	copy(window, s.disk)
	if err := peek(c, window); err != nil {
		return err
	}
	if clean {
		if err := h.judgeAcked(window); err != nil {
			return err
		}
	}
	return h.judge(window, false)
}

// endsForAll fails if the log ends only because the numbers of its ksets do: the kernel,
// which knows none, would take what stands there for the next one.
func endsForAll(region *pmem.Fake) error {
	l, err := ondisk.ReadLayout(region, region.Size())
	if err != nil {
		return err
	}
	end, err := l.WalkLog(region, l.KeyTail, func(ondisk.Position, *ondisk.Kset) error { return nil })
	if err != nil || end.Damage != nil {
		return err
	}
	var buf [ondisk.MaxKsetSize]byte
	p := buf[:min(ondisk.MaxKsetSize, ondisk.SegmentData-end.Pos.Off)]
	if _, err := region.ReadAt(p, l.Offset(end.Pos.Seg, end.Pos.Off)); err != nil {
		return nil // memory that has gone bad
	}
	var k ondisk.Kset
	for n := range ondisk.MaxKeys + 1 {
		if size := ondisk.KsetSize(n); size <= uint32(len(p)) && ondisk.DecodeKset(p[:size], &k) == nil {
			return fmt.Errorf("the log ends at %v, where a kset numbered %d stands", end.Pos, k.Seq)
		}
	}
	return nil
}

// goOn opens a state, with the power cut again now and then, and uses it.
func (l *life) goOn(s *snapshot, region *pmem.Fake, sum uint64, dice *rand.Rand) error {
	l.wentOn.Add(1)
	disk := l.newDisk(s.disk)
	defer disk.Close()
	mem := newRecorder(region, sum, l.durable)
	h := &history{sectors: slices.Clone(s.sectors), modes: s.modes}
	for i := range h.sectors {
		h.next = max(h.next, h.sectors[i].begun)
	}
	l.watch(mem, disk, h, 1)
	r, err := l.reopen(mem, disk, h, false)
	if err != nil {
		return err
	}
	use := func() error {
		if err := l.client(r, h, 0, 1, dice, 1+dice.IntN(12)); err != nil {
			return fmt.Errorf("after the power cut: %w", err)
		}
		if err := r.Flush(context.Background()); err != nil {
			return fmt.Errorf("write-back after the power cut: %w", err)
		}
		after := disk.Crash()
		defer after.Close()
		now := make([]byte, windowSize)
		after.ReadAt(now, 0)
		if err := h.judge(now, true); err != nil {
			return fmt.Errorf("on the disk alone, after a flush: %w", err)
		}
		return r.setGC(0) // and once more with everything collected
	}
	for range 2 {
		if err = use(); err != nil {
			break
		}
	}
	if killed := r.kill(); err == nil {
		err = killed
	}
	if err != nil {
		return err
	}
	r, err = l.reopen(mem, disk, h, true)
	if err != nil {
		return fmt.Errorf("after the restart: %w", err)
	}
	return r.kill()
}

// client works on the sectors that are its own.
func (l *life) client(r *rig, h *history, id, clients int, dice *rand.Rand, steps int) error {
	own := windowSectors / clients
	for ; steps > 0; steps-- {
		if head, _ := r.journal.head(); head.Seg != 0 {
			// Opening takes longer the more there is behind the log's end.
			steps = min(steps, l.encore)
		}
		if mem, ok := r.mem.(*recorder); ok && dice.IntN(30) == 0 {
			l.punch(r, mem, dice)
		}
		n := 1 + dice.IntN(8)
		switch dice.IntN(10) {
		case 0:
			n = 1 + dice.IntN(own/2)
		case 1, 2:
			n = 1 + dice.IntN(48)
		}
		n = min(n, own/2)
		first := id*own + dice.IntN(own-n+1)
		if border := windowSectors / 2; first < border && first+n > border {
			n = border - first // no request crosses a stripe
		}
		op := Write
		if dice.IntN(6) == 0 {
			op = Zero
		}
		var err error
		switch queue := dice.IntN(l.queues); dice.IntN(14) {
		case 0:
			live, _ := h.copy()
			if err = r.do(queue, &Request{Op: Flush}); err == nil {
				h.flushed(live)
			}
		case 1:
			err = l.read(r, h, queue, first, n)
		case 2:
			switch err = r.Flush(context.Background()); {
			case errors.Is(err, ErrStopped):
				err = errKilled
			case l.refuses(err):
				err = nil
			}
		case 12:
			err = l.setMode(r, h, dice)
		case 3:
			// Two writes of the same sectors at once.
			low, one := l.write(r, h, queue, first, n, op, false)
			_, other := l.write(r, h, dice.IntN(l.queues), first, n, Write, false)
			switch err = errors.Join(one(), other()); {
			case err == nil:
				h.written(first, n, low, l.durable)
				err = l.read(r, h, queue, first, n)
			case l.refuses(err):
				h.failed(first, n)
				err = nil
			}
		default:
			// One turn with several requests, mostly.
			parts := min(n, 1+dice.IntN(4)*dice.IntN(2))
			fua := dice.IntN(8) == 0
			var finish []func() error
			for i := range parts {
				from, to := first+n*i/parts, first+n*(i+1)/parts
				v, wait := l.write(r, h, queue, from, to-from, op, fua)
				finish = append(finish, func() error {
					err := wait()
					switch {
					case err == nil:
						h.written(from, to-from, v, l.durable || fua)
					case l.refuses(err):
						h.failed(from, to-from)
						err = nil
					}
					return err
				})
			}
			if dice.IntN(4) == 0 && !(first <= l.bad && l.bad < first+n) {
				// What is read of a write that is under way stays.
				err = l.readDuring(r, h, dice.IntN(l.queues), first, n)
			}
			for _, f := range finish {
				err = errors.Join(err, f())
			}
		}
		if r.space.waiting.Load() > 0 {
			l.full.Add(1)
		}
		switch {
		case errors.Is(err, errKilled) || l.done():
			return nil
		case err != nil:
			return err
		}
	}
	return nil
}

// refuses reports whether an error is that of the disk's bad sector.
func (l *life) refuses(err error) bool {
	return l.bad >= 0 && errors.Is(err, syscall.EIO) && !errors.Is(err, errKilled)
}

// setMode changes the mode, or breaks that off.
func (l *life) setMode(r *rig, h *history, dice *rand.Rand) error {
	h.setting.Lock()
	defer h.setting.Unlock()
	wanted := ondisk.Mode(dice.IntN(int(ondisk.PassThrough) + 1))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if dice.IntN(4) == 0 {
		after := dice.IntN(200)
		go func() {
			for range after {
				runtime.Gosched()
			}
			cancel()
		}()
	}
	old := r.Settings().Mode
	h.maySet(old, wanted)
	err := r.Set(ctx, func(s *Settings) error { s.Mode = wanted; return nil })
	switch {
	case errors.Is(err, ErrStopped):
		return errKilled // and it may have been stored
	case err != nil && !errors.Is(err, context.Canceled) && !l.refuses(err):
		return fmt.Errorf("set the mode %v: %w", wanted, err)
	case err != nil:
		wanted = old
	}
	h.maySet(wanted)
	if now := r.Settings().Mode; now != wanted {
		return fmt.Errorf("the mode is %v, want %v (%v)", now, wanted, err)
	}
	return nil
}

// write begins a Write or Zero.
func (l *life) write(r *rig, h *history, queue, first, n int, op Op, fua bool) (version uint64, wait func() error) {
	version = h.begin(first, n, op)
	lba := windowOff/sectorSize + int64(first)
	req := &Request{Op: op, Off: lba * sectorSize, FUA: fua}
	if op == Zero {
		req.Len = n * sectorSize
	} else {
		req.Buf = stamped(lba, n, version)
	}
	return version, r.begin(queue, req)
}

// read reads the client's own sectors, which nobody writes to now.
func (l *life) read(r *rig, h *history, queue, first, n int) error {
	p := make([]byte, n*sectorSize)
	if err := r.do(queue, &Request{Op: Read, Off: windowOff + int64(first*sectorSize), Buf: p}); err != nil {
		return err
	}
	return h.read(p, first, true, false)
}

// readDuring is read while a write of each of the sectors may be under way.
func (l *life) readDuring(r *rig, h *history, queue, first, n int) error {
	p := make([]byte, n*sectorSize)
	if err := r.do(queue, &Request{Op: Read, Off: windowOff + int64(first*sectorSize), Buf: p}); err != nil {
		return err
	}
	return h.read(p, first, l.durable, true)
}

// history knows what each sector of the window may hold. Versions grow; every
// write has one of its own.
type history struct {
	setting sync.Mutex // held by who changes the mode
	mu      sync.Mutex
	next    uint64 // the newest version
	sectors []sectorHistory
	modes   []ondisk.Mode // that may be on the media
}

// sectorHistory is the history of one sector. Its content may be settled, or any
// version above floor that was begun.
type sectorHistory struct {
	live   bound // what a read may find
	sure   bound // what may be found after a power cut
	acked  bound // what may be found on the disk alone, where a mode promises that it has all
	begun  uint64
	zeroed uint64 // the newest version that is zeros
	open   bool   // a write has failed, and what is there may change yet
}

type bound struct{ settled, floor uint64 }

func (b bound) holds(version uint64) bool { return version == b.settled || version > b.floor }

func newHistory() *history {
	h := &history{next: 1, sectors: make([]sectorHistory, windowSectors), modes: []ondisk.Mode{ondisk.WriteBack}}
	for i := range h.sectors {
		h.sectors[i] = sectorHistory{live: bound{1, 1}, sure: bound{1, 1}, acked: bound{1, 1}, begun: 1}
	}
	return h
}

func (h *history) copy() ([]sectorHistory, []ondisk.Mode) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.sectors), slices.Clone(h.modes)
}

func (h *history) maySet(modes ...ondisk.Mode) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.modes = modes
}

// judgeMode checks the mode that a region is left with and, if it promises a clean cache,
// the disk alone.
func (h *history) judgeMode(region *pmem.Fake, disk []byte) (clean bool, err error) {
	l, err := ondisk.ReadLayout(region, region.Size())
	if err != nil {
		return false, err
	}
	mode := l.Settings.Mode
	if !slices.Contains(h.modes, mode) {
		return false, fmt.Errorf("the mode is %v, may be %v", mode, h.modes)
	}
	if !promisesClean(mode) {
		return false, nil
	}
	if err := h.judgeAcked(disk); err != nil {
		return true, fmt.Errorf("on the disk alone, in mode %v: %w", mode, err)
	}
	return true, nil
}

// judgeAcked checks that everything is there that was acknowledged.
func (h *history) judgeAcked(p []byte) error {
	for i := range h.sectors {
		if _, err := h.sectors[i].version(p[i*sectorSize:], i, h.sectors[i].acked); err != nil {
			return err
		}
	}
	return nil
}

// begin is called before a write is submitted.
func (h *history) begin(first, n int, op Op) (version uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	for i := range h.sectors[first : first+n] {
		h.sectors[first+i].begun = h.next
		if op == Zero {
			h.sectors[first+i].zeroed = h.next
		}
	}
	return h.next
}

// written is called when a write is acknowledged. Of several writes of a
// sector at once, the oldest is.
func (h *history) written(first, n int, version uint64, sure bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.sectors[first : first+n] {
		s := &h.sectors[first+i]
		s.live, s.open = bound{version, version}, false
		s.acked = s.live
		if sure {
			s.sure = s.live
		}
	}
}

// failed is called when a write has been answered with an error. Until the next one the disk
// may have the old content or the new, and a power cut change that.
func (h *history) failed(first, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.sectors[first : first+n] {
		s := &h.sectors[first+i]
		s.live, s.open = s.acked, true
		if s.sure.floor > s.acked.floor {
			s.sure = s.acked
		}
	}
}

// flushed is called when a flush is acknowledged, with the history from before
// it began.
func (h *history) flushed(before []sectorHistory) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.sectors {
		if s := &h.sectors[i]; before[i].live.floor > s.sure.floor {
			s.sure = before[i].live
		}
	}
}

// read checks what was read, and no later read may find anything older.
func (h *history) read(p []byte, first int, sure, during bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range len(p) / sectorSize {
		v, err := h.versionLocked(p[i*sectorSize:], first+i, true)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		s := &h.sectors[first+i]
		if s.open {
			continue
		}
		b := bound{v, s.begun}
		if during {
			if v <= s.live.floor {
				continue // the write may still come
			}
			b.floor = v
		}
		if sure && s.sure == s.live {
			s.sure = b
		}
		s.live = b
	}
	return nil
}

// judge checks the whole window.
func (h *history) judge(p []byte, live bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.sectors {
		if _, err := h.versionLocked(p[i*sectorSize:], i, live); err != nil {
			return err
		}
	}
	return nil
}

func (h *history) versionLocked(p []byte, i int, live bool) (uint64, error) {
	s := &h.sectors[i]
	b := s.sure
	if live {
		b = s.live
	}
	return s.version(p, i, b)
}

// version returns which version of a sector of the window is there, if it may be.
func (s *sectorHistory) version(p []byte, i int, b bound) (uint64, error) {
	v, err := stamp(p[:sectorSize], windowOff/sectorSize+int64(i))
	if err != nil {
		return 0, err
	}
	if v == 0 {
		v = s.zeroed
	}
	if !b.holds(v) || v > s.begun {
		return 0, &wrongVersion{i, v, b, s.begun}
	}
	return v, nil
}

// wrongVersion is what a sector cannot hold.
type wrongVersion struct {
	sector  int // of the window
	version uint64
	bound   bound
	begun   uint64
}

func (w *wrongVersion) Error() string {
	return fmt.Sprintf("sector %d has version %d, may have %d or %d to %d",
		windowOff/sectorSize+w.sector, w.version, w.bound.settled, w.bound.floor+1, w.begun)
}

// story tells what region and disk know about the sector of the error.
func (s *snapshot) story(region *pmem.Fake, err error) string {
	var w *wrongVersion
	var damage *ondisk.Damage
	if errors.As(err, &damage) {
		return damageStory(region, damage)
	}
	if !errors.As(err, &w) {
		return ""
	}
	var b strings.Builder
	lba := int64(windowOff/sectorSize + w.sector)
	version, err := stamp(s.disk[w.sector*sectorSize:][:sectorSize], lba)
	fmt.Fprintf(&b, "the disk has version %d, %v\n", version, err)
	l, err := ondisk.ReadLayout(region, region.Size())
	if err != nil {
		return b.String() + err.Error()
	}
	fmt.Fprintf(&b, "key_tail %v, dirty_tail %v, generations %v\n", l.KeyTail, l.DirtyTail, l.Gens)
	end, _ := l.WalkLog(region, l.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		for _, k := range k.Keys {
			d := uint64(lba*sectorSize) - k.Off
			if d >= uint64(k.Len) {
				continue
			}
			var p [sectorSize]byte
			region.ReadAt(p[:], l.Offset(k.Seg, k.SegOff)+int64(d))
			version, err := stamp(p[:], lba)
			fmt.Fprintf(&b, "%v: flags %d, segment %d generation %d, there is version %d, %v\n", at, k.Flags, k.Seg, k.Gen, version, err)
		}
		return nil
	})
	fmt.Fprintf(&b, "the log ends at %v, %v\n", end.Pos, end.Damage)
	return b.String()
}

// damageStory tells the numbers of the log's ksets, and what stands where it is
// damaged and where it goes on.
func damageStory(region *pmem.Fake, d *ondisk.Damage) string {
	l, err := ondisk.ReadLayout(region, region.Size())
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "key_tail %v, dirty_tail %v\n", l.KeyTail, l.DirtyTail)
	l.WalkLog(region, l.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		fmt.Fprintf(&b, "%v: number %d, %d keys, last %v\n", at, k.Seq, len(k.Keys), k.Last)
		return nil
	})
	for _, at := range []*ondisk.Position{&d.At, d.Ahead} {
		if at != nil {
			p := make([]byte, 2*ondisk.KsetHeaderSize)
			region.ReadAt(p, l.Offset(at.Seg, at.Off))
			fmt.Fprintf(&b, "%v: % x\n", at, p)
		}
	}
	return b.String()
}

// settle takes over what was found when a cache was opened: a write that was
// not acknowledged either happened or did not, and that stays so.
func (h *history) settle(p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.sectors {
		s := &h.sectors[i]
		v, _ := stamp(p[i*sectorSize:][:sectorSize], windowOff/sectorSize+int64(i))
		if v == 0 {
			v = s.zeroed
		}
		b := bound{v, h.next}
		if !s.acked.holds(v) {
			s.acked = b // not flushed, and no mode had promised it
		}
		if s.open {
			s.live, s.sure = s.acked, s.acked
			continue
		}
		*s = sectorHistory{live: b, sure: b, acked: s.acked, begun: h.next, zeroed: s.zeroed}
	}
}

// peek puts over the disk's content, in window, what the cache has, without
// being a read that changes the cache. It also checks that no extent is in a
// segment that counts as free. The cache must be at rest: between one look and the
// next, what is dirty could be written, what is clean forgotten, and what is deferred
// gathered in a segment that was free.
func peek(c *Cache, window []byte) error {
	c.segments.mu.Lock()
	free := slices.Clone(c.segments.mu.freeList)
	c.segments.mu.Unlock()
	const half = windowSectors / 2
	var scratch []byte
	for _, first := range []int64{0, half} {
		s := c.index.span(windowOff/sectorSize+first, half)
		s.sh.Lock()
		parts := s.partsLocked(nil, func(extent) bool { return true })
		s.sh.Unlock()
		for _, e := range parts {
			at := windowOff/sectorSize + first + int64(e.off-s.off)
			if slices.Contains(free, e.seg) {
				return fmt.Errorf("%d sectors at %d are in segment %d, which is free", e.n, at, e.seg)
			}
			to := window[(first+int64(e.off-s.off))*sectorSize:][:int(e.n)*sectorSize]
			if e.flags&extZero != 0 {
				clear(to)
			} else if err := c.readExtent(to, e, &scratch); err != nil {
				return fmt.Errorf("%d sectors at %d: %w", e.n, at, err)
			}
		}
	}
	return nil
}

// windowDisk has a small disk for its window.
type windowDisk struct{ fakeDisk }

func (d windowDisk) Size() int64 { return windowOff + windowSize }

func (d windowDisk) Read(buf []byte, off int64, done func(error)) {
	d.fakeDisk.Read(buf, off-windowOff, done)
}

func (d windowDisk) Zero(off, n int64, done func(error)) {
	d.fakeDisk.Zero(off-windowOff, n, done)
}

func (d windowDisk) Write(buf []byte, off int64, done func(error)) {
	d.fakeDisk.Write(buf, off-windowOff, done)
}

// stillDisk is a disk for a cache that is only opened. It transfers nothing, but
// the cache fills its buffer all the same.
type stillDisk struct{ buf []byte }

func (stillDisk) Size() int64           { return windowOff + windowSize }
func (stillDisk) BlockSize() int        { return sectorSize }
func (d stillDisk) Buffer(n int) []byte { return d.buf[:n] }

func (stillDisk) Read(_ []byte, _ int64, done func(error))  { done(syscall.EIO) }
func (stillDisk) Write(_ []byte, _ int64, done func(error)) { done(syscall.EIO) }
func (stillDisk) Zero(_, _ int64, done func(error))         { done(syscall.EIO) }
func (stillDisk) Flush(done func(error))                    { done(syscall.EIO) }

// stillMemory is a region that will not see another power cut.
type stillMemory struct {
	*pmem.Fake
	durable bool
}

func (m stillMemory) Durable() bool { return m.durable }
