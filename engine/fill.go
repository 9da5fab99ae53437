package engine

import (
	"sync"

	"ublk-pcache/ondisk"
)

// A fill is one read of the disk on behalf of a missed read, and the clean
// data that comes of it.
//
// The obvious way, to read the disk and then enter what it said into the
// index, is wrong in two ways: a write may have come in between, and even if
// the index shows nothing of it any more (it was written back and collected),
// the disk's answer is older than it. So a miss first enters a claim of its hole:
// an extent with the number of the fill in place of a segment's. A write simply replaces
// it. When the disk has answered, data is entered only where the index still has
// the claim of this very fill.
//
// Concurrent misses of the same sectors find the claim, and wait for one read
// of the disk instead of asking for the same thing again.
type fill struct {
	q       *Queue // its owner, always the same
	id      uint32 // in its claims
	r       *Request
	at      span
	buf     []byte // the part of r.Buf that is read
	off     int64  // bytes on the disk
	err     error
	keys    []ondisk.Key // where the data was stored, as far as it was
	window  bool         // that is in the window
	direct  bool         // it is a write of r, see direct.go
	since   uint64       // of that, as flushDisk wants it
	waiters []*Request   // under the lock of at's shard
	done    func(error)  // finished, bound once
	next    *fill
}

// fillTable finds a fill by the number in an extent.
type fillTable struct {
	mu  sync.RWMutex
	all []*fill
}

func (t *fillTable) get(id uint32) *fill {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.all[id]
}

// made returns all fills there are.
func (t *fillTable) made() []*fill {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.all
}

func (q *Queue) newFill() *fill {
	if f := q.freeFill; f != nil {
		q.freeFill = f.next
		return f
	}
	t := &q.c.fills
	t.mu.Lock()
	defer t.mu.Unlock()
	f := &fill{q: q, id: uint32(len(t.all))}
	f.done = f.finish
	t.all = append(t.all, f)
	return f
}

// addFill gives r one more thing to wait for.
func (q *Queue) addFill(r *Request, s span, e extent) *fill {
	f := q.newFill()
	f.r, f.at, f.err, f.keys, f.window, f.direct = r, s.sub(e), nil, f.keys[:0], false, false
	f.buf, f.off = s.bytes(r.Buf, e), s.device(r, e)
	f.next, r.fills = r.fills, f
	return f
}

func (q *Queue) startFills(r *Request) {
	n := int32(0)
	for f := r.fills; f != nil; f = f.next {
		n++
	}
	r.lacks.Store(n)
	r.stage = stageFilled
	// With the last of them r may be back with its queue, and f on a free
	// list: but only this thread, the queue's, would put it there.
	for f := r.fills; f != nil; f = f.next {
		q.ask(f.buf, f.off, f.done)
	}
}

// finish is called by the disk.
func (f *fill) finish(err error) {
	f.err = err
	if f.direct {
		f.q.c.direct.landed(f)
		return
	}
	f.answer()
}

// answer hands the request back to its queue if it lacks nothing else.
func (f *fill) answer() {
	if r := f.r; r.lacks.Add(-1) == 0 {
		r.q.post(r)
	}
}

// abandoned is added to the lacks of a request that has been finished without its
// fills. It is more than there can be, so the last of them, if it ever ends, does not
// hand the request back a second time.
const abandoned = 1 << 30

// abandonFills finishes the reads that wait for the disk with ErrAborted, and
// wakes the requests that wait for their fills. The fills stay the disk's.
// The queue starts no others afterwards.
func (q *Queue) abandonFills() {
	// Giving up takes the lock of a shard, under which a fill may be made.
	for _, f := range q.c.fills.made() {
		if f.q != q || f.r == nil {
			continue
		}
		f.giveUp()
		// With none lacking the request is on its way back by itself.
		lacks := &f.r.lacks
		for n := lacks.Load(); n > 0 && n < abandoned; n = lacks.Load() {
			if lacks.CompareAndSwap(n, n+abandoned) {
				f.r.Err = ErrAborted
				q.finished = append(q.finished, f.r)
			}
		}
	}
}

// takeFills stores what the disk said, if it is to be kept and there is space without
// waiting for it: a read never makes a write wait.
func (q *Queue) takeFills(r *Request) {
	c := q.c
	passes := c.passes(r) || !keepsReads(c.settings.mode()) || c.flushes.unsure.Load()
	for f := r.fills; f != nil; {
		next := f.next
		err := c.errs.diskRead(f.off, f.err)
		switch {
		case err != nil:
			if r.Err == nil {
				r.Err = err
			}
		case passes:
			q.counts.bypassed += uint64(len(f.buf))
		case c.failure() != nil || q.stalled.Load():
		case !c.ghost.take(f.off >> sectorShift):
			q.storeInWindow(f)
		default:
			q.counts.ghostHits++
			for done := 0; done < len(f.buf); {
				k, ok := q.store(f.buf[done:], f.off+int64(done), ondisk.KeyClean, r)
				if !ok {
					break
				}
				f.keys = append(f.keys, k)
				done += int(k.Len)
			}
		}
		switch {
		case len(f.keys) == 0:
			q.endFill(f)
		case f.window:
			q.windowed = append(q.windowed, f)
		default:
			q.filled = append(q.filled, f)
		}
		f = next
	}
	r.fills = nil
	q.turn = append(q.turn, r)
}

// fillKeysLocked puts the keys of the stored fills in front of the batch, as
// far as the index still has the claims and the writes leave them room in the
// kset, and returns how many. The caller holds the journal's lock, so no write
// can replace a claim that was found here before the key is entered: one that was
// logged before has its shards locked until it is in the index.
func (q *Queue) fillKeysLocked() int {
	if len(q.filled) == 0 {
		return 0
	}
	writes := len(q.keys)
	var parts [64]extent
	for _, f := range q.filled {
		for i := range f.keys {
			k := &f.keys[i]
			stored, _ := q.c.keySpan(k)
			stored.sh.Lock()
			mine := stored.partsLocked(parts[:0], f.claims)
			stored.sh.Unlock()
			for _, e := range mine {
				if len(q.keys) >= ondisk.MaxKeys {
					break
				}
				part := stored.keyPart(k, e)
				if q.c.crc && part.Len != k.Len {
					part.CRC = ondisk.Checksum(f.at.bytes(f.buf, e))
				}
				q.c.segments.all[k.Seg].refs.Add(1)
				q.keys = append(q.keys, part)
			}
			q.c.drop(k.Seg)
		}
		f.keys = f.keys[:0]
	}
	rotate(q.keys, writes)
	return len(q.keys) - writes
}

// rotate moves the first n keys behind the others.
func rotate(keys []ondisk.Key, n int) {
	reverse := func(k []ondisk.Key) {
		for i, j := 0, len(k)-1; i < j; i, j = i+1, j-1 {
			k[i], k[j] = k[j], k[i]
		}
	}
	reverse(keys[:n])
	reverse(keys[n:])
	reverse(keys)
}

// endFill gives a fill up and puts it on the free list.
func (q *Queue) endFill(f *fill) {
	f.giveUp()
	q.recycle(f)
}

// recycle puts a fill that has ended on the free list.
func (q *Queue) recycle(f *fill) {
	f.r, f.buf, f.keys = nil, nil, f.keys[:0]
	f.next, q.freeFill = q.freeFill, f
}

// giveUp takes out the claims that a fill still has, and lets the requests that waited
// for it try again.
func (f *fill) giveUp() {
	q := f.q
	f.at.sh.Lock()
	q.pieces = f.at.partsLocked(q.pieces[:0], f.claims)
	for _, e := range q.pieces {
		f.at.sub(e).cutLocked(nil)
	}
	f.unlockAndWake()
}

// unlockAndWake unlocks the shard of a fill and lets the requests that waited for the fill
// try again.
func (f *fill) unlockAndWake() {
	waiters := f.waiters
	f.waiters = nil
	f.at.sh.Unlock()
	for _, r := range waiters {
		r.q.post(r)
	}
}
