// Package ondisk is the media format of a cache: it encodes, decodes and
// validates every structure, finds its way through a whole image, and knows
// nothing of what is done with it. The format is that of the Linux kernel's
// dm-pcache target, so a cache written here opens there and the other way
// round.
//
//	0        ┌──────────────────────────────┐
//	         │ identity × 2 (ours alone)    │  which backing device belongs to it,
//	         │                              │  and beside it what else the kernel lacks
//	4 KiB    ├──────────────────────────────┤
//	         │ superblock                   │  magic, number of segments
//	8 KiB    ├──────────────────────────────┤
//	         │ cache_info × 2               │  head of the segment chain, options
//	16 KiB   ├──────────────────────────────┤
//	         │ key_tail × 2, dirty_tail × 2 │  where the log begins, and its dirty part
//	20 KiB   ├──────────────────────────────┤
//	         │ segment 0                    │  16 MiB each:
//	         ├──────────────────────────────┤    +0      segment_info × 2
//	         │ segment 1                    │    +8 KiB  generation × 2
//	         ├──────────────────────────────┤    +12 KiB data: ksets or cached bytes
//	         │ …                            │
//	         └──────────────────────────────┘
//
// A structure that changes in place exists twice ("× 2"), each copy with a
// checksum and a sequence number; see replica.go for the one rule about them.
// Everything else only ever grows: ksets are appended to the log and cached
// data to data segments.
//
// An image is untrusted input. Every id, offset, length and count is checked
// before it is used, chains and logs that do not end are refused, and no
// content makes this package panic, loop or read outside the device. Readers
// take an [io.ReaderAt] that may fail for a few bytes only (poisoned memory):
// the failure of one copy never hides the other.
//
// Integers are little-endian on the media. Functions are safe for concurrent
// use as far as their arguments are.
package ondisk

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
)

// The fixed places of the format, in bytes from the start of the device.
const (
	IdentityOff   = 0        // two identity records, half a page apart
	SuperblockOff = 4 << 10  // one superblock
	InfoOff       = 8 << 10  // two cache_info, a page each
	CtrlOff       = 16 << 10 // the four positions
	SegmentsOff   = 20 << 10 // segment 0
)

const (
	// SegmentSize is the distance in bytes from one segment to the next.
	SegmentSize = 16 << 20
	// SegmentHeader is the size of a segment's own metadata in bytes.
	SegmentHeader = 12 << 10
	// SegmentData is the size of a segment's data area in bytes. Every
	// offset inside a segment, here and on the media, counts from its start.
	SegmentData = SegmentSize - SegmentHeader

	// MinSize is the smallest device in bytes that the kernel takes.
	MinSize = 512 << 20
	// MaxSegments is the largest number of segments that the kernel takes:
	// 16 TiB of cache.
	MaxSegments = 1 << 20

	// SectorSize is the granularity of cached data in bytes.
	SectorSize = 512
	// StripeSize bounds a key: none crosses a multiple of it on the cached
	// device, because the kernel keeps one index tree for each.
	StripeSize = 4 << 20
)

const (
	genOff       = 8 << 10 // of the two generations, in a segment
	infoDistance = 4 << 10 // between the copies of cache_info and segment_info
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeros      [4 << 10]byte
)

// crcStart is in the register when the kernel begins a checksum of this
// format. The kernel inverts the register neither then nor at the end.
// hash/crc32 does both, so Checksum undoes both.
const crcStart = 0x3B15A

// Checksum returns the crc32c of p as the format uses it, for metadata and
// for cached data alike.
func Checksum(p []byte) uint32 {
	return ^crc32.Update(^uint32(crcStart), castagnoli, p)
}

// readFull is ReadAt without io.EOF for a read that ends with the device.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return err
}

// readAround fills p with what can be read, piece by piece, and with zeros
// elsewhere. least is the smallest piece in bytes that is tried by itself.
func readAround(r io.ReaderAt, p []byte, off int64, least int) {
	for _, unit := range []int{4 << 10, 8} {
		if len(p) <= unit || unit < least {
			continue
		}
		for i := 0; i < len(p); i += unit {
			part := p[i:min(i+unit, len(p))]
			if readFull(r, part, off+int64(i)) != nil {
				readAround(r, part, off+int64(i), least)
			}
		}
		return
	}
	if readFull(r, p, off) != nil {
		clear(p)
	}
}

func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// SegmentsIn returns how many segments a device of size bytes holds, at most
// MaxSegments, and 0 for a device below MinSize.
func SegmentsIn(size int64) uint32 {
	if size < MinSize {
		return 0
	}
	return uint32(min((size-SegmentsOff)/SegmentSize, MaxSegments))
}

// segmentOff returns the place of a segment given by its physical index.
func segmentOff(phys uint32) int64 {
	return SegmentsOff + int64(phys)*SegmentSize
}
