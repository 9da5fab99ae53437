package ondisk

import (
	"fmt"
	"math/rand/v2"
)

// The log is a sequence of key-sets: a header and up to MaxKeys keys that
// became part of the cache together. A kset never crosses a segment; room for
// one more header is always left, for the LAST record that says in which
// segment the log goes on.
//
//	kset:  crc u32 │ key_num u32 │ magic u64 │ flags u64 │ keys …
//	LAST:  crc u32 │ next    u32 │ magic u64 │ flags u64
//
// # The log sequence number
//
// The kernel's log has no numbering. Its end is where no valid kset is
// found. Two questions stay open. Is a valid kset a successor, or a
// leftover of an earlier use of the segment? Is an invalid one the torn end
// of the log, or a damaged one in its middle, with good ones behind it?
//
// Bits 16 to 63 of the flags carry a number that answers both. The kernel
// looks at bit 0 alone and checks the crc, which covers the flags, so it
// reads such a log as its own. Its own ksets have number 0, which stands for
// "none". The rule: of two successive numbers that are not 0, the second is
// [NextSeq] of the first. A log begins at a number from [FirstSeq], random,
// so that leftovers of a cache formatted over do not fit either.
//
// A writer must fence between two ksets. Without it a power cut may keep the
// second and lose the first, which no reader can tell from damage. A LAST is
// the exception: it may be stored before the kset in front of it, in place of
// the end mark, since alone it proves nothing.

const (
	KsetHeaderSize = 24  // bytes; a LAST is no larger
	KeySize        = 40  // bytes
	MaxKeys        = 128 // in a kset
	MaxKsetSize    = KsetHeaderSize + MaxKeys*KeySize

	ksetMagic = 0x676894A64E164F1A
	ksetLast  = 1 << 0 // of the flags

	seqShift = 16
	seqMask  = 1<<48 - 1
)

// FirstSeq returns a number for the first kset of a log.
func FirstSeq() uint64 { return rand.Uint64N(seqMask) + 1 }

// NextSeq returns the number that follows seq, which is not 0.
func NextSeq(seq uint64) uint64 {
	if seq == seqMask {
		return 1
	}
	return seq + 1
}

// PrevSeq returns the number that seq, which is not 0, follows.
func PrevSeq(seq uint64) uint64 {
	if seq == 1 {
		return seqMask
	}
	return seq - 1
}

// seqDistance returns how many steps of NextSeq lead from a to b, both not 0.
func seqDistance(a, b uint64) uint64 {
	if b >= a {
		return b - a
	}
	return b + seqMask - a
}

// KeyFlags are the flags of a key.
type KeyFlags uint32

const (
	// KeyEmpty marks a placeholder in the kernel's index. It has no data and
	// is never part of a log.
	KeyEmpty KeyFlags = 1 << 0
	// KeyClean marks data that the backing device holds as well.
	KeyClean KeyFlags = 1 << 1
	// KeyZero marks data that is all zeros. Many keys with it may name the
	// same place. The bit is this project's own: the kernel does not look at
	// it (drivers/md/dm-pcache/cache_key.c of 7.3), and finds zeros.
	KeyZero KeyFlags = 1 << 2
	// KeyBad marks data that was damaged already when the key was logged. The
	// kernel does not look at this bit either, and finds the wrong checksum.
	KeyBad KeyFlags = 1 << 3
)

// Key says where a piece of the cached device lies in the cache.
type Key struct {
	Off    uint64 // bytes on the cached device, a multiple of SectorSize
	Gen    uint64 // generation of the segment when the key was made
	Len    uint32 // bytes, a multiple of SectorSize, never 0
	Flags  KeyFlags
	Seg    uint32 // cache_seg_id of the data
	SegOff uint32 // bytes into its data area
	CRC    uint32 // Checksum of the data if the cache keeps them, else 0
}

// Validate checks k for a cache of segments segments. It does not know the
// size of the backing device, which the caller has to check.
func (k *Key) Validate(segments uint32) error {
	end := k.Off + uint64(k.Len)
	switch {
	case k.Flags&KeyEmpty != 0:
		return fmt.Errorf("%w: marked empty", ErrKey)
	case k.Len == 0 || k.Off%SectorSize != 0 || k.Len%SectorSize != 0:
		return fmt.Errorf("%w: offset %d, length %d", ErrKey, k.Off, k.Len)
	case end < k.Off || end > 1<<63-1 || k.Off/StripeSize != (end-1)/StripeSize:
		return fmt.Errorf("%w: offset %d, length %d cross a multiple of 4 MiB", ErrKey, k.Off, k.Len)
	case k.SegOff%SectorSize != 0:
		return fmt.Errorf("%w: data at %d:%d, not on a sector", ErrKey, k.Seg, k.SegOff)
	case k.Seg >= segments:
		return fmt.Errorf("%w: segment %d of %d", ErrKey, k.Seg, segments)
	case uint64(k.SegOff)+uint64(k.Len) > SegmentData:
		return fmt.Errorf("%w: data at %d:%d, length %d leave the segment", ErrKey, k.Seg, k.SegOff, k.Len)
	}
	return nil
}

// Kset is a decoded key-set, or a LAST record.
type Kset struct {
	Seq  uint64 // log sequence number, 0 for none
	Last bool   // no keys: the log goes on at offset 0 of Next
	Next uint32 // cache_seg_id, meaningful with Last
	Keys []Key
}

// Size returns the bytes k takes in the log.
func (k *Kset) Size() uint32 { return KsetSize(len(k.Keys)) }

// KsetSize returns the bytes that a kset of n keys takes in the log.
func KsetSize(n int) uint32 { return KsetHeaderSize + KeySize*uint32(n) }

// after returns where the kset behind k belongs.
func (k *Kset) after(at Position) Position {
	if k.Last {
		return Position{Seg: k.Next}
	}
	return Position{Seg: at.Seg, Off: at.Off + k.Size()}
}

// EncodeKset writes a kset of 1 to MaxKeys keys into the front of dst, which
// has room for KsetSize(len(keys)), and returns that part of it. seq is its
// log sequence number.
func EncodeKset(dst []byte, seq uint64, keys []Key) []byte {
	dst = dst[:KsetSize(len(keys))]
	encodeKsetHeader(dst, uint32(len(keys)), seq<<seqShift)
	for i := range keys {
		k, p := &keys[i], dst[KsetHeaderSize+i*KeySize:][:KeySize]
		le.PutUint64(p[0:], k.Off)
		le.PutUint32(p[8:], k.Len)
		le.PutUint32(p[12:], uint32(k.Flags))
		le.PutUint32(p[16:], k.Seg)
		le.PutUint32(p[20:], k.SegOff)
		le.PutUint64(p[24:], k.Gen)
		le.PutUint32(p[32:], k.CRC)
		le.PutUint32(p[36:], 0)
	}
	le.PutUint32(dst, Checksum(dst[4:]))
	return dst
}

// EncodeLast writes the LAST record that leads to segment next (a
// cache_seg_id) into the front of dst and returns those KsetHeaderSize bytes.
// It takes a log sequence number like any kset.
func EncodeLast(dst []byte, seq uint64, next uint32) []byte {
	dst = dst[:KsetHeaderSize]
	encodeKsetHeader(dst, next, seq<<seqShift|ksetLast)
	le.PutUint32(dst, Checksum(dst[4:]))
	return dst
}

func encodeKsetHeader(dst []byte, second uint32, flags uint64) {
	le.PutUint32(dst[4:], second)
	le.PutUint64(dst[8:], ksetMagic)
	le.PutUint64(dst[16:], flags)
}

// ksetLen returns the length in bytes that the header p claims for its
// kset. It verifies only that this can be true.
func ksetLen(p []byte) (uint32, error) {
	switch n := le.Uint32(p[4:]); {
	case le.Uint64(p[8:]) != ksetMagic:
		return 0, errNoKset
	case le.Uint64(p[16:])&ksetLast != 0:
		return KsetHeaderSize, nil
	case n > MaxKeys:
		return 0, errKsetKeys
	default:
		return KsetSize(int(n)), nil
	}
}

// DecodeKset reads the kset at the front of p into k, reusing k.Keys, and
// reports whether it is whole. Keys are not validated.
func DecodeKset(p []byte, k *Kset) error {
	if len(p) < KsetHeaderSize {
		return errKsetShort
	}
	size, err := ksetLen(p)
	if err != nil {
		return err
	}
	if int(size) > len(p) {
		return errKsetShort
	}
	p = p[:size]
	if le.Uint32(p) != Checksum(p[4:]) {
		return errKsetCRC
	}
	flags := le.Uint64(p[16:])
	*k = Kset{Seq: flags >> seqShift, Keys: k.Keys[:0]}
	if flags&ksetLast != 0 {
		k.Last, k.Next = true, le.Uint32(p[4:])
		return nil
	}
	for p = p[KsetHeaderSize:]; len(p) > 0; p = p[KeySize:] {
		k.Keys = append(k.Keys, decodeKey(p))
	}
	return nil
}

func decodeKey(p []byte) Key {
	return Key{
		Off:    le.Uint64(p[0:]),
		Len:    le.Uint32(p[8:]),
		Flags:  KeyFlags(le.Uint32(p[12:])),
		Seg:    le.Uint32(p[16:]),
		SegOff: le.Uint32(p[20:]),
		Gen:    le.Uint64(p[24:]),
		CRC:    le.Uint32(p[32:]),
	}
}
