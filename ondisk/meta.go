package ondisk

import "fmt"

// The fixed-size records. Encoders write into the caller's buffer and
// allocate nothing; those of replicated records also return the device
// offset, in bytes, where the copy belongs.

const (
	// Magic marks a formatted device, in the superblock.
	Magic = 0x65B05EFA96C596EF

	SuperblockSize  = 24 // bytes
	InfoSize        = 24 // bytes
	PositionSize    = 16 // bytes
	SegmentInfoSize = 16 // bytes
	GenerationSize  = 16 // bytes
)

// Superblock is the one structure that exists once and never changes.
type Superblock struct {
	Segments uint32 // number of segments, at least 1
}

// EncodeSuperblock writes s into dst, SuperblockSize bytes.
func EncodeSuperblock(dst []byte, s Superblock) {
	dst = dst[:SuperblockSize]
	clear(dst)
	le.PutUint64(dst[8:], Magic)
	le.PutUint32(dst[16:], s.Segments)
	le.PutUint32(dst, Checksum(dst[4:]))
}

// DecodeSuperblock reads a superblock for a device of size bytes. The error
// says why the device is not a usable cache: ErrNotFormatted, ErrMagic,
// ErrSuperblock, ErrBigEndian, ErrSize.
func DecodeSuperblock(p []byte, size int64) (Superblock, error) {
	p = p[:SuperblockSize]
	var s Superblock
	switch magic := le.Uint64(p[8:]); {
	case magic == 0:
		return s, ErrNotFormatted
	case magic == bigEndianMagic:
		return s, ErrBigEndian
	case magic != Magic:
		return s, fmt.Errorf("%w (%#x at byte %d)", ErrMagic, magic, SuperblockOff+8)
	case le.Uint32(p) != Checksum(p[4:]):
		return s, ErrSuperblock
	case le.Uint32(p[4:])&1 != 0:
		return s, ErrBigEndian
	}
	s.Segments = le.Uint32(p[16:])
	if held := SegmentsIn(size); s.Segments == 0 || s.Segments > held {
		return s, fmt.Errorf("%w: the superblock counts %d segments, which take %d bytes, and %d bytes hold %d", ErrSize, s.Segments, segmentOff(s.Segments), size, held)
	}
	return s, nil
}

// bigEndianMagic is Magic as a big-endian host leaves it. Such a host's flag
// bit is swapped as well, so it is recognised by the magic.
const bigEndianMagic = 0xEF96C596FA5EB065

// InfoFlags are the options of a cache as cache_info holds them.
type InfoFlags uint32

const (
	infoDataCRC   InfoFlags = 1 << 0
	infoInitDone  InfoFlags = 1 << 1
	infoModeShift           = 2
	infoModeMask  InfoFlags = 0xF << infoModeShift
	infoGCShift             = 6
	infoGCMask    InfoFlags = 0x7F << infoGCShift
)

const (
	// DefaultGCPercent is the kernel's choice for a new cache.
	DefaultGCPercent = 70
	// MaxGCPercent is the largest value the kernel takes.
	MaxGCPercent = 90
)

// NewInfoFlags returns the flags of an initialised write-back cache.
// gcPercent is 0 to MaxGCPercent.
func NewInfoFlags(dataCRC bool, gcPercent int) InfoFlags {
	f := infoInitDone
	if dataCRC {
		f |= infoDataCRC
	}
	return f.WithGCPercent(gcPercent)
}

// DataCRC reports whether keys carry the checksum of their data.
func (f InfoFlags) DataCRC() bool { return f&infoDataCRC != 0 }

// InitDone reports whether the cache was completely formatted.
func (f InfoFlags) InitDone() bool { return f&infoInitDone != 0 }

// Mode returns the cache mode; 0 is write-back, the only one in use.
func (f InfoFlags) Mode() int { return int(f & infoModeMask >> infoModeShift) }

// GCPercent returns the share of used segments, in percent, above which the
// oldest are recycled.
func (f InfoFlags) GCPercent() int { return int(f & infoGCMask >> infoGCShift) }

// WithGCPercent returns f with another gc percentage, 0 to MaxGCPercent.
func (f InfoFlags) WithGCPercent(percent int) InfoFlags {
	return f&^infoGCMask | InfoFlags(percent)<<infoGCShift&infoGCMask
}

// Info is cache_info: where the chain of segments begins, and the options.
type Info struct {
	FirstSegment uint32 // physical index
	Segments     uint32 // length of the chain
	Flags        InfoFlags
}

// EncodeInfo writes the copy at of i into dst, InfoSize bytes.
func EncodeInfo(dst []byte, at Replica, i Info) (off int64) {
	dst = dst[:InfoSize]
	le.PutUint32(dst[8:], i.FirstSegment)
	le.PutUint32(dst[12:], i.Segments)
	le.PutUint32(dst[16:], uint32(i.Flags))
	le.PutUint32(dst[20:], 0)
	seal(dst, at.Seq)
	return InfoOff + int64(at.Slot)*infoDistance
}

func decodeInfo(p []byte) Info {
	return Info{
		FirstSegment: le.Uint32(p[8:]),
		Segments:     le.Uint32(p[12:]),
		Flags:        InfoFlags(le.Uint32(p[16:])),
	}
}

func (i Info) validate(s Superblock) error {
	switch {
	case !i.Flags.InitDone():
		return ErrNotInitialised
	case i.Flags.Mode() != 0:
		return fmt.Errorf("%w (mode %d)", ErrMode, i.Flags.Mode())
	case i.Flags.GCPercent() > MaxGCPercent:
		return fmt.Errorf("%w: gc percent %d is above %d", ErrInfo, i.Flags.GCPercent(), MaxGCPercent)
	case i.Segments == 0 || i.Segments > s.Segments:
		return fmt.Errorf("%w: a chain of %d segments on a device of %d", ErrInfo, i.Segments, s.Segments)
	case i.FirstSegment >= s.Segments:
		return fmt.Errorf("%w: the chain starts at segment %d of %d", ErrInfo, i.FirstSegment, s.Segments)
	}
	return nil
}

// Position is a place in the log.
type Position struct {
	Seg uint32 // cache_seg_id
	Off uint32 // bytes into the segment's data area
}

func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Seg, p.Off) }

// validate refuses a place where no kset can begin: behind the last header
// that fits, or off the 8-byte grid on which all of them lie.
func (p Position) validate(segments uint32) error {
	if p.Seg >= segments || p.Off > SegmentData-KsetHeaderSize || p.Off%8 != 0 {
		return fmt.Errorf("%w: %v", ErrPosition, p)
	}
	return nil
}

// Tail chooses one of the two positions that the media keeps.
type Tail int

const (
	// KeyTail is where the log begins; what lies before it is free.
	KeyTail Tail = iota
	// DirtyTail is where write-back goes on; keys before it are on the
	// backing device.
	DirtyTail
)

func (t Tail) String() string { return [...]string{"key_tail", "dirty_tail"}[t] }

func (t Tail) offset() int64 { return CtrlOff + int64(t)*2*PositionSize }

// EncodePosition writes the copy at of p, as position t, into dst,
// PositionSize bytes.
func EncodePosition(dst []byte, t Tail, at Replica, p Position) (off int64) {
	dst = dst[:PositionSize]
	le.PutUint32(dst[8:], p.Seg)
	le.PutUint32(dst[12:], p.Off)
	seal(dst, at.Seq)
	return t.offset() + int64(at.Slot)*PositionSize
}

func decodePosition(p []byte) Position {
	return Position{Seg: le.Uint32(p[8:]), Off: le.Uint32(p[12:])}
}

// SegmentInfo links a segment into the chain. It is written by a format and
// never again.
type SegmentInfo struct {
	HasNext bool
	Type    uint8  // segmentCacheData
	Next    uint32 // physical index, meaningful with HasNext
}

// segmentCacheData is the only type of segment there is.
const segmentCacheData = 1

func encodeSegmentInfo(dst []byte, phys uint32, at Replica, s SegmentInfo) (off int64) {
	dst = dst[:SegmentInfoSize]
	flags := uint32(s.Type) << 1
	if s.HasNext {
		flags |= 1
	}
	le.PutUint32(dst[8:], flags)
	le.PutUint32(dst[12:], s.Next)
	seal(dst, at.Seq)
	return segmentOff(phys) + int64(at.Slot)*infoDistance
}

func decodeSegmentInfo(p []byte) SegmentInfo {
	flags := le.Uint32(p[8:])
	return SegmentInfo{HasNext: flags&1 != 0, Type: uint8(flags >> 1 & 0xF), Next: le.Uint32(p[12:])}
}

// maxGeneration is the highest generation that a segment may be found with. A
// generation goes up by one each time that 16 MiB are used again, so a cache of
// a single segment takes thousands of years to get there at any speed; a forged
// one must not be made to wrap.
const maxGeneration = 1<<63 - 1

func encodeGeneration(dst []byte, phys uint32, at Replica, gen uint64) (off int64) {
	dst = dst[:GenerationSize]
	le.PutUint64(dst[8:], gen)
	seal(dst, at.Seq)
	return segmentOff(phys) + genOff + int64(at.Slot)*GenerationSize
}

func decodeGeneration(p []byte) uint64 { return le.Uint64(p[8:]) }
