package engine

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"ublk-pcache/backing"
)

// failingPower is a medium whose power fails after so many stores and fences, 0 for never.
type failingPower struct {
	*medium
	left int
	dice *rand.Rand
}

func (m *failingPower) step() {
	if m.left > 0 {
		if m.left--; m.left == 0 {
			m.crash(m.dice, func() {})
		}
	}
}

func (m *failingPower) WriteAt(p []byte, off int64) (int, error) {
	n, err := m.medium.WriteAt(p, off)
	m.step()
	return n, err
}

func (m *failingPower) Zero(off, n int64) error {
	err := m.medium.Zero(off, n)
	m.step()
	return err
}

func (m *failingPower) Fence() {
	m.step()
	m.medium.Fence()
}

// TestGatherCrash cuts the power at every step of copying what is stuck in several
// segments into one, some of which has been overwritten meanwhile.
func TestGatherCrash(t *testing.T) {
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("crc=%t", crc), func(t *testing.T) {
			cut := 1
			for ; gatherCrash(t, crc, cut) && !t.Failed(); cut++ {
			}
			if cut < 10 {
				t.Errorf("all was done in %d steps", cut)
			}
		})
	}
}

// gatherCrash reports whether the power was cut before all was done.
func gatherCrash(t *testing.T, crc bool, cut int) bool {
	const bad = 2 * stripeSectors // every so many sectors one is refused
	mem := &failingPower{medium: newMedium(true), dice: rand.New(rand.NewPCG(1, uint64(cut)))}
	formatSmall(t, mem, 9, crc, 90) // room enough for nobody to gather before
	disk, fate := backing.NewFake(64<<20, sectorSize, 1), newFate()
	defer disk.Close()
	disk.Script(fate.script)
	fate.refuse(bad)
	r := newRig(t, mem, disk, 1)
	want := map[int64]uint64{}
	stuckIn := map[uint32]bool{}
	for i := range int64(3) {
		lba := i * bad
		r.write(t, lba*sectorSize, stamped(lba, 12, 1))
		r.zero(t, (lba+4*bad)*sectorSize, 3*sectorSize)
		want[lba], want[lba+11], want[lba+4*bad] = 1, 1, 0
		for seg := r.queues[0].head.seg; i < 2 && r.queues[0].head.seg == seg; {
			r.write(t, (lba+100)*sectorSize, stamped(lba+100, 8000, 2))
			stuckIn[seg] = true
		}
	}
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush of what the disk refuses: %v", err)
	}
	r.mustRest(t)
	for r.segments.free() > r.segments.reserve {
		r.segments.take(0)
	}
	// One is overwritten after it was looked at for the last time, and stays.
	w := &r.writeback
	runs := w.runs()
	r.write(t, bad*sectorSize, stamped(bad, 1, 3))
	want[bad] = 3
	w.at = r.journal.mark()
	mem.left = cut
	moved, err := r.gather(runs)
	done := mem.left > 0
	if done {
		mem.left = 0
		if err != nil || !moved {
			t.Errorf("gather: %t, %v", moved, err)
		}
		for i := range w.stuck {
			if p := &w.stuck[i].part; p.off/sectorSize/bad != 1 && stuckIn[p.e.seg] && len(r.dirtyParts(p.s, p.s.place(p.e.seg, p.e.pos))) > 0 {
				t.Errorf("%d sectors at %d are still in segment %d", p.e.n, p.off, p.e.seg)
			}
		}
		r.checkOverwritten(t)
	}
	check := func(when string) {
		t.Helper()
		for lba, version := range want {
			if v := r.version(t, lba); v != version {
				t.Errorf("cut %d, %s: sector %d has version %d, want %d", cut, when, lba, v, version)
			}
		}
	}
	if done {
		check("before")
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	after := mem.restarted()
	r = newRig(t, after, disk, 1)
	check("after")
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush of what the disk refuses: %v", err)
	}
	fate.heal()
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	r.kill()
	p := make([]byte, sectorSize)
	for lba, version := range want {
		disk.ReadAt(p, lba*sectorSize)
		if v, err := stamp(p, lba); v != version || err != nil {
			t.Errorf("cut %d: sector %d of the disk has version %d, %v, want %d", cut, lba, v, err, version)
		}
	}
	return !done
}
