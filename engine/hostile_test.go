package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// An image comes from a file, a disk or a stranger, and whatever it holds,
// opening it gives an error or a cache that works. The tests here open
// forgeries (forge_test.go), work with what opens, and hold it against what
// the log says by a reading of its own (reading).
//
// What runs is the whole engine with its goroutines, in a bubble of
// testing/synctest: there, waiting takes no time, and a cache that waits for
// something that cannot come is found at once.

var (
	hostileExecs  = flag.Int("hostile.execs", 6000, "random images that TestHostileImages opens")
	hostileSeed   = flag.Uint64("hostile.seed", 0, "seed of TestHostileImages; 0 draws one")
	hostileWorker = flag.Int("hostile.workers", 2, "how many of them at a time")
)

// TestKnownForgeries opens each of them in every kind of cache.
func TestKnownForgeries(t *testing.T) {
	w := newWorkshop()
	for i, known := range forgeries {
		t.Run(known.name, func(t *testing.T) {
			for _, prog := range knownForgery(i) {
				opened, err := w.run(t, prog)
				if err != nil {
					t.Fatalf("program %x: %v", prog, err)
				}
				if known.fate != either && opened != (known.fate == opens) {
					t.Fatalf("program %x: opened %v", prog, opened)
				}
			}
		})
	}
}

// knownForgery returns programs that make one of the known forgeries, with and
// without checksums, on DAX and on a file, and in front of a disk with larger
// blocks. What is done first to a cache with checksums is to collect all of it
// and open it again; to the others, to write to them.
func knownForgery(i int) (progs [][]byte) {
	write := []byte{actCode + actWrite, 0, 9, 3, actCode + actFlush, 0, actCode + actZero, 0, 12, 1}
	collect := []byte{actCode + actFlush, 0, actCode + actCollect, 0, actCode + actReopen, 0}
	for _, kind := range []byte{2, 3, 0, 1, 0x1A} {
		prog := []byte{
			kind, 0, 0, 0,
			0, 1, 4, 7, 1, 0, 0, 0, 8, 3, 2, 0x80, 0, 0, // a kset of two keys
			170, byte(i),
		}
		if kind&1 != 0 {
			prog = append(prog, collect...)
		}
		progs = append(progs, append(prog, write...))
	}
	return progs
}

// TestHostileImages opens random images: half of them made by random programs,
// half by programs of known forgeries with something changed.
func TestHostileImages(t *testing.T) {
	seed := *hostileSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	var execs, opened atomic.Int64
	begin := time.Now()
	t.Run("images", func(t *testing.T) {
		for i := range *hostileWorker {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				w, rng := newWorkshop(), rand.New(rand.NewPCG(seed, uint64(i)))
				w.keepInput(t)
				for range *hostileExecs / *hostileWorker {
					prog := randomProgram(rng)
					ok, err := w.run(t, prog)
					if err != nil {
						t.Fatalf("program %q: %v", prog, err)
					}
					if ok {
						opened.Add(1)
					}
					execs.Add(1)
				}
			})
		}
	})
	t.Logf("%d images, %d of them opened, %v each", execs.Load(), opened.Load(), time.Since(begin)/time.Duration(max(1, execs.Load())))
	if !t.Failed() && (opened.Load() < execs.Load()/4 || opened.Load() > execs.Load()*9/10) {
		t.Errorf("%d of %d images opened: they are not what they should be", opened.Load(), execs.Load())
	}
}

func randomProgram(rng *rand.Rand) []byte {
	var prog []byte
	if rng.IntN(2) == 0 {
		prog = make([]byte, 8+rng.IntN(100))
		for i := range prog {
			prog[i] = byte(rng.Uint32())
		}
		return prog
	}
	known := knownForgery(rng.IntN(len(forgeries)))
	prog = known[rng.IntN(len(known))]
	for range 1 + rng.IntN(6) {
		at, b := rng.IntN(len(prog)), byte(rng.Uint32())
		switch rng.IntN(4) {
		case 0:
			prog = slices.Insert(prog, at, b)
		case 1:
			prog = append(prog, b, byte(rng.Uint32()), byte(rng.Uint32()))
		default:
			prog[at] = b
		}
	}
	return prog
}

// FuzzImage is the same with a fuzzer that watches what its programs reach.
func FuzzImage(f *testing.F) {
	for i := range forgeries {
		for _, prog := range knownForgery(i) {
			f.Add(prog)
		}
	}
	w := newWorkshop()
	f.Fuzz(func(t *testing.T, prog []byte) {
		if len(prog) > 1<<10 {
			return
		}
		if _, err := w.run(t, prog); err != nil {
			t.Fatal(err)
		}
	})
}

// workshop is what executions share, one after the other.
type workshop struct {
	disk  diskUnderTest
	input *os.File // the program under way, for when it ends the process
}

func newWorkshop() *workshop {
	w := &workshop{}
	w.disk.base = make([]byte, forgeSectors*sectorSize)
	fillStamp(w.disk.base, 0, 1)
	w.disk.content = bytes.Clone(w.disk.base)
	return w
}

// keepInput writes down each program before it runs, in the form that
// testdata/fuzz/FuzzImage takes, where a panic of a goroutine of the cache, or
// whoever kills a test that hangs, leaves it.
func (w *workshop) keepInput(t *testing.T) {
	f, err := os.CreateTemp("", "FuzzImage-*")
	if err != nil {
		t.Fatal(err)
	}
	w.input = f
	t.Logf("the program under way is in %s", f.Name())
	t.Cleanup(func() {
		f.Close()
		if !t.Failed() {
			os.Remove(f.Name())
		}
	})
}

// hangAfter is how long one execution may take on a machine that is busy with
// other things; it takes less than a millisecond.
const hangAfter = time.Minute

// run makes an image and does with it what the program says.
func (w *workshop) run(t *testing.T, prog []byte) (opened bool, err error) {
	if w.input != nil {
		p := fmt.Appendf(nil, "go test fuzz v1\n[]byte(%q)\n", prog)
		if _, err := w.input.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if err := w.input.Truncate(int64(len(p))); err != nil {
			t.Fatal(err)
		}
	}
	watchdog := time.AfterFunc(hangAfter, func() {
		debug.SetTraceback("all")
		panic(fmt.Sprintf("program %q hangs", prog))
	})
	defer watchdog.Stop()
	synctest.Test(t, func(*testing.T) {
		x := &execution{w: w, f: newForgery(bytes.Clone(prog)), written: map[int64]uint64{}, lost: map[int64]bool{}}
		w.disk.reset(x.f.block, x.f.sectors)
		opened, err = x.run()
		if fault := w.disk.fault; err == nil && fault != "" {
			err = errors.New(fault)
		}
	})
	return opened, err
}

// diskUnderTest answers at once. What it is asked for beyond its bounds is a
// fault of the engine's.
type diskUnderTest struct {
	base, content []byte
	block         int
	sectors       int64

	mu      sync.Mutex
	changed [][2]int64
	fault   string
	buffers [][]byte
	used    int
}

func (d *diskUnderTest) reset(block int, sectors int64) {
	for _, c := range d.changed {
		copy(d.content[c[0]:c[1]], d.base[c[0]:c[1]])
	}
	d.changed, d.fault, d.used = d.changed[:0], "", 0
	d.block, d.sectors = block, sectors
}

func (d *diskUnderTest) Size() int64    { return d.sectors * sectorSize }
func (d *diskUnderTest) BlockSize() int { return d.block }

// Buffer hands the same buffers out to one execution after the other.
func (d *diskUnderTest) Buffer(n int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.used == len(d.buffers) {
		d.buffers = append(d.buffers, make([]byte, 1<<20))
	}
	d.used++
	return d.buffers[d.used-1][:n]
}

var errBlocks = errors.New("not whole blocks")

func (d *diskUnderTest) transfer(what string, off, n int64, done func(error), do func()) {
	d.mu.Lock()
	if off < 0 || n <= 0 || off+n > d.Size() {
		d.fault = fmt.Sprintf("%s of %d bytes at %d of the disk", what, n, off)
	}
	if d.fault != "" || (off|n)%int64(d.block) != 0 {
		d.mu.Unlock()
		done(errBlocks)
		return
	}
	do()
	d.mu.Unlock()
	done(nil)
}

func (d *diskUnderTest) Read(p []byte, off int64, done func(error)) {
	d.transfer("read", off, int64(len(p)), done, func() { copy(p, d.content[off:]) })
}

func (d *diskUnderTest) Write(p []byte, off int64, done func(error)) {
	d.transfer("write", off, int64(len(p)), done, func() {
		copy(d.content[off:], p)
		d.changed = append(d.changed, [2]int64{off, off + int64(len(p))})
	})
}

func (d *diskUnderTest) Zero(off, n int64, done func(error)) {
	d.transfer("zero", off, n, done, func() {
		clear(d.content[off : off+n])
		d.changed = append(d.changed, [2]int64{off, off + n})
	})
}

func (d *diskUnderTest) Flush(done func(error)) { done(nil) }

// guarded is the region with its accesses watched.
type guarded struct {
	*pmem.Fake
	durable bool
	mu      sync.Mutex
	stores  int
	fault   string
}

func (g *guarded) Durable() bool { return g.durable }

func (g *guarded) ReadAt(p []byte, off int64) (int, error) {
	n, err := g.Fake.ReadAt(p, off)
	if errors.Is(err, pmem.ErrRange) || err == io.EOF {
		g.note("read", off, int64(len(p)))
	}
	return n, err
}

func (g *guarded) WriteAt(p []byte, off int64) (int, error) {
	g.store(off, int64(len(p)))
	return g.Fake.WriteAt(p, off)
}

func (g *guarded) Zero(off, n int64) error {
	g.store(off, n)
	return g.Fake.Zero(off, n)
}

// store checks that a store changes what the engine may change: a record in
// front or of a segment, or the data area of one segment.
func (g *guarded) store(off, n int64) {
	g.mu.Lock()
	g.stores++
	g.mu.Unlock()
	end := off + n
	if off >= ondisk.SegmentsOff {
		in := (off - ondisk.SegmentsOff) % ondisk.SegmentSize
		switch end := in + n; {
		case n == ondisk.SegmentInfoSize && (in == 0 || in == 4<<10):
		case in >= 8<<10 && end <= 8<<10+2*ondisk.GenerationSize:
		case in >= ondisk.SegmentHeader && end <= ondisk.SegmentSize:
		default:
			g.note("store", off, n)
		}
		return
	}
	if off < ondisk.InfoOff && end > ondisk.SuperblockOff || end > ondisk.CtrlOff+4*ondisk.PositionSize {
		g.note("store", off, n)
	}
}

func (g *guarded) note(what string, off, n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fault = fmt.Sprintf("%s of %d bytes at %d of the region", what, n, off)
}

type quietLog struct{}

func (quietLog) Info(Event, string, error)  {}
func (quietLog) Error(Event, string, error) {}

// execution is one image and what is done with it.
type execution struct {
	w   *workshop
	f   *forgery
	mem *guarded

	*Cache
	wake chan struct{}

	want    *reading
	looked  []lookedAt
	written map[int64]uint64 // version that a sector was last given
	lost    map[int64]bool   // it was to be given one, and that failed
	version uint64
	ended   bool // it would not open any more
}

// lookedAt is a run of sectors that is looked at.
type lookedAt struct {
	sector int64
	n      int
}

func (x *execution) run() (opened bool, err error) {
	x.mem = &guarded{Fake: x.f.mem, durable: x.f.durable}
	x.want = read(x.mem, x.f)
	if x.mem.fault != "" {
		return false, errors.New(x.mem.fault)
	}
	x.chooseWindows()
	for _, w := range x.looked {
		for i := range w.n {
			x.want.sector(w.sector + int64(i))
		}
	}
	if err := x.open(); err != nil {
		switch {
		case x.mem.stores > 0:
			return false, fmt.Errorf("refused with %w, after %d stores", err, x.mem.stores)
		case x.mem.fault != "":
			return false, fmt.Errorf("refused with %w, after a %s", err, x.mem.fault)
		}
		return false, nil
	}
	if x.want.refuse != nil {
		err = fmt.Errorf("opened in spite of: %w", x.want.refuse)
	} else {
		err = x.work()
	}
	if closing := x.close(); err == nil {
		err = closing
	}
	if err == nil && x.mem.fault != "" {
		err = errors.New(x.mem.fault)
	}
	return true, err
}

func (x *execution) open() (err error) {
	x.w.disk.used = 0
	x.Cache, err = Open(x.mem, &x.w.disk, Options{Queues: 1, Log: quietLog{}})
	if err != nil {
		return err
	}
	x.wake = make(chan struct{}, 1)
	wake := x.wake
	x.Queue(0).OnWake(func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	return nil
}

// close returns an error only if the cache had no reason to have one.
func (x *execution) close() error {
	if x.ended {
		return nil
	}
	err := x.Close()
	if x.frail() {
		return nil
	}
	return err
}

func (x *execution) reopen() error {
	if err := x.close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	if err := x.open(); err != nil {
		x.ended = true
		// The log may have grown into what cannot be read, or to where a
		// forged kset lies in wait with a number to be continued at; and of
		// keys that overlap, the one that justified the others may be gone.
		var d *ondisk.Damage
		if x.f.sick || errors.Is(err, ErrKeyOverlap) && x.want.overlap || errors.As(err, &d) && d.Ahead != nil && slices.Contains(x.f.places, *d.Ahead) {
			return nil
		}
		return fmt.Errorf("open again: %w", err)
	}
	return x.look()
}

// frail: something in the image cannot be read, or cannot be written to this
// disk, so that what leans on it may fail.
func (x *execution) frail() bool {
	return x.f.sick || x.want.damaged || x.f.block != sectorSize || len(x.lost) > 0
}

// work does what the program says, and then what is always done.
func (x *execution) work() error {
	if err := x.look(); err != nil {
		return fmt.Errorf("first look: %w", err)
	}
	for i, a := range x.f.acts {
		if err := x.act(a); err != nil {
			return fmt.Errorf("act %d, %+v: %w", i, a, err)
		}
		if x.ended {
			return nil
		}
	}
	if err := x.flush(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	if err := x.collect(0); err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	if err := x.act(act{kind: actWrite, sector: 8, n: 8}); err != nil {
		return fmt.Errorf("last write: %w", err)
	}
	if x.ended {
		return nil
	}
	if err := x.look(); err != nil {
		return fmt.Errorf("last look: %w", err)
	}
	return x.reopen()
}

func (x *execution) act(a act) error {
	switch a.kind {
	case actWrite, actZero:
		return x.write(a)
	case actFlush:
		return x.flush()
	case actCollect:
		return x.collect(int(a.arg) % (ondisk.MaxGCPercent + 1))
	case actIdle:
		time.Sleep(2 * time.Second)
		return x.look()
	default:
		return x.reopen()
	}
}

// patience is how long, in the time of the bubble, something may take that
// does not depend on anything: far longer than the longest delay.
const patience = 5 * lastRetry

var errStuck = errors.New("it does not come back")

// do carries out one request.
func (x *execution) do(r *Request) error {
	q := x.Queue(0)
	q.Submit(r)
	for {
		for _, done := range q.Turn() {
			if done == r {
				return r.Err
			}
			return errors.New("another request came back")
		}
		select {
		case <-x.wake:
			continue
		default:
		}
		timer := time.NewTimer(patience)
		select {
		case <-x.wake:
			timer.Stop()
		case <-timer.C:
			if !x.frail() {
				x.Abort()
				return errStuck
			}
			// Where nothing can be written back, a writer may wait for ever,
			// until it is told not to.
			if x.failure() != nil {
				return fmt.Errorf("aborted: %w", errStuck)
			}
			x.Abort()
		}
	}
}

func (x *execution) write(a act) error {
	x.version++
	r := &Request{Op: Write, FUA: a.arg&1 != 0, Off: a.sector * sectorSize}
	version := 2 + x.version
	if a.kind == actZero {
		r.Op, r.Len, version = Zero, a.n*sectorSize, zeroed
	} else {
		r.Buf = make([]byte, a.n*sectorSize)
		fillStamp(r.Buf, a.sector, version)
	}
	err := x.do(r)
	for s := a.sector; s < a.sector+int64(a.n); s++ {
		if err == nil {
			x.written[s] = version
			delete(x.lost, s)
		} else {
			x.lost[s] = true
		}
	}
	if errors.Is(err, errStuck) || err != nil && x.failure() == nil {
		return err
	}
	if err != nil {
		// Reads go on; to write again it takes a new start.
		return x.reopen()
	}
	return x.look()
}

// flush writes everything back and looks whether it is on the disk.
func (x *execution) flush() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := x.Flush(ctx); err != nil {
		if x.frail() {
			return x.look()
		}
		return err
	}
	if dirty := x.Status().DirtyBytes + x.Status().ZeroBytes; dirty != 0 && !x.frail() {
		return fmt.Errorf("%d bytes are dirty after a flush", dirty)
	}
	for _, w := range x.looked {
		for s := w.sector; s < w.sector+int64(w.n); s++ {
			if err := x.judgeDisk(s); err != nil {
				return fmt.Errorf("after a flush: %w", err)
			}
		}
	}
	return x.look()
}

// judgeDisk looks whether a sector of the disk is what a flush leaves there.
func (x *execution) judgeDisk(s int64) error {
	on := x.w.disk.content[s*sectorSize:][:sectorSize]
	want := x.want.sector(s)
	v := x.written[s]
	switch {
	case x.lost[s], v != 0 && bytes.Equal(on, sectorOf(s, v)):
		return nil
	case v != 0:
		return fmt.Errorf("sector %d of the disk is %s, not the last write, %d", s, describe(on), v)
	case x.want.unsure || want.unsure || want.fails, bytes.Equal(on, want.data), want.zero && isZeros(on):
		return nil
	case !want.dirty && bytes.Equal(on, x.w.disk.base[s*sectorSize:][:sectorSize]):
		return nil
	}
	return fmt.Errorf("sector %d of the disk is %s, not %s (%+v)", s, describe(on), describe(want.data), want.key)
}

// collect has the garbage collector take as much as it may.
func (x *execution) collect(percent int) error {
	if err := x.setGC(percent); err != nil {
		if fault := (*pmem.FaultError)(nil); x.f.sick && errors.As(err, &fault) {
			return x.look()
		}
		return err
	}
	synctest.Wait()
	st := x.Status()
	// What cannot be passed is bad memory, with data behind it that the disk
	// refuses, which is to be logged again and has no segment left for that.
	stays := x.f.sick && st.State == Degraded && x.segments.free() == 0
	if percent == 0 && st.KeyTail != st.DirtyTail && st.State != Failed && !stays {
		return fmt.Errorf("key_tail %v stays behind dirty_tail %v", st.KeyTail, st.DirtyTail)
	}
	if err := x.checkFree(); err != nil {
		return err
	}
	return x.look()
}

// checkFree: what is free is not in use.
func (x *execution) checkFree() error {
	now := read(x.mem, x.f)
	if now.refuse != nil && x.f.sick {
		return nil // it has grown into what cannot be read, and is on its way out
	}
	if now.refuse != nil || x.failure() != nil {
		return now.refuse
	}
	x.segments.mu.Lock()
	defer x.segments.mu.Unlock()
	seen := map[uint32]bool{}
	for _, seg := range x.segments.mu.freeList {
		if seen[seg] {
			return fmt.Errorf("segment %d is free twice", seg)
		}
		seen[seg] = true
		if now.log[seg] {
			return fmt.Errorf("segment %d is free and part of the log", seg)
		}
		for i := range now.keys {
			if k := &now.keys[i]; k.Seg == seg {
				return fmt.Errorf("segment %d is free and named by %+v", seg, k.Key)
			}
		}
	}
	return nil
}

// look reads all windows and compares.
func (x *execution) look() error {
	for _, w := range x.looked {
		p := make([]byte, w.n*sectorSize)
		err := x.do(&Request{Op: Read, Off: w.sector * sectorSize, Buf: p})
		if err == nil {
			for i := range w.n {
				if err := x.judge(w.sector+int64(i), p[i*sectorSize:][:sectorSize], nil); err != nil {
					return err
				}
			}
			continue
		}
		unit := x.f.block / sectorSize
		for i := 0; i < w.n; i += unit {
			p := p[:x.f.block]
			err := x.do(&Request{Op: Read, Off: (w.sector + int64(i)) * sectorSize, Buf: p})
			for j := range unit {
				if err := x.judge(w.sector+int64(i+j), p[j*sectorSize:][:sectorSize], err); err != nil {
					return err
				}
			}
		}
	}
	x.mem.mu.Lock()
	defer x.mem.mu.Unlock()
	if x.mem.fault != "" {
		return errors.New(x.mem.fault)
	}
	return nil
}

// judge compares what was read of a sector, or that it could not be.
func (x *execution) judge(s int64, p []byte, err error) error {
	base := x.w.disk.base[s*sectorSize:][:sectorSize]
	v := x.written[s]
	want := x.want.sector(s)
	unsure := x.want.unsure || want.unsure
	switch {
	case errors.Is(err, errStuck):
		return err
	case x.lost[s], v != 0 && err != nil && (x.f.sick || x.f.block != sectorSize):
		return nil
	case v != 0 && err == nil && bytes.Equal(p, sectorOf(s, v)):
		return nil
	case v != 0:
		return fmt.Errorf("sector %d: %s (%v), not the last write, %d", s, describe(p), err, v)
	case err != nil && (want.fails || unsure || x.f.block != sectorSize):
		return nil
	case err != nil:
		return fmt.Errorf("sector %d: %w", s, err)
	case x.want.unsure:
		return nil
	case want.fails && !unsure:
		return fmt.Errorf("sector %d: %s, in spite of damage", s, describe(p))
	case want.data != nil && bytes.Equal(p, want.data), !want.dirty && bytes.Equal(p, base):
		return nil
	case want.zero && isZeros(p), unsure && bytes.Equal(p, base):
		return nil
	}
	return fmt.Errorf("sector %d: %s, not %s (%+v)", s, describe(p), describe(want.data), want.key)
}

// zeroed stands for the version of a sector that was made zeros.
const zeroed = 1 << 62

func sectorOf(s int64, version uint64) []byte {
	p := make([]byte, sectorSize)
	if version != zeroed {
		fillStamp(p, s, version)
	}
	return p
}

func isZeros(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

func describe(p []byte) string {
	if p == nil {
		return "nothing"
	}
	lba := int64(binary.LittleEndian.Uint64(p))
	version, err := stamp(p, lba)
	return fmt.Sprintf("{%d version %d, %v}", lba, version, err)
}

// chooseWindows picks what is looked at: the ends of some keys and around
// them, and what will be written.
func (x *execution) chooseWindows() {
	add := func(from, to int64) {
		unit := int64(x.f.block / sectorSize)
		from = max(0, from) / unit * unit
		to = min((to+unit-1)/unit*unit, x.f.sectors)
		if from < forgeStripe && to > forgeStripe {
			x.looked = append(x.looked, lookedAt{from, int(forgeStripe - from)})
			from = forgeStripe
		}
		if from < to {
			x.looked = append(x.looked, lookedAt{from, int(to - from)})
		}
	}
	const most = 8
	keys := x.f.made
	if len(keys) > most {
		keys = keys[len(keys)-most:]
	}
	for i := range keys {
		from, to := int64(keys[i].Off/sectorSize), int64((keys[i].Off+uint64(keys[i].Len))/sectorSize)
		if to < from || to > x.f.sectors+1 {
			continue
		}
		add(from-1, min(to+1, from+5))
		if to > from+5 {
			add(to-4, to+1)
		}
	}
	for _, a := range x.f.acts {
		if a.kind <= actZero {
			add(a.sector-1, a.sector+int64(a.n)+1)
		}
	}
	slices.SortFunc(x.looked, func(a, b lookedAt) int { return int(a.sector - b.sector) })
	// What overlaps is looked at once.
	merged := x.looked[:0]
	for _, w := range x.looked {
		if n := len(merged); n > 0 {
			l := &merged[n-1]
			if end := l.sector + int64(l.n); w.sector <= end && (w.sector < forgeStripe) == (l.sector < forgeStripe) {
				l.n = int(max(end, w.sector+int64(w.n)) - l.sector)
				continue
			}
		}
		merged = append(merged, w)
	}
	x.looked = merged
}

// reading is what an image means, found out with the least of the code under
// test: the layout, and the decoder of a kset. What an error it holds says is
// that Open may not succeed; that it may succeed is never said.
type reading struct {
	mem     *guarded
	crc     bool
	disk    int64 // sectors
	layout  *ondisk.Layout
	refuse  error
	unsure  bool // a power cut may have taken any part of the log
	damaged bool // dirty data is, or may be, not what it should be
	overlap bool // keys share data
	log     map[uint32]bool
	keys    []readKey // the living ones, in the log's order
	dead    []readKey // the others
	known   map[int64]*readSector
}

type readKey struct {
	ondisk.Key
	dirty bool
	crc   int // 1 right, -1 wrong, 0 not looked at yet
	after int // living ones that come before it in the log
}

func (k *readKey) span() (from, to int64) {
	return int64(k.Off / sectorSize), int64((k.Off + uint64(k.Len)) / sectorSize)
}

// readSector is what is known of a sector before anything was done to it.
type readSector struct {
	key    *readKey
	data   []byte // nil: only the disk has it
	dirty  bool
	zero   bool // or it may be zeros
	fails  bool
	unsure bool // or the disk's, or an error
}

func read(mem *guarded, f *forgery) *reading {
	r := &reading{mem: mem, disk: f.sectors, log: map[uint32]bool{}, known: map[int64]*readSector{}}
	// The race detector does not know that time stands still meanwhile: the
	// stores that come later lock this first.
	defer func() {
		mem.mu.Lock()
		defer mem.mu.Unlock()
	}()
	l, err := ondisk.ReadLayout(mem, mem.Size())
	if err != nil {
		r.refuse = err
		return r
	}
	r.layout, r.crc = l, l.Info.Flags.DataCRC()
	r.unsure = !f.durable && l.SyncMark != 0
	if r.refuse = r.checkLayout(); r.refuse == nil {
		r.refuse = r.readLog()
	}
	if r.unsure {
		r.refuse = nil
	}
	for i := range r.keys {
		k := &r.keys[i]
		shared := r.crc && r.shared(k)
		r.overlap = r.overlap || shared
		r.damaged = r.damaged || r.crc && k.dirty && (shared || !r.intact(k))
	}
	return r
}

func (r *reading) checkLayout() error {
	l, held := r.layout, int(ondisk.SegmentsIn(r.mem.Size()))
	seen := map[uint32]bool{}
	for i, phys := range l.Chain {
		if int(phys) >= held || seen[phys] {
			return fmt.Errorf("the chain comes through segment %d", phys)
		}
		seen[phys] = true
		if l.Gens[i] >= 1<<63 {
			return fmt.Errorf("generation %d", l.Gens[i])
		}
	}
	for _, p := range []ondisk.Position{l.KeyTail, l.DirtyTail} {
		if int(p.Seg) >= len(l.Chain) || p.Off%8 != 0 || p.Off > ondisk.SegmentData-ondisk.KsetHeaderSize {
			return fmt.Errorf("a tail at %v", p)
		}
	}
	if n := len(l.Chain); n == 0 || n != int(l.Info.Segments) || l.Info.Flags.GCPercent() > 90 {
		return fmt.Errorf("%+v with a chain of %d", l.Info, n)
	}
	if err := l.Settings.Validate(); err != nil {
		return fmt.Errorf("%+v: %w", l.Settings, err)
	}
	return nil
}

func (r *reading) readLog() error {
	l := r.layout
	pos, dirty, seq := l.KeyTail, false, uint64(0)
	r.log[pos.Seg] = true
	var buf [ondisk.MaxKsetSize]byte
	var k ondisk.Kset
	for {
		dirty = dirty || pos == l.DirtyTail
		p := buf[:min(ondisk.MaxKsetSize, int64(ondisk.SegmentData)-int64(pos.Off))]
		if n, err := r.mem.ReadAt(p[:min(len(p), 24)], l.Offset(pos.Seg, pos.Off)); err != nil || n < 24 {
			break
		}
		n, last := binary.LittleEndian.Uint32(p[4:]), p[16]&1 != 0
		if !last && n > ondisk.MaxKeys {
			break
		}
		size := ondisk.KsetSize(int(n))
		if last {
			size = ondisk.KsetHeaderSize
		} else if pos.Off+size > ondisk.SegmentData-ondisk.KsetHeaderSize {
			break
		}
		if _, err := r.mem.ReadAt(p[:size], l.Offset(pos.Seg, pos.Off)); err != nil || ondisk.DecodeKset(p[:size], &k) != nil {
			break
		}
		if seq != 0 && k.Seq != 0 && k.Seq != seq%(1<<48-1)+1 {
			break
		}
		if k.Seq != 0 {
			seq = k.Seq
		}
		for i := range k.Keys {
			if err := r.key(&k.Keys[i], dirty); err != nil {
				return fmt.Errorf("key %d of the kset at %v: %w", i, pos, err)
			}
		}
		pos.Off += size
		if last {
			if int64(k.Next) >= int64(len(l.Chain)) || r.log[k.Next] {
				return fmt.Errorf("LAST to segment %d", k.Next)
			}
			pos = ondisk.Position{Seg: k.Next}
			r.log[pos.Seg] = true
		}
	}
	for i := range r.keys {
		if r.log[r.keys[i].Seg] {
			return fmt.Errorf("%+v in the log", r.keys[i].Key)
		}
	}
	if !dirty {
		return fmt.Errorf("dirty_tail %v is not on the log's path", l.DirtyTail)
	}
	return nil
}

func (r *reading) key(k *ondisk.Key, dirty bool) error {
	switch end := k.Off + uint64(k.Len); {
	case k.Flags&1 != 0, k.Len == 0, (k.Off|uint64(k.Len)|uint64(k.SegOff))%sectorSize != 0,
		k.Off > 1<<62, k.Off/ondisk.StripeSize != (end-1)/ondisk.StripeSize,
		int64(k.Seg) >= int64(len(r.layout.Chain)), int64(k.SegOff)+int64(k.Len) > ondisk.SegmentData:
		return fmt.Errorf("%+v is impossible", *k)
	case k.Gen < r.layout.Gens[k.Seg]:
		r.dead = append(r.dead, readKey{Key: *k, after: len(r.keys)})
		return nil
	case k.Gen > r.layout.Gens[k.Seg], end > uint64(r.disk)*sectorSize:
		return fmt.Errorf("%+v is not of this cache", *k)
	}
	r.keys = append(r.keys, readKey{Key: *k, dirty: dirty && k.Flags&ondisk.KeyClean == 0})
	return nil
}

// sector finds out about one. The first time for each must be before anything
// is done to the image.
func (r *reading) sector(s int64) *readSector {
	if known := r.known[s]; known != nil {
		return known
	}
	w := &readSector{}
	r.known[s] = w
	covers := func(k *readKey) bool { from, to := k.span(); return from <= s && s < to }
	buried := 0
	for i := range r.dead {
		if covers(&r.dead[i]) {
			buried = r.dead[i].after
		}
	}
	for i := len(r.keys) - 1; i >= buried && w.key == nil; i-- {
		if covers(&r.keys[i]) {
			w.key = &r.keys[i]
		}
	}
	if w.key == nil || r.refuse != nil {
		return w
	}
	k := w.key
	from, _ := k.span()
	w.dirty = k.dirty
	w.zero = k.Flags&ondisk.KeyZero != 0
	w.unsure = r.crc && r.shared(k) || w.zero && !r.intact(k)
	p := make([]byte, sectorSize)
	_, err := r.mem.ReadAt(p, r.layout.Offset(k.Seg, k.SegOff+uint32(s-from)*sectorSize))
	if err == nil && (!r.crc || r.intact(k) || w.unsure) {
		w.data = p
	} else {
		w.fails = w.dirty
	}
	return w
}

// intact: the data of a key can be read and is what the key says.
func (r *reading) intact(k *readKey) bool {
	if k.crc == 0 {
		p := make([]byte, k.Len)
		_, err := r.mem.ReadAt(p, r.layout.Offset(k.Seg, k.SegOff))
		k.crc = 1
		if err != nil || r.crc && ondisk.Checksum(p) != k.CRC {
			k.crc = -1
		}
	}
	return k.crc > 0
}

// shared: a part of the key's data is another one's as well, with a checksum
// of its own.
func (r *reading) shared(k *readKey) bool {
	for i := range r.keys {
		o := &r.keys[i]
		if o.Seg == k.Seg && o.SegOff < k.SegOff+k.Len && k.SegOff < o.SegOff+o.Len &&
			(o.SegOff != k.SegOff || o.Len != k.Len || o.CRC != k.CRC) {
			return true
		}
	}
	return false
}
