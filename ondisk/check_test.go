package ondisk

import (
	"errors"
	"strings"
	"testing"
)

func TestCheckGolden(t *testing.T) {
	for _, g := range goldens {
		s := golden(t, g.name+".pmem")
		rep := Check(s, s.Size(), true)
		if len(rep.Problems) != 0 || rep.Keys != g.keys || rep.Clean != g.clean || rep.Dirty != g.keys-g.clean ||
			rep.Ksets != g.ksets || rep.Dead != 0 || rep.End.Pos != g.head {
			t.Errorf("%s: %+v", g.name, rep)
		}
	}
}

// TestCheckNames makes sure that each thing wrong is reported in words that
// tell it from the others.
func TestCheckNames(t *testing.T) {
	generation := func(seg uint32, gen uint64) func(s *sparse) {
		return func(s *sparse) {
			l := mustLayout(t, s)
			var buf [GenerationSize]byte
			off := l.EncodeGeneration(buf[:], seg, l.GenAt[seg].Next(), gen)
			s.WriteAt(buf[:], off)
		}
	}
	l := mustLayout(t, golden(t, "small-crc.pmem"))
	for name, c := range map[string]struct {
		spoil func(s *sparse)
		want  string // "" for nothing wrong
	}{
		"dirty data":       {func(s *sparse) { s.flip(l.Offset(1, 100), 1) }, "dirty data of offset 49152, length 4096 has a wrong crc (from byte 16809984 on)"},
		"clean data":       {func(s *sparse) { s.flip(l.Offset(2, 100), 1) }, "clean data of offset 1685504, length 4096 has a wrong crc"},
		"poisoned data":    {func(s *sparse) { s.poison[l.Offset(1, 100)] = 1 }, "dirty data of offset 49152, length 4096 cannot be read: poisoned"},
		"dead data":        {func(s *sparse) { generation(2, 1)(s); s.flip(l.Offset(2, 100), 1) }, ""},
		"damaged log":      {func(s *sparse) { s.flip(l.Offset(0, 4200), 1) }, "the log is damaged at 0:"},
		"one copy":         {func(s *sparse) { s.flip(segmentOff(3)+infoDistance+9, 1) }, "segment_info of segment 3: copy 1 at byte 50356224 is damaged (bad crc)"},
		"superblock":       {func(s *sparse) { s.flip(SuperblockOff+16, 1) }, "superblock"},
		"identity":         {func(s *sparse) { WriteIdentity(s, Replica{}, &Identity{BackingSize: 8 << 20}) }, "outside the backing device of 8388608 bytes"},
		"two lost records": {func(s *sparse) { s.Zero(keyTailOff, 16); s.Zero(dirtyTailOff, 16) }, "dirty_tail at bytes 16416 and 16432: both copies are lost"},
		"generation lost":  {func(s *sparse) { s.Zero(segmentOff(9)+genOff, 32) }, "generation at bytes 151023616 and 151023632: both copies are lost"},
		"generation back": {func(s *sparse) {
			// A key of generation 1 in a segment that fell back to 0.
			key := Key{Len: 512, Gen: 1, Seg: 5, CRC: Checksum(make([]byte, 512))}
			s.WriteAt(EncodeKset(make([]byte, MaxKsetSize), 0, []Key{key}), l.Offset(0, 8776))
		}, "generation 1 is above 0, that of segment 5"},
		"data in the log": {func(s *sparse) {
			key := Key{Len: 512, Seg: 0, SegOff: SegmentData - 512, CRC: Checksum(make([]byte, 512))}
			s.WriteAt(EncodeKset(make([]byte, MaxKsetSize), 0, []Key{key}), l.Offset(0, 8776))
		}, "segment 0 is part of the log"},
	} {
		s := golden(t, "small-crc.pmem")
		c.spoil(s)
		rep := Check(s, s.Size(), true)
		all := errors.Join(rep.Problems...)
		if c.want == "" {
			if all != nil {
				t.Errorf("%s: %v", name, all)
			}
		} else if all == nil || !strings.Contains(all.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, all, c.want)
		}
	}
	blank := newSparse(MinSize)
	if rep := Check(blank, MinSize, false); len(rep.Problems) != 1 || !errors.Is(rep.Problems[0], ErrNotFormatted) {
		t.Errorf("blank: %v", rep.Problems)
	}
}

func TestCheckIsBounded(t *testing.T) {
	s := golden(t, "small-crc.pmem")
	l := mustLayout(t, s)
	s.poison[l.Offset(1, 0)] = SegmentData
	s.poison[l.Offset(2, 0)] = SegmentData
	if rep := Check(s, s.Size(), true); len(rep.Problems) != maxProblems || rep.More != rep.Keys-maxProblems {
		t.Errorf("%d problems and %d more of %d keys", len(rep.Problems), rep.More, rep.Keys)
	}
}
