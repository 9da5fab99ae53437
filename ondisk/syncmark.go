package ondisk

// On a region that takes more than a fence to be durable, a file in the page
// cache, a power cut keeps some of the pages written since the last sync and
// loses others. The log may then have a hole with valid ksets behind it, which
// is what damage looks like, and a kset may have survived its data. Neither is
// damage if it lies behind what the last sync covered: nobody was promised
// more.
//
// The sync mark says how far that was: the log sequence number of the last
// kset that was durable when the mark was written. It is written after a sync
// and becomes durable with the next one, so it may be too low by one sync but
// never too high. It lies in the first 4 KiB, beside the identity record; a
// region on DAX has none.

const (
	syncMarkOff   = 1 << 10
	syncMarkMagic = 0x4b52414d434e5953 // "SYNCMARK" in memory order

	// SyncMarkSize is the size in bytes of an encoded sync mark: the header,
	// the magic, the number.
	SyncMarkSize = headerSize + 16
)

// EncodeSyncMark writes the copy at of the sync mark seq into dst,
// SyncMarkSize bytes.
func EncodeSyncMark(dst []byte, at Replica, seq uint64) (off int64) {
	dst = dst[:SyncMarkSize]
	clear(dst)
	le.PutUint64(dst[8:], syncMarkMagic)
	le.PutUint64(dst[16:], seq)
	seal(dst, at.Seq)
	return syncMarkOff + int64(at.Slot)*identityDistance
}

// decodeSyncMark returns 0 for a record that is not one, and for a number
// that no kset has.
func decodeSyncMark(p []byte) uint64 {
	if seq := le.Uint64(p[16:]); le.Uint64(p[8:]) == syncMarkMagic && seq <= seqMask {
		return seq
	}
	return 0
}

// SeqAfter reports whether the kset numbered a is younger than the one
// numbered b, neither of them 0, in serial arithmetic.
func SeqAfter(a, b uint64) bool {
	d := seqDistance(b, a)
	return d != 0 && d < seqMask/2
}

// markLag bounds how many ksets the sync mark may miss: ten a second for a
// dozen years, or a million for an hour.
const markLag = 1 << 32

// SeqBeyond returns the number for the next kset of a log that has no kset
// left to tell it, only its sync mark. The mark may be too low, and the
// segments still hold ksets with numbers above it. One of these a little above
// the next number would look like its successor.
func SeqBeyond(mark uint64) uint64 {
	if mark > seqMask-markLag {
		return mark + markLag - seqMask
	}
	return mark + markLag
}
