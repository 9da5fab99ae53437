package engine

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
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

// TestGatherCrash cuts the power at every step of copying what is deferred in several
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

// gathering is a cache at rest in which sectors are deferred in several segments, one of
// which has been overwritten after write-back has looked at it for the last time.
type gathering struct {
	*rig
	disk      *backing.Fake
	fate      *diskFate
	want      map[int64]uint64 // versions by sector
	refusedIn map[uint32]bool
	runs      []run
}

// gatheringBad: every so many sectors one is refused.
const gatheringBad = 2 * stripeSectors

func newGathering(t *testing.T, mem Memory, crc bool) *gathering {
	t.Helper()
	const bad = gatheringBad
	formatSmall(t, mem, 9, crc, 90) // room enough for nobody to gather before
	g := &gathering{
		disk: backing.NewFake(64<<20, sectorSize, 1), fate: newFate(),
		want: map[int64]uint64{}, refusedIn: map[uint32]bool{},
	}
	g.disk.Script(g.fate.script)
	g.fate.refuse(bad)
	g.rig = newRig(t, mem, g.disk, 1)
	for i := range int64(3) {
		lba := i * bad
		g.write(t, lba*sectorSize, stamped(lba, 12, 1))
		g.zero(t, (lba+4*bad)*sectorSize, 3*sectorSize)
		g.want[lba], g.want[lba+11], g.want[lba+4*bad] = 1, 1, 0
		for seg := g.queues[0].head.seg; i < 2 && g.queues[0].head.seg == seg; {
			g.write(t, (lba+100)*sectorSize, stamped(lba+100, 8000, 2))
			g.refusedIn[seg] = true
		}
	}
	if err := g.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush of what the disk refuses: %v", err)
	}
	g.mustRest(t)
	for g.segments.free() > g.segments.reserve {
		g.segments.take(0)
	}
	g.runs = g.writeback.runs()
	g.write(t, bad*sectorSize, stamped(bad, 1, 3))
	g.want[bad] = 3
	g.writeback.at = g.journal.point()
	return g
}

// check reads what is wanted, from a cache that has it.
func (g *gathering) check(t *testing.T, r *rig, when string) {
	t.Helper()
	for lba, version := range g.want {
		if v := r.version(t, lba); v != version {
			t.Errorf("%s: sector %d has version %d, want %d", when, lba, v, version)
		}
	}
}

// gatherCrash reports whether the power was cut before all was done.
func gatherCrash(t *testing.T, crc bool, cut int) bool {
	mem := &failingPower{medium: newMedium(true), dice: rand.New(rand.NewPCG(1, uint64(cut)))}
	g := newGathering(t, mem, crc)
	defer g.disk.Close()
	mem.left = cut
	moved, err := g.gather(g.runs)
	done := mem.left > 0
	if done {
		mem.left = 0
		if err != nil || !moved {
			t.Errorf("gather: %t, %v", moved, err)
		}
		for i := range g.writeback.deferred {
			if p := &g.writeback.deferred[i].part; p.off/sectorSize/gatheringBad != 1 && g.refusedIn[p.e.seg] && len(g.dirtyParts(p.s, p.s.place(p.e.seg, p.e.pos))) > 0 {
				t.Errorf("%d sectors at %d are still in segment %d", p.e.n, p.off, p.e.seg)
			}
		}
		g.checkOverwritten(t)
		g.check(t, g.rig, "before")
	}
	if err := g.kill(); err != nil {
		t.Fatal(err)
	}
	after := mem.restarted()
	r := newRig(t, after, g.disk, 1)
	g.check(t, r, fmt.Sprintf("after cut %d", cut))
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a flush of what the disk refuses: %v", err)
	}
	g.fate.heal()
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	r.kill()
	p := make([]byte, sectorSize)
	for lba, version := range g.want {
		g.disk.ReadAt(p, lba*sectorSize)
		if v, err := stamp(p, lba); v != version || err != nil {
			t.Errorf("cut %d: sector %d of the disk has version %d, %v, want %d", cut, lba, v, err, version)
		}
	}
	return !done
}

// TestGatherSyncs: what is copied has been synced before its new place is named. In a
// plain file without checksums nothing tells a key whose data a power cut has taken.
func TestGatherSyncs(t *testing.T) {
	mem := newPageCache()
	g := newGathering(t, mem, false)
	defer g.disk.Close()
	if err := g.do(0, &Request{Op: Flush}); err != nil {
		t.Fatal(err)
	}
	if moved, err := g.gather(g.runs); err != nil || !moved {
		t.Fatalf("gather: %t, %v", moved, err)
	}
	head, _ := g.journal.head()
	log := g.layout.Offset(head.Seg, 0)
	after := mem.cut(func(page int64) bool { return page*pageSize >= log && page*pageSize < log+ondisk.SegmentData })
	g.kill()
	r := newRig(t, after, g.disk, 1)
	g.check(t, r, "after the power cut")
	r.kill()
}
