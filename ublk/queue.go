package ublk

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/uring"
)

// Op is what a request asks for. The values are the driver's UBLK_IO_OP_*.
type Op uint8

const (
	Read        Op = 0
	Write       Op = 1
	Flush       Op = 2
	Discard     Op = 3
	WriteZeroes Op = 5
)

// Request is one request from the block layer. It and its buffer belong to the
// handler from Submit until the tag's Completion has been returned from Turn.
type Request struct {
	Tag    uint16
	Op     Op
	FUA    bool   // Write and WriteZeroes: durable before it completes
	Offset int64  // bytes; 0 for Flush
	Len    int    // bytes; 0 for Flush
	Buf    []byte // Read and Write: Len bytes, page-aligned, mapped; otherwise nil
}

// Completion ends a request. With Err 0 the whole request was done. A short
// result cannot be expressed: the driver's treatment of one depends on its
// version, and 7.3 acknowledges the whole request.
type Completion struct {
	Tag uint16
	Err syscall.Errno
}

// Handler serves one queue. Both methods run on the queue's own thread, and
// nothing else runs there; they must not block, and should not allocate.
type Handler interface {
	// Submit takes a request. It cannot complete it yet.
	Submit(r *Request)

	// Turn is called when all requests that were there have been submitted,
	// and after each Wake and each end of a lent operation. It appends the
	// requests that are finished, in any order, and returns the slice.
	Turn(done []Completion) []Completion
}

// Queue is one hardware queue of a device: a ring, and one OS thread that does
// nothing but this loop:
//
//	enter the kernel: hand back what is finished, wait for what is next
//	give each new request, and the end of each lent operation, to the handler
//	let the handler end its turn; queue the completions it returns
//
// A tag is in one of three states, and only this thread looks at it: with the
// driver (fetched), with the handler (serving), or ended.
//
// # How a loop ends
//
// When the disk is removed, or its server is asked to quiesce, the driver
// aborts each tag it holds: the fetch completes with ENODEV, and the tag has
// ended. A tag that the handler holds at that moment cannot be aborted. Its
// request must still be completed, because the driver waits for it, but the
// fetch that goes along with the completion may never come back (seen on 6.18
// and 7.3). So once a first tag has been aborted, a tag ends with its commit,
// and the last commits are submitted without waiting for anything. When all
// tags have ended the loop returns nil.
//
// The other clean way out is to leave: the device is meant for another server,
// which takes it over as from one that died, or has not been started. The
// commits of the last turn are submitted, and once the character device is
// closed, the driver requeues all other requests that the handler holds.
//
// Every other end is fatal, and not only for this queue: when the thread that
// fetched a tag goes away, the driver cancels the fetch, marks every queue as
// being cancelled, and the disk hangs until the character device is closed.
// Only the end of the process closes it reliably, and then a new process can
// recover the device.
//
// # Being woken
//
// Requests that finish on other threads are collected by the handler, which
// calls Wake and gets a Turn. A message to the ring costs the sender a system
// call, so it is sent only to a thread that sleeps: state says so. The thread
// declares itself asleep before it enters the kernel, unless a Wake has come
// since the last Turn began; then it enters without waiting. A message may arrive
// when a request has woken the sleeper already. It then causes one turn too many,
// but at most one is sent per sleep.
//
// pace.go says when the thread sleeps and when it does not.
type Queue struct {
	id     int
	char   int // descriptor of the character device
	fatal  func(error)
	tags   []tag
	bufs   []byte
	descs  []byte
	ring   *uring.Ring
	waker  *uring.Messenger
	state  atomic.Uint32
	leave  atomic.Bool // give the device up after this turn
	ended  int         // tags in state ended
	aborts bool        // at least one tag has been aborted
	pace   pace

	handler Handler
	done    []Completion

	completed func(id uint32, res int32) // see Lend
	lent      bool                       // an operation is queued
}

// Values of Queue.state.
const (
	awake  = iota
	asleep // in the kernel, or about to be: a Wake must send a message
	woken  // awake, and a Wake has come: do not wait
)

type tag struct {
	state tagState
	req   Request
	buf   []byte
}

type tagState uint8

const (
	fetched tagState = iota
	serving
	ended
)

// Fetches carry their tag as user data, the handler's own operations their number
// from ownFirst on, and messages wakeUp.
const (
	wakeUp   = 1 << 16
	ownFirst = 1 << 32
)

func newQueue(id, depth, maxIO int, fatal func(error)) (*Queue, error) {
	// Nothing is reserved or touched until a request needs it.
	bufs, err := uring.AlignedBuffer(depth * maxIO)
	if err != nil {
		return nil, err
	}
	q := &Queue{id: id, fatal: fatal, bufs: bufs,
		tags: make([]tag, depth), done: make([]Completion, 0, depth)}
	for i := range q.tags {
		q.tags[i].buf = bufs[i*maxIO : (i+1)*maxIO : (i+1)*maxIO]
	}
	return q, nil
}

// ID is the queue's number in its device, from 0.
func (q *Queue) ID() int { return q.id }

// Depth is how many requests the handler can hold at once; tags are below it.
func (q *Queue) Depth() int { return len(q.tags) }

// Lend lets the handler have operations of its own on the queue's ring, up to
// Depth at once: they reach the kernel with what the queue hands back, and their
// results, for which completed is called, come with the requests, before a Turn.
// NewHandler may call it.
//
// When the queue ends, operations under way are forgotten: the kernel
// finishes them some time later, so their memory must stay mapped.
func (q *Queue) Lend(completed func(id uint32, res int32)) { q.completed = completed }

// Entry returns the ring's entry for the handler's operation id, with its user
// data filled in. No id may be used again before completed has been called with
// it. Only the queue's thread may call it.
func (q *Queue) Entry(id uint32) *uring.SQE {
	sqe := q.ring.SQE()
	sqe.UserData = ownFirst + uint64(id)
	q.lent = true
	return sqe
}

// Wake makes the queue's thread call Handler.Turn soon. Any goroutine may call
// it at any time, also before the queue runs and after it has ended. Any
// number of Wakes before a Turn cause one Turn.
func (q *Queue) Wake() {
	if q.state.Swap(woken) != asleep {
		return
	}
	if err := q.waker.Post(wakeUp); err != nil && err != uring.ErrClosed {
		q.fatal(fmt.Errorf("wake queue %d: %w", q.id, err))
	}
}

// serve is the queue's thread. It reports on ready that it has a ring, waits to
// hear whether to fetch, and reports again that it has fetched all tags. If it
// cannot, it reports the error and ends.
func (q *Queue) serve(ready chan<- error, fetch <-chan bool) {
	// The driver knows a tag's owner by its task, and so does the ring.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	defer q.release()
	if err := q.makeRing(); err != nil {
		ready <- fmt.Errorf("start queue %d: %w", q.id, err)
		return
	}
	ready <- nil
	if !<-fetch {
		return
	}
	if err := q.fetchAll(); err != nil {
		ready <- fmt.Errorf("start queue %d: %w", q.id, err)
		return
	}
	ready <- nil
	if err := q.loop(); err != nil {
		q.fatal(fmt.Errorf("queue %d ended: %w", q.id, err))
	}
}

func (q *Queue) makeRing() (err error) {
	// Each tag is fetched or committed once per turn, and the handler may have as
	// many operations of its own.
	if q.ring, err = uring.New(uring.Options{Entries: 2 * uint32(len(q.tags)), SingleIssuer: true}); err != nil {
		return err
	}
	q.waker, err = uring.NewMessenger(q.ring)
	return err
}

func (q *Queue) fetchAll() (err error) {
	// Mapping ties the device to this process until a recovery resets it, which
	// 6.12 does only after a queue was fetched: so let nothing fail in between.
	page := os.Getpagesize()
	roundUp := func(n int) int { return (n + page - 1) &^ (page - 1) }
	q.descs, err = unix.Mmap(q.char, int64(q.id*roundUp(maxQueueDepth*ioDescSize)),
		roundUp(len(q.tags)*ioDescSize), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map request descriptors: %w", err)
	}
	for i := range q.tags {
		q.issue(ioFetchReq, uint16(i), 0)
	}
	if err := q.ring.Submit(); err != nil {
		return err
	}
	// A fetch that is refused completes at once. One that is accepted cannot
	// complete before the device is started.
	if cqe, ok := q.ring.Next(); ok {
		return fetchError(cqe)
	}
	return nil
}

func (q *Queue) release() {
	if q.waker != nil {
		q.waker.Close()
	}
	if q.ring != nil {
		q.ring.Close()
	}
	if q.descs != nil {
		unix.Munmap(q.descs)
	}
}

func (q *Queue) loop() error {
	for q.ended < len(q.tags) && !q.leave.Load() {
		if err := q.enter(); err != nil {
			return err
		}
		came := 0
		for cqe, ok := q.ring.Next(); ok; cqe, ok = q.ring.Next() {
			if err := q.receive(cqe); err != nil {
				return err
			}
			came++
		}
		q.pace.turned(came)
		q.state.Swap(awake) // this Turn answers all Wakes up to here
		q.done = q.handler.Turn(q.done[:0])
		for _, c := range q.done {
			q.commit(c)
		}
	}
	return q.ring.Submit()
}

// enter hands the kernel what is queued, and returns when something has come or
// a Turn is wanted.
func (q *Queue) enter() error {
	defer q.state.Store(awake)
	if q.lent {
		// Some drivers sleep while they take an operation, and no signal ends that
		// sleep. If the call kept its P, the runtime would wait for it, and all
		// goroutines for the runtime.
		q.lent = false
		if err := q.ring.Wait(0); err != nil || q.pending() {
			return err
		}
	}
	if q.pace.polls() {
		if err := q.ring.Turn(0); err != nil || q.pending() {
			return err
		}
		if q.pace.poll(q.pending) {
			return q.ring.Turn(0)
		}
	}
	if !q.state.CompareAndSwap(awake, asleep) {
		return q.ring.Turn(0)
	}
	slept := !q.ring.Pending()
	if err := q.ring.Turn(1); err != nil || !slept || !q.pace.gathers() {
		return err
	}
	q.state.Store(awake)
	q.pace.gather()
	return q.ring.Turn(0)
}

// pending reports whether there is something to do without having slept.
func (q *Queue) pending() bool { return q.ring.Pending() || q.state.Load() == woken }

func (q *Queue) receive(cqe uring.CQE) error {
	switch {
	case cqe.UserData == wakeUp:
		return nil
	case cqe.UserData >= ownFirst:
		q.completed(uint32(cqe.UserData-ownFirst), cqe.Res)
		return nil
	}
	t := &q.tags[cqe.UserData]
	switch {
	case cqe.Res == 0:
		if t.state == ended { // committed after an abort, and fetched all the same
			q.ended--
		}
		t.state = serving
		q.describe(uint16(cqe.UserData), t)
		q.handler.Submit(&t.req)
	case syscall.Errno(-cqe.Res) == syscall.ENODEV:
		q.aborts = true
		if t.state != ended {
			t.state = ended
			q.ended++
		}
	default:
		return fetchError(cqe)
	}
	return nil
}

// describe fills in the request from the descriptor, which the driver wrote
// before it completed the fetch.
func (q *Queue) describe(i uint16, t *tag) {
	d := (*ioDesc)(unsafe.Pointer(&q.descs[int(i)*ioDescSize]))
	t.req = Request{Tag: i, Op: Op(d.opFlags), FUA: d.opFlags&ioFlagFUA != 0}
	if t.req.Op == Flush { // its start sector is -1
		return
	}
	t.req.Offset = int64(d.startSector) << sectorShift
	t.req.Len = int(d.nrSectors) << sectorShift
	if t.req.Op == Read || t.req.Op == Write {
		t.req.Buf = t.buf[:t.req.Len]
	}
}

func (q *Queue) commit(c Completion) {
	t := &q.tags[c.Tag]
	if t.state != serving {
		panic(fmt.Sprintf("ublk: queue %d: completion of tag %d, which the handler does not hold", q.id, c.Tag))
	}
	result := -int32(c.Err)
	if c.Err == 0 && t.req.Buf != nil {
		result = int32(t.req.Len)
	}
	q.issue(ioCommitAndFetchReq, c.Tag, result)
	t.state = fetched
	if q.aborts {
		t.state = ended
		q.ended++
	}
}

func (q *Queue) issue(op uint32, i uint16, result int32) {
	sqe := q.ring.SQE()
	sqe.UserData = uint64(i)
	cmd := (*ioCmd)(sqe.PrepareCommand(q.char, op))
	cmd.queueID = uint16(q.id)
	cmd.tag = i
	cmd.result = result
	cmd.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(q.tags[i].buf))))
}

func fetchError(cqe uring.CQE) error {
	if cqe.Res < 0 {
		return fmt.Errorf("fetch tag %d: %w", cqe.UserData, syscall.Errno(-cqe.Res))
	}
	return fmt.Errorf("%w: tag %d, result %d", errUnexpectedResult, cqe.UserData, cqe.Res)
}
