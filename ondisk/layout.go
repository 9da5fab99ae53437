package ondisk

import (
	"fmt"
	"io"
	"slices"
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

	Settings       Settings // the defaults where there is no record
	SettingsCopies Copies   // of a record of this program

	// Indexed by cache_seg_id, which is a segment's rank in the chain.
	Chain []uint32  // its physical index
	Gens  []uint64  // its generation
	GenAt []Replica // where the newest copy of that stands

	// DamagedCopies are the copies that were found damaged. The other copy of
	// each is good, unless Alone is set.
	DamagedCopies []DamagedCopy
}

// DamagedCopy is a damaged copy of a record. A cache can be opened in spite
// of it.
type DamagedCopy struct {
	What  string // the record
	Seg   uint32 // cache_seg_id, for a generation or segment_info
	Slot  uint8
	State CopyState
	Alone bool  // the other copy is no better, and the record is taken for none
	Off   int64 // of the damaged copy, bytes from the start of the device
	Size  int   // bytes
	good  int64 // where the other one is

	lost []byte // what the damaged one held, if that is known and newer
}

func (n DamagedCopy) String() string {
	what, then := n.What, "the other one is used"
	if n.What == recordGeneration || n.What == recordSegmentInfo {
		what = fmt.Sprintf("%s of segment %d", n.What, n.Seg)
	}
	if n.Alone {
		then = "and so is the other one, so there is none"
	}
	return fmt.Sprintf("%s: copy %d at byte %d is damaged (%v), %s", what, n.Slot, n.Off, n.State, then)
}

// Heal stores the damaged copy again, as it was if that is known, and otherwise
// as the good one is, and reads it back. Where there is no good one it does
// nothing. It does not make the store durable. Two equal copies do no harm: the
// next writer may replace either.
func (n DamagedCopy) Heal(m interface {
	io.ReaderAt
	io.WriterAt
}) error {
	if n.Alone {
		return nil
	}
	p := slices.Clone(n.lost)
	if p == nil {
		p = make([]byte, n.Size)
		if err := readFull(m, p, n.good); err != nil {
			return err
		}
	}
	if _, err := m.WriteAt(p, n.Off); err != nil {
		return err
	}
	return readFull(m, p, n.Off)
}

const (
	recordInfo        = "cache_info"
	recordIdentity    = "identity record"
	recordGeneration  = "generation"
	recordSegmentInfo = "segment_info"
	recordSyncMark    = "sync mark"
	recordFingerprint = "fingerprint of the backing device"
	recordSettings    = "settings"
)

// stored is where the copies of a record stand.
type stored struct {
	what     string
	seg      uint32 // cache_seg_id, for a generation or segment_info
	off      int64  // of the first copy, bytes from the start of the device
	distance int64  // of the second from it
	size     int    // bytes
}

func (s stored) read(from io.ReaderAt, dst []byte) Copies {
	return readCopies(from, s.off, s.distance, dst[:s.size])
}

// damaged describes a damaged copy.
func (s stored) damaged(slot int, c Copies) DamagedCopy {
	place := [2]int64{s.off, s.off + s.distance}
	return DamagedCopy{
		What: s.what, Seg: s.seg, Slot: uint8(slot), State: c.State[slot], Alone: !c.Valid(),
		Off: place[slot], Size: s.size, good: place[1-slot],
	}
}

func storedLink(seg, phys uint32) stored {
	return stored{what: recordSegmentInfo, seg: seg, off: segmentOff(phys), distance: infoDistance, size: SegmentInfoSize}
}

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
	l := &Layout{Settings: DefaultSettings()}
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
		check(l.readSettings(r))
		l.readSyncMark(r)
		l.readFingerprint(r)
		if check(l.readInfo(r)) && check(l.readChain(r)) {
			check(l.readGenerations(r))
		}
		check(l.readTail(r, KeyTail))
		check(l.readTail(r, DirtyTail))
		if faults == nil {
			l.raiseGenerations(r)
		}
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

// readIdentity finds no record, and no fault, in two cases that are not
// damage. If one copy was never written and the other one is torn, the first
// writing was cut off, since writers always write both. Bytes without the
// record's magic are somebody else's.
func (l *Layout) readIdentity(r io.ReaderAt) error {
	var buf [IdentitySize]byte
	at := stored{what: recordIdentity, off: IdentityOff, distance: identityDistance, size: IdentitySize}
	c := at.read(r, buf[:])
	if c.Valid() {
		if le.Uint64(buf[8:]) != identityMagic {
			return nil
		}
		l.IdentityCopies = c
		l.Identity = decodeIdentity(buf[:])
		l.note(c, at)
		if l.Identity.BackingSize <= 0 {
			return ErrIdentityFields
		}
		return nil
	}
	l.IdentityCopies = c
	if at.wasThere(r, c, identityMagic) {
		return ErrIdentity
	}
	return nil
}

// wasThere reports whether a record that has no valid copy was there once: both copies
// are damaged, and one has the magic, or cannot be read.
func (s stored) wasThere(from io.ReaderAt, c Copies, magic uint64) bool {
	if c.State[0] == CopyEmpty || c.State[1] == CopyEmpty {
		return false
	}
	for slot := range int64(2) {
		var p [8]byte
		err := readFull(from, p[:], s.off+slot*s.distance+headerSize)
		if err != nil || le.Uint64(p[:]) == magic {
			return true
		}
	}
	return false
}

// readSettings finds no record where readIdentity would find none.
func (l *Layout) readSettings(r io.ReaderAt) error {
	var buf [SettingsSize]byte
	at := stored{what: recordSettings, off: settingsOff, distance: identityDistance, size: SettingsSize}
	c := at.read(r, buf[:])
	l.Settings = DefaultSettings()
	switch {
	case c.Valid() && le.Uint64(buf[8:]) != settingsMagic:
		return nil
	case !c.Valid():
		l.SettingsCopies = c
		if at.wasThere(r, c, settingsMagic) {
			return ErrSettingsLost
		}
		return nil
	}
	s, err := decodeSettings(buf[:])
	if err != nil {
		return err
	}
	l.Settings, l.SettingsCopies = s, c
	l.note(c, at)
	return nil
}

// readSyncMark takes a lost mark for none: then more of what is found
// counts as damage, never less.
func (l *Layout) readSyncMark(r io.ReaderAt) {
	var buf [SyncMarkSize]byte
	at := stored{what: recordSyncMark, off: syncMarkOff, distance: identityDistance, size: SyncMarkSize}
	l.SyncMarkCopies = at.read(r, buf[:])
	if l.SyncMarkCopies.Valid() {
		l.SyncMark = decodeSyncMark(buf[:])
	}
	l.noteOurs(r, l.SyncMarkCopies, at, syncMarkMagic)
}

// readFingerprint takes a lost one for unknown, as if there had never been one.
func (l *Layout) readFingerprint(r io.ReaderAt) {
	var buf [FingerprintSize]byte
	at := stored{what: recordFingerprint, off: fingerprintOff, distance: identityDistance, size: FingerprintSize}
	l.FingerprintCopies = at.read(r, buf[:])
	if l.FingerprintCopies.Valid() {
		l.Fingerprint = decodeFingerprint(buf[:])
	}
	l.noteOurs(r, l.FingerprintCopies, at, fingerprintMagic)
}

// noteOurs is note for a record in the first 4 KiB. A cache may do without
// it, and somebody else may have left something there. A damaged copy is ours
// if the other one is valid, or if its own magic says so or cannot be read.
func (l *Layout) noteOurs(r io.ReaderAt, c Copies, at stored, magic uint64) {
	for slot, state := range c.State {
		if !state.damaged() {
			continue
		}
		var buf [8]byte
		n := at.damaged(slot, c)
		err := readFull(r, buf[:], n.Off+headerSize)
		if c.Valid() || err != nil || le.Uint64(buf[:]) == magic {
			l.DamagedCopies = append(l.DamagedCopies, n)
		}
	}
}

func (l *Layout) readInfo(r io.ReaderAt) error {
	var buf [InfoSize]byte
	at := stored{what: recordInfo, off: InfoOff, distance: infoDistance, size: InfoSize}
	l.InfoCopies = at.read(r, buf[:])
	if !l.InfoCopies.Valid() {
		return lost(l.InfoCopies, at)
	}
	l.note(l.InfoCopies, at)
	l.Info = decodeInfo(buf[:])
	return l.Info.validate(l.Superblock)
}

// readChain follows the segments. A chain that closes a circle never ends, so
// counting its segments is enough to find it. A chain that ends visits no
// segment twice.
func (l *Layout) readChain(r io.ReaderAt) error {
	phys := l.Info.FirstSegment
	for id := range l.Info.Segments {
		var buf [SegmentInfoSize]byte
		at := storedLink(id, phys)
		c := at.read(r, buf[:])
		if !c.Valid() {
			broken := fmt.Errorf("%w after %d of %d, at physical segment %d: %w", ErrChain, id, l.Info.Segments, phys, lost(c, at))
			return append(Faults{broken}, l.lostLinks(r, phys)...)
		}
		l.note(c, at)
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

// lostLinks names the other segments whose segment_info is lost, beside the
// one at which the chain broke.
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
		at := storedLink(0, phys)
		if c := at.read(r, buf[:]); !c.Valid() {
			faults = append(faults, fmt.Errorf("%w at physical segment %d: %w", ErrChain, phys, lost(c, at)))
		}
	}
	return faults
}

// readGenerations loads the generation of each segment. Every segment has
// one from the format on (the kernel writes 0 explicitly), so a missing one
// is damage, and taking it for 0 would bring dead keys back to life. So would
// counting on from the highest number there is, which wraps: hence
// maxGeneration.
func (l *Layout) readGenerations(r io.ReaderAt) error {
	l.Gens = make([]uint64, len(l.Chain))
	l.GenAt = make([]Replica, len(l.Chain))
	var faults Faults
	for id, phys := range l.Chain {
		var buf [GenerationSize]byte
		at := stored{what: recordGeneration, seg: uint32(id), off: segmentOff(phys) + genOff, distance: GenerationSize, size: GenerationSize}
		c := at.read(r, buf[:])
		if !c.Valid() {
			faults = append(faults, fmt.Errorf("segment %d: %w: %w", id, ErrGeneration, lost(c, at)))
			continue
		}
		l.note(c, at)
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

// raiseGenerations finds the generations whose newer copy is the damaged one, and
// counts them up: with the older copy, the living keys of the segment would be
// impossible. No writer counts up by more than one at a time. Where no key names
// the segment, it makes no difference.
func (l *Layout) raiseGenerations(r io.ReaderAt) {
	noted := map[uint32]*DamagedCopy{}
	for i := range l.DamagedCopies {
		if n := &l.DamagedCopies[i]; n.What == recordGeneration {
			noted[n.Seg] = n
		}
	}
	if len(noted) == 0 {
		return
	}
	l.WalkLog(r, l.KeyTail, func(_ Position, k *Kset) error {
		for i := range k.Keys {
			seg := k.Keys[i].Seg
			if n := noted[seg]; n != nil && n.lost == nil && k.Keys[i].Gen == l.Gens[seg]+1 {
				l.Gens[seg], l.GenAt[seg] = k.Keys[i].Gen, l.GenAt[seg].Next()
				n.lost = make([]byte, GenerationSize)
				l.EncodeGeneration(n.lost, seg, l.GenAt[seg], l.Gens[seg])
			}
		}
		return nil
	})
}

func (l *Layout) readTail(r io.ReaderAt, t Tail) error {
	pos, copies := &l.KeyTail, &l.KeyTailCopies
	if t == DirtyTail {
		pos, copies = &l.DirtyTail, &l.DirtyTailCopies
	}
	var buf [PositionSize]byte
	at := stored{what: t.String(), off: t.offset(), distance: PositionSize, size: PositionSize}
	*copies = at.read(r, buf[:])
	if !copies.Valid() {
		return lost(*copies, at)
	}
	l.note(*copies, at)
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
func (l *Layout) note(c Copies, at stored) {
	for slot, state := range c.State {
		if state.damaged() {
			l.DamagedCopies = append(l.DamagedCopies, at.damaged(slot, c))
		}
	}
}

func lost(c Copies, at stored) error {
	return fmt.Errorf("%s at bytes %d and %d: %w (%v, %v)", at.what, at.off, at.off+at.distance, ErrLost, c.State[0], c.State[1])
}
