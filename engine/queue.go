package engine

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// Queue serves the requests of one thread. Hits and writes are done inline;
// what has to wait for a disk, for space or for a sync goes elsewhere and
// comes back through the inbox, whose first entry wakes the thread.
type Queue struct {
	c    *Cache
	wake func()
	ask  func(buf []byte, off int64, done func(error)) // the disk, for a miss

	// The data segment being filled. Its reference keeps it from dying, so those
	// of the keys that name it need not be there before they are committed: owed
	// counts them.
	head struct {
		open bool
		seg  uint32
		off  uint32 // bytes
		owed int64
	}

	// A run of zeros in the head's segment, with a reference of its own; n
	// bytes, 0 for none yet. Every Zero of the queue names it.
	zeros struct{ off, n uint32 }

	line []*Request // those of the queue that wait in space, in order
	left bool       // one of them has gone, and nobody else was looked after since

	reads    []*Request   // submitted, not looked up yet
	keys     []ondisk.Key // stored, not committed yet; oldest first
	entering entering     // those of logged
	logged   []ondisk.Key // logged by this queue and not entered yet
	offer    offer        // keys that another one may log
	together []ondisk.Key // scratch: keys of this queue and of others
	filled   []*fill      // read from the disk, waiting for the commit
	turn     []*Request   // finished once their keys are committed

	// Keys of writes, ever. The batch holds stored - committed of them.
	stored, committed uint64

	finished, returned []*Request

	found struct { // scratch of readSome
		spans [readBatch]span
		hits  [readBatch]slot
		bufs  [readBatch][]byte
		offs  [readBatch]int64
	}
	pieces   []extent // scratch of a read
	whole    []byte   // likewise
	freeFill *fill
	stalled  atomic.Bool  // the log was full at the last commit
	since    atomic.Int64 // when it first was, as sinceStart counts

	abandoned bool // abandonFills was called

	inbox struct {
		sync.Mutex
		list, spare []*Request
	}

	// An atomic add, or a locked one, would wait for the data of the request
	// before to leave the processor. So counts is shown to others once a turn.
	counts counts
	shown  struct {
		sync.Mutex
		counts
	}
}

// counts is what a queue has done.
type counts struct {
	reads, writes, flushes, zeros uint64 // requests
	hits, misses                  uint64 // reads that did not, or did, need the disk
	readBytes, writeBytes         uint64
}

// show lets others see what the queue has done.
func (q *Queue) show() {
	q.shown.Lock()
	defer q.shown.Unlock()
	q.shown.counts = q.counts
}

// turnRequests is what the lists of a queue have room for without growing.
const turnRequests = 256

func newQueue(c *Cache, id int) *Queue {
	q := &Queue{
		c:        c,
		wake:     func() {},
		ask:      c.disk.Read,
		reads:    make([]*Request, 0, turnRequests),
		keys:     make([]ondisk.Key, 0, 2*turnRequests),
		turn:     make([]*Request, 0, turnRequests),
		finished: make([]*Request, 0, turnRequests),
		returned: make([]*Request, 0, turnRequests),
	}
	q.inbox.list = make([]*Request, 0, turnRequests)
	q.inbox.spare = make([]*Request, 0, turnRequests)
	if id < len(c.segments.resumable) {
		h := c.segments.resumable[id]
		q.head.open, q.head.seg, q.head.off = true, h.seg, h.off
		if c.crc {
			c.sumsOf(h.seg)
		}
		c.segments.all[h.seg].refs.Add(1)
		c.segments.all[h.seg].filling.Store(true)
	}
	return q
}

// OnWake sets what is called, from any goroutine, when something has come
// back to the queue and the next Turn should be soon. Call it before the
// first Submit.
func (q *Queue) OnWake(wake func()) { q.wake = wake }

// ReadBy sets what reads the disk for the queue's misses, in place of Disk.Read
// and like it, for a thread that can do so by itself. Call it before the first
// Submit.
func (q *Queue) ReadBy(read func(buf []byte, off int64, done func(error))) { q.ask = read }

// Submit takes a request. Writes have their data stored at once.
func (q *Queue) Submit(r *Request) {
	r.q, r.Err, r.done, r.last, r.fills = q, nil, 0, 0, nil
	switch r.Op {
	case Flush:
		q.counts.flushes++
		q.turn = append(q.turn, r)
	case Read, Write, Zero:
		if !q.c.covers(r) {
			r.Err = fmt.Errorf("%w: offset %d, length %d", ErrInvalid, r.Off, r.size())
			q.finished = append(q.finished, r)
			return
		}
		if r.Op == Read {
			q.counts.reads++
			q.counts.readBytes += uint64(len(r.Buf))
			q.reads = append(q.reads, r)
			return
		}
		if r.Op == Zero {
			q.counts.zeros++
		} else {
			q.counts.writes++
			q.counts.writeBytes += uint64(len(r.Buf))
		}
		q.write(r)
	}
}

// covers reports whether the range is whole sectors of the device, of one
// stripe if there is data to them.
func (c *Cache) covers(r *Request) bool {
	off, n := r.Off, int64(r.size())
	if uint64(off|n)%ondisk.SectorSize != 0 || off < 0 || n <= 0 || off > c.size-n {
		return false
	}
	if r.Op == Zero {
		return n <= MaxZero
	}
	return int64(stripeLeft(off)) >= n
}

// stripeLeft returns the number of bytes from off to the end of its stripe.
func stripeLeft(off int64) int { return int(ondisk.StripeSize - off%ondisk.StripeSize) }

// Turn ends a turn: it answers the reads that were submitted, takes up what has
// come back, commits the writes, and returns the requests that are finished. The
// slice is valid until the next Turn.
func (q *Queue) Turn() []*Request {
	for reads := q.reads; len(reads) > 0; {
		n := min(len(reads), readBatch)
		q.readSome(reads[:n])
		reads = reads[n:]
	}
	q.reads = q.reads[:0]
	q.takeInbox()
	for q.left {
		// Those who came after the ones that have gone may be the queue's own, and
		// whoever submits next must not find them still in line.
		q.left = false
		q.c.serve()
		q.takeInbox()
	}
	q.commit()
	if !q.abandoned && q.c.failure() == ErrAborted {
		q.abandoned = true
		q.abandonFills()
	}
	q.show()
	q.finished, q.returned = q.returned[:0], q.finished
	return q.returned
}

// takeInbox goes on with what has come back.
func (q *Queue) takeInbox() {
	q.inbox.Lock()
	list := q.inbox.list
	q.inbox.list, q.inbox.spare = q.inbox.spare[:0], list
	q.inbox.Unlock()
	for _, r := range list {
		switch r.stage {
		case stageWrite:
			r.awake = true
		case stageRead:
			q.read(r)
		case stageFilled:
			q.takeFills(r)
		case stageSynced:
			q.finished = append(q.finished, r)
		}
	}
	// In order: those behind one that waits on may need less.
	for len(q.line) > 0 && q.line[0].awake {
		r := q.line[0]
		r.awake = false
		q.write(r)
	}
}

// post hands a request back to its queue. Any goroutine.
func (q *Queue) post(r *Request) {
	q.inbox.Lock()
	first := len(q.inbox.list) == 0
	q.inbox.list = append(q.inbox.list, r)
	q.inbox.Unlock()
	if first {
		q.wake()
	}
}

// commit makes one kset of the batch's oldest keys and finishes the requests
// that have no others. A turn pays for one commit; what is left comes with the
// next, which is soon.
func (q *Queue) commit() {
	c := q.c
	q.settle()
	if len(q.turn) == 0 && len(q.filled) == 0 && len(q.keys) == 0 {
		return
	}
	var err error
	done := q.committed
	if len(q.keys) > 0 || len(q.filled) > 0 {
		if err = c.failure(); err == nil {
			err = c.commit(q)
		}
		done = q.committed
		switch err {
		case nil:
			c.writeback.wrote()
		case errLogFull: // below
		default:
			c.fail(err)
			q.abandon()
		}
	}
	// Fills that found the log full were given up, and nobody comes back for
	// a queue that waits with nothing.
	switch stalled, was := err == errLogFull && len(q.keys) > 0, q.stalled.Load(); {
	case stalled && !was:
		q.since.Store(sinceStart())
		q.stalled.Store(true)
	case !stalled && was:
		c.space.waited(sinceStart() - q.since.Load())
		q.stalled.Store(false)
		c.serve() // the line stood still for that
	}
	switch {
	case err == errLogFull:
		c.gc.kick() // which looks for queues that have stalled
	case err == nil && len(q.keys) > 0:
		q.wake()
	}
	stay := q.turn[:0]
	for _, r := range q.turn {
		if r.last > done {
			if err == nil || err == errLogFull {
				stay = append(stay, r)
				continue
			}
			r.Err = err
		}
		if r.Err == nil && !c.mem.Durable() && (r.Op == Flush || r.FUA) {
			c.syncer.add(r)
			continue
		}
		q.finished = append(q.finished, r)
	}
	q.turn = stay
	for _, f := range q.filled {
		q.endFill(f)
	}
	q.filled = q.filled[:0]
}

// abandon forgets the keys of a batch that could not be committed.
func (q *Queue) abandon() {
	for i := range q.keys {
		q.c.drop(q.keys[i].Seg)
	}
	q.committed += uint64(len(q.keys))
	q.keys = q.keys[:0]
}

// alloc returns a place for up to n bytes of data of r, with a reference to its
// segment for the key that will name it. It begins a new segment only if r may
// take one.
func (q *Queue) alloc(n int, r *Request) (seg, off uint32, got int, ok bool) {
	if q.head.open && (q.head.off == ondisk.SegmentData || q.c.segments.all[q.head.seg].bad.Load()) {
		q.closeHead()
	}
	if !q.head.open {
		seg, ok := q.c.takeData(q, r)
		if !ok {
			return 0, 0, 0, false
		}
		q.head.open, q.head.seg, q.head.off = true, seg, 0
	}
	seg, off = q.head.seg, q.head.off
	got = min(n, int(ondisk.SegmentData-off))
	q.head.off += uint32(got)
	q.head.owed++
	return seg, off, got, true
}

// settle takes the references that are owed.
func (q *Queue) settle() {
	if q.head.owed > 0 {
		q.c.segments.all[q.head.seg].refs.Add(q.head.owed)
		q.head.owed = 0
	}
}

// put allocates a place and stores what is to be there. A segment of which the
// memory fails is given up for another; what it holds already stays.
func (q *Queue) put(n int, r *Request, store func(n int, at int64) error) (seg, off uint32, got int, ok bool) {
	for {
		seg, off, got, ok = q.alloc(n, r)
		if !ok {
			return 0, 0, 0, false
		}
		err := store(got, q.c.layout.Offset(seg, off))
		if err == nil {
			return seg, off, got, true
		}
		q.c.badStore("data to be stored", seg, off, got, err)
		q.head.owed--
		q.closeHead()
	}
}

func (q *Queue) closeHead() {
	q.settle()
	if q.zeros.n > 0 {
		q.zeros.n = 0
		q.c.drop(q.head.seg)
	}
	q.head.open = false
	q.c.segments.all[q.head.seg].filling.Store(false)
	q.c.drop(q.head.seg)
}

// store puts data of r into the region and returns the key for it, with less than
// all of p where the segment or a checksum ended. ok is false where there is
// no space.
func (q *Queue) store(p []byte, off int64, flags ondisk.KeyFlags, r *Request) (k ondisk.Key, ok bool) {
	if q.c.crc {
		p = p[:min(len(p), maxSummed)]
	}
	seg, segOff, n, ok := q.put(len(p), r, func(n int, at int64) error {
		_, err := q.c.mem.WriteAt(p[:n], at)
		return err
	})
	if !ok {
		return k, false
	}
	k = ondisk.Key{
		Off: uint64(off), Len: uint32(n), Flags: flags,
		Seg: seg, SegOff: segOff, Gen: q.c.segments.all[seg].gen.Load(),
	}
	if q.c.crc {
		k.CRC = ondisk.Checksum(p[:n])
		q.c.segments.all[seg].sums.Load().add(sum{uint16(segOff >> sectorShift), uint16(n >> sectorShift), k.CRC})
	}
	return k, true
}

const (
	// zeroRun is how long a run of zeros is made, in bytes, unless the segment
	// ends before: a sixteenth of it. Where more is zeroed at once the run becomes
	// as long as a key may be, a stripe, which makes a discard of a disk of 1 TiB
	// a quarter of a million keys instead of a million.
	zeroRun = 1 << 20
	// zeroRunMin is how long it must be. What else is left of a segment is
	// given up.
	zeroRunMin = 64 << 10
)

var zeros [ondisk.StripeSize]byte

// zeroSum returns the checksum of n zeros, at most a stripe of them.
func zeroSum(n uint32) uint32 { return ondisk.Checksum(zeros[:n]) }

// storeZeros returns a key for zeros like store does for data: without storing
// any, if the head's segment has a run of them already.
//
// A block of the segment is left empty for it. Keys are what fills the log, and
// there is no end to those that a run has room for. With a place of its own each is
// to the cache like a write of a block: it waits where that would wait, and what
// bounds the keys of data bounds those of zeros. And data that the end of the segment
// divides is divided between blocks, or the disk would not take it.
func (q *Queue) storeZeros(n int, r *Request, off int64) (k ondisk.Key, ok bool) {
	if left := q.headLeft(); left == 0 || q.zeros.n == 0 && left < zeroRunMin {
		q.closeHead()
	}
	if q.zeros.n == 0 && !q.makeZeros(zeroRun, r) {
		return k, false
	}
	if n > zeroRun && q.zeros.n < ondisk.StripeSize && q.headLeft() > ondisk.StripeSize && !q.makeZeros(ondisk.StripeSize, r) {
		return k, false
	}
	seg := q.head.seg
	q.head.off += q.block()
	q.head.owed++
	k = ondisk.Key{
		Off: uint64(off), Len: min(uint32(n), q.zeros.n), Flags: ondisk.KeyZero,
		Seg: seg, SegOff: q.zeros.off, Gen: q.c.segments.all[seg].gen.Load(),
	}
	if q.c.crc {
		k.CRC = zeroSum(k.Len)
	}
	return k, true
}

// block is the least that is read and written, in bytes.
func (q *Queue) block() uint32 { return uint32(q.c.disk.BlockSize()) }

// makeZeros begins a run of zeros, which leaves a block of the segment for a key.
func (q *Queue) makeZeros(n uint32, r *Request) bool {
	n = min(n, q.headLeft()-q.block())
	_, off, got, ok := q.put(int(n), r, func(n int, at int64) error { return q.c.mem.Zero(at, int64(n)) })
	if !ok {
		return false
	}
	if q.zeros.n > 0 {
		q.head.owed-- // there was a run in this segment, and a reference for it
	}
	q.zeros.off, q.zeros.n = off, uint32(got)
	return true
}

// headLeft returns how much room there is in the segment that the queue fills, or
// in the one that it would begin.
func (q *Queue) headLeft() uint32 {
	switch {
	case !q.head.open:
		return ondisk.SegmentData
	case q.c.segments.all[q.head.seg].bad.Load():
		return 0
	}
	return ondisk.SegmentData - q.head.off
}

// write gives the data of r its place, as far as there is space. The rest waits in
// line, and so does every other request that comes while anybody is ahead.
func (q *Queue) write(r *Request) {
	c := q.c
	if err := c.failure(); err != nil {
		q.leaveLine(r)
		r.Err = err
		q.finished = append(q.finished, r)
		return
	}
	if q.stalled.Load() || r.ticket == 0 && (len(q.line) > 0 || c.space.parked.Load() > 0) {
		q.wait(r, false)
		return
	}
	if r.Op == Write && q.writeAtOnce(r) {
		return
	}
	for r.done < r.size() {
		k, ok := q.storeNext(r)
		if !ok {
			q.wait(r, true)
			return
		}
		q.keys = append(q.keys, k)
		q.stored++
		r.done += int(k.Len)
	}
	q.leaveLine(r)
	r.last = q.stored
	q.turn = append(q.turn, r)
}

// writeAtOnce does what write is to do and reports true, or nothing that counts, where
// more is to be done than mostly: where r has waited, its data does not fit into the
// segment that the queue fills, or has checksums, or where memory fails.
func (q *Queue) writeAtOnce(r *Request) bool {
	c, n := q.c, uint32(len(r.Buf))
	if c.crc || r.ticket != 0 || !q.head.open || n > ondisk.SegmentData-q.head.off {
		return false
	}
	s := &c.segments.all[q.head.seg]
	if s.bad.Load() {
		return false
	}
	if _, err := c.mem.WriteAt(r.Buf, c.layout.Offset(q.head.seg, q.head.off)); err != nil {
		c.badStore("data to be stored", q.head.seg, q.head.off, len(r.Buf), err)
		q.closeHead()
		return false
	}
	q.keys = append(q.keys, ondisk.Key{Off: uint64(r.Off), Len: n, Seg: q.head.seg, SegOff: q.head.off, Gen: s.gen.Load()})
	q.head.off += n
	q.head.owed++
	q.stored++
	r.done, r.last = int(n), q.stored
	q.turn = append(q.turn, r)
	return true
}

// storeNext stores what comes next of a write or zero.
func (q *Queue) storeNext(r *Request) (k ondisk.Key, ok bool) {
	off := r.Off + int64(r.done)
	if r.Op == Zero {
		return q.storeZeros(min(r.Len-r.done, stripeLeft(off)), r, off)
	}
	return q.store(r.Buf[r.done:], off, 0, r)
}

// wait puts r in line, dry if the queue has no room left for it. The collector
// looks after everybody there: it makes room, and it answers for a cache that has
// failed. It may rest, so a cache that was aborted meanwhile is looked at here, and
// so is room that has been made meanwhile.
func (q *Queue) wait(r *Request, dry bool) {
	r.stage = stageWrite
	if r.ticket == 0 {
		q.line = append(q.line, r)
	}
	q.c.space.park(r, dry)
	if q.c.failure() == ErrAborted {
		q.c.wakeWriters()
	}
	q.c.serve()
	q.c.gc.kick()
}

// leaveLine is called for a request that waits no longer, if it ever did: the first
// of the queue's.
func (q *Queue) leaveLine(r *Request) {
	if r.ticket != 0 {
		q.c.space.leave(r)
		q.line = slices.Delete(q.line, 0, 1)
		q.left = true
	}
}

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
		lookAhead(spans)
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
	v := s.coverLocked()
	if v.flags()&extLoading != 0 {
		v = 0
	}
	if v != 0 {
		c.segments.all[v.seg()].pins.Add(1)
	}
	s.sh.Unlock()
	return v
}

// read answers r from the cache and asks the disk for what is not there. If
// somebody else is already asking for a part of it, r waits for that first.
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
			c.index.forget(s.sub(e), s.sub(e).place(e.seg, e.pos), nil)
			q.addFill(r, s, e)
		}
		c.unpin(e.seg)
	}
	if r.fills == nil {
		q.counts.hits++
		q.finished = append(q.finished, r)
		return
	}
	q.counts.misses++
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
// holes between them with fills. If a hole is claimed already, it does
// nothing but put r in line for that fill, and says so.
func (q *Queue) lookup(s span, r *Request) (hits []extent, joined bool) {
	s.sh.Lock()
	defer s.sh.Unlock()
	hits = s.partsLocked(q.pieces[:0], func(extent) bool { return true })
	q.pieces = hits
	for _, e := range hits {
		if e.flags&extLoading != 0 {
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
	e := extent{off: from, n: to - from, flags: extLoading}
	e.seg = q.addFill(r, s, e).id
	s.sub(e).setLocked(e, nil)
}
