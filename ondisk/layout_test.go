package ondisk

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// The places of what the tests spoil, in bytes.
const (
	superMagicOff = SuperblockOff + 8
	keyTailOff    = CtrlOff
	dirtyTailOff  = CtrlOff + 2*PositionSize
)

// formatted returns a fresh cache of the least size.
func formatted(t testing.TB, o FormatOptions) *sparse {
	t.Helper()
	s := newSparse(MinSize)
	if err := Format(s, o); err != nil {
		t.Fatal(err)
	}
	return s
}

func mustLayout(t testing.TB, s *sparse) *Layout {
	t.Helper()
	l, err := ReadLayout(s, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestReplicaNeverOverwritesNewest updates a record many times over, losing
// some of the writes in the middle, and checks after each that the newest
// complete version is found.
func TestReplicaNeverOverwritesNewest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSparse(MinSize)
		var newest Replica
		var want Position
		written := false
		for i := range rapid.IntRange(1, 600).Draw(t, "updates") {
			next := newest.Next()
			if written && next.Slot == newest.Slot {
				t.Fatal("the newest copy is the target")
			}
			var buf [PositionSize]byte
			pos := Position{Seg: uint32(i), Off: uint32(i) * 8}
			off := EncodePosition(buf[:], DirtyTail, next, pos)
			if rapid.IntRange(0, 3).Draw(t, "torn") == 0 {
				half := rapid.IntRange(0, 1).Draw(t, "half") * 8
				s.WriteAt(buf[half:half+8], off+int64(half))
				if rapid.Bool().Draw(t, "restart") && written {
					c := readCopies(s, dirtyTailOff, PositionSize, buf[:])
					newest = c.Newest
				}
			} else {
				s.WriteAt(buf[:], off)
				newest, want, written = next, pos, true
			}
			c := readCopies(s, dirtyTailOff, PositionSize, buf[:])
			if written && (!c.Valid() || c.Newest != newest || decodePosition(buf[:]) != want) {
				t.Fatalf("update %d: found %v at %+v, want %v at %+v", i, decodePosition(buf[:]), c, want, newest)
			}
		}
	})
}

// TestReplicaSurvivesLossOfOther loses one copy of each record in every way.
func TestReplicaSurvivesLossOfOther(t *testing.T) {
	id := &Identity{UUID: [16]byte{1, 2, 3}, BackingSize: 1 << 30, Serial: "S1"}
	fresh := formatted(t, FormatOptions{DataCRC: true, GCPercent: 33, Identity: id})
	want := mustLayout(t, fresh)
	records := map[string]struct{ off, distance int64 }{
		recordIdentity:         {IdentityOff, identityDistance},
		recordInfo:             {InfoOff, infoDistance},
		"key_tail":             {keyTailOff, PositionSize},
		"dirty_tail":           {dirtyTailOff, PositionSize},
		recordSegmentInfo:      {segmentOff(7), infoDistance},
		recordGeneration:       {segmentOff(7) + genOff, GenerationSize},
		recordGeneration + "0": {segmentOff(0) + genOff, GenerationSize},
	}
	for name, rec := range records {
		for slot := range int64(2) {
			for _, state := range []CopyState{CopyEmpty, CopyBad, CopyUnreadable} {
				s := fresh.clone()
				spoil(s, rec.off+slot*rec.distance, min(rec.distance, IdentitySize), state)
				l, err := ReadLayout(s, s.Size())
				if err != nil {
					t.Errorf("%s copy %d %v: %v", name, slot, state, err)
					continue
				}
				notes := 1
				if state == CopyEmpty {
					notes = 0
				}
				if len(l.DamagedCopies) != notes || notes == 1 && (int64(l.DamagedCopies[0].Slot) != slot || l.DamagedCopies[0].State != state) {
					t.Errorf("%s copy %d %v: notes %v", name, slot, state, l.DamagedCopies)
				}
				if l.Info != want.Info || l.KeyTail != want.KeyTail || l.DirtyTail != want.DirtyTail || *l.Identity != *id ||
					fmt.Sprint(l.Chain, l.Gens) != fmt.Sprint(want.Chain, want.Gens) {
					t.Errorf("%s copy %d %v: another layout", name, slot, state)
				}
			}
		}
		s := fresh.clone()
		spoil(s, rec.off, 8, CopyBad)
		spoil(s, rec.off+rec.distance, 8, CopyUnreadable)
		_, err := ReadLayout(s, s.Size())
		if err == nil || !errors.Is(err, ErrLost) && !errors.Is(err, ErrIdentity) {
			t.Errorf("%s lost: %v", name, err)
		}
	}
}

// TestHeal makes each record whole from the copy that is left, where memory
// takes it.
func TestHeal(t *testing.T) {
	fresh := formatted(t, FormatOptions{DataCRC: true, Identity: &Identity{BackingSize: 1 << 30, Serial: "S1"}})
	at := Replica{}
	for range 2 {
		var buf [IdentitySize]byte
		at = at.Next()
		fresh.WriteAt(buf[:SyncMarkSize], EncodeSyncMark(buf[:], at, 7))
		fresh.WriteAt(buf[:FingerprintSize], EncodeFingerprint(buf[:], at, &Fingerprint{State: FingerprintKnown, Sum: 3, Size: 1 << 30}))
		fresh.WriteAt(buf[:SettingsSize], EncodeSettings(buf[:], at, &through))
	}
	want := mustLayout(t, fresh)
	places := map[string]int64{
		recordIdentity: IdentityOff, recordSyncMark: syncMarkOff, recordFingerprint: fingerprintOff, recordInfo: InfoOff,
		recordSettings: settingsOff,
		"key_tail":     keyTailOff, "dirty_tail": dirtyTailOff,
		recordSegmentInfo: segmentOff(7), recordGeneration: segmentOff(7) + genOff,
	}
	for what, off := range places {
		for _, state := range []CopyState{CopyBad, CopyUnreadable} {
			s := fresh.clone()
			spoil(s, off, 16, state)
			l := mustLayout(t, s)
			if len(l.DamagedCopies) != 1 || l.DamagedCopies[0].What != what || l.DamagedCopies[0].Off != off {
				t.Fatalf("%s, %v: notes %v", what, state, l.DamagedCopies)
			}
			if err := l.DamagedCopies[0].Heal(s); (err == nil) != (state == CopyBad) {
				t.Errorf("%s, %v: %v", what, state, err)
			}
			if state == CopyUnreadable {
				continue
			}
			healed := mustLayout(t, s)
			// The copy that was good goes now.
			spoil(s, l.DamagedCopies[0].good, 16, CopyUnreadable)
			for _, l := range []*Layout{healed, mustLayout(t, s)} {
				if l.Info != want.Info || l.KeyTail != want.KeyTail || l.DirtyTail != want.DirtyTail || *l.Identity != *want.Identity ||
					l.SyncMark != 7 || l.Settings != through || l.Fingerprint != want.Fingerprint || fmt.Sprint(l.Chain, l.Gens) != fmt.Sprint(want.Chain, want.Gens) {
					t.Errorf("%s: another layout", what)
				}
			}
			if len(healed.DamagedCopies) > 0 {
				t.Errorf("%s: %v", what, healed.DamagedCopies)
			}
		}
	}
}

func spoil(s *sparse, off, n int64, state CopyState) {
	switch state {
	case CopyEmpty:
		s.Zero(off, n)
	case CopyBad:
		s.flip(off+9, 3)
	case CopyUnreadable:
		s.poison[off] = n
	}
}

// TestLostGeneration must not become generation 0.
func TestLostGeneration(t *testing.T) {
	for _, state := range []CopyState{CopyEmpty, CopyBad, CopyUnreadable} {
		s := golden(t, "small-crc.pmem")
		spoil(s, segmentOff(2)+genOff+GenerationSize, GenerationSize, state)
		if _, err := ReadLayout(s, s.Size()); !errors.Is(err, ErrGeneration) {
			t.Errorf("%v: %v", state, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	info := func(change func(i *Info)) func(s *sparse) {
		return func(s *sparse) {
			i := Info{Segments: 31, Flags: NewInfoFlags(false, 70)}
			change(&i)
			var buf [InfoSize]byte
			off := EncodeInfo(buf[:], Replica{0, 2}, i)
			s.WriteAt(buf[:], off)
		}
	}
	link := func(phys uint32, change func(i *SegmentInfo)) func(s *sparse) {
		return func(s *sparse) {
			i := SegmentInfo{HasNext: true, Type: segmentCacheData, Next: phys + 1}
			change(&i)
			var buf [SegmentInfoSize]byte
			off := encodeSegmentInfo(buf[:], phys, Replica{1, 3}, i)
			s.WriteAt(buf[:], off)
		}
	}
	tail := func(p Position) func(s *sparse) {
		return func(s *sparse) {
			var buf [PositionSize]byte
			off := EncodePosition(buf[:], KeyTail, Replica{1, 2}, p)
			s.WriteAt(buf[:], off)
		}
	}
	super := func(change func(p []byte)) func(s *sparse) {
		return func(s *sparse) {
			p := make([]byte, SuperblockSize)
			s.ReadAt(p, SuperblockOff)
			change(p)
			le.PutUint32(p, Checksum(p[4:]))
			s.WriteAt(p, SuperblockOff)
		}
	}
	for name, c := range map[string]struct {
		spoil func(s *sparse)
		want  error
	}{
		"blank":                {func(s *sparse) { *s = *newSparse(MinSize) }, ErrNotFormatted},
		"too small":            {func(s *sparse) { s.size = MinSize - 4096 }, ErrTooSmall},
		"magic zero":           {func(s *sparse) { s.Zero(superMagicOff, 8) }, ErrNotFormatted},
		"other magic":          {super(func(p []byte) { p[8]++ }), ErrMagic},
		"superblock crc":       {func(s *sparse) { s.flip(SuperblockOff, 0) }, ErrSuperblock},
		"superblock poisoned":  {func(s *sparse) { s.poison[SuperblockOff] = 1 }, ErrUnreadable},
		"big-endian flag":      {super(func(p []byte) { p[4] = 1 }), ErrBigEndian},
		"big-endian magic":     {super(func(p []byte) { p[7] = 1; le.PutUint64(p[8:], bigEndianMagic) }), ErrBigEndian},
		"no segments":          {super(func(p []byte) { le.PutUint32(p[16:], 0) }), ErrSize},
		"too many segments":    {super(func(p []byte) { le.PutUint32(p[16:], 32) }), ErrSize},
		"not initialised":      {info(func(i *Info) { i.Flags &^= infoInitDone }), ErrNotInitialised},
		"write-through":        {info(func(i *Info) { i.Flags |= 1 << infoModeShift }), ErrMode},
		"gc percent":           {info(func(i *Info) { i.Flags = i.Flags.WithGCPercent(91) }), ErrInfo},
		"chain too long":       {info(func(i *Info) { i.Segments = 32 }), ErrInfo},
		"chain of nothing":     {info(func(i *Info) { i.Segments = 0 }), ErrInfo},
		"chain starts outside": {info(func(i *Info) { i.FirstSegment = 31 }), ErrInfo},
		"chain is longer":      {info(func(i *Info) { i.Segments = 30 }), ErrChain},
		"chain ends early":     {link(5, func(i *SegmentInfo) { i.HasNext = false }), ErrChain},
		"chain leads outside":  {link(5, func(i *SegmentInfo) { i.Next = 31 }), ErrChain},
		"chain is a circle":    {link(30, func(i *SegmentInfo) { i.Next = 3 }), ErrChain},
		"chain turns back":     {link(5, func(i *SegmentInfo) { i.Next = 5 }), ErrChain},
		"segment type":         {link(5, func(i *SegmentInfo) { i.Type = 2 }), ErrChain},
		"tail in no segment":   {tail(Position{31, 0}), ErrPosition},
		"tail off the grid":    {tail(Position{0, 4}), ErrPosition},
		"tail behind the end":  {tail(Position{0, SegmentData - 16}), ErrPosition},
	} {
		s := formatted(t, FormatOptions{GCPercent: 70})
		c.spoil(s)
		l, err := ReadLayout(s, s.Size())
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if l == nil {
			t.Errorf("%s: no layout to show", name)
		}
		if err != nil && bytes.ContainsRune([]byte(err.Error()), '\n') {
			t.Errorf("%s: more than a line: %q", name, err)
		}
	}
}

// TestIdentity tells a record that was never finished, or is not one, from one
// that was lost.
func TestIdentity(t *testing.T) {
	id := &Identity{UUID: [16]byte{9}, BackingSize: 4096, Serial: string(bytes.Repeat([]byte("x"), 200))}
	s := formatted(t, FormatOptions{GCPercent: 70})
	if l := mustLayout(t, s); l.Identity != nil {
		t.Fatalf("fresh cache bound to %+v", l.Identity)
	}
	for cut := range 2 {
		s := s.clone()
		s.writes = cut
		if err := WriteIdentity(s, Replica{}, id); err == nil {
			t.Fatal("no error from a write that failed")
		}
		s.writes = -1
		if l := mustLayout(t, s); (l.Identity != nil) != (cut > 0) {
			t.Errorf("cut after %d writes: %+v", cut, l.Identity)
		}
	}
	torn := s.clone()
	var buf [IdentitySize]byte
	off := EncodeIdentity(buf[:], Replica{}.Next(), id)
	torn.WriteAt(buf[:40], off)
	if l := mustLayout(t, torn); l.Identity != nil {
		t.Error("a torn first record is believed")
	}

	if err := WriteIdentity(s, Replica{}, id); err != nil {
		t.Fatal(err)
	}
	l := mustLayout(t, s)
	if l.Identity == nil || l.Identity.UUID != id.UUID || l.Identity.BackingSize != 4096 || !l.Identity.Matches(id.Serial) ||
		l.Identity.Matches("another") || !l.Identity.Matches("") {
		t.Errorf("read back %+v", l.Identity)
	}
	// Only the newest copy may be lost without a trace of the new one.
	newer := *id
	newer.BackingSize = 8192
	if err := WriteIdentity(s, l.IdentityCopies.Newest, &newer); err != nil {
		t.Fatal(err)
	}
	if l := mustLayout(t, s); l.Identity.BackingSize != 8192 || l.IdentityCopies.State != [2]CopyState{CopyValid, CopyValid} {
		t.Errorf("rebound: %+v, %+v", l.Identity, l.IdentityCopies)
	}
	foreign := formatted(t, FormatOptions{GCPercent: 70})
	foreign.WriteAt(bytes.Repeat([]byte("boot"), 1024), 0)
	if l := mustLayout(t, foreign); l.Identity != nil {
		t.Error("somebody else's bytes are an identity")
	}
}
