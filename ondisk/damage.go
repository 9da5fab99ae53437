package ondisk

import (
	"bytes"
	"errors"
	"io"
	"iter"
)

// A log without an end record ends where no valid kset is found. So does a
// log with a bad kset in its middle. A server that takes the second for the
// first forgets acknowledged writes, and then writes over them. The bytes
// behind that place tell the two apart.
//
// A numbered log answers by itself: any kset with a number a little above the
// expected one is younger than the bad one, and writers finish one before
// they begin the next. Such a kset is looked for in the rest of the segment,
// at every place where a kset may lie; and, since a LAST may be among the bad
// ones, at the start of every other segment. A log that ends before others of its
// ksets, which a power cut has left, needs their room cleared, or they would be
// found there (engine/replay.go).
//
// The kernel's ksets have no number, and valid old ones lie about wherever a
// segment is used for the log again. But before a kset is written the 24
// bytes behind it are zeroed. So the reader looks behind the bad one, at each
// distance of a whole number of keys, for zeros or a valid kset. The first of
// these decides: zeros are the end mark of a torn kset; a kset there is the
// successor of a damaged one. No key of a log looks like an end mark, since
// its first 24 bytes hold its length. But an old kset may still be valid where
// a torn one has not arrived. So a successor must also fit what is left of the
// bad one's header, its length or its number. One of the two is right even if
// a word of the header is damaged. An old kset fits neither, since only the
// end mark stands at the end of a torn one.
//
// Neither rule finds a damaged last kset of the log. Nothing on the media
// says that such a kset was acknowledged, unless dirty_tail is behind it. Nor does
// one find the log where a LAST is lost together with the kset that it leads to.

// maxSeqAhead bounds how much younger a successor can be: as many ksets fit
// into a segment. Leftovers of a cache formatted over have random numbers, of
// which one in 2^30 is this near.
const maxSeqAhead = SegmentData / (KsetHeaderSize + KeySize)

// diagnose returns the damage at which a walk ended, nil if that is the end
// of the log. cause is why the walk ended. The walker loses its place.
func (w *walker) diagnose(cause error) *Damage {
	at := w.pos
	ahead := w.ahead(cause)
	if ahead == nil && endsProperly(cause) {
		return nil
	}
	d := &Damage{At: at, Cause: cause, Ahead: ahead}
	if ahead != nil {
		w.start(*ahead)
		w.run(func(_ Position, k *Kset) error {
			if d.Ksets == 0 {
				d.AheadSeq = k.Seq
			}
			d.Ksets++
			d.Keys += len(k.Keys)
			return nil
		})
	}
	return d
}

// endsProperly reports whether a cause is what the end of a good log may look
// like: zeros, leftovers, or a kset that was being written. The other causes
// are ksets that pass their crc and make no sense, and places that cannot be
// read.
func endsProperly(cause error) bool {
	for _, proper := range []error{errNoKset, errKsetCRC, errKsetKeys, errKsetRoom, errKsetStale} {
		if errors.Is(cause, proper) {
			return true
		}
	}
	return false
}

// ahead looks for the log's continuation behind pos.
func (w *walker) ahead(cause error) *Position {
	found := w.unnumberedAhead(cause)
	if w.seq == 0 {
		return found
	}
	// That one may have passed over others, where more than one is bad.
	expected := NextSeq(w.seq)
	if next := w.search(func() bool { return w.isAhead(expected) }); next != nil && (found == nil || found.Seg != next.Seg || next.Off < found.Off) {
		found = next
	}
	if found != nil {
		return found
	}
	// The nearest number: the log may go through several segments.
	least := uint64(maxSeqAhead + 1)
	for seg, distance := range w.startsAhead(expected) {
		if distance < least {
			found, least = &Position{Seg: seg}, distance
		}
	}
	return found
}

// startsAhead has the other segments that begin with a kset that proves that the expected
// one was there, each with how many numbers it is ahead.
func (w *walker) startsAhead(expected uint64) iter.Seq2[uint32, uint64] {
	return func(yield func(seg uint32, distance uint64) bool) {
		for seg := range uint32(len(w.l.Chain)) {
			if seg == w.pos.Seg || w.read(Position{Seg: seg}) != nil {
				continue
			}
			distance := seqDistance(expected, w.kset.Seq)
			if w.isAhead(expected) && !yield(seg, distance) {
				return
			}
		}
	}
}

// StartsAhead returns the segments that begin with a kset whose number could make it the
// continuation of a log that ends at a position, if its next kset has number seq.
func (l *Layout) StartsAhead(r io.ReaderAt, end Position, seq uint64) (segs []uint32) {
	w := &walker{l: l, r: r, pos: end}
	for seg := range w.startsAhead(seq) {
		segs = append(segs, seg)
	}
	return segs
}

// unnumberedAhead applies the rule of the end mark. A damaged LAST has no
// place behind it to look at, but says itself where to look.
func (w *walker) unnumberedAhead(cause error) *Position {
	if errors.Is(cause, errKsetStale) {
		return nil
	}
	var head [KsetHeaderSize]byte
	err := readFull(w.r, head[:], w.l.Offset(w.pos.Seg, w.pos.Off))
	if err == nil {
		if isZero(head[:]) {
			return nil
		}
		next := le.Uint32(head[4:])
		if le.Uint64(head[8:]) == ksetMagic && le.Uint64(head[16:])&ksetLast != 0 && next < uint32(len(w.l.Chain)) {
			if start := (Position{Seg: next}); next != w.pos.Seg && w.read(start) == nil && w.follows() {
				return &start
			}
		}
	}
	for n := 0; n <= MaxKeys; n++ {
		at := Position{Seg: w.pos.Seg, Off: w.pos.Off + KsetSize(n)}
		if at.Off > SegmentData-KsetHeaderSize {
			return nil
		}
		if w.read(at) == nil && (err != nil || w.fits(head[:], n)) && w.follows() {
			return &at
		}
		if w.endsAt(at) {
			return nil
		}
	}
	return nil
}

// fits reports whether the kset just read, n keys behind the bad one, agrees
// with what is left of the bad one's header: with its length, or its number.
//
// The bad one may also be a LAST of which a part has arrived, over the end mark
// of a log that is empty from here on. In the place of a length a LAST has the
// number of the next segment, which agrees with old ksets by chance. Its flags
// tell it from a kset, unless they are still the end mark's zeros: then the bad
// one counts as a kset only if it can be restored to one.
func (w *walker) fits(head []byte, n int) bool {
	if w.seq != 0 && w.kset.Seq != 0 {
		return true // follows knows better
	}
	magic, flags := le.Uint64(head[8:]), le.Uint64(head[16:])
	seq := flags >> seqShift
	switch {
	case seq != 0 && w.kset.Seq == NextSeq(seq):
		return true
	case flags&ksetLast != 0, flags == 0 && (magic == 0 || w.kset.Seq != 0):
		return n > 0 && w.restores(head, n)
	default:
		return n > 0 && le.Uint32(head[4:]) == uint32(n) || seq == 0 && w.kset.Seq == 0
	}
}

// restores reports whether the bad kset would be a good one of n keys in front
// of the one just read, if the header had its magic number and flags.
func (w *walker) restores(head []byte, n int) bool {
	flags := uint64(0)
	if w.kset.Seq != 0 {
		flags = PrevSeq(w.kset.Seq) << seqShift
	}
	p := w.buf[:KsetSize(n)]
	if err := readFull(w.r, p, w.l.Offset(w.pos.Seg, w.pos.Off)); err != nil {
		return true
	}
	encodeKsetHeader(p, uint32(n), flags)
	return le.Uint32(head) == Checksum(p[4:])
}

// endsAt reports whether an end mark stands at a place, or a LAST in place of
// one, which leads to nothing yet.
func (w *walker) endsAt(at Position) bool {
	var head [KsetHeaderSize]byte
	if err := readFull(w.r, head[:], w.l.Offset(at.Seg, at.Off)); err != nil {
		return false
	}
	return isZero(head[:]) || w.read(at) == nil && w.kset.Last && !w.leadsOn()
}

// search looks at every place in the rest of the segment for a kset that will
// do.
func (w *walker) search(do func() bool) *Position { return w.searchTo(SegmentData, 8, do) }

// searchTo is search up to a place in the segment. unit is the least of
// readAround.
func (w *walker) searchTo(end uint32, unit int, do func() bool) *Position {
	if end <= w.pos.Off {
		return nil
	}
	chunk := make([]byte, min(64<<10, end-w.pos.Off))
	magic := le.AppendUint64(nil, ksetMagic)
	for base := w.pos.Off; base < end; base += uint32(len(chunk)) {
		p := chunk[:min(uint32(len(chunk)), end-base)]
		if err := readFull(w.r, p, w.l.Offset(w.pos.Seg, base)); err != nil {
			readAround(w.r, p, w.l.Offset(w.pos.Seg, base), unit)
		}
		for i := 0; ; {
			hit := bytes.Index(p[i:], magic)
			if hit < 0 {
				break
			}
			i += hit
			if at := (Position{Seg: w.pos.Seg, Off: base + uint32(i) - 8}); i%8 == 0 && at.Off > w.pos.Off &&
				w.read(at) == nil && do() {
				return &at
			}
			i++
		}
	}
	return nil
}

// follows reports whether the kset just read can come behind the bad one.
func (w *walker) follows() bool {
	switch {
	case w.kset.Seq == 0:
		return true
	case w.seq == 0:
		return !w.kset.Last || w.leadsOn()
	default:
		return w.isAhead(NextSeq(w.seq))
	}
}

// isAhead reports whether the kset just read proves that the expected one was
// there. A LAST may be older than the kset in front of it (kset.go), so it
// proves that only with the kset that it leads to.
func (w *walker) isAhead(expected uint64) bool {
	if w.kset.Seq == 0 {
		return false
	}
	d := seqDistance(expected, w.kset.Seq)
	return d > 0 && d <= maxSeqAhead && (d > 1 || !w.kset.Last || w.leadsOn())
}

// leadsOn reports whether the log goes on behind the LAST just read.
func (w *walker) leadsOn() bool {
	last := w.kset
	return last.Next < uint32(len(w.l.Chain)) && w.read(Position{Seg: last.Next}) == nil &&
		w.kset.Seq == NextSeq(last.Seq)
}
