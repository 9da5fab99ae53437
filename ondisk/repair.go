package ondisk

import (
	"errors"
	"fmt"
	"io"
)

// Repair makes a damaged cache one that opens, here and in the kernel, with
// everything that is left of it.
//
// The obvious way is to walk through the structures and to set right what is
// wrong with each. But the structures explain each other, and a store that a
// wrong conclusion led to cannot be taken back. So everything is decided on
// an [Overlay] first, and stored only for a person who has seen what will
// become of it. Each thing is made again from others that imply it:
//
//   - A copy of a record, from the other one. The other may be the older of
//     the two, so the rules below hold for a record with one bad copy as
//     well.
//   - The superblock: its only content is how many segments there are, and a
//     format links them all into one chain.
//   - cache_info: the first segment is the one that no other leads to. That
//     data has a checksum is seen from the keys, which have 0 otherwise. The
//     gc percentage is lost, and a matter of taste.
//   - A segment_info: if one segment is missing from the chain, it is the one
//     that fits. If more are missing, nothing tells their order, unless the
//     links that are left ascend by one from segment to segment, as every
//     format makes them.
//   - A generation: no key from key_tail on names a segment whose generation
//     has moved on (engine/gc.go), so the keys tell it. A segment that none
//     names is free or part of the log. Its generation only has to be above
//     that of every key that may still lie about.
//   - key_tail: dirty_tail will do. All before it is on the backing device, and
//     references to segments are counted from wherever the log begins.
//   - dirty_tail: key_tail will do. Everything in the log counts as dirty then,
//     and is written back once more, in the order of the log. When that has
//     come to where dirty_tail was, the backing device has again what it had. A
//     key that was flagged clean is younger than all writes of its sectors in
//     front of it, and stays clean.
//   - Both: see findLog.
//
// A log that is broken off in the middle is another matter: the damaged ksets
// named data that was acknowledged, and nothing else tells which. As long as
// the damage lies before dirty_tail, key_tail can move behind it for the price
// of some clean data. Otherwise somebody who may do so has to give that data
// up: see repairlog.go.
//
// # Crashes
//
// A repair in place may be cut off at any store. Started again, it goes on
// where it was, because no store goes over bytes that it was concluded from:
// of a record with a valid copy only the other one is written, and a record
// with none is concluded from others. The superblock is stored last, so that
// a cache without one stays none until all the rest is durable. A tail is
// stored only when the log that it belongs to is durable.
//
// Run on its own result, it finds nothing to do.

// RepairOptions says what a repair may do.
type RepairOptions struct {
	// Durable: a fence is all that the region needs, so a sync mark means nothing.
	Durable bool
	// GiveUpLog: acknowledged data may be given up where the log is damaged.
	GiveUpLog bool
}

// Repaired is a cache as it is after a repair that has not been stored yet.
type Repaired struct {
	*Overlay
	Mended  []string // what was changed, and what that costs
	Left    []error  // why something was not
	Report  *Report  // what is wrong with the result, once Verify has looked
	Unbound bool     // nothing tells any more which backing device it belongs to
	Lost    Ranges   // dirty data that was given up, as far as its sectors are known
	LostLog bool     // acknowledged keys were given up

	steps [][]change // to be stored in this order, each durable before the next
}

type change struct {
	off int64
	p   []byte
}

// Repair concludes what a device of size bytes should hold. It only reads
// base.
func Repair(base io.ReaderAt, size int64, o RepairOptions) *Repaired {
	r := &repairer{Repaired: &Repaired{Overlay: NewOverlay(base, size)}, options: o, l: &Layout{}}
	if err := r.mend(); err != nil {
		r.Left = append(r.Left, err)
	}
	return r.Repaired
}

// Verify looks at all of the result, cached data too.
func (r *Repaired) Verify() { r.Report = check(r.Overlay, r.size, true) }

// Done reports whether everything is in order in the result, except for
// clean data, which the backing device has as well.
func (r *Repaired) Done() bool {
	return len(r.Left) == 0 && len(r.Report.Problems)+r.Report.More == r.Report.Harmless
}

// Opens reports whether the result is a cache that can be opened.
func (r *Repaired) Opens() bool {
	_, err := ReadLayout(r.Overlay, r.size)
	return err == nil && r.Report.End.Damage == nil
}

// Copyable returns nil if a copy, with zeros for the bytes that cannot be read,
// is worth as much as the original. It is worth less if somebody would take
// these zeros for what was there.
func (r *Repaired) Copyable() error {
	d := r.Report.End.Damage
	switch {
	case d != nil && errors.Is(d.Cause, ErrUnreadable):
		return fmt.Errorf("%w, which a copy could not show", d)
	case r.Report.Unreadable.Bytes() > 0 && !r.Report.Layout.Info.Flags.DataCRC():
		return fmt.Errorf("data of %v %w, which a copy without checksums could not show", &r.Report.Unreadable, ErrUnreadable)
	}
	return nil
}

// Store makes the repair in place. Where the memory does not take a store,
// it goes on with the next, and returns an error that names each such place.
func (r *Repaired) Store(m Medium) error {
	var errs []error
	for _, step := range r.steps {
		for _, c := range step {
			if _, err := m.WriteAt(c.p, c.off); err != nil {
				errs = append(errs, fmt.Errorf("store %d bytes at %d: %w", len(c.p), c.off, err))
			}
		}
		m.Fence()
		if err := m.Sync(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		for _, c := range step {
			p := make([]byte, len(c.p))
			if err := readFull(m, p, c.off); err != nil {
				errs = append(errs, fmt.Errorf("%d bytes at %d, stored and %w: %w", len(c.p), c.off, ErrUnreadable, err))
			}
		}
	}
	return errors.Join(errs...)
}

// repairer concludes in the order in which things follow from each other, and
// stores in an order that makes a crash harmless.
type repairer struct {
	*Repaired
	options RepairOptions
	l       *Layout // what is known so far

	superblock error // why there is none
	infoLost   bool
	genCopies  []Copies
	named      []uint64 // the highest generation that a key of the log has, by segment
	isNamed    []bool
	crc        bool // a key of the log has a checksum
	foreign    bool // the log has ksets without a number

	found [2]foundTail
}

// foundTail is a position as it was found.
type foundTail struct {
	pos Position
	err error  // why it is lost, nil if it is not
	why string // why it is changed, empty if it is not
}

func (r *repairer) mend() error {
	if err := r.readSuperblock(); err != nil {
		return err
	}
	if err := r.firstPage(); err != nil {
		return err
	}
	if err := r.chain(); err != nil {
		return err
	}
	r.barrier()
	r.readGenerations()
	lost := r.tails()
	if lost == nil {
		r.readKeys()
		r.generations()
		r.info()
		r.barrier()
		r.log()
		r.storeTails()
	} else if r.infoLost {
		return errors.Join(lost, ErrCRCLost)
	} else {
		r.info()
	}
	r.barrier()
	r.storeSuperblock()
	return lost
}

// store stores to the overlay now, and to the device when Repaired.Store is
// called.
func (r *repairer) store(p []byte, off int64) {
	if _, err := r.WriteAt(p, off); err != nil {
		panic(fmt.Sprintf("ondisk: repair stores outside the device: %v", err))
	}
	if len(r.steps) == 0 {
		r.barrier()
	}
	last := len(r.steps) - 1
	r.steps[last] = append(r.steps[last], change{off, append([]byte{}, p...)})
}

func (r *repairer) barrier() { r.steps = append(r.steps, nil) }

func (r *repairer) mended(format string, args ...any) {
	r.Mended = append(r.Mended, fmt.Sprintf(format, args...))
}

// record is a replicated record to be mended.
type record struct {
	what   string
	copies Copies
	encode func(dst []byte, at Replica) (off int64)
	size   int
	stale  string // why its newest copy is wrong; empty if it is right
}

// put makes both copies of a record good and the newest of them right. It does
// not store to the newest good copy.
func (r *repairer) put(rec record) {
	var buf [IdentitySize]byte
	write := func(at Replica) {
		off := rec.encode(buf[:], at)
		r.store(buf[:rec.size], off)
	}
	switch c := rec.copies; {
	case !c.Valid():
		for _, at := range bothCopies {
			write(at)
		}
		r.mended("%s: both copies were lost (%v, %v); made again, %s", rec.what, c.State[0], c.State[1], rec.stale)
	case rec.stale != "":
		write(c.Newest.Next())
		r.mended("%s: %s", rec.what, rec.stale)
	default:
		for slot, state := range c.State {
			if state.damaged() {
				write(Replica{Slot: uint8(slot), Seq: c.Newest.Seq - 1})
				r.mended("%s: copy %d was damaged (%v); made again from the other one", rec.what, slot, state)
			}
		}
	}
}

func (r *repairer) readSuperblock() error {
	err := r.l.readSuperblock(r, r.size)
	if errors.Is(err, ErrTooSmall) || errors.Is(err, ErrBigEndian) || errors.Is(err, ErrSize) {
		return err
	}
	if r.superblock = err; err != nil {
		r.l.Superblock.Segments = SegmentsIn(r.size)
	}
	return nil
}

// storeSuperblock makes a lost superblock again, for all segments up to the
// last one of the chain.
func (r *repairer) storeSuperblock() {
	if r.superblock == nil {
		return
	}
	s := Superblock{Segments: uint32(len(r.l.Chain))}
	for _, phys := range r.l.Chain {
		s.Segments = max(s.Segments, phys+1)
	}
	var buf [SuperblockSize]byte
	EncodeSuperblock(buf[:], s)
	r.store(buf[:], SuperblockOff)
	hint := ""
	if errors.Is(r.superblock, ErrNotFormatted) {
		hint = " (if a format was cut off here, format again instead)"
	}
	r.mended("superblock: was lost; made again, for %d segments%s", s.Segments, hint)
}

// firstPage mends the records that are this program's own. Without an identity
// a cache can still be opened, which then binds it anew. Its error is settings that
// only a newer version understands.
func (r *repairer) firstPage() error {
	l := r.l
	if err := l.readSettings(r); errors.Is(err, ErrSettingsNewer) {
		return err
	} else if err != nil {
		var zero [SettingsSize]byte
		r.store(zero[:], settingsOff)
		r.store(zero[:], settingsOff+identityDistance)
		r.mended("%s: %v; erased, so they are those of a new cache until they are set again, write-back among them", recordSettings, err)
	} else if l.SettingsCopies.Valid() {
		r.put(record{what: recordSettings, copies: l.SettingsCopies, size: SettingsSize,
			encode: func(dst []byte, at Replica) int64 { return EncodeSettings(dst, at, &l.Settings) }})
	}
	if err := l.readIdentity(r); err != nil {
		var zero [IdentitySize]byte
		r.store(zero[:], IdentityOff)
		r.store(zero[:], IdentityOff+identityDistance)
		l.Identity, r.Unbound = nil, true
		r.mended("%s: %v; erased, so the next add takes whichever backing device it is given", recordIdentity, err)
	} else if l.Identity != nil {
		r.put(record{what: recordIdentity, copies: l.IdentityCopies, size: IdentitySize,
			encode: func(dst []byte, at Replica) int64 { return EncodeIdentity(dst, at, l.Identity) }})
	}
	l.DamagedCopies = nil
	l.readSyncMark(r)
	l.readFingerprint(r)
	alone := map[string]bool{}
	for _, n := range l.DamagedCopies {
		alone[n.What] = n.Alone
	}
	mendOurs := func(rec record, off int64, cost string) {
		isAlone, noted := alone[rec.what]
		if !noted {
			return
		}
		if !isAlone {
			r.put(rec)
			return
		}
		zero := make([]byte, rec.size)
		r.store(zero, off)
		r.store(zero, off+identityDistance)
		r.mended("%s: both copies were lost; erased, %s", rec.what, cost)
	}
	mendOurs(record{what: recordSyncMark, copies: l.SyncMarkCopies, size: SyncMarkSize,
		encode: func(dst []byte, at Replica) int64 { return EncodeSyncMark(dst, at, l.SyncMark) },
	}, syncMarkOff, "so that a hole which a power cut left in the log counts as damage")
	mendOurs(record{what: recordFingerprint, copies: l.FingerprintCopies, size: FingerprintSize,
		encode: func(dst []byte, at Replica) int64 { return EncodeFingerprint(dst, at, &l.Fingerprint) },
	}, fingerprintOff, "so nothing tells whether the backing device was written without the cache")
	r.barrier()
	return nil
}

// chain finds the order of the segments, and mends the records that tell
// it.
func (r *repairer) chain() error {
	l := r.l
	err := l.readInfo(r)
	switch {
	case !l.InfoCopies.Valid(), errors.Is(err, ErrNotInitialised) && l.InfoCopies.damaged():
		r.infoLost = true
		l.Info = Info{}
	case err != nil:
		return err
	}
	if r.infoLost || l.readChain(r) != nil {
		if err := r.orderChain(); err != nil {
			return err
		}
	}
	// Positions and the log are validated against these.
	l.Info.FirstSegment, l.Info.Segments = l.Chain[0], uint32(len(l.Chain))
	for id, phys := range l.Chain {
		want := SegmentInfo{Type: segmentCacheData}
		if id+1 < len(l.Chain) {
			want.HasNext, want.Next = true, l.Chain[id+1]
		}
		rec := record{what: fmt.Sprintf("%s of segment %d", recordSegmentInfo, id), size: SegmentInfoSize,
			encode: func(dst []byte, at Replica) int64 { return encodeSegmentInfo(dst, phys, at, want) }}
		var got SegmentInfo
		if got, rec.copies = r.readLink(phys); !rec.copies.Valid() {
			rec.stale = "the segment was the one missing from the chain"
		} else if got.HasNext != want.HasNext || want.HasNext && got.Next != want.Next {
			rec.stale = "the copy that links the segment was lost; made again, from the chain"
		}
		r.put(rec)
	}
	return nil
}

func (r *repairer) readLink(phys uint32) (SegmentInfo, Copies) {
	var buf [SegmentInfoSize]byte
	c := readCopies(r, segmentOff(phys), infoDistance, buf[:])
	return decodeSegmentInfo(buf[:]), c
}

// The link of a segment, where it is not the number of the next one.
const (
	linkEnd     = -1
	linkUnknown = -2
)

// orderChain concludes the chain from the links that are left, or gives up.
func (r *repairer) orderChain() error {
	l := r.l
	l.Chain = nil
	links := make([]int, l.Superblock.Segments)
	known := 0
	for phys := range links {
		info, c := r.readLink(uint32(phys))
		known++
		switch {
		case c.Valid() && info.Type == segmentCacheData && info.HasNext && info.Next < l.Superblock.Segments:
			links[phys] = int(info.Next)
		case c.Valid() && info.Type == segmentCacheData && !info.HasNext && !c.damaged():
			links[phys] = linkEnd
		default:
			// Also where the copy left may be from before the segment was linked.
			links[phys] = linkUnknown
			known--
		}
	}
	n, first := len(links), linkUnknown
	if !r.infoLost {
		n, first = int(l.Info.Segments), int(l.Info.FirstSegment)
	}
	if r.infoLost && r.superblock != nil && known*2 < n {
		return fmt.Errorf("%w: %w", ErrNoCache, r.superblock)
	}
	chain := ascending(links, n, first)
	if chain == nil {
		chain = onlyChain(links, n, first)
	}
	if chain == nil {
		return ErrChainLost
	}
	l.Chain = chain
	return nil
}

// ascending returns the chain that every format makes, nil if a link that is
// known contradicts it.
func ascending(links []int, n, first int) (chain []uint32) {
	if first > 0 {
		return nil
	}
	for phys, next := range links[:n] {
		if want := phys + 1; next != linkUnknown && next != want && (want < n || next != linkEnd) {
			return nil
		}
		chain = append(chain, uint32(phys))
	}
	if last := links[n-1]; last != linkUnknown && last != linkEnd {
		return nil
	}
	return chain
}

// onlyChain returns the only chain of n segments that one unknown link may
// complete, nil if there is none or more than one.
func onlyChain(links []int, n, first int) (only []uint32) {
	ledTo := make([]bool, len(links))
	unknown := 0
	for _, next := range links {
		if next >= 0 {
			ledTo[next] = true
		} else if next == linkUnknown {
			unknown++
		}
	}
	var heads []int
	for phys, led := range ledTo {
		if !led {
			heads = append(heads, phys)
		}
	}
	// A chain with one link missing has two heads.
	if unknown > 1 || len(heads) > 2 {
		return nil
	}
	for _, head := range heads {
		if first >= 0 && head != first {
			continue
		}
		for _, next := range append(heads, linkEnd) {
			if chain := follow(links, head, next, n); chain != nil {
				if only != nil {
					return nil
				}
				only = chain
			}
			if unknown == 0 {
				break // next was not used
			}
		}
	}
	return only
}

// follow returns the chain of n segments from a head on, with next for an
// unknown link, nil if there is none.
func follow(links []int, head, next, n int) (chain []uint32) {
	for at := head; at != linkEnd; {
		if len(chain) == n {
			return nil
		}
		chain = append(chain, uint32(at))
		if at = links[at]; at == linkUnknown {
			at = next
		}
	}
	if len(chain) < n {
		return nil
	}
	return chain
}

func (r *repairer) readGenerations() {
	l := r.l
	n := len(l.Chain)
	l.Gens, l.GenAt = make([]uint64, n), make([]Replica, n)
	r.genCopies, r.named, r.isNamed = make([]Copies, n), make([]uint64, n), make([]bool, n)
	for id, phys := range l.Chain {
		var buf [GenerationSize]byte
		c := readCopies(r, segmentOff(phys)+genOff, GenerationSize, buf[:])
		if r.genCopies[id] = c; c.Valid() {
			l.Gens[id], l.GenAt[id] = decodeGeneration(buf[:]), c.Newest
		}
	}
}

// dead reports whether a key's segment is known to have moved on.
func (r *repairer) dead(k *Key) bool {
	return r.genCopies[k.Seg].Valid() && k.Gen < r.l.Gens[k.Seg]
}

// readKeys collects what the keys of the log tell, and those behind damage.
func (r *repairer) readKeys() {
	r.l.walkOn(r, r.l.KeyTail, func(_ Position, k *Kset) error {
		r.foreign = r.foreign || k.Seq == 0
		for i := range k.Keys {
			if k := &k.Keys[i]; !r.dead(k) {
				r.crc = r.crc || k.CRC != 0
				r.named[k.Seg], r.isNamed[k.Seg] = max(r.named[k.Seg], k.Gen), true
			}
		}
		return nil
	})
}

// generationGap is how far above all others a lost generation is put if no
// key tells it: no segment is used so often that the lost one was higher.
const generationGap = 1 << 32

// generations mends the generations of which a copy is lost. If both copies are
// valid, and a key has a higher one, it leaves the generation: nothing tells
// which of the two is wrong.
func (r *repairer) generations() {
	l := r.l
	top := uint64(0)
	for seg, gen := range l.Gens {
		top = max(top, gen, r.named[seg])
	}
	for seg, c := range r.genCopies {
		gen, stale := l.Gens[seg], ""
		switch {
		case c.Valid() && !c.damaged():
			continue
		case r.isNamed[seg] && (!c.Valid() || r.named[seg] > gen):
			gen = r.named[seg]
			stale = fmt.Sprintf("%d, which its keys have", gen)
		case r.isNamed[seg]:
		case c.Valid():
			// The copy lost may be the newer one, and its keys may lie about.
			gen += 2
			stale = fmt.Sprintf("copy %d was damaged; raised to %d, above all that it can have been, since no key has it", c.Newest.Slot^1, gen)
		default:
			gen = top + generationGap
			stale = fmt.Sprintf("%d, above all others, since no key has it", gen)
		}
		l.Gens[seg] = min(gen, maxGeneration)
		r.put(record{what: fmt.Sprintf("%s of segment %d", recordGeneration, seg), copies: c, size: GenerationSize, stale: stale,
			encode: func(dst []byte, at Replica) int64 { return l.EncodeGeneration(dst, uint32(seg), at, l.Gens[seg]) }})
	}
}

func (r *repairer) info() {
	l := r.l
	stale := ""
	if r.infoLost {
		l.Info.Flags = NewInfoFlags(r.crc, DefaultGCPercent)
		stale = fmt.Sprintf("%d segments from %d, data crc %t as its keys have it, gc percent %d for want of the old one", l.Info.Segments, l.Info.FirstSegment, r.crc, DefaultGCPercent)
	}
	r.put(record{what: recordInfo, copies: l.InfoCopies, size: InfoSize, stale: stale,
		encode: func(dst []byte, at Replica) int64 { return EncodeInfo(dst, at, l.Info) }})
}
