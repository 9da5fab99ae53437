package ondisk

import (
	"bytes"
	"testing"
)

// TestFingerprint writes versions of the record, and damages the newest copy.
func TestFingerprint(t *testing.T) {
	m := formatted(t, FormatOptions{GCPercent: 70, Identity: &Identity{BackingSize: 1 << 30}})
	if f := mustLayout(t, m).Fingerprint; f != (Fingerprint{}) {
		t.Fatalf("a new cache has the fingerprint %+v", f)
	}
	for slot := range int64(2) {
		taken := [][2]int64{{IdentityOff, IdentitySize}, {syncMarkOff, SyncMarkSize}, {identityDistance, IdentitySize}, {syncMarkOff + identityDistance, SyncMarkSize}}
		off := fingerprintOff + slot*identityDistance
		for _, r := range append(taken, [2]int64{SuperblockOff, 1}) {
			if off < r[0]+r[1] && r[0] < off+FingerprintSize {
				t.Fatalf("copy %d at %d lies on what is at %d", slot, off, r[0])
			}
		}
	}
	versions := []Fingerprint{
		{State: FingerprintKnown, Sum: 0xDEADBEEF, Size: 1 << 40, DirtyTail: [2]Position{{1, 2}, {3, 4}}},
		{State: FingerprintUnknown},
		{State: FingerprintKnown, Sum: 1, Size: 512, DirtyTail: [2]Position{{7, 8}, {9, 10}}},
		{State: FingerprintChanged},
	}
	var at Replica
	for i := range versions {
		at = at.Next()
		var buf [FingerprintSize]byte
		off := EncodeFingerprint(buf[:], at, &versions[i])
		m.WriteAt(buf[:], off)
		if l := mustLayout(t, m); l.Fingerprint != versions[i] || l.FingerprintCopies.Newest != at {
			t.Errorf("read %+v at %v, want %+v at %v", l.Fingerprint, l.FingerprintCopies.Newest, versions[i], at)
		}
	}
	for _, state := range []CopyState{CopyEmpty, CopyBad, CopyUnreadable} {
		s := m.clone()
		spoil(s, fingerprintOff+int64(at.Slot)*identityDistance, FingerprintSize, state)
		if l := mustLayout(t, s); l.Fingerprint != versions[2] {
			t.Errorf("newest copy %v: read %+v, want %+v", state, l.Fingerprint, versions[2])
		}
		spoil(s, fingerprintOff+int64(at.Slot^1)*identityDistance, FingerprintSize, state)
		if l := mustLayout(t, s); l.Fingerprint != (Fingerprint{}) {
			t.Errorf("both copies %v: read %+v", state, l.Fingerprint)
		}
	}
	if err := Format(m, FormatOptions{GCPercent: 70}); err != nil {
		t.Fatal(err)
	}
	if l := mustLayout(t, m); l.FingerprintCopies.Valid() {
		t.Error("a format leaves the fingerprint of the cache before")
	}
}

// TestNoFingerprint: a record with the checksum right and anything else wrong
// is none.
func TestNoFingerprint(t *testing.T) {
	var good [FingerprintSize]byte
	EncodeFingerprint(good[:], Replica{}, &Fingerprint{State: FingerprintKnown, Sum: 7, Size: 512})
	for _, at := range []int{8, 15, 16, 19} { // magic, state
		p := bytes.Clone(good[:])
		p[at] |= 0x80
		p[at] ^= 0x04
		if f := decodeFingerprint(p); f != (Fingerprint{}) {
			t.Errorf("with byte %d changed: %+v", at, f)
		}
	}
}
