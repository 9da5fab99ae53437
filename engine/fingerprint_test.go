package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

// What the tests below write to, in bytes on a disk of changedDisk: offsets in
// the three areas, and between them.
const (
	changedDisk = 1536 << 10
	superblock  = 1 << 10
	partition   = firstPartition + 4<<10
	backupTable = changedDisk - 512
	elsewhere   = 600 << 10
	faraway     = 1280 << 10
)

// formatted returns a blank region with a new cache.
func formatted(t testing.TB, crc bool) *pmem.Fake {
	t.Helper()
	mem := pmem.NewFake(ondisk.MinSize)
	if err := ondisk.Format(mem, ondisk.FormatOptions{DataCRC: crc, GCPercent: 70}); err != nil {
		t.Fatal(err)
	}
	return mem
}

// openChanged opens a cache with a choice. empty says whether it was emptied.
func openChanged(mem Memory, disk *backing.Fake, choice Choice) (r *rig, empty bool, err error) {
	log := &testLog{}
	c, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, WritebackDepth: 1, Log: log, Changed: choice})
	log.mu.Lock()
	defer log.mu.Unlock()
	empty = slices.ContainsFunc(log.lines, func(l string) bool { return strings.Contains(l, "starts empty") })
	if err != nil {
		return nil, empty, err
	}
	return startRig(c), empty, nil
}

// mustOpen opens a cache of which the test knows whether it is emptied.
func mustOpen(t *testing.T, mem Memory, disk *backing.Fake, choice Choice, wantEmpty bool) *rig {
	t.Helper()
	r, empty, err := openChanged(mem, disk, choice)
	if err != nil {
		t.Fatal(err)
	}
	if empty != wantEmpty {
		t.Fatalf("the cache was emptied: %t", empty)
	}
	return r
}

func (r *rig) mustEnd(t *testing.T) {
	t.Helper()
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) mustFlush(t *testing.T) {
	t.Helper()
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// filled is a sector of one byte, all over.
func filled(b byte) []byte { return bytes.Repeat([]byte{b}, sectorSize) }

// holds fails the test unless the device has filled(b) at off.
func (r *rig) holds(t *testing.T, off int64, b byte) {
	t.Helper()
	if got := r.read(t, off, sectorSize); !bytes.Equal(got, filled(b)) {
		t.Errorf("at %d the device holds %d…, want %d", off, got[0], b)
	}
}

func diskHolds(t *testing.T, disk *backing.Fake, off int64, b byte) {
	t.Helper()
	got := make([]byte, sectorSize)
	disk.ReadAt(got, off)
	if !bytes.Equal(got, filled(b)) {
		t.Errorf("at %d the disk holds %d…, want %d", off, got[0], b)
	}
}

func TestSampledAreas(t *testing.T) {
	for _, block := range []int64{512, 4096} {
		for _, size := range []int64{block, 64 << 10, sampleBytes, sampleBytes + block, 3 * sampleBytes, 1 << 20, 1<<20 + block,
			1<<20 + 64<<10, 1<<20 + sampleBytes, 1<<20 + sampleBytes + block, 2<<20 - block, 1 << 40} {
			sampled := map[int64]bool{}
			end := int64(-1)
			for _, a := range sampledAreas(size) {
				if a.n <= 0 || a.off <= end-1 || a.off+a.n > size || a.off%block != 0 || a.n%block != 0 {
					t.Errorf("size %d, blocks of %d: area %+v behind %d", size, block, a, end)
				}
				for off := a.off; off < a.off+a.n; off += block {
					sampled[off] = true
				}
				end = a.off + a.n
			}
			for _, off := range []int64{0, superblock, 64 << 10, sampleBytes - block, firstPartition, firstPartition + sampleBytes - block, size - sampleBytes, size - 64<<10, size - block} {
				if off = off / block * block; off >= 0 && off < size && !sampled[off] {
					t.Errorf("size %d, blocks of %d: the block at %d is not sampled", size, block, off)
				}
			}
		}
	}
}

// cached makes a cache that holds clean data 1 at elsewhere and faraway, and
// dirty data 2 at superblock and faraway+512 if dirty is set. Before that the
// disk was 1 all over; flushed data 3 at partition is clean, too.
func cached(t *testing.T, dirty bool) (*pmem.Fake, *backing.Fake) {
	t.Helper()
	mem, disk := formatted(t, true), backing.NewFake(changedDisk, 512, 1)
	for off := int64(0); off < changedDisk; off += sectorSize {
		disk.WriteAt(filled(1), off)
	}
	r := mustOpen(t, mem, disk, Refuse, false)
	r.write(t, partition, filled(3))
	r.missedBefore(elsewhere, sectorSize)
	r.missedBefore(faraway, sectorSize)
	r.holds(t, elsewhere, 1)
	r.mustFlush(t)
	r.mustRest(t) // what follows stays behind dirty_tail
	r.holds(t, faraway, 1)
	if dirty {
		r.write(t, superblock, filled(2))
		r.write(t, faraway+512, filled(2))
	}
	r.missedBefore(elsewhere+512, sectorSize)
	r.holds(t, elsewhere+512, 1)
	r.mustEnd(t)
	return mem, disk
}

// written is what a disk looks like that somebody wrote without the cache.
func written(disk *backing.Fake, at int64) {
	disk.WriteAt(filled(9), at)
	disk.WriteAt(filled(9), elsewhere)
	disk.WriteAt(filled(9), elsewhere+512)
	disk.WriteAt(filled(9), faraway)
	disk.WriteAt(filled(9), faraway+512)
}

// TestChangedDiskCostsCleanData: wherever the change is seen, what is clean in
// the cache is gone, and does not come back.
func TestChangedDiskCostsCleanData(t *testing.T) {
	for _, at := range []int64{0, superblock, 64 << 10, partition, backupTable} {
		mem, disk := cached(t, false)
		mustOpen(t, mem, disk, Refuse, false).mustEnd(t)
		written(disk, at)
		for i := range 3 {
			r := mustOpen(t, mem, disk, Refuse, i == 0)
			r.holds(t, elsewhere, 9)
			r.holds(t, elsewhere+512, 9)
			r.holds(t, faraway, 9)
			r.holds(t, at, 9)
			r.write(t, elsewhere+1024, filled(byte(i)))
			if i > 0 {
				r.mustFlush(t)
			}
			r.mustEnd(t)
		}
		l, err := ondisk.ReadLayout(mem, mem.Size())
		if err != nil || l.Fingerprint.State != ondisk.FingerprintKnown {
			t.Errorf("fingerprint %+v, %v", l.Fingerprint, err)
		}
		disk.Close()
	}
}

// TestChangeNotSeen is the limit of it, and the way around it.
func TestChangeNotSeen(t *testing.T) {
	mem, disk := cached(t, true)
	defer disk.Close()
	written(disk, elsewhere)
	r := mustOpen(t, mem, disk, Refuse, false)
	r.holds(t, elsewhere, 1)
	r.mustEnd(t)
	if _, _, err := openChanged(mem, disk, Discard); !errors.Is(err, ErrUnchanged) {
		t.Fatalf("discard of dirty data over a disk without a change: %v", err)
	}
	for i := range 2 {
		r = mustOpen(t, mem, disk, []Choice{Overwrite, Refuse}[i], i == 0)
		r.holds(t, elsewhere, 9)
		r.holds(t, elsewhere+512, 9)
		r.holds(t, faraway, 9)
		r.holds(t, faraway+512, 2)
		r.holds(t, superblock, 2)
		r.mustEnd(t)
	}
	diskHolds(t, disk, superblock, 2)
}

// TestChangeWhileOpen: what somebody does to the disk behind the back of the cache
// is not taken for its own work because it writes somewhere else.
func TestChangeWhileOpen(t *testing.T) {
	for _, area := range []int64{backupTable, superblock} {
		mem, disk := cached(t, false)
		r := mustOpen(t, mem, disk, Refuse, false)
		written(disk, area)
		r.write(t, superblock+backupTable-area, filled(4))
		r.mustFlush(t)
		r.mustEnd(t)
		r = mustOpen(t, mem, disk, Refuse, true)
		r.holds(t, elsewhere, 9)
		r.mustEnd(t)
		disk.Close()
	}
}

// same reports the first difference of two regions, -1 for none.
func same(a, b *pmem.Fake) int64 {
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < a.Size(); off += int64(len(p)) {
		a.ReadAt(p, off)
		b.ReadAt(q, off)
		if !bytes.Equal(p, q) {
			return off
		}
	}
	return -1
}

// TestChangedDiskWithDirtyData: nothing happens without a choice, and each
// choice does what it says, for good.
func TestChangedDiskWithDirtyData(t *testing.T) {
	for _, choice := range []Choice{Overwrite, Discard} {
		mem, disk := cached(t, true)
		written(disk, backupTable)
		before := mem.Clone()
		for range 2 {
			_, _, err := openChanged(mem, disk, Refuse)
			if !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "1024 bytes") {
				t.Fatalf("opened without a choice: %v", err)
			}
		}
		if at := same(mem, before); at >= 0 {
			t.Fatalf("the refusal changed the region, in the MiB at %d", at)
		}
		diskHolds(t, disk, superblock, 1)

		dirty, where := byte(2), byte(9)
		if choice == Discard {
			dirty, where = 1, 9
		}
		for i := range 3 {
			r := mustOpen(t, mem, disk, []Choice{choice, Refuse, Refuse}[i], i == 0)
			r.holds(t, superblock, dirty)
			r.holds(t, faraway, where)
			r.holds(t, faraway+512, map[Choice]byte{Overwrite: 2, Discard: 9}[choice])
			r.holds(t, elsewhere, where)
			r.holds(t, elsewhere+512, where)
			r.holds(t, backupTable, 9)
			r.mustEnd(t)
		}
		diskHolds(t, disk, superblock, dirty)
		disk.Close()
	}
}

// TestOverwriteFails: a disk that refuses the dirty data leaves it where it is,
// and the question open.
func TestOverwriteFails(t *testing.T) {
	mem, disk := cached(t, true)
	defer disk.Close()
	written(disk, backupTable)
	var broken atomic.Bool
	broken.Store(true)
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite && broken.Load() {
			f.Err = syscall.EIO
		}
		return f
	})
	if _, _, err := openChanged(mem, disk, Overwrite); !errors.Is(err, syscall.EIO) {
		t.Fatalf("overwrite on a disk that takes nothing: %v", err)
	}
	broken.Store(false)
	if _, _, err := openChanged(mem, disk, Refuse); !errors.Is(err, ErrChanged) {
		t.Fatalf("after a failed overwrite: %v", err)
	}
	r := mustOpen(t, mem, disk, Overwrite, true)
	r.holds(t, superblock, 2)
	r.holds(t, elsewhere, 9)
	r.mustEnd(t)
}

// TestKernelInBetween: what the kernel may have written to the disk is no
// change, as far as it can be seen that it had the cache.
func TestKernelInBetween(t *testing.T) {
	for _, dirty := range []bool{false, true} {
		for _, left := range []string{"nothing", "a kset", "dirty_tail"} {
			mem, disk := cached(t, dirty)
			kernel(t, mem, left)
			disk.WriteAt(filled(9), superblock)
			r, empty, err := openChanged(mem, disk, Refuse)
			switch {
			case left != "nothing" && (err != nil || empty):
				t.Errorf("dirty %t, the kernel left %s: %v, emptied %t", dirty, left, err, empty)
			case left == "nothing" && !empty && !errors.Is(err, ErrChanged):
				t.Errorf("dirty %t, nothing of the kernel: %v", dirty, err)
			}
			if err == nil {
				r.mustEnd(t)
				// What was found then is the fingerprint, and good as soon as
				// dirty_tail is behind what the kernel left.
				r = mustOpen(t, mem, disk, Refuse, false)
				r.write(t, faraway, filled(7))
				r.mustFlush(t)
				r.mustEnd(t)
				disk.WriteAt(filled(8), superblock)
				if r, empty, err = openChanged(mem, disk, Refuse); err == nil {
					r.mustEnd(t)
				}
				if !empty && !errors.Is(err, ErrChanged) {
					t.Errorf("dirty %t, the kernel left %s: a change after that is not seen: %v", dirty, left, err)
				}
			}
			disk.Close()
		}
	}
}

// kernel does to a closed cache what the kernel could have: it appends a kset
// without a number, or moves dirty_tail to the end of the log.
func kernel(t *testing.T, mem *pmem.Fake, leave string) {
	t.Helper()
	l, err := ondisk.ReadLayout(mem, mem.Size())
	if err != nil {
		t.Fatal(err)
	}
	var key ondisk.Key
	end, err := l.WalkLog(mem, l.KeyTail, func(_ ondisk.Position, k *ondisk.Kset) error {
		key = k.Keys[0]
		return nil
	})
	if err != nil || end.Damage != nil {
		t.Fatal(err, end.Damage)
	}
	var buf [ondisk.MaxKsetSize]byte
	switch leave {
	case "a kset":
		key.Flags |= ondisk.KeyClean
		kset := ondisk.EncodeKset(buf[:], 0, []ondisk.Key{key})
		mem.Zero(l.Offset(end.Pos.Seg, end.Pos.Off+uint32(len(kset))), ondisk.KsetHeaderSize)
		mem.WriteAt(kset, l.Offset(end.Pos.Seg, end.Pos.Off))
	case "dirty_tail":
		off := ondisk.EncodePosition(buf[:], ondisk.DirtyTail, l.DirtyTailCopies.Newest.Next(), end.Pos)
		mem.WriteAt(buf[:ondisk.PositionSize], off)
	}
}

// TestKernelBeforehand: once dirty_tail has passed the kernel's ksets, they do
// not keep a change from being seen.
func TestKernelBeforehand(t *testing.T) {
	mem, disk := cached(t, true)
	defer disk.Close()
	kernel(t, mem, "a kset")
	r := mustOpen(t, mem, disk, Refuse, false)
	r.mustFlush(t)
	r.mustRest(t) // the write stays dirty
	r.write(t, elsewhere, filled(5))
	r.mustEnd(t)
	disk.WriteAt(filled(9), superblock)
	if _, _, err := openChanged(mem, disk, Refuse); !errors.Is(err, ErrChanged) {
		t.Errorf("a change behind the kernel's ksets: %v", err)
	}
}

// TestGrownDisk: a disk that has grown has another end, and is the same.
func TestGrownDisk(t *testing.T) {
	for _, changed := range []bool{false, true} {
		mem, small := cached(t, true)
		disk := backing.NewFake(2*changedDisk, 512, 1)
		all := make([]byte, changedDisk)
		small.ReadAt(all, 0)
		small.Close()
		disk.WriteAt(all, 0)
		if changed {
			disk.WriteAt(filled(9), backupTable)
			if _, _, err := openChanged(mem, disk, Refuse); !errors.Is(err, ErrChanged) {
				t.Errorf("grown and changed: %v", err)
			}
		} else {
			mustOpen(t, mem, disk, Refuse, false).mustEnd(t)
			disk.WriteAt(filled(9), 2*changedDisk-512)
			if _, _, err := openChanged(mem, disk, Refuse); !errors.Is(err, ErrChanged) {
				t.Errorf("changed at the new end: %v", err)
			}
		}
		disk.Close()
	}
}

// TestUnreadableArea: a disk whose head cannot be read is served all the same.
// Nothing is known of it until a round finds it readable.
func TestUnreadableArea(t *testing.T) {
	mem, disk := cached(t, true)
	defer disk.Close()
	var bad atomic.Bool
	bad.Store(true)
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpRead && op.Off == 0 && bad.Load() {
			f.Err = syscall.EIO
		}
		return f
	})
	disk.WriteAt(filled(9), superblock)
	r := mustOpen(t, mem, disk, Refuse, false)
	r.mustRest(t)
	if l, err := ondisk.ReadLayout(mem, mem.Size()); err != nil || l.Fingerprint.State != ondisk.FingerprintUnknown {
		t.Errorf("fingerprint %+v of a disk that cannot be read, %v", l.Fingerprint, err)
	}
	r.Resume()
	r.write(t, elsewhere, filled(5))
	r.mustFlush(t)
	bad.Store(false)
	r.write(t, elsewhere, filled(6))
	r.mustFlush(t)
	r.mustEnd(t)
	disk.WriteAt(filled(8), superblock)
	mustOpen(t, mem, disk, Refuse, true).mustEnd(t)
}

// TestVolatileDisk: the last writes of a server that died are on the disk, but
// not for good. The next one must not take them for that.
func TestVolatileDisk(t *testing.T) {
	for seed := range uint64(10) {
		mem, disk := formatted(t, false), backing.NewFake(changedDisk, 512, seed)
		r := mustOpen(t, mem, disk, Refuse, false)
		r.mustRest(t)
		r.write(t, superblock, filled(2))
		// A round that ends between its write and its flush, and none before.
		refusing(disk, backing.OpFlush)
		r.Resume()
		if err := r.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		r.mustEnd(t)
		// The fake's failed flush has made some of it stable; write it anew.
		disk.Script(nil)
		done := make(chan error)
		disk.Write(filled(2), superblock, func(err error) { done <- err })
		<-done
		mustOpen(t, mem, disk, Refuse, false).mustEnd(t)
		opensAfterCut(t, fmt.Sprint("seed ", seed), mem, disk, 2)
		disk.Close()
	}
}

// opensAfterCut fails the test unless the cache opens with what a power cut leaves of the
// disk, and has filled(b) where the superblock is.
func opensAfterCut(t *testing.T, what string, mem *pmem.Fake, disk *backing.Fake, b byte) {
	t.Helper()
	after := disk.Crash()
	defer after.Close()
	r, _, err := openChanged(mem.Clone(), after, Refuse)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	r.holds(t, superblock, b)
	r.mustEnd(t)
}

// TestForgottenByDisk: a flush has failed, so that the disk shows what it may forget; that was
// overwritten since, and what overwrote it is not on the disk yet. A fingerprint of what
// the disk shows would be wrong after a power cut.
func TestForgottenByDisk(t *testing.T) {
	for seed := range uint64(10) {
		mem, disk := formatted(t, false), backing.NewFake(changedDisk, 512, seed)
		r := mustOpen(t, mem, disk, Refuse, false)
		r.mustRest(t)
		r.write(t, superblock, filled(1))
		r.write(t, elsewhere, filled(2))
		refusing(disk, backing.OpFlush)
		// As the loop of write-back makes them, but no more than these.
		r.workers.stop = make(chan struct{})
		if err := r.round(2); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		disk.Script(nil)
		r.write(t, superblock, filled(3))
		for until := uint64(2); until <= 4; until++ {
			if until == 3 {
				r.write(t, superblock, filled(4)) // before the one before it is written
			}
			if err := r.round(until); err != nil {
				t.Fatal(err)
			}
			if known := r.fingerprint.now.State == ondisk.FingerprintKnown; known != (until == 4) {
				t.Errorf("seed %d: the fingerprint is known: %t, dirty_tail has passed %d ksets of 4", seed, known, until)
			}
			opensAfterCut(t, fmt.Sprintf("seed %d, dirty_tail has passed %d ksets of 4", seed, until), mem, disk, byte(min(until+1, 4)))
		}
		close(r.workers.stop)
		r.mustEnd(t)
		disk.Close()
	}
}

// TestForgottenByDiskBefore: the flush has failed in a server that died, or fails when the next
// one begins.
func TestForgottenByDiskBefore(t *testing.T) {
	for seed := range uint64(10) {
		mem, disk := formatted(t, false), backing.NewFake(changedDisk, 512, seed)
		r := mustOpen(t, mem, disk, Refuse, false)
		r.mustRest(t)
		r.write(t, superblock, filled(1))
		refusing(disk, backing.OpFlush)
		r.workers.stop = make(chan struct{})
		if err := r.round(1); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		r.write(t, superblock, filled(2))
		close(r.workers.stop)
		r.mustEnd(t)
		if seed%2 == 0 {
			disk.Script(nil)
		}
		r = mustOpen(t, mem, disk, Refuse, false)
		r.mustRest(t)
		if r.fingerprint.now.State == ondisk.FingerprintKnown {
			t.Errorf("seed %d: the fingerprint is known, with dirty data", seed)
		}
		opensAfterCut(t, fmt.Sprint("seed ", seed), mem, disk, 2)
		disk.Script(nil)
		r.Resume()
		r.mustFlush(t)
		r.mustRest(t)
		if r.fingerprint.now.State != ondisk.FingerprintKnown {
			t.Errorf("seed %d: the fingerprint is unknown after a flush", seed)
		}
		r.mustEnd(t)
		disk.Close()
	}
}

// cutMemory keeps, for each barrier while it is armed, what a power cut there
// could leave of the region and the disk: of the region all that was stored up
// to the barrier before, and of the rest all, nothing, or any of its 8-byte
// words.
type cutMemory struct {
	*pmem.Fake
	durable bool
	disk    *backing.Fake
	mu      struct {
		sync.Mutex
		armed bool
		base  *pmem.Fake // as of the last barrier
		loose []looseStore
		dice  *rand.Rand
		cuts  []powerCut
	}
}

type looseStore struct {
	off  int64
	data []byte
}

type powerCut struct {
	mem  *pmem.Fake
	disk *backing.Fake
}

func newCutMemory(mem *pmem.Fake, disk *backing.Fake, durable bool, seed uint64) *cutMemory {
	m := &cutMemory{Fake: mem, disk: disk, durable: durable}
	m.mu.base, m.mu.dice = mem.Clone(), rand.New(rand.NewPCG(seed, 0))
	return m
}

func (m *cutMemory) Durable() bool { return m.durable }

func (m *cutMemory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.loose = append(m.mu.loose, looseStore{off, bytes.Clone(p)})
	return m.Fake.WriteAt(p, off)
}

// Zero leaves out what is zero: it is that also if this store does not arrive.
func (m *cutMemory) Zero(off, n int64) error {
	for end := off + n; off < end; off += 4096 {
		p := make([]byte, min(4096, end-off))
		if _, err := m.ReadAt(p, off); err != nil {
			return err
		}
		if isZeros(p) {
			continue
		}
		clear(p)
		if _, err := m.WriteAt(p, off); err != nil {
			return err
		}
	}
	return nil
}

func (m *cutMemory) Fence() {
	if m.durable {
		m.barrier()
	}
}

func (m *cutMemory) Sync() error {
	if !m.durable {
		m.barrier()
	}
	return nil
}

func (m *cutMemory) barrier() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for variant := range 4 {
		if !m.mu.armed {
			break
		}
		after := m.mu.base.Clone()
		for _, s := range m.mu.loose {
			for i := 0; i < len(s.data); i += 8 {
				if variant == 0 || variant > 1 && m.mu.dice.IntN(2) == 0 {
					after.WriteAt(s.data[i:i+8], s.off+int64(i))
				}
			}
		}
		m.mu.cuts = append(m.mu.cuts, powerCut{after, m.disk.Crash()})
	}
	m.mu.base, m.mu.loose = m.Fake.Clone(), nil
}

// cutsOf returns the power cuts at every barrier of what f does.
func (m *cutMemory) cutsOf(f func()) []powerCut {
	arm := func(armed bool) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.mu.armed = armed
	}
	arm(true)
	f()
	arm(false)
	cuts := m.mu.cuts
	m.mu.cuts = nil
	return cuts
}

// again is a memory like m with another content.
func (m *cutMemory) again(mem *pmem.Fake) Memory { return newCutMemory(mem, nil, m.durable, 0) }

func testSeed(t *testing.T) uint64 {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	return seed
}

// TestFingerprintCrashes cuts the power at every barrier of rounds that write
// to an area and rounds that do not. A disk that nobody touched is never taken
// for changed. One that somebody did is seen to be, unless the round was
// writing to an area just then.
func TestFingerprintCrashes(t *testing.T) {
	seed := testSeed(t)
	for _, durable := range []bool{true, false} {
		for _, off := range []int64{superblock, elsewhere} {
			t.Run(fmt.Sprintf("durable=%t/at=%d", durable, off), func(t *testing.T) {
				fake, disk := cached(t, true)
				defer disk.Close()
				m := newCutMemory(fake, disk, durable, seed)
				r := mustOpen(t, m, disk, Refuse, false)
				r.mustFlush(t) // the dirty data of superblock
				states, unseen := 0, 0
				for i := range byte(5) {
					r.write(t, off, filled(i))
					r.write(t, faraway+512, filled(i))
					for _, cut := range m.cutsOf(func() { r.mustFlush(t) }) {
						states++
						touched := cut.disk.Crash()
						mustOpen(t, m.again(cut.mem.Clone()), cut.disk, Refuse, false).mustEnd(t)
						cut.disk.Close()

						touched.WriteAt(filled(0x80|i), backupTable)
						after, empty, err := openChanged(m.again(cut.mem), touched, Refuse)
						if err == nil {
							after.mustEnd(t)
						}
						touched.Close()
						if empty || errors.Is(err, ErrChanged) {
							continue
						}
						if unseen++; off == elsewhere {
							t.Fatalf("state %d: somebody wrote to the disk, and nobody saw it: %v", states, err)
						}
					}
				}
				r.mustEnd(t)
				if states < 8 || off == superblock && unseen == 0 {
					t.Errorf("of %d states %d came while an area was being written", states, unseen)
				}
				t.Logf("%d states, %d of them while an area was being written", states, unseen)
			})
		}
	}
}

// TestChangedDiskCrashes cuts the power at every barrier while a cache with a
// changed disk is opened: what is out of date never comes back, and dirty data
// is given up only where that was the choice.
func TestChangedDiskCrashes(t *testing.T) {
	seed := testSeed(t)
	for _, durable := range []bool{true, false} {
		for _, c := range []struct {
			choice Choice
			dirty  bool
		}{{Refuse, false}, {Overwrite, true}, {Discard, true}} {
			t.Run(fmt.Sprintf("durable=%t/choice=%s", durable, c.choice), func(t *testing.T) {
				fake, disk := cached(t, c.dirty)
				defer disk.Close()
				written(disk, backupTable)
				m := newCutMemory(fake, disk, durable, seed)
				asked := 0
				cuts := m.cutsOf(func() { mustOpen(t, m, disk, c.choice, true).mustEnd(t) })
				for i, cut := range cuts {
					mem := m.again(cut.mem)
					r, _, err := openChanged(mem, cut.disk, Refuse)
					if errors.Is(err, ErrChanged) && c.dirty {
						asked++
						r, _, err = openChanged(mem, cut.disk, c.choice)
					}
					if err != nil {
						t.Fatalf("state %d of %d: %v", i, len(cuts), err)
					}
					for range 2 {
						r.holds(t, elsewhere, 9)
						r.holds(t, elsewhere+512, 9)
						r.holds(t, faraway, 9)
						if c.choice == Overwrite {
							r.holds(t, superblock, 2)
							r.holds(t, faraway+512, 2)
						} else {
							r.holds(t, superblock, 1)
							r.holds(t, faraway+512, 9)
						}
						r.mustEnd(t)
						if t.Failed() {
							t.Fatalf("state %d of %d", i, len(cuts))
						}
						r = mustOpen(t, mem, cut.disk, Refuse, false)
					}
					r.mustEnd(t)
					cut.disk.Close()
				}
				if len(cuts) < 8 || (asked > 0) != c.dirty {
					t.Errorf("%d states, %d of them asked again", len(cuts), asked)
				}
				t.Logf("%d states, %d of them asked again", len(cuts), asked)
			})
		}
	}
}
