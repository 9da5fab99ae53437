package engine

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"ublk-pcache/ondisk"
)

// Data is verified whenever it is used: before a read is answered with it, and
// before it is written back. It can be compared with the checksum of a whole
// key, and an extent may be less than a key, or more. So the index does not
// keep checksums; each segment keeps those of the pieces that were stored in
// it, in the order in which they lie there, which is the order in which its one
// writer filled it. Eight bytes a piece.
//
// To use a part of a piece is to read all of it. That bounds the length of the
// pieces we store: see maxSummed. The kernel makes longer ones.

// maxSummed is the longest piece of data that gets a checksum of its own, in
// bytes: what a small read has to read and check at most, some ten
// microseconds. Shorter ones would be paid for with keys, 40 bytes each.
const maxSummed = 64 << 10

// sum is the checksum of one piece.
type sum struct {
	pos, n uint16 // sectors
	crc    uint32
}

func (s sum) end() uint16 { return s.pos + s.n }

const (
	segmentSectors = ondisk.SegmentData >> sectorShift
	// sumChunk is how many are allocated at a time: 4 KiB.
	sumChunk = 512
)

// sums are the checksums of a segment's data. Its writer adds to them; readers
// find what was added before the extent that led them there.
type sums struct {
	n      atomic.Int32
	chunks [(segmentSectors + sumChunk - 1) / sumChunk]atomic.Pointer[[sumChunk]sum]
}

func (t *sums) at(i int) *sum { return &t.chunks[i/sumChunk].Load()[i%sumChunk] }

func (t *sums) add(s sum) {
	i := int(t.n.Load())
	if i%sumChunk == 0 && t.chunks[i/sumChunk].Load() == nil {
		t.chunks[i/sumChunk].Store(new([sumChunk]sum))
	}
	*t.at(i) = s
	t.n.Store(int32(i + 1))
}

// clear makes room for the pieces of the segment's next life.
func (t *sums) clear() { t.n.Store(0) }

// find returns the piece that holds the sector at pos.
func (t *sums) find(pos uint16) (sum, bool) {
	lo, hi := 0, int(t.n.Load())
	for lo < hi {
		m := int(uint(lo+hi) >> 1)
		if t.at(m).pos <= pos {
			lo = m + 1
		} else {
			hi = m
		}
	}
	if lo == 0 {
		return sum{}, false
	}
	s := *t.at(lo - 1)
	return s, pos < s.end()
}

// bytes returns the memory that the checksums take. Any goroutine.
func (t *sums) bytes() int64 {
	n := int64(unsafe.Sizeof(*t))
	for i := range t.chunks {
		if t.chunks[i].Load() != nil {
			n += int64(unsafe.Sizeof([sumChunk]sum{}))
		}
	}
	return n
}

// sumsOf returns the checksums of a segment that has data or is to take some.
func (c *Cache) sumsOf(seg uint32) *sums {
	s := &c.segments.all[seg]
	t := s.sums.Load()
	if t == nil {
		t = new(sums)
		s.sums.Store(t)
	}
	return t
}

// readExtent reads the data of an extent, which the caller has pinned, and
// verifies it where the cache keeps checksums. scratch is for pieces of which
// the extent is only a part.
func (c *Cache) readExtent(p []byte, e extent, scratch *[]byte) error {
	base := func(pos uint16) int64 { return c.layout.Offset(e.seg, uint32(pos)<<sectorShift) }
	if !c.crc {
		_, err := c.mem.ReadAt(p, base(e.pos))
		return err
	}
	for pos, end := e.pos, e.pos+e.n; pos < end; {
		s, ok := c.segments.all[e.seg].sums.Load().find(pos)
		if !ok {
			return fmt.Errorf("%w: no checksum of segment %d, sector %d", ErrDamaged, e.seg, pos)
		}
		upto := min(end, s.end())
		part := p[int(pos-e.pos)<<sectorShift : int(upto-e.pos)<<sectorShift]
		whole := part
		if pos != s.pos || upto != s.end() {
			whole = grow(scratch, int(s.n)<<sectorShift)
		}
		if _, err := c.mem.ReadAt(whole, base(s.pos)); err != nil {
			return err
		}
		if ondisk.Checksum(whole) != s.crc {
			return fmt.Errorf("%w: %d bytes in segment %d, sector %d", ErrDamaged, len(whole), e.seg, s.pos)
		}
		if len(part) != len(whole) {
			copy(part, whole[int(pos-s.pos)<<sectorShift:])
		}
		pos = upto
	}
	return nil
}

// grow returns n bytes of a buffer that is kept for the next time.
func grow(buf *[]byte, n int) []byte {
	if cap(*buf) < n {
		*buf = make([]byte, max(n, maxSummed))
	}
	return (*buf)[:n]
}

// named is the checksum of a key that replay has found.
type named struct {
	sum
	at uint64 // where the device would be if the segment's data began there, bytes
}

// enter adds what replay has found, in any order. A place is named by one key,
// or again by keys for parts of it and of what the one covers (relog.go), of
// which some may be gone from the log: the longest counts. Nobody writes keys
// that overlap otherwise, so they are refused, whichever comes first, or a
// cache might open and, with some of its keys logged again, not a second time.
func (t *sums) enter(list []named) error {
	slices.SortFunc(list, func(a, b named) int {
		return cmp.Or(cmp.Compare(a.pos, b.pos), cmp.Compare(b.n, a.n))
	})
	var outer named
	for _, s := range list {
		switch {
		case s.pos >= outer.end():
			t.add(s.sum)
			outer = s
		case s.end() > outer.end() || s.at != outer.at:
			return fmt.Errorf("%w: %d bytes at %d", ErrKeyOverlap, int(s.n)<<sectorShift, int(s.pos)<<sectorShift)
		}
	}
	return nil
}
