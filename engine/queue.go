package engine

import (
	"fmt"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// Queue serves the requests of one thread. Hits and writes are done inline; a
// request that has to wait for a disk, for space or for a sync goes elsewhere
// and comes back through the inbox, whose first entry wakes the thread.
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

	window windowHead

	line []*Request // requests of the queue that wait in space, in order
	left bool       // one of them has gone, and nobody else was looked after since

	reads     []*Request   // submitted, not looked up yet
	keys      []ondisk.Key // stored, not committed yet; oldest first
	publisher publisher    // those of logged
	logged    []ondisk.Key // logged by this queue and not entered yet
	offer     offer        // keys that another one may log
	together  []ondisk.Key // scratch: keys of this queue and of others
	filled    []*fill      // read from the disk, waiting for the commit
	windowed  []*fill      // likewise, stored in the window
	turn      []*Request   // finished once their keys are committed

	// Keys of writes, ever. The batch holds stored - committed of them.
	stored, committed uint64

	finished, returned []*Request

	found struct { // scratch of readSome
		spans [readBatch]span
		hits  [readBatch]slot
		bufs  [readBatch][]byte
		offs  [readBatch]int64
	}
	pieces     []extent // scratch of a read
	whole      []byte   // likewise
	freeFill   *fill
	committing atomic.Bool  // it obeys the mode that it has looked at
	stalled    atomic.Bool  // the log was full at the last commit
	since      atomic.Int64 // when it first was, as sinceStart counts

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
	windowHits                    uint64 // of the hits, those in the window
	ghostHits                     uint64 // of the misses, those of what had just left it
	readBytes, writeBytes         uint64
	bypassed                      uint64 // bytes that were read from the disk and not kept
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

// OnWake sets the function that is called, from any goroutine, when something
// has come back to the queue and the next Turn should be soon. Call it before
// the first Submit.
func (q *Queue) OnWake(wake func()) { q.wake = wake }

// ReadBy sets the function that reads the disk for the queue's misses, in place
// of Disk.Read and like it, for a thread that can do so by itself. Call it
// before the first Submit.
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
		// Requests behind the ones that have gone may be the queue's own, and the
		// next Submit must not find them still in line.
		q.left = false
		q.c.serve()
		q.takeInbox()
	}
	q.enterWindowed()
	q.commit()
	if !q.abandoned && q.c.failure() == ErrAborted {
		q.abandoned = true
		q.abandonFills()
	}
	q.show()
	q.finished, q.returned = q.returned[:0], q.finished
	return q.returned
}

// takeInbox goes on with the requests that have come back.
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
		case stageDirect:
			q.endDirect(r)
		case stageAnswered:
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
// that have no others. A turn pays for one commit; the rest comes with the
// next, which is soon.
func (q *Queue) commit() {
	q.payOwed()
	if len(q.turn) == 0 && len(q.filled) == 0 && len(q.keys) == 0 {
		return
	}
	q.committing.Store(true) // before the mode is looked at, see awaitTurns
	through := promisesClean(q.c.settings.mode())
	if through {
		q.c.register(q)
	}
	done, err := q.commitKeys()
	// Mostly there is nothing to note.
	if err != nil || len(q.keys) > 0 || q.stalled.Load() {
		q.noteStall(err)
	}
	q.finishTurn(done, err, through)
	q.committing.Store(false)
	for _, f := range q.filled {
		q.endFill(f)
	}
	q.filled = q.filled[:0]
}

// commitKeys commits keys of the batch and of what was filled, and returns how many of
// the batch's, ever, have been.
func (q *Queue) commitKeys() (done uint64, err error) {
	c := q.c
	if len(q.keys) == 0 && len(q.filled) == 0 {
		return q.committed, nil
	}
	if err = c.failure(); err == nil {
		err = c.commit(q)
	}
	done = q.committed
	switch err {
	case nil:
		c.writeback.wrote()
	case errLogFull: // the keys stay, see noteStall
	default:
		c.fail(err)
		q.abandon()
	}
	return done, err
}

// noteStall is told how a commit went, and sees to it that the queue goes on with the
// rest of the batch: when there is room for the log, or soon.
func (q *Queue) noteStall(err error) {
	c := q.c
	// Fills that found the log full were given up, and nobody would come back
	// to a queue that waits without keys.
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
		if c.refillAtOnce() {
			q.wake()
		}
		c.gc.kick() // which looks for queues that have stalled
	case err == nil && len(q.keys) > 0:
		q.wake()
	}
}

// finishTurn finishes the requests whose keys are among the first done, or which have failed.
func (q *Queue) finishTurn(done uint64, err error, through bool) {
	c := q.c
	cost := c.brake.cost.Load()
	written := uint64(0) // what all writes of the turn that are committed are logged in front of
	if through {
		_, written = c.journal.head()
	}
	stay := q.turn[:0]
	for _, r := range q.turn {
		if r.last > done {
			if err == nil || err == errLogFull {
				stay = append(stay, r)
				continue
			}
			if r.Err = err; r.through {
				c.through.forget(r)
			}
		}
		if r.through && !through {
			c.through.forget(r)
		}
		switch {
		case r.Err != nil:
		case through && (r.Op == Write || r.Op == Zero):
			c.awaitDisk(r, written)
			continue
		case (r.Op == Flush || r.FUA) && !c.mem.Durable():
			c.syncer.add(r)
			continue
		case cost > 0 && r.Op == Write && c.brake.holds(r, cost):
			continue
		}
		q.finished = append(q.finished, r)
	}
	q.turn = stay
}

// abandon forgets the keys of a batch that could not be committed.
func (q *Queue) abandon() {
	for i := range q.keys {
		q.c.drop(q.keys[i].Seg)
	}
	q.committed += uint64(len(q.keys))
	q.keys = q.keys[:0]
}
