package engine

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestManyRefused: a disk that refuses more than can be remembered gets all the
// rest, also what lies between it, and the cache can be filled many times over.
// Nothing of it is lost, and it is written when the disk takes it.
func TestManyRefused(t *testing.T) {
	for _, most := range []int{2, maxDeferred} {
		t.Run(fmt.Sprint(most), func(t *testing.T) { manyRefused(t, most) })
	}
}

func manyRefused(t *testing.T, most int) {
	pieces := int64(most + 1500)
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(128<<20, 512, 1)
	refuses := func(lba int64) bool { return lba%4 == 1 && lba < 4*pieces }
	var mended atomic.Bool
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if mended.Load() || op.Kind != backing.OpWrite {
			return f
		}
		for lba := op.Off / sectorSize; lba < (op.Off+op.Len)/sectorSize; lba++ {
			if refuses(lba) {
				f.Err = syscall.EIO
				break
			}
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.writeback.most = most
	for i := range pieces { // three sectors, each by itself, and a gap
		for lba := 4 * i; lba < 4*i+3; lba++ {
			r.write(t, lba*sectorSize, stamped(lba, 1, 1))
		}
	}
	r.Resume()
	onDisk := func(when string, all bool) {
		t.Helper()
		p := make([]byte, 4*pieces*sectorSize)
		disk.ReadAt(p, 0)
		missing := 0
		for lba := range 4 * pieces {
			if lba%4 == 3 || refuses(lba) && !all {
				continue
			}
			if v, err := stamp(p[lba*sectorSize:][:sectorSize], lba); v != 1 || err != nil {
				missing++
			}
		}
		if missing > 0 {
			t.Errorf("%s: the disk lacks %d sectors that it takes", when, missing)
		}
	}
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush of what the disk refuses: %v", err)
	}
	within(t, "writing the rest", func() {
		for r.Status().DirtyBytes > pieces*sectorSize {
			time.Sleep(time.Millisecond)
		}
	})
	onDisk("refusing", false)
	if s := r.Status(); s.State != Degraded {
		t.Errorf("%v, %q", s.State, s.Error)
	}
	for n := range int64(8) {
		within(t, "filling the cache", func() {
			for i := range int64(8 * 16) {
				off := (16 + i%64) << 20
				r.write(t, off, stamped(off/sectorSize, 2048, uint64(n)))
			}
		})
		r.mustRest(t)
		r.mustNameDirty(t)
		r.Resume()
	}
	r.mustRest(t)
	if n := r.writeback.refused(); n > most+1 {
		t.Errorf("%d pieces are remembered, at most %d should be", n, most)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, mem, disk, 1)
	r.narrow(t, most, roundTime)
	for lba := range 4 * pieces {
		if lba%4 != 3 {
			if v := r.version(t, lba); v != 1 {
				t.Fatalf("after a restart sector %d has version %d", lba, v)
			}
		}
	}
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush after a restart: %v", err)
	}
	mended.Store(true)
	within(t, "a flush", func() {
		if err := r.Flush(t.Context()); err != nil {
			t.Error(err)
		}
	})
	// What was deferred may have been logged again meanwhile, behind what the flush waits for.
	within(t, "dirty_tail to come to the end", func() {
		for s := r.Status(); s.DirtyTail != s.KeyHead; s = r.Status() {
			time.Sleep(time.Millisecond)
		}
	})
	if s := r.Status(); s.State != Healthy || s.DirtyBytes > 0 {
		t.Errorf("mended: %v, %q, %d dirty bytes, dirty_tail %v of %v", s.State, s.Error, s.DirtyBytes, s.DirtyTail, s.KeyHead)
	}
	onDisk("mended", true)
	if err := r.kill(); err != nil {
		t.Error(err)
	}
	disk.Close()
}

// mustNameDirty makes sure that the log has a key behind dirty_tail for all that the
// index of a cache at rest says is dirty.
func (r *rig) mustNameDirty(t *testing.T) {
	t.Helper()
	from, _ := r.tails.dirtyTail()
	head, _ := r.journal.head()
	named := map[int64]bool{}
	damage := r.walk(new(ondisk.Walker), from, head, func(k *ondisk.Kset, _ ondisk.Position) bool {
		for i := range k.Keys {
			if key := &k.Keys[i]; !r.dead(key) && key.Flags&ondisk.KeyClean == 0 {
				for lba := int64(key.Off / sectorSize); lba < int64(key.Off+uint64(key.Len))/sectorSize; lba++ {
					named[lba] = true
				}
			}
		}
		return true
	})
	missing := 0
	r.Dirty(func(off, n int64) {
		for lba := off / sectorSize; lba < (off+n)/sectorSize; lba++ {
			if !named[lba] {
				missing++
			}
		}
	})
	if damage != nil || missing > 0 {
		t.Fatalf("%d dirty sectors are not named behind dirty_tail, %v", missing, damage)
	}
}

// TestRefusedBehindTheEnd: a round that is cut short may have been refused what lies
// behind its new end. That is picked again. To be passed by it would hold
// dirty_tail at a place that write-back has not come to, and write-back would go on
// from there.
func TestRefusedBehindTheEnd(t *testing.T) {
	const count = 400
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(8<<20, sectorSize, 1)
	defer disk.Close()
	var healed atomic.Bool
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite && !healed.Load() {
			f.Delay = time.Millisecond
			if op.Off == 0 {
				f.Err = syscall.EIO
			}
		}
		return f
	})
	c, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, WritebackDepth: 4, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	r := startRig(c)
	r.mustRest(t)
	for i := range int64(count) { // the youngest is the first on the disk, and refused
		lba := (count - 1 - i) * 4
		r.write(t, lba*sectorSize, stamped(lba, 1, 1))
	}
	w := &r.writeback
	w.most, w.step = 0, 10*time.Millisecond
	r.workers.stop = make(chan struct{}) // for the rounds made here
	_, written := r.journal.head()
	w.nextTurn()
	if err := r.round(written); err != nil {
		t.Fatal(err)
	}
	at := w.at.ksets
	if at == written || at == 0 {
		t.Fatalf("a round of %d ksets was cut short to %d", written, at)
	}
	w.skipped.next = time.Time{}
	if until := w.rewind(0, at); w.at.ksets > at || until > at {
		t.Errorf("begun once more at kset %d, up to %d, write-back had come to %d", w.at.ksets, until, at)
	}
	for w.at.ksets < written {
		if err := r.round(written); err != nil && !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		r.mustNameDirty(t)
	}
	close(r.workers.stop)
	healed.Store(true)
	r.Resume()
	within(t, "a flush", func() {
		if err := r.Flush(t.Context()); err != nil {
			t.Error(err)
		}
	})
	r.kill()
	p := make([]byte, sectorSize)
	for lba := int64(0); lba < 4*count; lba += 4 {
		disk.ReadAt(p, lba*sectorSize)
		if v, err := stamp(p, lba); v != 1 || err != nil {
			t.Fatalf("sector %d of the disk: version %d, %v", lba, v, err)
		}
	}
}

// TestFlushWhileWritten: a flush that cannot succeed fails, also while a client goes on
// writing what the disk takes.
func TestFlushWhileWritten(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	const refused = 32 << 20 // from there on
	disk.Script(func(op backing.Op) (f backing.Fault) {
		f.Delay = time.Millisecond // more is written in each round
		if op.Kind == backing.OpWrite && op.Off+op.Len > refused {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 2)
	r.mustRest(t)
	r.writeback.most = 2
	for i := range int64(16) {
		r.write(t, refused+i<<20, stamped((refused+i<<20)/sectorSize, 1, 1))
	}
	r.Resume()
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		for v := uint64(1); ; v++ {
			select {
			case <-stop:
				ended <- nil
				return
			case <-time.After(100 * time.Microsecond): // the cache does not fill
			}
			lba := int64(v%1000) * 8
			if err := r.do(1, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, 1, v)}); err != nil {
				ended <- err
				return
			}
		}
	}()
	for range 3 {
		within(t, "a flush", func() {
			if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
				t.Errorf("a flush of what the disk refuses: %v", err)
			}
		})
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}

// TestListIsBounded: what is deferred is bounded, also when all of it is refused again
// and could be tried in smaller pieces, and what the disk takes goes on meanwhile.
func TestListIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most, pieces, sectors = 8, 24, 64
		mem := pmem.NewFake(ondisk.MinSize)
		formatSmall(t, mem, 8, false, 70)
		disk := backing.NewFake(64<<20, sectorSize, 1)
		defer disk.Close()
		disk.Script(func(op backing.Op) (f backing.Fault) {
			if op.Kind == backing.OpWrite && op.Off < pieces<<20 {
				f.Err = syscall.EIO
			}
			return f
		})
		r := newRig(t, mem, disk, 1)
		r.mustRest(t)
		w := &r.writeback
		w.most = most
		for i := range int64(pieces) {
			lba := i << 11
			r.write(t, lba*sectorSize, stamped(lba, sectors, 1))
		}
		r.Resume()
		for n := range int64(20) {
			lba := (pieces + n) << 11
			r.write(t, lba*sectorSize, stamped(lba, 1, 1))
			if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
				t.Errorf("a flush of what the disk refuses: %v", err)
			}
			p := make([]byte, sectorSize)
			disk.ReadAt(p, lba*sectorSize)
			if v, err := stamp(p, lba); v != 1 || err != nil {
				t.Errorf("flush %d: what the disk takes is at version %d, %v", n, v, err)
			}
		}
		r.mustRest(t)
		if n := w.refused(); n > most+1 {
			t.Errorf("%d pieces are remembered, at most %d should be", n, most)
		}
		if err := r.kill(); err != nil {
			t.Error(err)
		}
	})
}

// TestLargeKeysPassedBy: what was refused is logged again as the keys that it was, so
// that the log becomes shorter, and the cache can be filled.
func TestLargeKeysPassedBy(t *testing.T) {
	const block = 1 << 20
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(256<<20, sectorSize, 1)
	defer disk.Close()
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite && op.Off < 64<<20 {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.writeback.most = 1
	for i := range int64(48) { // which are most of what there is room for
		r.write(t, i*block, stamped(i*block/sectorSize, block/sectorSize, 1))
	}
	r.Resume()
	within(t, "filling the cache", func() {
		for i := range int64(128) {
			at := 192<<20 + i%32*block
			r.write(t, at, stamped(at/sectorSize, block/sectorSize, uint64(i)))
		}
	})
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}

// TestMoreKeysThanPassed: what is left of a few keys takes more of them than the log could pass
// by that. Logged again all the same, it lets go of segments in which there is nothing to be
// written, and the cache can be filled.
func TestMoreKeysThanPassed(t *testing.T) {
	for _, test := range []struct {
		name    string
		most    int   // as of writeback
		block   int64 // bytes of a write
		count   int64 // of writes of which some is refused
		piece   int64 // bytes of which the disk takes all or none
		refused string
	}{
		{"deferred", maxDeferred, 1 << 20, 1, sectorSize, "-+"},
		// More than half of each segment, so that no two can be gathered in one.
		{"passed by", 0, ondisk.StripeSize, 11, transferBytes, "-+--+-+-"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mem := pmem.NewFake(ondisk.MinSize)
				formatSmall(t, mem, 8, false, 70)
				disk := backing.NewFake(128<<20, sectorSize, 1)
				defer disk.Close()
				refuses := func(off int64) bool {
					return off < test.count*test.block && test.refused[off/test.piece%int64(len(test.refused))] == '-'
				}
				disk.Script(func(op backing.Op) (f backing.Fault) {
					for off := op.Off; op.Kind == backing.OpWrite && off < op.Off+op.Len; off += sectorSize {
						if refuses(off) {
							f.Err = syscall.EIO
						}
					}
					return f
				})
				r := newRig(t, mem, disk, 1)
				r.narrow(t, test.most, roundTime)
				left := int64(0)
				for off := int64(0); off < test.count*test.block; off += test.piece {
					if refuses(off) {
						left += test.piece
					}
				}
				write := func(at int64, version uint64) {
					r.write(t, at, stamped(at/sectorSize, int(test.block/sectorSize), version))
				}
				for i := range test.count {
					write(i*test.block, 1)
				}
				r.Resume()
				within(t, "writing what the disk takes", func() {
					for r.Status().DirtyBytes > left {
						time.Sleep(time.Millisecond)
					}
				})
				within(t, "filling the cache three times", func() {
					for i := range 3 * 8 * ondisk.SegmentSize / test.block {
						write(64<<20+i*test.block%(32<<20), uint64(i))
					}
				})
				r.mustRest(t)
				r.mustNameDirty(t)
				for lba := range test.count * test.block / sectorSize {
					if v := r.version(t, lba); v != 1 {
						t.Fatalf("sector %d has version %d", lba, v)
					}
				}
				if err := r.kill(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestTried: of a disk that takes nothing each flush that fails has tried more, and what
// lies behind comes to its turn.
func TestTried(t *testing.T) {
	const pieces = roundParts + 1000
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 16, false, 90)
	disk := backing.NewFake(128<<20, sectorSize, 1)
	defer disk.Close()
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite && op.Off < 2*pieces*sectorSize {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	r.narrow(t, 0, roundTime)
	r.mustRest(t)
	for i := range int64(pieces) {
		r.write(t, 2*i*sectorSize, stamped(2*i, 1, 1))
	}
	const last = 3 * pieces
	r.write(t, last*sectorSize, stamped(last, 1, 1))
	r.Resume()
	_, written := r.journal.head()
	for tried := uint64(0); tried < written; {
		if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a flush of what the disk refuses: %v", err)
		}
		now := r.Status().Tried
		if now <= tried {
			t.Fatalf("flush after flush tries %d of %d ksets", now, written)
		}
		tried = now
	}
	p := make([]byte, sectorSize)
	disk.ReadAt(p, last*sectorSize)
	if v, err := stamp(p, last); v != 1 || err != nil {
		t.Errorf("what the disk takes is at version %d, %v", v, err)
	}
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}

// TestFlushOfWhatIsOverwritten: a flush returns although what was passed by turns out to
// be overwritten when the collector presses, and nothing is left to write.
func TestFlushOfWhatIsOverwritten(t *testing.T) {
	const lba = 40
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 7, false, 70)
	disk, fate := backing.NewFake(64<<20, sectorSize, 1), newFate()
	defer disk.Close()
	disk.Script(fate.script)
	fate.refuse(lba)
	r := newRig(t, mem, disk, 1)
	r.narrow(t, 0, roundTime)
	r.write(t, lba*sectorSize, stamped(lba, 1, 1))
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a flush of what the disk refuses: %v", err)
	}
	r.mustRest(t)
	w := &r.writeback
	if !w.skipped.on {
		t.Fatal("nothing was passed by")
	}
	w.skipped.next = time.Now().Add(time.Hour)
	r.neverWait()
	fate.heal()
	r.write(t, lba*sectorSize, stamped(lba, 1, 2))
	r.Resume()
	within(t, "writing it back", func() {
		for r.Status().DirtyBytes > 0 {
			time.Sleep(time.Millisecond)
		}
	})
	r.mustRest(t)
	flushed := make(chan error, 1)
	go func() { flushed <- r.Flush(t.Context()) }()
	for waits := false; !waits; {
		w.mu.Lock()
		waits = len(w.mu.waiters) > 0
		w.mu.Unlock()
	}
	w.pressed.Store(true)
	r.Resume()
	within(t, "the flush", func() {
		if err := <-flushed; err != nil {
			t.Error(err)
		}
	})
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}

// TestAllRefused: of a disk that takes nothing, and of which nothing can be deferred,
// what is overwritten makes room all the same.
func TestAllRefused(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 7, false, 70)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	r.narrow(t, 0, roundTime)
	within(t, "overwriting a block", func() {
		r.write(t, 32<<20, stamped(32<<20/sectorSize, 8, 1))
		for v := range uint64(300) {
			r.write(t, 0, stamped(0, 2048, 1+v))
		}
	})
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}

// TestGatherAroundZeros: segments with more refused zeros than can be copied at once do
// not keep others from being gathered.
func TestGatherAroundZeros(t *testing.T) {
	var in [4]holding
	for i, n := range []int{gatherRuns - 1, gatherRuns - 1, 1, 1} {
		in[i] = holding{seg: uint32(i), n: n}
	}
	in[2].bytes, in[3].bytes = sectorSize, sectorSize
	all := []*holding{&in[0], &in[1], &in[2], &in[3]}
	worth := fitting(all)
	if len(worth) != 2 || worth[0] != &in[0] || worth[1] != &in[2] {
		t.Errorf("%d holdings fit, %+v", len(worth), worth)
	}
}
