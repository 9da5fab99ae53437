package ondisk

import (
	"strings"
	"testing"
)

// TestUnwritten: data that the backing device lacks and zeros are told apart, and
// a sector that is named more than once counts once.
func TestUnwritten(t *testing.T) {
	s := newSparse(MinSize)
	if err := Format(s, FormatOptions{}); err != nil {
		t.Fatal(err)
	}
	l := mustLayout(t, s)
	const mib = 1 << 20
	key := func(off uint64, n uint32, flags KeyFlags) Key {
		return Key{Off: off, Len: n, Flags: flags, Seg: 1, Gen: l.Gens[1]}
	}
	keys := []Key{
		key(0, 8192, 0), key(4096, 8192, 0), // 12 KiB
		key(mib, 512, KeyClean),
	}
	for i := range uint64(100) { // 100 MiB, of which 4 KiB are data, too
		keys = append(keys, key(64*mib+i*mib, mib, KeyZero))
	}
	keys = append(keys, key(64*mib, mib, KeyZero), key(70*mib, 4096, 0))
	kset := EncodeKset(make([]byte, MaxKsetSize), FirstSeq(), keys)
	s.WriteAt(kset, l.Offset(0, 0))
	rep := Check(s, s.Size(), false)
	if len(rep.Problems) > 0 || rep.DirtyBytes != 16<<10 || rep.ZeroBytes != 100*mib-4096 || rep.Dirty != len(keys)-1 {
		t.Errorf("%d keys, %d bytes of data, %d of zeros, %v", rep.Dirty, rep.DirtyBytes, rep.ZeroBytes, rep.Problems)
	}

	// The same behind damage of the log.
	second := Position{Off: KsetSize(len(keys))}
	s.WriteAt(EncodeKset(make([]byte, MaxKsetSize), NextSeq(rep.End.Seq), keys[:3]), l.Offset(0, second.Off))
	s.WriteAt(EncodeKset(make([]byte, MaxKsetSize), NextSeq(NextSeq(rep.End.Seq)), keys[3:5]), l.Offset(0, second.Off+KsetSize(3)))
	s.flip(l.Offset(0, second.Off+30), 1)
	rep = Check(s, s.Size(), false)
	if len(rep.Problems) != 1 || !strings.Contains(rep.Problems[0].Error(), "; behind that lie 2097152 bytes to be zeroed, sectors 131072-135167") {
		t.Errorf("%v", rep.Problems)
	}

	for want, n := range map[string][2]int64{
		"0 bytes of dirty data":                          {},
		"1 bytes of dirty data":                          {1, 0},
		"2 bytes to be zeroed":                           {0, 2},
		"1 bytes of dirty data and 2 bytes to be zeroed": {1, 2},
	} {
		if got := Unwritten(n[0], n[1]); got != want {
			t.Errorf("%v is %q", n, got)
		}
	}
}
