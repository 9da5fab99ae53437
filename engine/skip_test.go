package engine

import (
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

// TestManyRefused: a disk that refuses more than can be remembered gets all the
// rest, also what lies between it, and the cache can be filled many times over.
// Nothing of it is lost, and it is written when the disk takes it.
func TestManyRefused(t *testing.T) {
	for _, most := range []int{2, maxStuck} {
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
	r.mustRest(t)
	r.writeback.most = most
	r.Resume()
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
	// What was stuck may have been logged again meanwhile, behind what the flush waits for.
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
