package ondisk

import "testing"

func TestSyncMark(t *testing.T) {
	m := newSparse(MinSize)
	if err := Format(m, FormatOptions{GCPercent: 70}); err != nil {
		t.Fatal(err)
	}
	var at Replica
	for _, seq := range []uint64{5, 6, seqMask, 1} {
		at = at.Next()
		var buf [SyncMarkSize]byte
		off := EncodeSyncMark(buf[:], at, seq)
		if off+SyncMarkSize > SuperblockOff || off < IdentityOff+IdentitySize || off < IdentityOff+identityDistance && off+SyncMarkSize > identityDistance {
			t.Fatalf("the mark at %d is not in free space", off)
		}
		m.WriteAt(buf[:], off)
		l, err := ReadLayout(m, m.Size())
		if err != nil || l.SyncMark != seq || l.SyncMarkCopies.Newest != at {
			t.Errorf("read %d at %v, %v, want %d at %v", l.SyncMark, l.SyncMarkCopies.Newest, err, seq, at)
		}
	}
	// The newest copy is torn: the one before it counts.
	m.flip(syncMarkOff+int64(at.Slot)*identityDistance+20, 3)
	if l, err := ReadLayout(m, m.Size()); err != nil || l.SyncMark != seqMask {
		t.Errorf("read %d, %v", l.SyncMark, err)
	}
}

func TestSeqOrder(t *testing.T) {
	for _, c := range []struct {
		a, b  uint64
		after bool
	}{{2, 1, true}, {1, 2, false}, {7, 7, false}, {1, seqMask, true}, {seqMask, 1, false}, {3, seqMask - 5, true}} {
		if SeqAfter(c.a, c.b) != c.after {
			t.Errorf("SeqAfter(%d, %d) is not %t", c.a, c.b, c.after)
		}
	}
	for _, seq := range []uint64{1, 2, seqMask} {
		if NextSeq(PrevSeq(seq)) != seq || PrevSeq(NextSeq(seq)) != seq {
			t.Errorf("PrevSeq(%d) = %d", seq, PrevSeq(seq))
		}
		if next := SeqBeyond(seq); !SeqAfter(next, seq) || next == 0 || next > seqMask {
			t.Errorf("SeqBeyond(%d) = %d", seq, next)
		}
	}
}
