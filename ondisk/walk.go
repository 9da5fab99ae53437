package ondisk

import (
	"errors"
	"fmt"
	"io"
)

// LogEnd is the end of a walk of the log.
type LogEnd struct {
	Pos    Position // where the next kset goes, if Damage is nil
	Seq    uint64   // the last log sequence number seen, 0 for none
	Damage *Damage  // why Pos is not the log's real end; nil if it is
}

// NextSeq returns the log sequence number for the kset to be written at Pos.
func (e LogEnd) NextSeq() uint64 {
	if e.Seq == 0 {
		return FirstSeq()
	}
	return NextSeq(e.Seq)
}

// Damage is a place where the log is broken off although it goes on behind
// it, or should.
type Damage struct {
	At    Position // of the kset that cannot be used
	Cause error    // why it cannot

	Ahead    *Position // the first good kset behind it, if one was found
	AheadSeq uint64    // its log sequence number, 0 for none
	Ksets    int       // how many of them follow there, in sequence
	Keys     int       // how many keys they hold

	DirtyTail *Position // set if the log ends before it, or passes it by
}

func (d *Damage) Error() string {
	s := fmt.Sprintf("the log is damaged at %v: %v", d.At, d.Cause)
	if d.Ahead != nil {
		s += fmt.Sprintf("; it goes on at %v with %d keys in %d ksets, which cannot be reached", d.Ahead, d.Keys, d.Ksets)
	}
	if d.DirtyTail != nil {
		s += fmt.Sprintf("; dirty_tail %v is not on its path, so everything from there on is lost", d.DirtyTail)
	}
	return s
}

func (d *Damage) Unwrap() error { return d.Cause }

// errFound ends a walk that has come to what it looked for.
var errFound = errors.New("found")

// WalkLog visits the ksets from a position on, in order, LAST records
// included, with all their fields verified. visit must not keep k or its
// keys, which are used again for the next. An error of visit ends the walk
// and is returned as it is. There are no other errors: the LogEnd describes
// whatever the log contains.
//
// A walk from l.KeyTail also finds out whether dirty_tail lies on the path.
func (l *Layout) WalkLog(r io.ReaderAt, from Position, visit func(at Position, k *Kset) error) (LogEnd, error) {
	w := &walker{l: l, r: r}
	w.start(from)
	dirtySeen := from != l.KeyTail
	cause, err := w.run(func(at Position, k *Kset) error {
		dirtySeen = dirtySeen || at == l.DirtyTail
		return visit(at, k)
	})
	end := LogEnd{Pos: w.pos, Seq: w.seq}
	if err != nil {
		return end, err
	}
	dirtySeen = dirtySeen || w.pos == l.DirtyTail
	end.Damage = w.diagnose(cause)
	if !dirtySeen {
		if end.Damage == nil {
			end.Damage = &Damage{At: w.pos, Cause: cause}
		}
		end.Damage.DirtyTail = &l.DirtyTail
	}
	return end, nil
}

// Walker walks the log of a cache that is open, again and again, without allocating.
// The zero value is ready. One goroutine may use it at a time.
type Walker struct{ w walker }

// WalkTo visits the ksets of [from, to), two places that the log came through,
// until visit returns an error. The log may be written meanwhile. A kset that
// cannot be used is damage; WalkTo does not look behind it, where somebody may be
// writing. visit must not keep k or its keys.
func (x *Walker) WalkTo(l *Layout, r io.ReaderAt, from, to Position, visit func(k *Kset, after Position) error) (*Damage, error) {
	if from == to {
		return nil, nil
	}
	w := &x.w
	w.l, w.r = l, r
	w.start(from)
	cause, err := w.run(func(at Position, k *Kset) error {
		after := k.after(at)
		if err := visit(k, after); err != nil {
			return err
		}
		if after == to {
			return errFound
		}
		return nil
	})
	switch err {
	case nil:
		return &Damage{At: w.pos, Cause: cause}, nil
	case errFound:
		return nil, nil
	default:
		return nil, err
	}
}

// walkOn is WalkLog that goes on behind damage, wherever the log is found
// again.
func (l *Layout) walkOn(r io.ReaderAt, from Position, visit func(at Position, k *Kset) error) {
	begun := map[Position]bool{}
	for at := &from; at != nil && !begun[*at]; {
		begun[*at] = true
		end, err := l.WalkLog(r, *at, visit)
		if at = nil; err == nil && end.Damage != nil {
			at = end.Damage.Ahead
		}
	}
}

// walker follows the log. It owns what a walk needs.
type walker struct {
	l    *Layout
	r    io.ReaderAt
	pos  Position
	seq  uint64   // of the last numbered kset
	seen []uint64 // a bit per cache_seg_id: the segments it came through

	kset Kset
	buf  [MaxKsetSize]byte
}

func (w *walker) start(at Position) {
	if n := len(w.l.Chain)/64 + 1; len(w.seen) == n {
		clear(w.seen)
	} else {
		w.seen = make([]uint64, n)
	}
	w.seq = 0
	w.enter(at)
}

func (w *walker) enter(at Position) {
	w.pos = at
	w.seen[at.Seg/64] |= 1 << (at.Seg % 64)
}

// run visits ksets until one cannot be used. It returns why, with pos there.
func (w *walker) run(visit func(at Position, k *Kset) error) (cause, err error) {
	for {
		if cause := w.next(); cause != nil {
			return cause, nil
		}
		if err := visit(w.pos, &w.kset); err != nil {
			return nil, err
		}
		if w.kset.Seq != 0 {
			w.seq = w.kset.Seq
		}
		if w.kset.Last {
			w.enter(Position{Seg: w.kset.Next})
		} else {
			w.pos.Off += w.kset.Size()
		}
	}
}

// next decodes the kset at pos, and returns why it cannot be the next of the log, nil
// if it can.
func (w *walker) next() error {
	if err := w.read(w.pos); err != nil {
		return err
	}
	return w.check()
}

// read decodes the kset at a position. Header and keys are read apart: bad
// memory behind the kset must not make it unreadable.
func (w *walker) read(at Position) error {
	if at.Off > SegmentData-KsetHeaderSize {
		return errKsetRoom
	}
	head := w.buf[:KsetHeaderSize]
	off := w.l.Offset(at.Seg, at.Off)
	if err := readFull(w.r, head, off); err != nil {
		return fmt.Errorf("kset %w: %w", ErrUnreadable, err)
	}
	size, err := ksetLen(head)
	if err != nil {
		return err
	}
	// There is room for a LAST behind every other kset, even behind one of no
	// keys, which nobody writes: the next writer counts on it.
	if le.Uint64(head[16:])&ksetLast == 0 && at.Off+size > SegmentData-KsetHeaderSize {
		return errKsetRoom
	}
	if size > KsetHeaderSize {
		if err := readFull(w.r, w.buf[KsetHeaderSize:size], off+KsetHeaderSize); err != nil {
			return fmt.Errorf("kset %w: %w", ErrUnreadable, err)
		}
	}
	return DecodeKset(w.buf[:size], &w.kset)
}

// check returns why the decoded kset cannot be the next of the log, nil if
// it can.
func (w *walker) check() error {
	k, segments := &w.kset, uint32(len(w.l.Chain))
	if k.Seq != 0 && w.seq != 0 && k.Seq != NextSeq(w.seq) {
		return errKsetStale
	}
	if k.Last {
		switch {
		case k.Next >= segments:
			return fmt.Errorf("%w: segment %d of %d", ErrLast, k.Next, segments)
		case w.seen[k.Next/64]>>(k.Next%64)&1 != 0:
			return fmt.Errorf("%w: to segment %d", ErrLogLoop, k.Next)
		}
	}
	for i := range k.Keys {
		if err := k.Keys[i].Validate(segments); err != nil {
			return fmt.Errorf("key %d: %w", i, err)
		}
	}
	return nil
}
