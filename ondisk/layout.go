package ondisk

import (
	"fmt"
	"io"
)

// Layout is everything about a cache that stands outside the log.
type Layout struct {
	Superblock Superblock

	Info       Info
	InfoCopies Copies

	KeyTail         Position
	KeyTailCopies   Copies
	DirtyTail       Position
	DirtyTailCopies Copies

	Identity       *Identity // nil: not bound to a backing device
	IdentityCopies Copies

	SyncMark       uint64 // number of the last kset known to be durable, 0 for none
	SyncMarkCopies Copies

	Fingerprint       Fingerprint // of the backing device
	FingerprintCopies Copies

	// Indexed by cache_seg_id, which is a segment's rank in the chain.
	Chain []uint32  // its physical index
	Gens  []uint64  // its generation
	GenAt []Replica // where the newest copy of that stands

	// Notes lists the copies that were found damaged while the other one
	// was good. They heal when they are next written.
	Notes []Note
}

// Note is a damaged copy of a record that is otherwise fine.
type Note struct {
	What  string // the record
	Seg   uint32 // cache_seg_id, for a generation or segment_info
	Slot  uint8
	State CopyState
	Alone bool // the other copy is no better, and the record is taken for none
}

func (n Note) String() string {
	what, then := n.What, "the other one is used"
	if n.What == recordGeneration || n.What == recordSegmentInfo {
		what = fmt.Sprintf("%s of segment %d", n.What, n.Seg)
	}
	if n.Alone {
		then = "and so is the other one, so there is none"
	}
	return fmt.Sprintf("%s: copy %d is damaged (%v), %s", what, n.Slot, n.State, then)
}

const (
	recordInfo        = "cache_info"
	recordIdentity    = "identity record"
	recordGeneration  = "generation"
	recordSegmentInfo = "segment_info"
	recordSyncMark    = "sync mark"
	recordFingerprint = "fingerprint"
)

// Offset returns the device offset in bytes of a place in the data area of a
// segment given by its cache_seg_id.
func (l *Layout) Offset(seg, off uint32) int64 {
	return segmentOff(l.Chain[seg]) + SegmentHeader + int64(off)
}

// EncodeGeneration writes the copy at of the generation of segment seg (a
// cache_seg_id) into dst, GenerationSize bytes.
func (l *Layout) EncodeGeneration(dst []byte, seg uint32, at Replica, gen uint64) (off int64) {
	return encodeGeneration(dst, l.Chain[seg], at, gen)
}

// ReadLayout reads the metadata of a device of size bytes. An error is of
// type Faults and names everything that is wrong; the layout then holds what
// could be read in spite of it, for display only.
func ReadLayout(r io.ReaderAt, size int64) (*Layout, error) {
	l := &Layout{}
	var faults Faults
	check := func(err error) bool {
		if many, ok := err.(Faults); ok {
			faults = append(faults, many...)
		} else if err != nil {
			faults = append(faults, err)
		}
		return err == nil
	}
	if check(l.readSuperblock(r, size)) {
		check(l.readIdentity(r))
		l.readSyncMark(r)
		l.readFingerprint(r)
		if check(l.readInfo(r)) && check(l.readChain(r)) {
			check(l.readGenerations(r))
		}
		check(l.readTail(r, KeyTail))
		check(l.readTail(r, DirtyTail))
	}
	if faults != nil {
		return l, faults
	}
	return l, nil
}

func (l *Layout) readSuperblock(r io.ReaderAt, size int64) error {
	if SegmentsIn(size) == 0 {
		return fmt.Errorf("%w: this one has %d bytes", ErrTooSmall, size)
	}
	var buf [SuperblockSize]byte
	if err := readFull(r, buf[:], SuperblockOff); err != nil {
		return fmt.Errorf("superblock %w: %w", ErrUnreadable, err)
	}
	var err error
	l.Superblock, err = DecodeSuperblock(buf[:], size)
	return err
}

// readIdentity takes a record of which one copy was never written and the
// other is torn for one whose first writing was cut off, since writers always
// write both; and bytes without the record's magic for somebody else's.
func (l *Layout) readIdentity(r io.ReaderAt) error {
	var buf [IdentitySize]byte
	c := readCopies(r, IdentityOff, identityDistance, buf[:])
	if c.Valid() {
		if le.Uint64(buf[8:]) != identityMagic {
			return nil
		}
		l.IdentityCopies = c
		l.Identity = decodeIdentity(buf[:])
		l.note(c, recordIdentity, 0)
		if l.Identity.BackingSize <= 0 {
			return ErrIdentityFields
		}
		return nil
	}
	l.IdentityCopies = c
	if c.State[0] == CopyEmpty || c.State[1] == CopyEmpty {
		return nil
	}
	for slot := range int64(2) {
		var magic [8]byte
		err := readFull(r, magic[:], IdentityOff+slot*identityDistance+headerSize)
		if err != nil || le.Uint64(magic[:]) == identityMagic {
			return ErrIdentity
		}
	}
	return nil
}

// readSyncMark takes a lost mark for none: that only makes more of what is
// found count as damage.
func (l *Layout) readSyncMark(r io.ReaderAt) {
	var buf [SyncMarkSize]byte
	l.SyncMarkCopies = readCopies(r, syncMarkOff, identityDistance, buf[:])
	if l.SyncMarkCopies.Valid() {
		l.SyncMark = decodeSyncMark(buf[:])
	}
	l.noteOurs(r, l.SyncMarkCopies, recordSyncMark, syncMarkOff, syncMarkMagic)
}

// readFingerprint takes a lost one for unknown, as if there had never been one.
func (l *Layout) readFingerprint(r io.ReaderAt) {
	var buf [FingerprintSize]byte
	l.FingerprintCopies = readCopies(r, fingerprintOff, identityDistance, buf[:])
	if l.FingerprintCopies.Valid() {
		l.Fingerprint = decodeFingerprint(buf[:])
	}
	l.noteOurs(r, l.FingerprintCopies, recordFingerprint, fingerprintOff, fingerprintMagic)
}

// noteOurs is note for a record in the first 4 KiB, where a cache may do
// without it and somebody else may have left something. A copy is ours if its
// magic says so, or cannot be read.
func (l *Layout) noteOurs(r io.ReaderAt, c Copies, what string, off int64, magic uint64) {
	for slot, state := range c.State {
		if !state.damaged() {
			continue
		}
		var buf [8]byte
		err := readFull(r, buf[:], off+int64(slot)*identityDistance+headerSize)
		if c.Valid() || err != nil || le.Uint64(buf[:]) == magic {
			l.Notes = append(l.Notes, Note{What: what, Slot: uint8(slot), State: state, Alone: !c.Valid()})
		}
	}
}

func (l *Layout) readInfo(r io.ReaderAt) error {
	var buf [InfoSize]byte
	l.InfoCopies = readCopies(r, InfoOff, infoDistance, buf[:])
	if !l.InfoCopies.Valid() {
		return lost(recordInfo, l.InfoCopies)
	}
	l.note(l.InfoCopies, recordInfo, 0)
	l.Info = decodeInfo(buf[:])
	return l.Info.validate(l.Superblock)
}

// readChain follows the segments. A chain that closes a circle never ends, so
// counting hops is enough to find one, and one that ends visits no segment
// twice.
func (l *Layout) readChain(r io.ReaderAt) error {
	phys := l.Info.FirstSegment
	for id := range l.Info.Segments {
		var buf [SegmentInfoSize]byte
		c := readCopies(r, segmentOff(phys), infoDistance, buf[:])
		if !c.Valid() {
			broken := fmt.Errorf("%w after %d of %d, at physical segment %d: %w", ErrChain, id, l.Info.Segments, phys, lost(recordSegmentInfo, c))
			return append(Faults{broken}, l.lostLinks(r, phys)...)
		}
		l.note(c, recordSegmentInfo, id)
		l.Chain = append(l.Chain, phys)

		info := decodeSegmentInfo(buf[:])
		switch more := id+1 < l.Info.Segments; {
		case info.Type != segmentCacheData:
			return fmt.Errorf("%w: segment %d is of the unknown type %d", ErrChain, phys, info.Type)
		case info.HasNext != more:
			return fmt.Errorf("%w: it should end after %d segments, at number %d it does not", ErrChain, l.Info.Segments, id+1)
		case more && info.Next >= l.Superblock.Segments:
			return fmt.Errorf("%w: segment %d leads to %d of %d", ErrChain, phys, info.Next, l.Superblock.Segments)
		}
		phys = info.Next
	}
	return nil
}

// lostLinks names the segments that nothing leads on from, beyond those of the
// chain and the one at which it broke.
func (l *Layout) lostLinks(r io.ReaderAt, broken uint32) (faults Faults) {
	whole := make([]bool, l.Superblock.Segments)
	whole[broken] = true
	for _, phys := range l.Chain {
		whole[phys] = true
	}
	for phys := range l.Info.Segments {
		var buf [SegmentInfoSize]byte
		if whole[phys] || len(faults) == maxProblems {
			continue
		}
		if c := readCopies(r, segmentOff(phys), infoDistance, buf[:]); !c.Valid() {
			faults = append(faults, fmt.Errorf("%w at physical segment %d: %w", ErrChain, phys, lost(recordSegmentInfo, c)))
		}
	}
	return faults
}

// readGenerations loads the generation of each segment. Every segment has
// one from the format on (the kernel writes 0 explicitly), so a missing one
// is damage, and taking it for 0 would bring dead keys back to life. So would
// counting on from the last number there is, hence maxGeneration.
func (l *Layout) readGenerations(r io.ReaderAt) error {
	l.Gens = make([]uint64, len(l.Chain))
	l.GenAt = make([]Replica, len(l.Chain))
	var faults Faults
	for id, phys := range l.Chain {
		var buf [GenerationSize]byte
		c := readCopies(r, segmentOff(phys)+genOff, GenerationSize, buf[:])
		if !c.Valid() {
			faults = append(faults, fmt.Errorf("segment %d: %w: %w", id, ErrGeneration, lost(recordGeneration, c)))
			continue
		}
		l.note(c, recordGeneration, uint32(id))
		l.Gens[id], l.GenAt[id] = decodeGeneration(buf[:]), c.Newest
		if l.Gens[id] > maxGeneration {
			faults = append(faults, fmt.Errorf("%w: segment %d is said to be at %d", ErrGenerationValue, id, l.Gens[id]))
		}
	}
	if faults != nil {
		return faults
	}
	return nil
}

func (l *Layout) readTail(r io.ReaderAt, t Tail) error {
	pos, copies := &l.KeyTail, &l.KeyTailCopies
	if t == DirtyTail {
		pos, copies = &l.DirtyTail, &l.DirtyTailCopies
	}
	var buf [PositionSize]byte
	*copies = readCopies(r, t.offset(), PositionSize, buf[:])
	if !copies.Valid() {
		return lost(t.String(), *copies)
	}
	l.note(*copies, t.String(), 0)
	*pos = decodePosition(buf[:])
	segments := l.Superblock.Segments
	if l.Info.Segments > 0 {
		segments = l.Info.Segments
	}
	if err := pos.validate(segments); err != nil {
		return fmt.Errorf("%v: %w", t, err)
	}
	return nil
}

// note records a damaged copy; an empty one is how the kernel leaves copies
// it had no reason to write.
func (l *Layout) note(c Copies, what string, seg uint32) {
	for slot, state := range c.State {
		if state.damaged() {
			l.Notes = append(l.Notes, Note{What: what, Seg: seg, Slot: uint8(slot), State: state})
		}
	}
}

func lost(what string, c Copies) error {
	return fmt.Errorf("%s: %w (%v, %v)", what, ErrLost, c.State[0], c.State[1])
}
