package ondisk

import (
	"fmt"
	"io"
)

// Medium is a device that a cache is written to. WriteAt and Zero are
// complete when they return, and Fence orders them; Sync makes all of it
// durable.
type Medium interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	Zero(off, n int64) error
	Fence()
	Sync() error
}

// FormatOptions are the choices for a new cache.
type FormatOptions struct {
	DataCRC   bool      // keep a checksum of the data in each key
	GCPercent int       // 0 to MaxGCPercent, see DefaultGCPercent
	Identity  *Identity // of the backing device, nil if not known yet
}

// Blank asks for zeros in the first blankFront bytes of the device, and in
// the first blankSegment bytes of each segment's data area.
const (
	blankFront   = 1 << 20
	blankSegment = 4 << 10
)

// Blank reports whether a device of size bytes shows no trace of a cache,
// or of most other things: its first MiB is zero, and so are the header and
// the first 4 KiB of data of every segment.
func Blank(r io.ReaderAt, size int64) (bool, error) {
	buf := make([]byte, SegmentHeader+blankSegment)
	zero := func(off, n int64) (bool, error) {
		for end := min(off+n, size); off < end; off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), end-off)]
			if err := readFull(r, p, off); err != nil {
				return false, fmt.Errorf("bytes from %d on %w: %w", off, ErrUnreadable, err)
			}
			if !isZero(p) {
				return false, nil
			}
		}
		return true, nil
	}
	if ok, err := zero(0, blankFront); !ok {
		return false, err
	}
	for phys := range SegmentsIn(size) {
		if ok, err := zero(segmentOff(phys), int64(len(buf))); !ok {
			return false, err
		}
	}
	return true, nil
}

// Format makes a new, empty cache of the whole medium, whatever was there
// before. It is what the kernel would write, except that both copies of each
// record are valid.
//
// The order makes an interruption harmless. The superblock is erased first:
// from then on nobody can open the device as a cache. Its magic number is
// written last, when all else is durable.
//
// Leftovers of an earlier cache stay in the segments, since clearing the
// whole device takes long. Three things keep them dead. The first header of
// every segment is zeroed, so the log does not begin with them. A log
// sequence number that is drawn anew does not continue an old one (see
// FirstSeq). And generations begin above all that the old cache had: an old
// key, even if it were reached, names a generation that is past. A device
// without a valid generation on it starts at 0, like the kernel.
func Format(m Medium, o FormatOptions) error {
	segments := SegmentsIn(m.Size())
	switch {
	case segments == 0:
		return fmt.Errorf("%w: this one has %d bytes", ErrTooSmall, m.Size())
	case o.GCPercent < 0 || o.GCPercent > MaxGCPercent:
		return fmt.Errorf("%w, not %d", ErrGCPercent, o.GCPercent)
	}
	f := formatter{Medium: m}
	gen := firstGeneration(m, segments)

	f.zero(SuperblockOff, SuperblockSize)
	f.sync()

	f.zero(IdentityOff, SuperblockOff-IdentityOff)
	if o.Identity != nil {
		f.check(WriteIdentity(m, Replica{}, o.Identity))
	}
	var buf [InfoSize]byte
	info := Info{Segments: segments, Flags: NewInfoFlags(o.DataCRC, o.GCPercent)}
	for _, at := range bothCopies {
		f.write(buf[:InfoSize], EncodeInfo(buf[:], at, info))
	}
	// The kernel writes its first position to slot 0, everything else to 1.
	for _, at := range bothCopies {
		at.Slot ^= 1
		f.write(buf[:PositionSize], EncodePosition(buf[:], KeyTail, at, Position{}))
		f.write(buf[:PositionSize], EncodePosition(buf[:], DirtyTail, at, Position{}))
	}
	for phys := range segments {
		f.segment(phys, segments, gen)
	}
	var super [SuperblockSize]byte
	EncodeSuperblock(super[:], Superblock{Segments: segments})
	f.write(super[:8], SuperblockOff)
	f.write(super[16:], SuperblockOff+16)
	f.sync()
	f.write(super[8:16], SuperblockOff+8)
	f.sync()
	return f.err
}

// bothCopies are the two copies of a new record, the older one first.
var bothCopies = [2]Replica{{Slot: 0, Seq: 0}, {Slot: 1, Seq: 1}}

// firstGeneration returns a generation that no key on the device has reached.
// It leaves out generations that are higher than any cache gets.
func firstGeneration(r io.ReaderAt, segments uint32) (gen uint64) {
	for phys := range segments {
		var buf [GenerationSize]byte
		if readCopies(r, segmentOff(phys)+genOff, GenerationSize, buf[:]).Valid() {
			if old := decodeGeneration(buf[:]); old < maxGeneration {
				gen = max(gen, old+1)
			}
		}
	}
	return gen
}

// WriteIdentity binds a cache to its backing device: it writes both copies of
// the record, the older one first, and makes each durable before the next.
// newest is Layout.IdentityCopies.Newest.
func WriteIdentity(m Medium, newest Replica, id *Identity) error {
	f := formatter{Medium: m}
	var buf [IdentitySize]byte
	for range 2 {
		newest = newest.Next()
		f.write(buf[:], EncodeIdentity(buf[:], newest, id))
		f.sync()
	}
	return f.err
}

// formatter writes until the first error, which it keeps.
type formatter struct {
	Medium
	err error
}

func (f *formatter) check(err error) {
	if f.err == nil {
		f.err = err
	}
}

func (f *formatter) write(p []byte, off int64) {
	if f.err == nil {
		_, err := f.WriteAt(p, off)
		f.check(err)
	}
}

func (f *formatter) zero(off, n int64) {
	if f.err == nil {
		f.check(f.Zero(off, n))
	}
}

func (f *formatter) sync() {
	if f.err == nil {
		f.Fence()
		f.check(f.Sync())
	}
}

// segment writes the records at the beginning of segment phys of a new
// cache, and zeros where its first kset would be.
func (f *formatter) segment(phys, segments uint32, gen uint64) {
	var buf [SegmentInfoSize]byte
	info := SegmentInfo{Type: segmentCacheData}
	at := Replica{Slot: 1, Seq: 1}
	if phys+1 < segments {
		// The kernel makes the segment first and links it then: one version
		// more.
		info.HasNext, info.Next = true, phys+1
		at = at.Next()
	}
	older := Replica{Slot: at.Slot ^ 1, Seq: at.Seq - 1}
	for _, at := range [2]Replica{older, at} {
		f.write(buf[:], encodeSegmentInfo(buf[:], phys, at, info))
	}
	for _, at := range bothCopies {
		f.write(buf[:], encodeGeneration(buf[:], phys, at, gen))
	}
	f.zero(segmentOff(phys)+SegmentHeader, KsetHeaderSize)
}
