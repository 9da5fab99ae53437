package ondisk

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
)

// TestFormatIsTheKernels compares a new cache with what is left of the
// kernel's own format in the golden images: the newest copy of every record,
// byte by byte.
func TestFormatIsTheKernels(t *testing.T) {
	for _, g := range goldens {
		theirs := golden(t, g.name+".pmem")
		ours := newSparse(theirs.Size())
		if err := Format(ours, FormatOptions{DataCRC: g.dataCRC, GCPercent: DefaultGCPercent}); err != nil {
			t.Fatal(err)
		}
		l := mustLayout(t, theirs)
		same := func(what string, off, n int64) {
			a, b := make([]byte, n), make([]byte, n)
			theirs.ReadAt(a, off)
			ours.ReadAt(b, off)
			if !bytes.Equal(a, b) {
				t.Errorf("%s: %s at %d: kernel % x, here % x", g.name, what, off, a, b)
			}
		}
		same("superblock", SuperblockOff, 4096)
		same("cache_info", InfoOff+int64(l.InfoCopies.Newest.Slot)*infoDistance, 4096)
		same("key_tail", keyTailOff+int64(l.KeyTailCopies.Newest.Slot)*PositionSize, PositionSize)
		same("dirty_tail", dirtyTailOff+int64(l.DirtyTailCopies.Newest.Slot)*PositionSize, PositionSize)
		for id, phys := range l.Chain {
			var buf [SegmentInfoSize]byte
			c := readCopies(theirs, segmentOff(phys), infoDistance, buf[:])
			same("segment_info", segmentOff(phys)+int64(c.Newest.Slot)*infoDistance, SegmentInfoSize)
			same("generation", segmentOff(phys)+genOff+int64(l.GenAt[id].Slot)*GenerationSize, GenerationSize)
		}
		if flags := mustLayout(t, ours).Info.Flags; !g.dataCRC && flags != 0x1182 {
			t.Errorf("flags %#x", flags)
		}
	}
}

// TestFormatBuriesOldCache formats over a cache with a log and makes sure that
// nothing of it can come back, even where the log runs into it.
func TestFormatBuriesOldCache(t *testing.T) {
	s := golden(t, "small-crc.pmem")
	old := mustLayout(t, s)
	for id := range old.Gens {
		var buf [GenerationSize]byte
		off := old.EncodeGeneration(buf[:], uint32(id), old.GenAt[id].Next(), uint64(id))
		s.WriteAt(buf[:], off)
	}
	if err := WriteIdentity(s, Replica{}, &Identity{BackingSize: 512}); err != nil {
		t.Fatal(err)
	}
	if err := Format(s, FormatOptions{GCPercent: 10}); err != nil {
		t.Fatal(err)
	}
	l := mustLayout(t, s)
	if l.Identity != nil || l.Info.Flags.DataCRC() || l.Info.Flags.GCPercent() != 10 || len(l.DamagedCopies) != 0 {
		t.Errorf("%+v", l)
	}
	for id, gen := range l.Gens {
		if gen != uint64(len(old.Gens)) {
			t.Errorf("segment %d starts at generation %d, keys of generation %d may be about", id, gen, len(old.Gens)-1)
		}
	}
	for seg := range l.Chain {
		from := Position{Seg: uint32(seg)}
		if end, err := l.WalkLog(s, from, func(Position, *Kset) error { return errors.New("a kset") }); err != nil || end.Pos != from {
			t.Errorf("segment %d: %+v, %v", seg, end, err)
		}
	}
}

// TestFormatInterrupted stops a format after every write, over a blank device
// and over a cache: the device is a cache again only when it is complete.
func TestFormatInterrupted(t *testing.T) {
	opts := FormatOptions{GCPercent: 70, Identity: &Identity{BackingSize: 512}}
	for name, before := range map[string]*sparse{"blank": newSparse(MinSize), "cache": formatted(t, FormatOptions{DataCRC: true})} {
		for writes := 0; ; writes++ {
			s := before.clone()
			s.writes = writes
			err := Format(s, opts)
			if err == nil {
				break
			}
			s.writes = -1
			l, err := ReadLayout(s, s.Size())
			switch {
			case writes == 0 && name == "cache":
				if err != nil || !l.Info.Flags.DataCRC() {
					t.Errorf("%s: gone before anything was written: %v", name, err)
				}
			case !errors.Is(err, ErrNotFormatted):
				t.Errorf("%s, after %d writes: %v", name, writes, err)
			}
		}
	}
	// Writes since the last Sync may arrive in any order, so there must be one
	// between all of them and the magic number.
	s := newSparse(MinSize)
	var before, after *sparse
	s.onSync = func() { before, after = after, s.clone() }
	if err := Format(s, opts); err != nil {
		t.Fatal(err)
	}
	var magic [8]byte
	after.ReadAt(magic[:], superMagicOff)
	before.WriteAt(magic[:], superMagicOff)
	if !reflect.DeepEqual(before.pages, after.pages) {
		t.Error("the last sync writes more than the magic number")
	}
}

func TestFormatRefuses(t *testing.T) {
	for _, percent := range []int{-1, 91} {
		s := newSparse(MinSize)
		if err := Format(s, FormatOptions{GCPercent: percent}); !errors.Is(err, ErrGCPercent) || len(s.pages) != 0 {
			t.Errorf("gc percent %d: %v", percent, err)
		}
	}
	if err := Format(newSparse(MinSize-4096), FormatOptions{}); !errors.Is(err, ErrTooSmall) {
		t.Errorf("too small: %v", err)
	}
}

func TestBlank(t *testing.T) {
	fresh := newSparse(MinSize)
	if ok, err := Blank(fresh, MinSize); !ok || err != nil {
		t.Fatalf("%v, %v", ok, err)
	}
	last := segmentOff(SegmentsIn(MinSize) - 1)
	for _, off := range []int64{0, 4095, superMagicOff, 1<<20 - 1, segmentOff(1), last + SegmentHeader - 1, last + SegmentHeader + 4095} {
		s := fresh.clone()
		s.flip(off, 0)
		if ok, err := Blank(s, MinSize); ok || err != nil {
			t.Errorf("a bit at %d: %v, %v", off, ok, err)
		}
		s = fresh.clone()
		s.poison[off] = 1
		if ok, err := Blank(s, MinSize); ok || !errors.Is(err, ErrUnreadable) {
			t.Errorf("unreadable at %d: %v, %v", off, ok, err)
		}
	}
	for _, off := range []int64{1 << 20, last + SegmentHeader + 4096} {
		s := fresh.clone()
		s.flip(off, 0)
		if ok, _ := Blank(s, MinSize); !ok {
			t.Errorf("a bit of old data at %d counts", off)
		}
	}
}
