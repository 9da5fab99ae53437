package ondisk

import "io"

// The fingerprint is a checksum of some areas of the backing device, and the
// state of the log that it was taken with. Everybody who mounts or partitions
// the device writes to these areas. If the device has another checksum when a
// cache is opened, it was written without the cache. Package engine knows what
// that means, and when the two may be compared at all.
//
// It lies in the first 4 KiB, beside the identity record and the sync mark. The
// kernel ignores it, and so leaves it behind when it formats.

const (
	fingerprintOff   = 3 << 9             // the second copy at identityDistance, like the others
	fingerprintMagic = 0x544e495250474e46 // "FNGPRINT" in memory order

	// FingerprintSize is the size in bytes of an encoded fingerprint: the
	// header, the magic, the state, the sum, the size, two positions.
	FingerprintSize = headerSize + 8 + 4 + 4 + 8 + 2*8
)

// FingerprintState says what a fingerprint is good for.
type FingerprintState uint32

const (
	// FingerprintUnknown is one that nothing may be compared with: write-back
	// is changing the areas, or there never was one.
	FingerprintUnknown FingerprintState = iota
	// FingerprintKnown is one that the device should have.
	FingerprintKnown
	// FingerprintChanged says that the device was found to be written without
	// the cache: what is clean in the cache is out of date, and what is dirty
	// waits for somebody's decision.
	FingerprintChanged
)

func (s FingerprintState) String() string {
	return [...]string{"unknown", "known", "changed"}[s]
}

// Fingerprint is what the backing device should look like. All but the state
// has a meaning only if that is FingerprintKnown.
type Fingerprint struct {
	State FingerprintState
	Sum   uint32 // checksum of the areas
	Size  int64  // bytes of the device, on which its areas depend

	// DirtyTail is where dirty_tail stood, and where it was about to go: the
	// fingerprint holds for both.
	DirtyTail [2]Position
}

// EncodeFingerprint writes the copy at of f into dst, FingerprintSize bytes.
func EncodeFingerprint(dst []byte, at Replica, f *Fingerprint) (off int64) {
	dst = dst[:FingerprintSize]
	le.PutUint64(dst[8:], fingerprintMagic)
	le.PutUint32(dst[16:], uint32(f.State))
	le.PutUint32(dst[20:], f.Sum)
	le.PutUint64(dst[24:], uint64(f.Size))
	for i, p := range f.DirtyTail {
		le.PutUint32(dst[32+8*i:], p.Seg)
		le.PutUint32(dst[36+8*i:], p.Off)
	}
	seal(dst, at.Seq)
	return fingerprintOff + int64(at.Slot)*identityDistance
}

// decodeFingerprint returns an unknown one for a record that is not one.
func decodeFingerprint(p []byte) (f Fingerprint) {
	state := FingerprintState(le.Uint32(p[16:]))
	if le.Uint64(p[8:]) != fingerprintMagic || state > FingerprintChanged {
		return f
	}
	f.State, f.Sum, f.Size = state, le.Uint32(p[20:]), int64(le.Uint64(p[24:]))
	for i := range f.DirtyTail {
		f.DirtyTail[i] = Position{Seg: le.Uint32(p[32+8*i:]), Off: le.Uint32(p[36+8*i:])}
	}
	return f
}

// FingerprintAt returns the fingerprint in a store of p at off, if it is one.
func FingerprintAt(p []byte, off int64) (f Fingerprint, ok bool) {
	if len(p) != FingerprintSize || off != fingerprintOff && off != fingerprintOff+identityDistance {
		return f, false
	}
	return decodeFingerprint(p), true
}

// ReadFingerprint returns where the newest copy of the fingerprint of a cache of
// size bytes stands, and where dirty_tail does, nil if that cannot be told. The
// cache may be damaged: nothing else is looked at.
func ReadFingerprint(r io.ReaderAt, size int64) (f Fingerprint, at Replica, dirtyTail *Position) {
	l := &Layout{Superblock: Superblock{Segments: SegmentsIn(size)}}
	l.readFingerprint(r)
	if l.readTail(r, DirtyTail) == nil {
		dirtyTail = &l.DirtyTail
	}
	return l.Fingerprint, l.FingerprintCopies.Newest, dirtyTail
}
