package ondisk

import (
	"errors"
	"testing"
)

// scribe writes a log the way a server does.
type scribe struct {
	t    testing.TB
	s    *sparse
	l    *Layout
	pos  Position
	seq  uint64 // 0: as the kernel does, without numbers
	seqs bool
}

func newScribe(t testing.TB, seq uint64) *scribe {
	s := formatted(t, FormatOptions{GCPercent: 70})
	return &scribe{t: t, s: s, l: mustLayout(t, s), seq: seq, seqs: seq != 0}
}

// kset appends a kset of n keys and returns where it is.
func (w *scribe) kset(n int) Position {
	keys := make([]Key, n)
	for i := range keys {
		keys[i] = Key{Off: uint64(i) * 512, Len: 512, Seg: 30, SegOff: uint32(i) * 512}
	}
	var buf [MaxKsetSize]byte
	p := EncodeKset(buf[:], w.seq, keys)
	at := w.pos
	w.write(p)
	w.pos.Off += uint32(len(p))
	w.s.Zero(w.l.Offset(w.pos.Seg, w.pos.Off), KsetHeaderSize)
	return at
}

// last appends a LAST record and returns where it is.
func (w *scribe) last(next uint32) Position {
	var buf [KsetHeaderSize]byte
	at := w.pos
	w.s.Zero(w.l.Offset(next, 0), KsetHeaderSize)
	w.write(EncodeLast(buf[:], w.seq, next))
	w.pos = Position{Seg: next}
	return at
}

func (w *scribe) write(p []byte) {
	w.s.WriteAt(p, w.l.Offset(w.pos.Seg, w.pos.Off))
	if w.seqs {
		w.seq = NextSeq(w.seq)
	}
}

// tail moves a tail on the media.
func (w *scribe) tail(t Tail, p Position) {
	var buf [PositionSize]byte
	w.l = mustLayout(w.t, w.s)
	at := w.l.KeyTailCopies.Newest
	if t == DirtyTail {
		at = w.l.DirtyTailCopies.Newest
	}
	off := EncodePosition(buf[:], t, at.Next(), p)
	w.s.WriteAt(buf[:], off)
	w.l = mustLayout(w.t, w.s)
}

// nearEnd begins the log at a kset behind which no full one fits.
func (w *scribe) nearEnd() {
	w.pos.Off = SegmentData - MaxKsetSize
	w.tail(KeyTail, w.pos)
	w.tail(DirtyTail, w.pos)
	w.kset(1)
}

// walk returns the keys found and the end.
func (w *scribe) walk() (int, LogEnd) {
	keys := 0
	end, err := w.l.WalkLog(w.s, w.l.KeyTail, func(_ Position, k *Kset) error {
		keys += len(k.Keys)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return keys, end
}

func (w *scribe) off(p Position) int64 { return w.l.Offset(p.Seg, p.Off) }

// numberings are the logs that every rule must hold for, except where a test
// says otherwise: the kernel's, ours, and ours at the largest number.
var numberings = map[string]uint64{"kernel": 0, "numbered": 1000, "wrapping": seqMask - 2}

func TestWalkChain(t *testing.T) {
	for name, seq := range numberings {
		w := newScribe(t, seq)
		w.kset(3)
		w.last(17)
		w.kset(128)
		w.kset(1)
		w.last(4)
		w.kset(2)
		keys, end := w.walk()
		if keys != 134 || end.Pos != w.pos || end.Damage != nil {
			t.Errorf("%s: %d keys to %+v, want 134 to %v", name, keys, end, w.pos)
		}
		if seq != 0 && end.NextSeq() != w.seq {
			t.Errorf("%s: next number %d, want %d", name, end.NextSeq(), w.seq)
		}
		if seq == 0 && (end.Seq != 0 || end.NextSeq() == 0) {
			t.Errorf("%s: numbers %d, %d", name, end.Seq, end.NextSeq())
		}
	}
}

// TestWalkMixed has the kernel and a server take turns on one log.
func TestWalkMixed(t *testing.T) {
	w := newScribe(t, 50)
	w.kset(1)
	w.kset(1)
	ours := w.seq
	w.seq, w.seqs = 0, false
	w.kset(2)
	w.last(3)
	w.kset(2)
	w.seq, w.seqs = ours, true
	w.kset(4)
	if keys, end := w.walk(); keys != 10 || end.Damage != nil || end.Pos != w.pos || end.Seq != 52 {
		t.Errorf("%d keys to %+v", keys, end)
	}
}

// TestWalkStale leaves valid old ksets behind the end of the log, as happens
// when a segment is used for it again and an end mark is lost.
func TestWalkStale(t *testing.T) {
	for name, old := range map[string]uint64{"older": 900, "other cache": 1 << 40, "nearly": 1000 - 6} {
		w := newScribe(t, old)
		for range 5 {
			w.kset(2)
		}
		w.pos, w.seq = Position{}, 1000
		w.kset(2)
		end := w.pos
		w.pos, w.seq = end, old
		w.write(EncodeKset(make([]byte, MaxKsetSize), old, []Key{{Len: 512}}))
		if keys, got := w.walk(); keys != 2 || got.Damage != nil || got.Pos != end {
			t.Errorf("%s: %d keys to %+v, want 2 to %v", name, keys, got, end)
		}
	}
}

// TestTornTail cuts the last kset at every word: the log ends there, and that
// is no damage.
func TestTornTail(t *testing.T) {
	for name, seq := range numberings {
		w := newScribe(t, seq)
		w.kset(5)
		at := w.kset(3)
		for word := int64(0); word < int64(KsetSize(3)); word += 8 {
			torn := w.s.clone()
			torn.Zero(w.off(at)+word, 8)
			cut := &scribe{t: t, s: torn, l: w.l}
			keys, end := cut.walk()
			if w.isZeroWord(at, word) {
				continue
			}
			if keys != 5 || end.Damage != nil || end.Pos != at {
				t.Errorf("%s, word %d: %d keys to %+v", name, word, keys, end)
			}
		}
	}
}

func (w *scribe) isZeroWord(at Position, word int64) bool {
	var buf [8]byte
	w.s.ReadAt(buf[:], w.off(at)+word)
	return isZero(buf[:])
}

// TestTornOverStale tears the last kset in a segment that was full of others
// before, with one of them just behind the end mark.
func TestTornOverStale(t *testing.T) {
	for name, seq := range numberings {
		w := newScribe(t, seq)
		w.kset(5)
		at := w.kset(3)
		mark := w.pos
		w.pos.Off += 2 * KeySize
		if w.seqs {
			w.seq -= 100
		}
		w.kset(1)
		if keys, end := w.walk(); keys != 8 || end.Damage != nil || end.Pos != mark {
			t.Errorf("%s: %d keys to %+v", name, keys, end)
		}
		w.s.flip(w.off(at)+50, 1)
		if keys, end := w.walk(); keys != 5 || end.Damage != nil || end.Pos != at {
			t.Errorf("%s, torn: %d keys to %+v", name, keys, end)
		}
	}
}

// TestTornLastOverStale stores parts of a LAST over the end mark of an empty
// log, which has no number to go by. The segment held another log before, with a
// kset just where one would lie if the LAST were a kset as long as the number of
// the segment it leads to.
func TestTornLastOverStale(t *testing.T) {
	for next := uint32(1); next < 30; next++ {
		for arrived := range 7 {
			w := newScribe(t, 1000)
			w.kset(int(next))
			w.kset(2)
			w.s.Zero(w.off(Position{}), KsetHeaderSize)
			last := EncodeLast(make([]byte, KsetHeaderSize), 1<<40, next)
			for word := range 3 {
				if arrived&(1<<word) != 0 {
					w.s.WriteAt(last[8*word:][:8], w.off(Position{})+int64(8*word))
				}
			}
			if keys, end := w.walk(); keys != 0 || end.Damage != nil || end.Pos != (Position{}) {
				t.Errorf("leading to %d, words %03b: %d keys to %+v", next, arrived, keys, end)
			}
		}
	}
}

// TestFirstDamage takes parts of the header of a log's first kset away, where
// no number in front of it helps.
func TestFirstDamage(t *testing.T) {
	for name, seq := range numberings {
		w := newScribe(t, seq)
		at := w.kset(7)
		next := w.kset(4)
		for _, lost := range []struct{ off, size int64 }{
			{0, 4}, {4, 4}, {0, 8}, {8, 8}, {16, 8}, {8, 16},
		} {
			if lost.off == 16 && seq == 0 {
				continue // no flags to lose
			}
			s := w.s.clone()
			s.Zero(w.off(at)+lost.off, lost.size)
			keys, end := (&scribe{t: t, s: s, l: w.l}).walk()
			if d := end.Damage; keys != 0 || d == nil || d.At != at || d.Ahead == nil || *d.Ahead != next || d.Keys != 4 {
				t.Errorf("%s, without %d bytes from %d on: %d keys, %+v", name, lost.size, lost.off, keys, end)
			}
		}
	}
}

// TestMiddleDamage flips bits of a kset with others behind it.
func TestMiddleDamage(t *testing.T) {
	for name, seq := range numberings {
		w := newScribe(t, seq)
		w.kset(1)
		at := w.kset(7)
		next := w.kset(4)
		w.kset(2)
		for _, off := range []int64{0, 4, 8, 12, 23, 24, 100, int64(KsetSize(7)) - 1} {
			for name2, hit := range map[string]func(s *sparse){
				"flip":   func(s *sparse) { s.flip(w.off(at)+off, 5) },
				"poison": func(s *sparse) { s.poison[w.off(at)+off] = 1 },
			} {
				s := w.s.clone()
				hit(s)
				keys, end := (&scribe{t: t, s: s, l: w.l}).walk()
				d := end.Damage
				if keys != 1 || d == nil || d.At != at || d.Ahead == nil || *d.Ahead != next || d.Ksets != 2 || d.Keys != 6 {
					t.Errorf("%s, %s of byte %d: %d keys, %+v", name, name2, off, keys, d)
				}
				if d != nil && (name2 == "poison") != errors.Is(d, ErrUnreadable) {
					t.Errorf("%s, %s of byte %d: %v", name, name2, off, d)
				}
			}
		}
	}
}

// TestLostPage clears a whole piece of a numbered log, header and all: what
// the kernel would take for a proper end.
func TestLostPage(t *testing.T) {
	w := newScribe(t, 7)
	w.kset(10)
	at := w.kset(100)
	w.kset(100)
	next := w.kset(3)
	w.s.Zero(w.off(at), int64(KsetSize(100))+400)
	keys, end := w.walk()
	if d := end.Damage; keys != 10 || d == nil || d.At != at || d.Ahead == nil || *d.Ahead != next || d.Keys != 3 {
		t.Errorf("%d keys, %+v", keys, end)
	}
}

// TestDamagedLast breaks the record that leads on to the next segment.
func TestDamagedLast(t *testing.T) {
	for name, seq := range numberings {
		for _, off := range []int64{0, 1, 16, 18} {
			w := newScribe(t, seq)
			w.nearEnd()
			at := w.last(9)
			w.kset(4)
			w.kset(5)
			w.s.flip(w.off(at)+off, 7)
			if keys, end := w.walk(); end.Damage == nil || end.Damage.At != at || end.Damage.Keys != 9 {
				t.Errorf("%s, byte %d: %d keys, %+v", name, off, keys, end)
			}
		}
	}
	w := newScribe(t, 77)
	w.nearEnd()
	at := w.last(9)
	w.kset(4)
	w.s.Zero(w.off(at), KsetHeaderSize)
	if _, end := w.walk(); end.Damage == nil || end.Damage.Keys != 4 {
		t.Errorf("a LAST that is gone altogether: %+v", end)
	}
}

// TestLastBeforeItsKset: a LAST that is there although the kset in front of it
// is not proves nothing, unless the log goes on where it leads.
func TestLastBeforeItsKset(t *testing.T) {
	for _, before := range []int{0, 1} {
		for _, goesOn := range []bool{false, true} {
			w := newScribe(t, 7)
			w.nearEnd()
			if before == 0 {
				w.tail(KeyTail, w.pos)
				w.tail(DirtyTail, w.pos)
			}
			at := w.kset(5)
			w.last(9)
			if goesOn {
				w.kset(4)
			}
			for _, lose := range []string{"torn", "gone"} {
				if lose == "torn" {
					w.s.flip(w.off(at)+30, 1)
				} else {
					w.s.Zero(w.off(at), int64(KsetSize(5)))
				}
				_, end := w.walk()
				// Nothing was numbered before a first kset that is gone.
				hidden := before == 0 && lose == "gone"
				if damaged := end.Damage != nil; damaged != (goesOn && !hidden) || end.Pos != at {
					t.Errorf("%d ksets in front, goes on: %t, %s: %+v", before, goesOn, lose, end)
				}
			}
		}
	}
}

// TestDirtyTailBeyondEnd loses everything from the key tail on.
func TestDirtyTailBeyondEnd(t *testing.T) {
	for name, seq := range numberings {
		w := newScribe(t, seq)
		w.kset(1)
		at := w.kset(1)
		w.tail(DirtyTail, at)
		if _, end := w.walk(); end.Damage != nil {
			t.Errorf("%s: %v", name, end.Damage)
		}
		w.tail(DirtyTail, w.pos)
		if _, end := w.walk(); end.Damage != nil {
			t.Errorf("%s, all clean: %v", name, end.Damage)
		}
		w.s.Zero(w.off(at), int64(KsetSize(1)))
		if _, end := w.walk(); end.Damage == nil || end.Damage.DirtyTail == nil {
			t.Errorf("%s: the lost kset before dirty_tail goes unseen", name)
		}
	}
}

// TestHostileLog has valid checksums and impossible content.
func TestHostileLog(t *testing.T) {
	buf := make([]byte, MaxKsetSize)
	key := Key{Len: 512}
	for name, c := range map[string]struct {
		write func(w *scribe)
		want  error
	}{
		"LAST to itself":     {func(w *scribe) { w.last(0) }, ErrLogLoop},
		"LAST in a circle":   {func(w *scribe) { w.kset(1); w.last(1); w.kset(1); w.last(2); w.write(EncodeLast(buf, w.seq, 1)) }, ErrLogLoop},
		"LAST to the start":  {func(w *scribe) { w.kset(1); w.last(1); w.write(EncodeLast(buf, w.seq, 0)) }, ErrLogLoop},
		"LAST leads outside": {func(w *scribe) { w.write(EncodeLast(buf, w.seq, 31)) }, ErrLast},
		"bad key": {func(w *scribe) {
			bad := key
			bad.Seg = 31
			w.write(EncodeKset(buf, w.seq, []Key{key, bad}))
		}, ErrKey},
	} {
		for numbering, seq := range numberings {
			w := newScribe(t, seq)
			c.write(w)
			if _, end := w.walk(); end.Damage == nil || !errors.Is(end.Damage, c.want) {
				t.Errorf("%s, %s: %+v", name, numbering, end)
			}
		}
	}
	// A kset that leaves no room for the LAST record behind it is not taken.
	w := newScribe(t, 5)
	w.pos.Off = SegmentData - KsetSize(1)
	w.tail(KeyTail, w.pos)
	w.tail(DirtyTail, w.pos)
	w.write(EncodeKset(buf, 5, []Key{key}))
	if keys, end := w.walk(); keys != 0 || end.Pos.Off != SegmentData-KsetSize(1) {
		t.Errorf("%d keys to %+v", keys, end)
	}
}

// TestVisitError must end the walk where it is.
func TestVisitError(t *testing.T) {
	w := newScribe(t, 5)
	w.kset(1)
	at := w.kset(1)
	stop := errors.New("stop")
	end, err := w.l.WalkLog(w.s, w.l.KeyTail, func(p Position, _ *Kset) error {
		if p == at {
			return stop
		}
		return nil
	})
	if err != stop || end.Pos != at {
		t.Errorf("%+v, %v", end, err)
	}
}

// TestWalkAllocations: a walk allocates for itself, never per kset or key.
func TestWalkAllocations(t *testing.T) {
	walk := func(ksets int) float64 {
		w := newScribe(t, 5)
		for range ksets {
			w.kset(128)
		}
		return testing.AllocsPerRun(5, func() { w.walk() })
	}
	if few, many := walk(1), walk(1000); many > few+1 {
		t.Errorf("%v allocations for a kset, %v for 1000", few, many)
	}
}

// TestNearestStart loses a LAST behind which the log goes through two more segments. It goes
// on at the first of them, whatever the numbers of the segments are.
func TestNearestStart(t *testing.T) {
	for _, path := range [][2]uint32{{17, 4}, {4, 17}} {
		w := newScribe(t, 1000)
		w.kset(1)
		lost := w.last(path[0])
		w.kset(MaxKeys)
		w.kset(5)
		w.last(path[1])
		w.kset(2)
		w.s.Zero(w.l.Offset(lost.Seg, lost.Off), KsetHeaderSize)
		end, _ := w.l.WalkLog(w.s, w.l.KeyTail, func(Position, *Kset) error { return nil })
		if d := end.Damage; d == nil || d.Ahead == nil || *d.Ahead != (Position{Seg: path[0]}) {
			t.Errorf("%v: %v", path, d)
		}
		rep := Repair(w.s, w.s.Size(), RepairOptions{Durable: true})
		if rep.Verify(); !rep.Done() || rep.LostLog || rep.Report.Keys != 1+MaxKeys+5+2 {
			t.Errorf("%v: %q, %v remain, %d keys", path, rep.Mended, rep.Report.Problems, rep.Report.Keys)
		}
	}
}

// TestDirtyTailBehindLast loses all ksets from dirty_tail to the LAST, at the start of a
// segment or one kset behind it, and the kset in front of them. Nothing is readable in that
// segment any more, and the log goes on in the next one.
func TestDirtyTailBehindLast(t *testing.T) {
	for _, behind := range []bool{false, true} {
		w := newScribe(t, 1000)
		w.kset(1)
		front := w.kset(1)
		w.last(17)
		dirty := w.pos
		if behind {
			front = w.kset(1)
			w.kset(1)
			dirty = w.pos
		}
		w.kset(3)
		w.kset(4)
		w.last(4)
		w.kset(7)
		w.kset(8)
		for range 2 {
			w.tail(DirtyTail, dirty)
		}
		w.s.Zero(w.l.Offset(front.Seg, front.Off), int64(KsetSize(1)))
		w.s.Zero(w.l.Offset(dirty.Seg, dirty.Off), int64(KsetSize(3)+KsetSize(4)+KsetHeaderSize))
		rep := Repair(w.s, w.s.Size(), RepairOptions{Durable: true})
		if rep.Verify(); rep.Done() {
			t.Errorf("behind %t: without the flag: %q", behind, rep.Mended)
		}
		rep = Repair(w.s, w.s.Size(), RepairOptions{Durable: true, GiveUpLog: true})
		if rep.Verify(); !rep.Done() || !rep.LostLog || rep.Report.Keys < 7+8 {
			t.Errorf("behind %t: with the flag: %q, %v remain, %d keys", behind, rep.Mended, rep.Report.Problems, rep.Report.Keys)
		}
	}
}
