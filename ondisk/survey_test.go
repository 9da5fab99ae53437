package ondisk

import (
	"errors"
	"testing"
)

// TestSurveyInterruptedFormat: a format that was cut off has left nothing that a
// next one would have to be forced for, unless there was before.
func TestSurveyInterruptedFormat(t *testing.T) {
	opts := FormatOptions{GCPercent: 70, Identity: &Identity{BackingSize: 512}}
	for name, before := range map[string]*sparse{"blank": newSparse(MinSize), "cache": formatted(t, FormatOptions{DataCRC: true})} {
		for writes := 0; ; writes += 5 {
			s := before.clone()
			s.writes = writes
			err := Format(s, opts)
			s.writes = -1
			if h := Survey(s, s.Size(), false); !h.Harmless || h.Dirty != 0 {
				t.Fatalf("%s, after %d writes: %+v", name, writes, h)
			}
			if err == nil {
				break
			}
		}
	}
	s := golden(t, "small-crc.pmem")
	if h := Survey(s, s.Size(), false); h.Kind != HoldsCache || h.Harmless || h.Dirty == 0 {
		t.Errorf("a dirty cache: %+v", h)
	}
	s.writes = 10
	Format(s, opts)
	if h := Survey(s, s.Size(), false); h.Kind != HoldsDamage || h.Harmless || h.Dirty == 0 {
		t.Errorf("a format that was cut off before it came to the dirty data: %+v", h)
	}
}

// TestSurveyFindsKsets: where nothing leads to the log any more, its ksets are found
// in whichever segment they lie, behind damage and behind memory that cannot be read.
func TestSurveyFindsKsets(t *testing.T) {
	for name, wound := range map[string]func(s *sparse, off int64){
		"erased":     func(s *sparse, off int64) { s.Zero(off, 8<<10) },
		"unreadable": func(s *sparse, off int64) { s.poison[off] = 8 << 10 },
	} {
		for _, seg := range []uint32{0, 7, 30} {
			s := formatted(t, FormatOptions{})
			l := mustLayout(t, s)
			buf := make([]byte, MaxKsetSize)
			for i := range uint32(200) {
				keys := []Key{{Off: uint64(i) << 12, Len: 4096, Seg: 20, SegOff: i << 12}}
				s.WriteAt(EncodeKset(buf, 1000+uint64(i), keys), l.Offset(seg, i*uint32(KsetSize(1))))
			}
			wound(s, l.Offset(seg, 0))
			s.Zero(SuperblockOff, SuperblockSize)
			s.Zero(InfoOff, 2*infoDistance)
			s.Zero(CtrlOff, 4*PositionSize)
			// 8 KiB are 128 ksets.
			if h := Survey(s, s.Size(), false); h.Kind != HoldsDamage || h.Harmless || h.Dirty != 72*4096 {
				t.Errorf("%s, segment %d: %+v", name, seg, h)
			}
		}
	}
}

// TestCheckWithoutSuperblock: check sees that parts of a cache are left.
func TestCheckWithoutSuperblock(t *testing.T) {
	s := golden(t, "small-crc.pmem")
	want := Check(s, s.Size(), false).Keys
	s.Zero(SuperblockOff, SuperblockSize)
	rep := Check(s, s.Size(), false)
	if len(rep.Problems) != 1 || !errors.Is(rep.Problems[0], ErrSuperblockLost) || errors.Is(rep.Problems[0], ErrNotFormatted) || rep.Keys != want {
		t.Errorf("%d keys, problems %v", rep.Keys, rep.Problems)
	}
}
