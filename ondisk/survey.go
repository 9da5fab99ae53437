package ondisk

import (
	"errors"
	"fmt"
	"io"
)

// Holding is what a device holds, for somebody who is about to write over
// it.
type Holding struct {
	Kind  HoldingKind
	Dirty int64 // bytes of dirty data that can be found, overwritten data, too
	Zeros int64 // likewise, to be zeroed on the backing device
	Err   error // what is wrong, of HoldsDamage and HoldsUnknown

	// Harmless: nothing dirty can be lost.
	Harmless bool
	// Mendable: a repair makes a cache that opens, at worst without what damaged
	// parts of the log held.
	Mendable bool
}

// HoldingKind sorts devices by what they hold.
type HoldingKind int

const (
	// HoldsNothing is a device that is blank.
	HoldsNothing HoldingKind = iota
	// HoldsForeign is one that is not blank, with nothing of a cache on it.
	HoldsForeign
	// HoldsCache is a cache in order.
	HoldsCache
	// HoldsDamage is a cache that is not in order, or what is left of one.
	HoldsDamage
	// HoldsUnknown is one that cannot be read in places where a cache may have
	// been.
	HoldsUnknown
)

// Survey finds out what a device of size bytes holds. durable: a fence is all
// that it needs, as in [RepairOptions].
//
// The obvious way is to ask for a superblock. But that is one page among
// millions, and where it is lost, dirty data can be found all the same: by a
// repair, which is tried in memory, and where that finds no log, by the ksets.
func Survey(r io.ReaderAt, size int64, durable bool) *Holding {
	blank, err := Blank(r, size)
	if blank {
		return &Holding{Kind: HoldsNothing, Harmless: true}
	}
	rep := check(r, size, false)
	if len(rep.Problems) == 0 {
		return &Holding{Kind: HoldsCache, Dirty: rep.DirtyBytes, Zeros: rep.ZeroBytes, Harmless: rep.Dirty == 0}
	}
	first, left := rep.Problems[0], rep.left
	if left == nil {
		left = findRemains(r, size)
	}
	unread := errors.Is(first, ErrUnreadable) && rep.Layout.Superblock.Segments == 0
	switch {
	case left.found, !unread && !noSuperblock(first):
	case unread:
		return &Holding{Kind: HoldsUnknown, Err: first}
	case err != nil:
		return &Holding{Kind: HoldsUnknown, Err: err}
	case left.unreadable != nil:
		return &Holding{Kind: HoldsUnknown, Err: left.unreadable}
	default:
		return &Holding{Kind: HoldsForeign, Harmless: true}
	}
	h := &Holding{Kind: HoldsDamage, Err: first}
	mended := Repair(r, size, RepairOptions{Durable: durable})
	behind := check(mended, size, false)
	data, zeros := behind.behind.bytes()
	h.Dirty, h.Zeros = behind.DirtyBytes+data, behind.ZeroBytes+zeros
	if behind.Keys == 0 && h.Dirty+h.Zeros == 0 {
		// An empty log leaves no key that is alive.
		h.Dirty, h.Zeros = left.dirty.bytes()
	}
	unfinished := left.unfinished && rep.left != nil
	h.Harmless = h.Dirty+h.Zeros == 0 && (unfinished || len(mended.Left) == 0 && len(behind.Problems) == 0)
	_, err = ReadLayout(Repair(r, size, RepairOptions{Durable: durable, GiveUpLog: true}), size)
	h.Mendable = err == nil
	return h
}

// noSuperblock reports whether a fault is a superblock that is not there.
func noSuperblock(fault error) bool {
	return errors.Is(fault, ErrNotFormatted) || errors.Is(fault, ErrMagic)
}

// remains are what can be found of a cache that nothing leads to.
type remains struct {
	found      bool      // something that only a cache has
	unfinished bool      // a format that was cut off, on a device that was blank before
	ksets      bool      // any were found
	dirty      unwritten // what keys that may be alive say is dirty
	unreadable error     // the first place that could not be read
}

// A first kset is looked for in the first remainsSpan bytes of a segment: more
// than an accident overwrites that hits a few pages, and so little that a region
// of a terabyte takes seconds. Memory that cannot be read is left out in pieces of
// remainsUnit bytes: much of a region may be unreadable, and each try costs a
// signal.
const (
	remainsSpan = 64 << 10
	remainsUnit = 4 << 10
)

// findRemains looks for the records of a cache where they belong, and for ksets.
// A log enters a segment at its beginning. Segment 0 is searched to its end: a
// device that is overwritten by mistake is overwritten from the front.
func findRemains(r io.ReaderAt, size int64) *remains {
	m := &remains{}
	n := SegmentsIn(size)
	l := &Layout{Superblock: Superblock{Segments: n}, Chain: make([]uint32, n), Gens: make([]uint64, n)}
	var buf [IdentitySize]byte
	look := func(off, distance int64, size int) bool {
		c := readCopies(r, off, distance, buf[:size])
		for slot, state := range c.State {
			if state == CopyUnreadable {
				m.unread(off + int64(slot)*distance)
			}
		}
		m.found = m.found || c.Valid()
		return c.Valid()
	}
	m.unfinished = look(InfoOff, infoDistance, InfoSize)
	tails := 0
	for _, t := range []Tail{KeyTail, DirtyTail} {
		if look(t.offset(), PositionSize, PositionSize) {
			tails++
			m.unfinished = m.unfinished && decodePosition(buf[:]) == Position{}
		}
	}
	for phys := range n {
		l.Chain[phys] = phys // as every format makes it
		if look(segmentOff(phys), infoDistance, SegmentInfoSize) && tails < 2 {
			m.unfinished = false // a format writes them before
		}
		if look(segmentOff(phys)+genOff, GenerationSize, GenerationSize) {
			l.Gens[phys] = decodeGeneration(buf[:])
		}
	}
	w := &walker{l: l, r: r}
	for seg := range n {
		m.segment(w, seg)
	}
	m.unfinished = m.unfinished && !m.ksets && m.unreadable == nil
	return m
}

func (m *remains) unread(off int64) {
	if m.unreadable == nil {
		m.unreadable = fmt.Errorf("bytes from %d on %w", off, ErrUnreadable)
	}
}

// segment visits the ksets of a segment.
func (m *remains) segment(w *walker, seg uint32) {
	span := uint32(remainsSpan)
	if seg == 0 {
		span = SegmentData
	}
	for at := &(Position{Seg: seg}); at != nil; at = w.searchTo(span, remainsUnit, func() bool { return true }) {
		w.start(*at)
		cause, err := w.run(func(_ Position, k *Kset) error {
			m.found, m.ksets, span = true, true, SegmentData
			for i := range k.Keys {
				if k := &k.Keys[i]; k.Flags&KeyClean == 0 && k.Gen >= w.l.Gens[k.Seg] {
					m.dirty.add(k)
				}
			}
			if k.Last {
				return errFound // the segment that it leads to has its own turn
			}
			return nil
		})
		if errors.Is(cause, ErrUnreadable) {
			m.unread(w.l.Offset(w.pos.Seg, w.pos.Off))
		}
		if err != nil {
			return
		}
	}
}
