package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

var allModes = []ondisk.Mode{ondisk.WriteBack, ondisk.WriteThrough, ondisk.WriteAround, ondisk.WriteOnly, ondisk.PassThrough}

// modeRig is a cache in some mode, and a disk that can hold or fail what it is asked for.
type modeRig struct {
	*rig
	mem         *pmem.Fake
	disk        *backing.Fake
	hold, fails atomic.Int64 // bits of kinds
	fails4K     atomic.Int64 // writes that touch the 4 KiB block of that number fail, 0 for none
	holdAt      atomic.Int64 // the same for those that are held
}

func newModeRig(t *testing.T, mode ondisk.Mode) *modeRig {
	t.Helper()
	x := &modeRig{mem: pmem.NewFake(ondisk.MinSize), disk: backing.NewFake(64<<20, sectorSize, 1)}
	formatSmall(t, x.mem, 12, false, 70)
	x.rig = newRig(t, x.mem, x.disk, 2)
	x.setMode(t, mode)
	x.disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Len == sampleBytes {
			return f
		}
		touches := func(block int64) bool {
			return op.Kind == backing.OpWrite && block > 0 && op.Off < (block+1)<<12 && block<<12 < op.Off+op.Len
		}
		f.Hold = x.hold.Load()>>op.Kind&1 != 0 || touches(x.holdAt.Load())
		if x.fails.Load()>>op.Kind&1 != 0 || touches(x.fails4K.Load()) {
			f.Err = syscall.EIO
		}
		return f
	})
	t.Cleanup(func() {
		x.hold.Store(0)
		x.disk.Release()
		x.leave()
		if err := x.Close(); err != nil && !errors.Is(err, ErrAborted) {
			t.Error(err)
		}
		x.disk.Close()
	})
	return x
}

func (x *modeRig) setMode(t *testing.T, mode ondisk.Mode) {
	t.Helper()
	set(t, x.Cache, func(s *Settings) { s.Mode = mode })
	if goesAround(mode) {
		x.awaitSure(t)
	}
}

// mayGoAround reports whether a write may go around the cache in a stripe where the index has nothing.
func (r *rig) mayGoAround(stripe int64) bool {
	d := &r.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mayBeginLocked(stripe)
}

// awaitSure returns when the collector has stored both copies of key_tail, and writes may go around.
func (r *rig) awaitSure(t *testing.T) {
	t.Helper()
	within(t, "both copies of key_tail", func() {
		for !r.direct.isSure() {
			time.Sleep(time.Millisecond)
		}
	})
}

func (x *modeRig) holds(kinds ...backing.Kind) {
	bits := int64(0)
	for _, k := range kinds {
		bits |= 1 << k
	}
	x.hold.Store(bits)
}

// beginWrite begins a write of some version at lba.
func (x *modeRig) beginWrite(queue int, lba int64, version uint64) (ended chan error) {
	return x.start(queue, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, 8, version)})
}

// start begins a request.
func (x *modeRig) start(queue int, req *Request) (ended chan error) {
	wait := x.begin(queue, req)
	ended = make(chan error, 1)
	go func() { ended <- wait() }()
	return ended
}

// beginFlush begins a flush of the cache, and returns when its round waits for a write that goes
// around, or has ended, or has given the disk more than that.
func (x *modeRig) beginFlush(t *testing.T) (flushed chan error) {
	t.Helper()
	flushed = make(chan error, 1)
	go func() { flushed <- x.Flush(context.Background()) }()
	within(t, "a round", func() {
		for !x.awaitsDirect() && x.disk.Held() == 1 && len(flushed) == 0 {
			time.Sleep(time.Millisecond)
		}
	})
	return flushed
}

// afterCut returns 8 sectors at lba of the disk alone, as a power cut may leave them.
func (x *modeRig) afterCut(lba int64) []byte {
	p := make([]byte, 8*sectorSize)
	x.disk.CrashAt(p, lba*sectorSize)
	return p
}

// onDisk fails if a power cut could leave anything but a version at lba of the disk.
func (x *modeRig) onDisk(t *testing.T, lba int64, version uint64) {
	t.Helper()
	for range 4 {
		p := x.afterCut(lba)
		if !bytes.Equal(p, stamped(lba, 8, version)) {
			v, err := stamp(p[:sectorSize], lba)
			t.Fatalf("after a power cut the disk alone has version %d at %d, %v; want %d", v, lba, err, version)
		}
	}
}

// readBack fails if the device has anything but a version at lba.
func (x *modeRig) readBack(t *testing.T, lba int64, version uint64) {
	t.Helper()
	if got := x.read(t, lba*sectorSize, 8*sectorSize); !bytes.Equal(got, stamped(lba, 8, version)) {
		v, err := stamp(got[:sectorSize], lba)
		t.Fatalf("version %d at %d, %v; want %d", v, lba, err, version)
	}
}

// awaitWaiting returns when so many writes are logged and wait for the disk.
func (x *modeRig) awaitWaiting(t *testing.T, n int) {
	t.Helper()
	logged := func() (n int) {
		x.through.mu.Lock()
		defer x.through.mu.Unlock()
		for _, r := range x.through.mu.list {
			if committed(r) {
				n++
			}
		}
		return n
	}
	within(t, "a commit", func() {
		for logged() < n {
			time.Sleep(time.Millisecond)
		}
	})
}

// awaitsDirect reports whether somebody waits for a write that goes around.
func (x *modeRig) awaitsDirect() bool {
	d := &x.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.ended != nil
}

func unanswered(t *testing.T, what string, ended chan error) {
	t.Helper()
	select {
	case err := <-ended:
		t.Fatalf("%s was answered: %v", what, err)
	default:
	}
}

func answered(t *testing.T, what string, ended chan error, want error) {
	t.Helper()
	within(t, what, func() {
		if err := <-ended; !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	})
}

// far is a place that no fingerprint is taken of, in sectors.
const far = 8 << 20 / sectorSize

// TestCleanModesWait: in the modes that promise a clean cache nobody is answered before the disk has
// written, and flushed, what he wrote.
func TestCleanModesWait(t *testing.T) {
	for _, mode := range allModes {
		t.Run(mode.String(), func(t *testing.T) {
			x := newModeRig(t, mode)
			if !promisesClean(mode) {
				x.holds(backing.OpWrite, backing.OpFlush)
				answered(t, "a write", x.beginWrite(0, far, 1), nil)
				return
			}
			for i, kind := range []backing.Kind{backing.OpWrite, backing.OpFlush} {
				version := uint64(i + 1)
				x.holds(kind)
				ended := x.beginWrite(0, far, version)
				held(t, x.disk, 1)
				unanswered(t, fmt.Sprintf("a write with %v held", kind), ended)
				x.holds()
				x.disk.Release()
				answered(t, "a write", ended, nil)
				x.onDisk(t, far, version)
				x.readBack(t, far, version)
			}
			if s := x.Status(); s.DirtyBytes != 0 {
				t.Errorf("%d bytes are dirty", s.DirtyBytes)
			}
			if err := x.do(0, &Request{Op: Zero, Off: far * sectorSize, Len: 4096}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(x.afterCut(far), make([]byte, 4096)) {
				t.Error("zeros were acknowledged, and the disk has something else")
			}
		})
	}
}

// TestWhatIsKept: which modes keep what they have read, and what they have written.
func TestWhatIsKept(t *testing.T) {
	for _, mode := range allModes {
		t.Run(mode.String(), func(t *testing.T) {
			x := newModeRig(t, mode)
			_, before := x.journal.head()
			x.write(t, far*sectorSize, stamped(far, 8, 1))
			_, after := x.journal.head()
			if kept := !goesAround(mode); x.Cached(far*sectorSize, 4096) != kept || (before != after) != kept || (x.Status().DirectWrites == 0) != kept {
				t.Errorf("a write is kept: %t; the log had %d ksets, and has %d, %d writes went around", !kept, before, after, x.Status().DirectWrites)
			}
			x.read(t, 2*far*sectorSize, 4096)
			if got := x.Cached(2*far*sectorSize, 4096); got != keepsReads(mode) {
				t.Errorf("a read is kept: %t", got)
			}
			x.readBack(t, far, 1)
		})
	}
}

// TestCachedIsNotGoneAround: a write goes through the log where the cache has anything, the claim of
// a reader as well, and where the disk's fingerprint is taken.
func TestCachedIsNotGoneAround(t *testing.T) {
	x := newModeRig(t, ondisk.WriteBack)
	x.write(t, far*sectorSize, stamped(far, 8, 1))
	x.setMode(t, ondisk.WriteAround)
	x.read(t, 3*far*sectorSize, 4096) // the window has that
	x.holds(backing.OpRead)
	read := x.begin(1, &Request{Op: Read, Off: 2 * far * sectorSize, Buf: make([]byte, 8*sectorSize)})
	held(t, x.disk, 1)
	for _, lba := range []int64{far, far + 4, 2 * far, 3*far + 4, 0, 1 << 20 / sectorSize, x.size/sectorSize - 8} {
		answered(t, "a write", x.beginWrite(0, lba, 2), nil)
	}
	x.holds()
	x.disk.Release()
	if err := read(); err != nil {
		t.Fatal(err)
	}
	for _, lba := range []int64{far, far + 4, 2 * far, 3*far + 4} {
		if lba != far {
			x.readBack(t, lba, 2)
			x.onDisk(t, lba, 2)
		}
	}
	if n := x.Status().DirectWrites; n != 0 {
		t.Errorf("%d writes went around", n)
	}
}

// TestReadersAwaitDirectWrite: a reader of what a write is bringing to the disk waits for it, and
// does not fill what the disk had before.
func TestReadersAwaitDirectWrite(t *testing.T) {
	x := newModeRig(t, ondisk.WriteAround)
	x.holds(backing.OpWrite)
	wrote := x.beginWrite(0, far, 1)
	held(t, x.disk, 1)
	read := make([]chan error, 2)
	bufs := [2][]byte{make([]byte, 8*sectorSize), make([]byte, 8*sectorSize)}
	for i := range read {
		read[i] = x.start(i, &Request{Op: Read, Off: far * sectorSize, Buf: bufs[i]})
	}
	// Another miss is answered, so both of them have been looked up.
	for i := range read {
		if err := x.do(i, &Request{Op: Read, Off: 4 * far * sectorSize, Buf: make([]byte, 4096)}); err != nil {
			t.Fatal(err)
		}
		unanswered(t, "a read", read[i])
	}
	x.holds()
	x.disk.Release()
	answered(t, "the write", wrote, nil)
	for i := range read {
		answered(t, "a read", read[i], nil)
		if !bytes.Equal(bufs[i], stamped(far, 8, 1)) {
			t.Error("a reader that waited for the write has what was there before")
		}
	}
	x.readBack(t, far, 1)
}

// TestWritebackAwaitsDirectWrite: what was logged over a write that is still under way to the disk
// comes there after it.
func TestWritebackAwaitsDirectWrite(t *testing.T) {
	x := newModeRig(t, ondisk.WriteAround)
	x.holds(backing.OpWrite)
	first := x.beginWrite(0, far, 1)
	held(t, x.disk, 1)
	x.setMode(t, ondisk.WriteBack)
	answered(t, "a write over it", x.beginWrite(1, far, 2), nil)
	x.readBack(t, far, 2)
	flushed := x.beginFlush(t)
	if n := x.disk.Held(); n != 1 {
		t.Errorf("%d writes of the same place are under way", n)
	}
	x.holds()
	x.disk.Release()
	answered(t, "the first write", first, nil)
	answered(t, "a flush", flushed, nil)
	x.onDisk(t, far, 2)
}

// TestForgottenIsNotGoneAround: what the index has lost while the log still names it would come
// back after a crash, so no write goes around there until key_tail has passed it.
func TestForgottenIsNotGoneAround(t *testing.T) {
	x := newModeRig(t, ondisk.WriteBack)
	x.write(t, far*sectorSize, stamped(far, 8, 1))
	x.setMode(t, ondisk.WriteAround)
	e := x.extents(far, 8)
	if len(e) != 1 {
		t.Fatalf("%+v", e)
	}
	x.mem.Poison(x.layout.Offset(e[0].seg, uint32(e[0].pos)<<sectorShift), 4096)
	x.readBack(t, far, 1) // of the disk
	x.mem.Mend()
	if len(x.extents(far, 8)) != 0 {
		t.Fatal("damaged data was not forgotten")
	}
	x.write(t, far*sectorSize, stamped(far, 8, 2))
	if err := x.kill(); err != nil {
		t.Fatal(err)
	}
	x.rig = newRig(t, x.mem, x.disk, 2)
	x.readBack(t, far, 2)
}

// TestRefusedByDisk: a write that the disk does not take is answered with the disk's error, and the
// next one of the place, when the disk takes it again, like any other.
func TestRefusedByDisk(t *testing.T) {
	for _, mode := range []ondisk.Mode{ondisk.WriteThrough, ondisk.WriteAround, ondisk.PassThrough} {
		for _, what := range []string{"one place", "all writes", "flushes"} {
			t.Run(mode.String()+"/"+what, func(t *testing.T) {
				x := newModeRig(t, mode)
				x.write(t, 2*far*sectorSize, stamped(2*far, 8, 1))
				switch what {
				case "one place":
					x.fails4K.Store(far / 8)
				case "all writes":
					x.fails.Store(1 << backing.OpWrite)
				default:
					x.fails.Store(1 << backing.OpFlush)
				}
				answered(t, "a write", x.beginWrite(0, far, 1), syscall.EIO)
				if what == "one place" {
					answered(t, "a write elsewhere", x.beginWrite(1, 3*far, 1), nil)
					x.onDisk(t, 3*far, 1)
				}
				x.fails.Store(0)
				x.fails4K.Store(0)
				answered(t, "a write when the disk is well again", x.beginWrite(0, far, 2), nil)
				x.onDisk(t, far, 2)
				x.readBack(t, far, 2)
				x.onDisk(t, 2*far, 1)
			})
		}
	}
}

// TestDrain: a change to a mode that promises a clean cache ends when all is on the disk, and where
// it is broken off, or fails, the old mode is in force.
func TestDrain(t *testing.T) {
	for _, mode := range allModes {
		if !promisesClean(mode) {
			continue
		}
		t.Run(mode.String(), func(t *testing.T) {
			x := newModeRig(t, ondisk.WriteBack)
			set(t, x.Cache, func(s *Settings) { s.Writeback = false })
			to := func(ctx context.Context) error {
				return x.Set(ctx, func(s *Settings) error { s.Mode = mode; return nil })
			}
			kept := func(what string) {
				t.Helper()
				l, err := ondisk.ReadLayout(x.mem, x.mem.Size())
				if err != nil || l.Settings.Mode != ondisk.WriteBack || x.Settings().Mode != ondisk.WriteBack {
					t.Errorf("%s: mode %v on the media, %v in force, %v", what, l.Settings.Mode, x.Settings().Mode, err)
				}
				x.holds(backing.OpWrite)
				answered(t, "a write after that", x.beginWrite(0, 2*far, 1), nil)
				x.holds()
				x.disk.Release()
			}
			x.write(t, far*sectorSize, stamped(far, 8, 1))
			x.holds(backing.OpWrite)
			ctx, cancel := context.WithCancel(context.Background())
			changed := make(chan error, 1)
			go func() { changed <- to(ctx) }()
			held(t, x.disk, 1)
			unanswered(t, "a change of mode with dirty data", changed)
			during := x.beginWrite(1, 3*far, 1) // obeys the new mode, or the old
			cancel()
			answered(t, "a change that was broken off", changed, context.Canceled)
			kept("broken off")
			answered(t, "a write during the change", during, nil)

			x.fails.Store(1 << backing.OpWrite)
			if err := to(context.Background()); !errors.Is(err, syscall.EIO) {
				t.Errorf("a change with a disk that fails: %v", err)
			}
			x.fails.Store(0)
			kept("failed")

			if err := to(context.Background()); err != nil {
				t.Fatal(err)
			}
			x.onDisk(t, far, 1)
			x.onDisk(t, 2*far, 1)
			if s := x.Status(); s.DirtyBytes != 0 || s.Settings.Mode != mode {
				t.Errorf("%d bytes are dirty in mode %v", s.DirtyBytes, s.Settings.Mode)
			}
		})
	}
}

// TestRestGoesAroundNothing: a cache that is handed over begins no write to the disk, and has come
// to rest when none is under way.
func TestRestGoesAroundNothing(t *testing.T) {
	x := newModeRig(t, ondisk.WriteAround)
	x.holds(backing.OpWrite)
	first := x.beginWrite(0, far, 1)
	held(t, x.disk, 1)
	rested := make(chan error, 1)
	go func() {
		_, err := x.Rest(context.Background())
		rested <- err
	}()
	within(t, "a rest", func() {
		for !x.awaitsDirect() && len(rested) == 0 {
			time.Sleep(time.Millisecond)
		}
	})
	unanswered(t, "a rest with a write under way", rested)
	x.holds()
	x.disk.Release()
	answered(t, "a rest", rested, nil)
	answered(t, "the write", first, nil)
	second := x.beginWrite(0, 2*far, 1)
	x.awaitWaiting(t, 1)
	if n := x.Status().DirectWrites; n != 1 {
		t.Errorf("%d writes went around, one of them at rest", n)
	}
	if err := x.Set(context.Background(), func(s *Settings) error { s.IdleAfter = 0; return nil }); !errors.Is(err, ErrResting) {
		t.Errorf("settings of a cache at rest: %v", err)
	}
	x.Resume()
	answered(t, "a write that came at rest", second, nil)
	x.onDisk(t, 2*far, 1)
}

// TestAbortAnswersAll: every write that waits for the disk, or for its flush, is answered when the cache is
// given up.
func TestAbortAnswersAll(t *testing.T) {
	for _, mode := range []ondisk.Mode{ondisk.WriteThrough, ondisk.WriteAround} {
		for _, what := range []string{"write", "flush", "rest"} {
			t.Run(mode.String()+"/"+what, func(t *testing.T) {
				x := newModeRig(t, mode)
				switch what {
				case "write":
					x.holds(backing.OpWrite)
				case "flush":
					x.holds(backing.OpFlush)
				default:
					x.mustRest(t)
				}
				var all []chan error
				for i := range int64(6) {
					all = append(all, x.beginWrite(int(i%2), far+16*i, 1))
				}
				if what == "rest" {
					x.awaitWaiting(t, len(all))
				} else {
					held(t, x.disk, 1)
				}
				x.Abort()
				for _, ended := range all {
					answered(t, "a write", ended, ErrAborted)
				}
				answered(t, "a later write", x.beginWrite(0, 2*far, 1), ErrAborted)
			})
		}
	}
}

// TestHeldWritebackDoesNotHold: writes that are answered from the disk are a reason to write back,
// whatever the settings say of it.
func TestHeldWritebackDoesNotHold(t *testing.T) {
	x := newModeRig(t, ondisk.WriteThrough)
	set(t, x.Cache, func(s *Settings) { s.Writeback, s.IdleAfter, s.DirtyMaxAge = false, 0, 0 })
	for i := range int64(4) {
		answered(t, "a write", x.beginWrite(0, far+8*i, 1), nil)
	}
}

// TestModesGiveWhatTheyHad: a cache that was opened in a mode has what any other has left.
func TestModesGiveWhatTheyHad(t *testing.T) {
	x := newModeRig(t, ondisk.WriteBack)
	version := uint64(1)
	for _, from := range allModes {
		for _, to := range allModes {
			x.setMode(t, from)
			version++
			x.write(t, far*sectorSize, stamped(far, 8, version))
			x.setMode(t, to)
			x.readBack(t, far, version)
			if promisesClean(to) {
				x.onDisk(t, far, version)
			}
			if err := x.kill(); err != nil {
				t.Fatal(err)
			}
			x.rig = newRig(t, x.mem, x.disk, 2)
			if got := x.Settings().Mode; got != to {
				t.Errorf("mode %v after a restart, want %v", got, to)
			}
			x.readBack(t, far, version)
		}
	}
}

// tailGate is a region that keeps the stores of key_tail waiting.
type tailGate struct {
	*pmem.Fake
	closed atomic.Bool
	offs   [2]int64
	waits  chan struct{} // gets one for each that waits
	open   chan struct{}
}

func newTailGate() *tailGate {
	g := &tailGate{Fake: pmem.NewFake(ondisk.MinSize), waits: make(chan struct{}, 1), open: make(chan struct{})}
	for slot := range g.offs {
		var buf [ondisk.PositionSize]byte
		g.offs[slot] = ondisk.EncodePosition(buf[:], ondisk.KeyTail, ondisk.Replica{Slot: uint8(slot)}, ondisk.Position{})
	}
	return g
}

func (g *tailGate) WriteAt(p []byte, off int64) (int, error) {
	if (off == g.offs[0] || off == g.offs[1]) && g.closed.Load() {
		g.waits <- struct{}{}
		<-g.open
	}
	return g.Fake.WriteAt(p, off)
}

// TestNothingGoesAroundTheCollector: it forgets before its key_tail counts, and a power cut in
// between brings the keys back.
func TestNothingGoesAroundTheCollector(t *testing.T) {
	mem := newTailGate()
	formatSmall(t, mem, 12, false, 70)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	for i := range int64(4) {
		r.write(t, (far+8*i)*sectorSize, stamped(far+8*i, 8, 1))
	}
	set(t, r.Cache, func(s *Settings) { s.Mode = ondisk.WriteAround })
	r.awaitSure(t)
	mem.closed.Store(true)
	if err := r.setGC(0); err != nil {
		t.Fatal(err)
	}
	within(t, "collecting", func() { <-mem.waits })
	if len(r.extents(far, 8)) != 0 {
		t.Fatal("the collector has forgotten nothing")
	}
	r.write(t, far*sectorSize, stamped(far, 8, 2))
	region, after := pmem.NewFake(ondisk.MinSize), disk.Crash()
	defer after.Close()
	p := make([]byte, ondisk.MinSize)
	mem.ReadAt(p, 0)
	store(t, region, p, 0)
	mem.closed.Store(false)
	close(mem.open)
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	cut := newRig(t, region, after, 1)
	if v := cut.version(t, far); v != 2 {
		t.Errorf("version %d has come back over an acknowledged write", v)
	}
	cut.kill()
}

// TestLosses: where the index loses more than the log, no write may go around until key_tail has
// passed what the log had then.
func TestLosses(t *testing.T) {
	const stripe int64 = far * sectorSize / ondisk.StripeSize
	zero := func(t *testing.T, r *rig) {
		if err := r.do(0, &Request{Op: Zero, Off: far * sectorSize, Len: 4096}); err != nil {
			t.Fatal(err)
		}
	}
	for name, loseSome := range map[string]func(t *testing.T, r *rig){
		// Two keys name the same zeros, and the first of them takes both away.
		"zeros": func(t *testing.T, r *rig) {
			if changed, err := r.gcStep(); !changed || err != nil {
				t.Fatal(changed, err)
			}
			if len(r.extents(far, 8)) != 0 {
				t.Fatal("the second key still has its extent")
			}
		},
		"logged again": func(t *testing.T, r *rig) {
			j := &r.journal
			j.mu.Lock()
			defer j.mu.Unlock()
			e := r.extents(far, 8)[0]
			k := ondisk.Key{Off: far * sectorSize, Len: 4096, Flags: ondisk.KeyZero, Seg: e.seg, SegOff: uint32(e.pos) << sectorShift, Gen: r.segments.all[e.seg].gen.Load()}
			if err := r.appendAgainLocked([]ondisk.Key{k}, 0); err != nil {
				t.Fatal(err)
			}
		},
		"log damage": func(t *testing.T, r *rig) {
			to, _ := r.tails.dirtyTail()
			if _, damage := r.forgetHidden(to); damage != nil {
				t.Fatal(damage)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			x := newModeRig(t, ondisk.WriteBack)
			zero(t, x.rig)
			for i := range int64(2 * gcKsets) { // more than a step of the collector takes
				x.write(t, (2*far+8*i)*sectorSize, stamped(2*far+8*i, 8, 1))
			}
			zero(t, x.rig)
			x.setMode(t, ondisk.WriteAround)
			x.mustRest(t)
			s := x.Settings()
			s.GCPercent = 0
			x.settings.now.Store(&s)
			x.direct.set(&x.direct.mu.resting, false)
			if !x.mayGoAround(stripe) {
				t.Fatal("something is lost already")
			}
			loseSome(t, x.rig)
			if x.mayGoAround(stripe) {
				t.Error("a write may go around what a crash brings back")
			}
			x.Resume()
			within(t, "key_tail", func() {
				for n := far; !x.mayGoAround(stripe); n += 8 {
					x.write(t, int64(n)*sectorSize, stamped(int64(n), 8, 1))
				}
			})
		})
	}
}

// TestOverwrittenWaits: a write that was overwritten is answered when what has overwritten it is on
// the disk, although write-back has passed its own key.
func TestOverwrittenWaits(t *testing.T) {
	x := newModeRig(t, ondisk.WriteThrough)
	x.narrow(t, maxDeferred, 1) // a round ends as soon as something is written
	x.mustRest(t)
	first := x.beginWrite(0, far, 1)
	x.awaitWaiting(t, 1)
	between := x.beginWrite(0, 2*far, 1)
	x.awaitWaiting(t, 2)
	second := x.beginWrite(1, far, 2)
	x.awaitWaiting(t, 3)
	x.fails4K.Store(far / 8)
	x.Resume()
	answered(t, "a write elsewhere", between, nil)
	answered(t, "the write that overwrote", second, syscall.EIO)
	answered(t, "the write that was overwritten", first, syscall.EIO)
}

// TestDrainOfOverwritten: what was answered before a change of mode, and is overwritten during it,
// is on the disk, or what overwrote it, when the change has ended. Where that is refused, so is the
// change.
func TestDrainOfOverwritten(t *testing.T) {
	for _, refused := range []bool{false, true} {
		t.Run(fmt.Sprintf("refused=%t", refused), func(t *testing.T) {
			x := newModeRig(t, ondisk.WriteBack)
			x.narrow(t, maxDeferred, 1) // a round ends as soon as something is written
			x.mustRest(t)
			x.write(t, 2*far*sectorSize, stamped(2*far, 8, 1))
			x.write(t, far*sectorSize, stamped(far, 8, 1))
			x.obey(ondisk.WriteThrough)
			drained := make(chan error, 1)
			go func() { drained <- x.drain(context.Background()) }()
			within(t, "a flush", func() {
				for waiters := 0; waiters == 0; time.Sleep(time.Millisecond) {
					x.writeback.mu.Lock()
					waiters = len(x.writeback.mu.waiters)
					x.writeback.mu.Unlock()
				}
			})
			between := x.beginWrite(0, 3*far, 1)
			x.awaitWaiting(t, 1)
			over := x.beginWrite(0, far, 2)
			x.awaitWaiting(t, 2)
			x.holdAt.Store(far / 8)
			if refused {
				x.fails4K.Store(far / 8)
			}
			x.Resume()
			answered(t, "a write elsewhere", between, nil)
			held(t, x.disk, 1)
			unanswered(t, "the drain", drained)
			x.holdAt.Store(0)
			x.disk.Release()
			var want error
			if refused {
				want = syscall.EIO
			}
			answered(t, "the write that overwrote", over, want)
			answered(t, "the drain", drained, want)
			if !refused {
				x.onDisk(t, far, 2)
			}
		})
	}
}

// TestWeakerModeReleases: a write that waits for the disk is answered as soon as a mode is obeyed in which
// it need not.
func TestWeakerModeReleases(t *testing.T) {
	x := newModeRig(t, ondisk.WriteThrough)
	x.holds(backing.OpWrite)
	waits := x.beginWrite(0, far, 1)
	held(t, x.disk, 1)
	unanswered(t, "a write", waits)
	x.setMode(t, ondisk.WriteBack)
	answered(t, "the write", waits, nil)
}

// TestFailedRoundAnswersAll: after a round that failed all are answered, those behind its end, too.
func TestFailedRoundAnswersAll(t *testing.T) {
	x := newModeRig(t, ondisk.WriteBack)
	x.mustRest(t)
	for i := range int64(roundBytes>>20 + 2) {
		x.write(t, (far+2048*(i%40))*sectorSize, stamped(far+2048*(i%40), 2048, 1))
	}
	x.obey(ondisk.WriteThrough)
	waits := x.beginWrite(0, far-8, 1)
	x.awaitWaiting(t, 1)
	x.fails.Store(1 << backing.OpFlush)
	x.Resume()
	answered(t, "a write behind the first round", waits, syscall.EIO)
}

// TestOldRefusalIsNotTheNext: that the disk has refused what was there before is no error of a
// write that came meanwhile.
func TestOldRefusalIsNotTheNext(t *testing.T) {
	x := newModeRig(t, ondisk.WriteThrough)
	x.fails4K.Store(far / 8)
	x.holds(backing.OpWrite)
	old := x.beginWrite(0, far, 1)
	held(t, x.disk, 1) // and will fail
	next := x.beginWrite(1, far, 2)
	x.awaitWaiting(t, 2)
	x.fails4K.Store(0)
	x.holds()
	x.disk.Release()
	answered(t, "the write that was refused", old, syscall.EIO)
	answered(t, "the next one", next, nil)
	x.onDisk(t, far, 2)
}

// TestFlushFailsForAll: a disk tells of a failed flush once, so whoever has written since then is
// told of it, too.
func TestFlushFailsForAll(t *testing.T) {
	x := newModeRig(t, ondisk.WriteAround)
	x.mustRest(t) // nobody else flushes
	since := x.flushes.failed.Load()
	x.fails.Store(1 << backing.OpFlush)
	if err := x.flushDisk(since, nil); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	x.fails.Store(0)
	if err := x.flushDisk(since, nil); !errors.Is(err, syscall.EIO) {
		t.Errorf("for who has written before the failure: %v", err)
	}
	if err := x.flushDisk(x.flushes.failed.Load(), nil); err != nil {
		t.Errorf("for who has written after it: %v", err)
	}
	x.Resume()
}

// TestUnflushedIsNotKept: what a reader has of a write that is not flushed yet may be gone after a power
// cut, so it waits; and of one whose flush has failed nothing is kept until one succeeds.
func TestUnflushedIsNotKept(t *testing.T) {
	x := newModeRig(t, ondisk.WriteAround)
	x.holds(backing.OpFlush)
	wrote := x.beginWrite(0, far, 1)
	held(t, x.disk, 1)
	buf := make([]byte, 8*sectorSize)
	read := x.start(1, &Request{Op: Read, Off: far * sectorSize, Buf: buf})
	if err := x.do(1, &Request{Op: Read, Off: 4 * far * sectorSize, Buf: make([]byte, 4096)}); err != nil {
		t.Fatal(err)
	}
	unanswered(t, "a read of what is not flushed", read)
	x.fails.Store(1 << backing.OpFlush)
	x.holds()
	x.disk.Release() // the held one succeeds
	answered(t, "the write", wrote, nil)
	answered(t, "the read", read, nil)
	answered(t, "a write whose flush fails", x.beginWrite(0, 2*far, 1), syscall.EIO)
	x.read(t, 2*far*sectorSize, 4096)
	if x.Cached(2*far*sectorSize, 4096) {
		t.Error("what may be gone after a power cut is kept")
	}
	x.fails.Store(0)
	answered(t, "a write when the disk is well again", x.beginWrite(0, 3*far, 1), nil)
	x.read(t, 2*far*sectorSize, 4096)
	if !x.Cached(2*far*sectorSize, 4096) {
		t.Error("nothing is kept although the disk is well again")
	}
}

// TestLoggedAgainIsLostLater: two keys have one place since something was logged again, and a server
// that was started since knows that as well.
func TestLoggedAgainIsLostLater(t *testing.T) {
	x := newModeRig(t, ondisk.WriteBack)
	x.fails4K.Store(far / 8)
	x.write(t, far*sectorSize, stamped(far, 8, 1))
	for i := range int64(2 * gcKsets) {
		x.write(t, (2*far+8*i)*sectorSize, stamped(2*far+8*i, 8, 1))
	}
	if err := x.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	x.mustRest(t)
	runs := x.writeback.runs()
	for i := range runs {
		runs[i].keys = x.keysOf(nil, &runs[i].part)
	}
	if passed, err := x.relogRuns(runs); !passed || err != nil {
		t.Fatal(passed, err)
	}
	if err := x.kill(); err != nil {
		t.Fatal(err)
	}
	x.fails4K.Store(0)
	x.rig = newRig(t, x.mem, x.disk, 2)
	x.setMode(t, ondisk.WriteAround)
	x.mustRest(t)
	s := x.Settings()
	s.GCPercent = 0
	x.settings.now.Store(&s)
	if changed, err := x.gcStep(); !changed || err != nil || len(x.extents(far, 8)) != 0 {
		t.Fatal(changed, err, x.extents(far, 8))
	}
	s.GCPercent = 70
	x.settings.now.Store(&s)
	x.Resume()
	x.write(t, far*sectorSize, stamped(far, 8, 2))
	if err := x.kill(); err != nil {
		t.Fatal(err)
	}
	x.rig = newRig(t, x.mem, x.disk, 2)
	x.readBack(t, far, 2)
}

// TestDirectAndOlderKeyTail: what has gone around the cache is not hidden by what had been collected there,
// although the newest copy of key_tail is gone when the cache is opened.
func TestDirectAndOlderKeyTail(t *testing.T) {
	const stripe int64 = far * sectorSize / ondisk.StripeSize
	x := newModeRig(t, ondisk.WriteBack)
	x.write(t, far*sectorSize, stamped(far, 8, 1))
	x.setMode(t, ondisk.WriteAround)
	if err := x.setGC(0); err != nil {
		t.Fatal(err)
	}
	within(t, "collecting", func() {
		for len(x.extents(far, 8)) != 0 || !x.mayGoAround(stripe) {
			time.Sleep(time.Millisecond)
		}
	})
	x.write(t, far*sectorSize, stamped(far, 8, 2))
	if n := x.Status().DirectWrites; n != 1 {
		t.Fatalf("%d writes went around", n)
	}
	if err := x.setGC(70); err != nil { // or it is collected again before anybody reads it
		t.Fatal(err)
	}
	if err := x.kill(); err != nil {
		t.Fatal(err)
	}
	l, err := ondisk.ReadLayout(x.mem, x.mem.Size())
	if err != nil {
		t.Fatal(err)
	}
	var buf [ondisk.PositionSize]byte
	off := ondisk.EncodePosition(buf[:], ondisk.KeyTail, l.KeyTailCopies.Newest, ondisk.Position{})
	store(t, x.mem, bytes.Repeat([]byte{0xff}, len(buf)), off)
	x.rig = newRig(t, x.mem, x.disk, 2)
	x.readBack(t, far, 2)
}

// TestZerosAwaitDirectWrite: two zeros that begin at the same place are two parts of a round, the one
// within the other, and both wait for a write that is under way.
func TestZerosAwaitDirectWrite(t *testing.T) {
	x := newModeRig(t, ondisk.WriteAround)
	x.holds(backing.OpWrite)
	first := x.beginWrite(0, far+120, 1)
	held(t, x.disk, 1)
	set(t, x.Cache, func(s *Settings) { s.Mode, s.Writeback = ondisk.WriteBack, false })
	for _, n := range []int{200, 100} {
		if err := x.do(1, &Request{Op: Zero, Off: far * sectorSize, Len: n * sectorSize}); err != nil {
			t.Fatal(err)
		}
	}
	flushed := x.beginFlush(t)
	unanswered(t, "a flush", flushed)
	x.holds()
	x.disk.Release()
	answered(t, "the write", first, nil)
	answered(t, "a flush", flushed, nil)
	if !bytes.Equal(x.afterCut(far+120), make([]byte, 4096)) {
		t.Error("the disk has what came before the zeros")
	}
}

// listed is a write of n sectors that the cache knows, and that is not committed yet.
func (x *modeRig) listed(lba, n int64) *Request {
	q := &Queue{c: x.Cache, wake: func() {}}
	q.turn = []*Request{{Op: Write, Off: lba * sectorSize, Buf: make([]byte, n*sectorSize), done: 1, q: q}}
	x.register(q)
	return q.turn[0]
}

// TestFailsWithItsSuccessor: a write that was overwritten fails where what may have overwritten it does.
func TestFailsWithItsSuccessor(t *testing.T) {
	x := newModeRig(t, ondisk.WriteThrough)
	failed := errors.New("failed")
	r := [2]*Request{x.listed(far, 8), x.listed(far, 8)}
	r[0].until = 10
	r[1].Err = failed
	x.through.forget(r[1]) // a part of it is committed behind the other
	x.through.roundEnded(10, nil)
	if r[0].through || !errors.Is(r[0].Err, failed) {
		t.Errorf("answered: %t, %v", !r[0].through, r[0].Err)
	}
	r = [2]*Request{x.listed(far, 8), x.listed(far, 8)}
	r[1].until = 20 // the first has been committed before, and does not wait yet
	x.through.roundEnded(11, failed)
	x.awaitDisk(r[0], 15)
	x.through.roundEnded(15, nil)
	if r[0].through || !errors.Is(r[0].Err, failed) {
		t.Errorf("answered: %t, %v", !r[0].through, r[0].Err)
	}
}

// TestNobodyStarves: a write waits for those that may have overwritten it before the disk had what it could, and
// not for those that come later, however many.
func TestNobodyStarves(t *testing.T) {
	x := newModeRig(t, ondisk.WriteThrough)
	first := x.listed(far, 8)
	first.until = 5
	next := x.listed(far, 1)
	for round := uint64(10); first.through; round += 2 {
		if round > 40 {
			t.Fatal("a write is never answered while others come")
		}
		next.until = round
		then := x.listed(far+int64(round/2%2), 1) // another sector each time
		x.through.roundEnded(round, nil)
		next = then
	}
	x.through.forget(next)
}
