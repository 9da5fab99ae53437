package engine

import (
	"context"
	"errors"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// spoil flips a bit of the cached data of each of some sectors.
func spoil(t *testing.T, r *rig, lbas ...int64) {
	t.Helper()
	r.mustRest(t) // write-back reads there
	defer r.Resume()
	for _, lba := range lbas {
		found := r.extents(lba, 1)
		if len(found) != 1 {
			t.Fatalf("sector %d is not cached", lba)
		}
		off := r.layout.Offset(found[0].seg, uint32(found[0].pos)<<sectorShift)
		var word [8]byte
		if _, err := r.mem.ReadAt(word[:], off); err != nil {
			t.Fatal(err)
		}
		word[3] ^= 0x10
		store(t, r.mem, word[:], off)
	}
}

// TestDamagedData: clean data that is damaged comes from the disk; dirty data
// is an error for what was stored with it and never gets to the disk, and goes
// with the write that replaces it. So it is before a restart and after.
func TestDamagedData(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(32<<20, 512, 1)
	defer disk.Close()
	disk.WriteAt(stamped(16<<11, 4096, 7), 16<<20)
	r := newRig(t, mem, disk, 1)
	r.mustRest(t) // what is dirty has to be so when it is spoiled

	const clean, dirty = 16 << 11, 1 << 11 // sectors
	r.write(t, 0, stamped(0, 8, 1))
	r.write(t, dirty*sectorSize, stamped(dirty, 1024, 1))
	r.read(t, clean*sectorSize, 1<<20)
	spoil(t, r, clean+1000, dirty+300)
	// The pieces are of 128 sectors: the damaged one is [256, 384).
	check := func(when string) {
		t.Helper()
		for i := int64(0); i < 2048; i += 8 {
			if v := r.version(t, clean+i); v != 7 {
				t.Fatalf("%s: clean sector %d has version %d", when, i, v)
			}
		}
		for i := int64(0); i < 1024; i += 8 {
			p := make([]byte, 8*sectorSize)
			err := r.do(0, &Request{Op: Read, Off: (dirty + i) * sectorSize, Buf: p})
			if damaged := i >= 256 && i < 384; damaged != errors.Is(err, ErrDamaged) {
				t.Fatalf("%s: dirty sector %d: %v", when, i, err)
			} else if v, _ := stamp(p, dirty+i); !damaged && v != 1 {
				t.Fatalf("%s: dirty sector %d has version %d", when, i, v)
			}
		}
	}
	check("at first")
	if n := r.Status().MemoryErrors; n == 0 {
		t.Error("damage is not counted")
	}
	if err := r.Flush(context.Background()); !errors.Is(err, ErrDamaged) {
		t.Errorf("a flush of damaged data: %v", err)
	}
	check("after a flush")
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1024*sectorSize)
	disk.ReadAt(got, dirty*sectorSize)
	for i := range int64(1024) {
		want := uint64(1)
		if i >= 256 && i < 384 {
			want = 0
		}
		if v, err := stamp(got[i*sectorSize:][:sectorSize], dirty+i); v != want || err != nil {
			t.Fatalf("sector %d of the disk: version %d, %v, want %d", i, v, err, want)
		}
	}

	r = newRig(t, mem, disk, 1)
	check("after a restart")
	r.write(t, (dirty+256)*sectorSize, stamped(dirty+256, 128, 2))
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if v := r.version(t, dirty+300); v != 2 {
		t.Errorf("after the repair: version %d", v)
	}
	r.kill()
}

// TestPartlyOverwritten: what is left of a piece is verified with all of it.
func TestPartlyOverwritten(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(32<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	r.write(t, 0, stamped(0, 128, 1))
	r.write(t, 10*sectorSize, stamped(10, 20, 2))
	r.write(t, 128*sectorSize, stamped(128, 128, 1)) // joined with the rest of the first
	for _, restart := range []bool{false, true} {
		if restart {
			if err := r.kill(); err != nil {
				t.Fatal(err)
			}
			r = newRig(t, mem, disk, 1)
			r.mustRest(t)
		}
		p := r.read(t, 0, 256*sectorSize)
		for i := range int64(256) {
			want := uint64(1)
			if i >= 10 && i < 30 {
				want = 2
			}
			if v, err := stamp(p[i*sectorSize:][:sectorSize], i); v != want || err != nil {
				t.Fatalf("sector %d: version %d, %v", i, v, err)
			}
		}
	}
	spoil(t, r, 100)
	for lba, damaged := range map[int64]bool{0: true, 15: false, 40: true, 130: false} {
		if err := r.do(0, &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, sectorSize)}); damaged != errors.Is(err, ErrDamaged) {
			t.Errorf("sector %d: %v", lba, err)
		}
	}
	r.kill()
}
