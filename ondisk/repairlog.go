package ondisk

import (
	"fmt"
)

// # A log that is broken off
//
// Behind a damaged kset the log may go on for long, and only its sequence
// numbers and the places of its ksets keep a reader from going on there. If the
// keys of the damaged ksets have to be given up, the rest need not be: their room
// is filled with ksets that say nothing new, with the numbers that are missing
// there. All of their keys are the same, the first living key behind them, for the
// same sectors and the same place. A replay of the log enters it a few times
// before its turn, and then once more in its turn, over whatever came in between.
// References are counted for each key, here and in the kernel, and taken back for
// each key; write-back finds the place a few times more; and checksums allow a
// place to be named again for the same sectors (engine/sums.go).
//
// The ksets that were there had a whole number of keys each, so as many ksets,
// with the keys spread over them, always fill the room exactly. If they cannot,
// the damage is of another kind, and the log is cut off in front of it:
// everything behind is given up and erased, since its numbers would look like a
// continuation again as soon as the log gets there.
//
// If only a LAST is lost, and the numbers prove where it led, nothing is given
// up.

// tails concludes where the log and its dirty part begin. If key_tail moves,
// the log must be seen to begin at the new place: with no kset in front,
// nothing tells its end from damage.
func (r *repairer) tails() error {
	if err := r.concludeTails(); err != nil {
		return err
	}
	key, dirty, start := &r.found[KeyTail], &r.found[DirtyTail], r.l.KeyTail
	switch {
	case key.why == "" || !r.unclear(start):
		return nil
	case key.err == nil && !r.l.KeyTailCopies.damaged():
		// From where it was, the damage can at least be seen.
		r.l.KeyTail, key.why = key.pos, ""
		if r.options.GiveUpLog {
			r.l.DirtyTail, dirty.why = key.pos, fmt.Sprintf("%v, %s", key.pos, toKey)
		}
		return nil
	case !r.options.GiveUpLog:
		return fmt.Errorf("%v: %w", start, ErrLogStart)
	}
	r.LostLog = true
	r.mended("log: begins at %v, where no kset can be read; given up is what may have followed there", start)
	return nil
}

// Why a tail is moved.
const (
	behind  = "behind keys of segments that have been used again since"
	toDirty = "that of dirty_tail, for the price of the clean data in front of it"
	toKey   = "that of key_tail, so everything in the log is written back once more"
	toFound = "where the log that was found by its ksets begins, so everything in it is written back once more"
)

// unclear reports whether no kset can be read at a place, although a log may
// have begun there.
func (r *repairer) unclear(at Position) bool {
	w := &walker{l: r.l, r: r}
	w.start(at)
	cause := w.next()
	if cause == nil {
		return false
	}
	if w.seq = r.seqBefore(at); w.seq != 0 {
		return w.ahead(cause) != nil
	}
	return w.search(func() bool { return len(w.kset.Keys) > 0 }) != nil
}

// seqBefore returns the number of the last good kset in front of a place, in its
// segment or that leads to it, 0 if none is found.
func (r *repairer) seqBefore(to Position) (seq uint64) {
	key, starts := &r.found[KeyTail], []Position{{Seg: to.Seg}}
	if key.err == nil {
		starts = append(starts, key.pos)
	}
	for _, from := range starts {
		r.l.walkOn(r, from, func(at Position, k *Kset) error {
			switch {
			case at.Seg == to.Seg && at.Off >= to.Off:
				return errFound
			case at.Seg != to.Seg && !(k.Last && k.Next == to.Seg):
			case k.Seq != 0 && (seq == 0 || SeqAfter(k.Seq, seq)):
				seq = k.Seq
			}
			return nil
		})
	}
	if seq == 0 && key.err == nil {
		// The walk goes over no LAST that leads to nothing.
		end, _ := r.l.WalkLog(r, key.pos, func(Position, *Kset) error { return nil })
		w := &walker{l: r.l, r: r}
		w.start(end.Pos)
		if w.search(func() bool { return w.kset.Last && w.kset.Next == to.Seg }) != nil {
			seq = w.kset.Seq
		}
	}
	return seq
}

// concludeTails concludes the tails from the copies that are found. A tail with
// a damaged copy is not sure: the copy that is left may be the older one.
func (r *repairer) concludeTails() error {
	l := r.l
	pos := func(t Tail) *Position { return [...]*Position{&l.KeyTail, &l.DirtyTail}[t] }
	for _, t := range []Tail{KeyTail, DirtyTail} {
		err := l.readTail(r, t)
		r.found[t] = foundTail{pos: *pos(t), err: err}
	}
	key, dirty := &r.found[KeyTail], &r.found[DirtyTail]
	keySure := key.err == nil && !l.KeyTailCopies.damaged()
	dirtySure := dirty.err == nil && !l.DirtyTailCopies.damaged()
	move := func(t Tail, to Position, why string) error {
		*pos(t), r.found[t].why = to, fmt.Sprintf("%v, %s", to, why)
		return nil
	}
	switch {
	case key.err == nil && dirty.err == nil && r.leads():
		if keySure {
			return nil
		}
		l.KeyTail = r.behindDead(key.pos)
		if !r.leads() {
			if l.KeyTail = dirty.pos; !dirtySure {
				l.KeyTail = r.behindDead(dirty.pos)
				move(DirtyTail, l.KeyTail, behind)
			}
		}
		if l.KeyTail != key.pos {
			move(KeyTail, l.KeyTail, behind)
		}
		return nil
	case dirtySure, keySure && dirty.err == nil && r.isBehind():
		return move(KeyTail, l.DirtyTail, toDirty)
	case keySure:
		return move(DirtyTail, l.KeyTail, toKey)
	}
	l.KeyTail, l.DirtyTail = Position{}, Position{}
	at, err := r.findLog()
	if err != nil {
		return err
	}
	move(DirtyTail, at, toFound)
	return move(KeyTail, at, toFound)
}

// leads reports whether the log leads from key_tail to dirty_tail.
func (r *repairer) leads() bool {
	found := r.l.KeyTail == r.l.DirtyTail
	end, _ := r.l.WalkLog(r, r.l.KeyTail, func(at Position, _ *Kset) error {
		if found = found || at == r.l.DirtyTail; found {
			return errFound
		}
		return nil
	})
	return found || end.Pos == r.l.DirtyTail
}

// isBehind reports whether the kset at dirty_tail is younger than all that the
// log leads to from key_tail on.
func (r *repairer) isBehind() bool {
	end, _ := r.l.WalkLog(r, r.l.KeyTail, func(Position, *Kset) error { return nil })
	first := uint64(0)
	r.l.WalkLog(r, r.l.DirtyTail, func(_ Position, k *Kset) error {
		first = k.Seq
		return errFound
	})
	return end.Damage != nil && end.Seq != 0 && first != 0 && SeqAfter(first, end.Seq)
}

// behindDead returns the first position from which on no key is dead. A segment
// moves on when key_tail has passed all its keys, so key_tail was at that
// position, or behind it.
func (r *repairer) behindDead(from Position) Position {
	to := from
	r.l.WalkLog(r, from, func(at Position, k *Kset) error {
		for i := range k.Keys {
			if r.dead(&k.Keys[i]) {
				to = k.after(at)
			}
		}
		return nil
	})
	return to
}

// findLog looks for the log when both tails are lost, and returns a place from
// which on it can be read as if key_tail were there.
//
// A log enters a segment at its beginning and leaves it by a LAST, so it is a
// chain of segments that begin with a kset. The place may lie before the lost
// key_tail. As long as no key from there on is dead, the keys in between only
// name data that the backing device has, and every older version of a sector has
// a younger one behind it.
//
// Segments that were part of the log once begin with ksets as well until they
// are used again. If more than one chain has keys that are not dead, nothing
// tells which is the log, and each of them could be old data.
func (r *repairer) findLog() (Position, error) {
	l := r.l
	for _, c := range r.genCopies {
		if !c.Valid() || c.damaged() {
			return Position{}, fmt.Errorf("%w: generations are lost, too", ErrLogLost)
		}
	}
	begins, ledTo := make([]bool, len(l.Chain)), make([]bool, len(l.Chain))
	for seg := range l.Chain {
		last := Kset{}
		_, err := l.WalkLog(r, Position{Seg: uint32(seg)}, func(at Position, k *Kset) error {
			begins[seg] = true
			if last.Last {
				return errFound // and it goes on there
			}
			last = Kset{Last: k.Last, Next: k.Next}
			return nil
		})
		if err == errFound {
			ledTo[last.Next] = true
		}
	}
	var only *Position
	for seg := range l.Chain {
		if !begins[seg] || ledTo[seg] {
			continue
		}
		at := r.behindDead(Position{Seg: uint32(seg)})
		keys := 0
		l.WalkLog(r, at, func(_ Position, k *Kset) error {
			keys += len(k.Keys)
			return nil
		})
		switch {
		case keys == 0:
		case only != nil:
			return Position{}, fmt.Errorf("%w: one may begin at %v, another at %v", ErrLogLost, *only, at)
		default:
			only = &at
		}
	}
	if only == nil {
		return Position{}, fmt.Errorf("%w: no segment begins with a key that is alive", ErrLogLost)
	}
	return *only, nil
}

// storeTails stores dirty_tail first: it must never lie before key_tail. The
// fingerprint holds for its old and its new place.
func (r *repairer) storeTails() {
	l := r.l
	r.barrier()
	if f := l.Fingerprint; r.found[DirtyTail].why != "" && f.State == FingerprintKnown && !r.foreign {
		f.DirtyTail = [2]Position{r.found[DirtyTail].pos, l.DirtyTail}
		if r.found[DirtyTail].err != nil {
			f.DirtyTail[0] = l.DirtyTail
		}
		var buf [FingerprintSize]byte
		off := EncodeFingerprint(buf[:], l.FingerprintCopies.Newest.Next(), &f)
		r.store(buf[:], off)
	}
	for _, t := range []Tail{DirtyTail, KeyTail} {
		to, copies := l.KeyTail, l.KeyTailCopies
		if t == DirtyTail {
			to, copies = l.DirtyTail, l.DirtyTailCopies
		}
		r.barrier()
		r.put(record{what: t.String(), copies: copies, size: PositionSize, stale: r.found[t].why,
			encode: func(dst []byte, at Replica) int64 { return EncodePosition(dst, t, at, to) }})
	}
}

// log mends what keeps the log from being read to its end.
func (r *repairer) log() {
	for {
		end, _ := r.l.WalkLog(r, r.l.KeyTail, func(Position, *Kset) error { return nil })
		d := end.Damage
		switch {
		case d == nil:
			return
		case r.unsynced(end):
			r.mended("log: ends at %v, where a power cut took what no sync had covered%s", d.At, r.cut(d))
		case r.relink(end):
			r.mended("log: the LAST at %v was damaged; made again, since the log goes on at %v", d.At, *d.Ahead)
		case !r.options.GiveUpLog:
			return
		default:
			lost := r.leftOf(d)
			r.LostLog = true
			if r.bridge(end) {
				r.mended("log: what was damaged at %v is given up, up to %v%s; the %d keys in %d ksets behind it are kept", d.At, *d.Ahead, namely(&lost), d.Keys, d.Ksets)
			} else {
				r.mended("log: cut off at %v; what was there is given up%s%s", d.At, namely(&lost), r.cut(d))
			}
			lost.Each(r.Lost.Add)
		}
		if again, _ := r.l.WalkLog(r, r.l.KeyTail, func(Position, *Kset) error { return nil }); again.Damage != nil && again.Damage.At == d.At {
			return // the report says what is left
		}
	}
}

func namely(lost *Ranges) string {
	if lost.Bytes() == 0 {
		return ", and nothing is left to tell its sectors"
	}
	return fmt.Sprintf(", of which can still be read that it wrote %v", lost)
}

// unsynced reports whether a power cut made the damage, behind all that a
// sync has covered (see syncmark.go).
func (r *repairer) unsynced(end LogEnd) bool {
	lost := end.Damage.AheadSeq
	if end.Seq != 0 {
		lost = NextSeq(end.Seq)
	}
	mark := r.l.SyncMark
	return !r.options.Durable && lost != 0 && mark != 0 && SeqAfter(lost, mark) && end.Damage.DirtyTail == nil
}

// missing returns how many ksets are missing between the end and what is found
// ahead, and the number of the first, 0 for none.
func missing(end LogEnd) (n int, seq uint64) {
	switch d := end.Damage; {
	case d.AheadSeq == 0:
		return 1, 0
	case end.Seq == 0:
		return 1, PrevSeq(d.AheadSeq)
	default:
		seq = NextSeq(end.Seq)
		return int(seqDistance(seq, d.AheadSeq)), seq
	}
}

// relink stores a LAST again if nothing else is missing.
func (r *repairer) relink(end LogEnd) bool {
	d := end.Damage
	if d.Ahead == nil || d.Ksets == 0 || d.Ahead.Seg == d.At.Seg || end.Seq == 0 || d.AheadSeq == 0 {
		return false
	}
	if n, _ := missing(end); n != 1 {
		return false
	}
	return r.bridge(end)
}

// bridge fills the room of the damaged ksets, the header of the first one last:
// until then the damage is where it was. It reports false if nothing fits there.
func (r *repairer) bridge(end LogEnd) bool {
	d := end.Damage
	if d.Ahead == nil || d.Ksets == 0 {
		return false
	}
	n, seq := missing(end)
	var fill []byte
	add := func(keys []Key) {
		fill = append(fill, EncodeKset(make([]byte, MaxKsetSize), seq, keys)...)
		if seq != 0 {
			seq = NextSeq(seq)
		}
	}
	key, alive := r.firstAlive(*d.Ahead)
	keys := make([]Key, MaxKeys)
	for i := range keys {
		keys[i] = key
	}
	if d.Ahead.Seg == d.At.Seg {
		room := int(d.Ahead.Off) - int(d.At.Off) - n*KsetHeaderSize
		total := room / KeySize
		if !alive || room%KeySize != 0 || total < n || total > n*MaxKeys {
			return false
		}
		for ; n > 0; n-- {
			add(keys[:(total+n-1)/n])
			total -= (total + n - 1) / n
		}
	} else {
		size := (n-1)*int(KsetSize(1)) + KsetHeaderSize
		if d.Ahead.Off != 0 || n > 1 && !alive || int(d.At.Off)+size > SegmentData {
			return false
		}
		for range n - 1 {
			add(keys[:1])
		}
		fill = append(fill, EncodeLast(make([]byte, KsetHeaderSize), seq, d.Ahead.Seg)...)
	}
	off := r.l.Offset(d.At.Seg, d.At.Off)
	r.barrier()
	if len(fill) > KsetHeaderSize {
		r.store(fill[KsetHeaderSize:], off+KsetHeaderSize)
	}
	r.barrier()
	r.store(fill[:KsetHeaderSize], off)
	r.barrier()
	return true
}

// firstAlive returns the first key from a position on that is not dead.
func (r *repairer) firstAlive(from Position) (key Key, ok bool) {
	r.l.WalkLog(r, from, func(_ Position, k *Kset) error {
		for i := range k.Keys {
			if k.Keys[i].Gen == r.l.Gens[k.Keys[i].Seg] {
				key, ok = k.Keys[i], true
				return errFound
			}
		}
		return nil
	})
	return key, ok
}

// cut ends the log in front of the damage, and says what that gives up. It
// erases nothing in segments that the kept part of the log needs: a forged
// log may lead there.
func (r *repairer) cut(d *Damage) (what string) {
	l := r.l
	kept := make([]bool, len(l.Chain))
	kept[l.KeyTail.Seg] = true
	l.WalkLog(r, l.KeyTail, func(_ Position, k *Kset) error {
		if k.Last {
			kept[k.Next] = true
		}
		for i := range k.Keys {
			kept[k.Keys[i].Seg] = true
		}
		return nil
	})
	ksets, keys := 0, 0
	var dirty Ranges
	var erase []Position
	if d.Ahead != nil {
		l.walkOn(r, *d.Ahead, func(at Position, k *Kset) error {
			if !kept[at.Seg] {
				erase = append(erase, at)
			}
			if !k.Last {
				ksets++
			}
			for i := range k.Keys {
				keys++
				if k := &k.Keys[i]; k.Flags&KeyClean == 0 && !r.dead(k) {
					dirty.Add(int64(k.Off), int64(k.Len))
				}
			}
			return nil
		})
	}
	r.barrier()
	for _, at := range erase {
		r.store(zeros[:KsetHeaderSize], l.Offset(at.Seg, at.Off))
	}
	off, end := l.Offset(d.At.Seg, d.At.Off), l.Offset(d.At.Seg, SegmentData)
	for end > off {
		n := min(int64(len(zeros)), end-off)
		end -= n
		r.store(zeros[:n], end)
	}
	r.barrier()
	if ksets == 0 {
		return ""
	}
	dirty.Each(r.Lost.Add)
	return fmt.Sprintf("; with it %d keys in %d ksets behind, with %d bytes of dirty data: %v", keys, ksets, dirty.Bytes(), &dirty)
}

// leftOf returns the sectors that can still be read in what is damaged, between
// the damage and what is found ahead of it.
func (r *repairer) leftOf(d *Damage) (left Ranges) {
	end := min(d.At.Off+MaxKsetSize, SegmentData)
	if d.Ahead != nil && d.Ahead.Seg == d.At.Seg {
		end = d.Ahead.Off
	}
	var buf [KeySize]byte
	for off := d.At.Off + KsetHeaderSize; off+KeySize <= end; {
		err := readFull(r, buf[:], r.l.Offset(d.At.Seg, off))
		k := decodeKey(buf[:])
		switch {
		case err == nil && le.Uint64(buf[8:]) == ksetMagic:
			off += KsetHeaderSize
		case err == nil && k.Validate(uint32(len(r.l.Chain))) == nil && k.Gen == r.l.Gens[k.Seg] && le.Uint32(buf[36:]) == 0 &&
			(r.l.Identity == nil || k.Off+uint64(k.Len) <= uint64(r.l.Identity.BackingSize)):
			if k.Flags&KeyClean == 0 {
				left.Add(int64(k.Off), int64(k.Len))
			}
			off += KeySize
		default:
			off += 8
		}
	}
	return left
}
