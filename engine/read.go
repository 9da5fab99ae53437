package engine

import (
	"fmt"

	"ublk-pcache/ondisk"
)

// A read pins the segments that the index leads it to, copies without any lock, and
// unpins. For what the index does not have it claims the hole with a fill, which reads
// the disk (fill.go); where another fill has claimed it, the read waits for that, and
// begins anew.

// readBatch is how many reads are looked up before the first of them is answered:
// more than that at once makes none faster.
const readBatch = 8

// readSome answers up to readBatch reads. Those that one extent covers, as is
// usual, are looked up first, all of them, and then copied, all of them: the memory
// that their data is in is waited for longest, and the index meanwhile would leave
// the processor's cache.
func (q *Queue) readSome(batch []*Request) {
	spans, hits := q.found.spans[:len(batch)], q.found.hits[:len(batch)]
	bufs, offs := q.found.bufs[:0], q.found.offs[:0]
	if q.c.failure() == ErrAborted {
		clear(hits)
	} else {
		for i, r := range batch {
			spans[i] = q.c.index.spanOf(r)
		}
		prefetchSpans(spans)
		for i, r := range batch {
			v := q.c.pinWhole(spans[i])
			if hits[i] = v; v != 0 && q.c.justCopied(v) {
				bufs = append(bufs, r.Buf)
				offs = append(offs, q.c.layout.Offset(v.seg(), uint32(v.pos())<<sectorShift))
			}
		}
	}
	copied := 0
	if q.c.each != nil && len(bufs) > 0 {
		copied, _ = q.c.each.ReadEach(bufs, offs) // answer meets an error again
	}
	for i, r := range batch {
		switch v := hits[i]; {
		case v == 0:
			q.read(r)
		case copied > 0 && q.c.justCopied(v):
			copied--
			q.c.unpin(v.seg())
			q.counts.hits++
			q.counts.windowHits += uint64(v >> windowShift & 1)
			q.finished = append(q.finished, r)
		default:
			e := [1]extent{spans[i].extent(v)}
			q.answer(r, spans[i], e[:])
		}
	}
}

// justCopied reports whether to read an extent is to copy it, and no more.
func (c *Cache) justCopied(v slot) bool { return !c.crc && v.flags()&extZero == 0 }

// pinWhole returns the span as one extent has it that can be read, whose segment it
// pins, and 0 if there is none.
func (c *Cache) pinWhole(s span) slot {
	s.sh.Lock()
	v := s.hitLocked()
	if v.flags()&extClaim != 0 {
		v = 0
	}
	if v != 0 {
		c.segments.all[v.seg()].pins.Add(1)
	}
	s.sh.Unlock()
	return v
}

// read answers r from the cache and asks the disk for what is not there. If
// another fill has claimed a part of that, r waits for it first.
func (q *Queue) read(r *Request) {
	if q.c.failure() == ErrAborted {
		r.Err = ErrAborted
		q.finished = append(q.finished, r)
		return
	}
	s := q.c.index.spanOf(r)
	if hits, joined := q.lookup(s, r); !joined {
		q.answer(r, s, hits)
	}
}

// answer reads r, which covers s, from pinned extents, and the rest from the disk,
// with the fills that r has and more where the memory fails.
func (q *Queue) answer(r *Request, s span, hits []extent) {
	c := q.c
	for _, e := range hits {
		buf := s.bytes(r.Buf, e)
		if e.flags&extZero != 0 {
			clear(buf)
			c.unpin(e.seg)
			continue
		}
		err := c.readExtent(buf, e, &q.whole)
		if err != nil {
			c.badData(e, s.device(r, e), err, &q.whole)
		}
		switch {
		case err != nil && e.flags&extDirty != 0:
			r.Err = fmt.Errorf("read dirty data at %d: %w", s.device(r, e), err)
		case err != nil:
			// The disk has it too. The extent goes, and the disk's answer is
			// not put in its place by this fill, which the index does not know.
			_, written := c.journal.head()
			c.direct.lose(r.Off/ondisk.StripeSize, written)
			c.index.forget(s.sub(e), s.sub(e).place(e.seg, e.pos), nil)
			q.addFill(r, s, e)
		}
		c.unpin(e.seg)
	}
	if r.fills == nil {
		q.counts.hits++
		if hits[0].flags&extWindow != 0 {
			q.counts.windowHits++
		}
		q.finished = append(q.finished, r)
		return
	}
	q.counts.misses++
	r.passage = q.c.passageOf(r)
	q.startFills(r)
}

// bytes returns the part of buf, which covers s, that belongs to e.
func (s span) bytes(buf []byte, e extent) []byte {
	return buf[int(e.off-s.off)<<sectorShift : int(e.end()-s.off)<<sectorShift]
}

// device returns the address of e in bytes, for r which covers s.
func (s span) device(r *Request, e extent) int64 {
	return r.Off + int64(e.off-s.off)<<sectorShift
}

// lookup returns the extents that r can be read from, pinned, and claims the
// holes between them with fills. If a hole is claimed already, it only puts r
// in line for that fill, and says so.
func (q *Queue) lookup(s span, r *Request) (hits []extent, joined bool) {
	s.sh.Lock()
	defer s.sh.Unlock()
	hits = s.partsLocked(q.pieces[:0], func(extent) bool { return true })
	q.pieces = hits
	if len(hits) > 0 {
		s.hitPartsLocked()
	}
	for _, e := range hits {
		if e.flags&extClaim != 0 {
			r.stage = stageRead
			f := q.c.fills.get(e.seg)
			f.waiters = append(f.waiters, r)
			return nil, true
		}
	}
	at := s.off
	for _, e := range hits {
		q.c.segments.all[e.seg].pins.Add(1)
		if at < e.off {
			q.claimLocked(s, r, at, e.off)
		}
		at = e.end()
	}
	if at < s.end() {
		q.claimLocked(s, r, at, s.end())
	}
	return hits, false
}

func (q *Queue) claimLocked(s span, r *Request, from, to uint16) {
	e := extent{off: from, n: to - from, flags: extClaim}
	e.seg = q.addFill(r, s, e).id
	s.sub(e).setLocked(e, nil)
}
