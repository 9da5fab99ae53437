package backing

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"ublk-pcache/internal/uring"
)

// lane is one ring with its thread. Invariant: an operation is in exactly one
// place, the queue, a slot, or finished, and done is called when it leaves the
// slot (or, after a failure of the ring, the queue), on the lane's thread.
//
// # Who enters the ring
//
// Any goroutine may submit. The obvious way is a lock around the submission
// queue, the submitter entering the kernel itself, and one goroutine waiting
// for completions. But io_uring finishes an operation in the context of the
// task that submitted it: a completion would interrupt the submitter, in our
// case most often a queue thread asleep in its own ring, only to let it do
// the bookkeeping for a ring that is none of its business, and the waiting
// goroutine would hear of it after that. So submitters hand over instead: they
// append to the queue, and one thread submits, waits and reaps, in the same
// system call, on a ring that no other thread enters. A batch handed over
// while it is busy costs it one system call, and its submitters none.
//
// # When a message is needed
//
// idle says that the thread is waiting in the kernel, or about to. Whoever
// submits and finds it set clears it and sends the message, so there is at most
// one per sleep, and none from done callbacks or while the thread is busy. The
// thread sets it in the same critical section in which it finds the queue
// empty or the slots full; with full slots a completion will wake it, and a
// message too many does no harm.
//
// The thread waits as ordinary blocking system calls do, giving up its P: the
// device's latency is above what that costs, and two threads fewer hold a P
// for long.
type lane struct {
	fd    int
	path  string // for errors
	block bool   // the device is one, not a file
	ring  *uring.Ring
	waker *uring.Messenger
	slots []op           // by user data
	since []atomic.Int64 // by user data: when the operation came, nanoseconds since epoch, 0 for none
	free  []uint32       // indices of slots
	ended chan struct{}

	zeroing zeroing // the best way that has not been refused
	zeros   []byte  // only read

	mu struct {
		sync.Mutex
		queue  fifo
		idle   bool
		closed bool
	}
}

// inFlight is how many operations the device is given at once: the number of
// requests that two queues of depth 128 can have waiting for it.
const inFlight = 256

// wakeUp is the user data of a message; operations carry their slot.
const wakeUp = inFlight

// Kind tells operations apart.
type Kind uint8

const (
	OpRead Kind = iota
	OpWrite
	OpFlush
	OpZero
)

func (k Kind) String() string {
	return [...]string{"read", "write", "flush", "zero"}[k]
}

type op struct {
	kind Kind
	by   zeroing // OpZero: how it was issued
	buf  []byte  // what is left of the transfer
	off  int64
	n    int64 // OpZero: what is left of it
	done func(error)
}

// startLane returns when the lane is ready for submissions.
func startLane(fd int, path string, block bool) (*lane, error) {
	l := &lane{fd: fd, path: path, block: block, slots: make([]op, inFlight), since: make([]atomic.Int64, inFlight), ended: make(chan struct{})}
	for i := range l.slots {
		l.free = append(l.free, uint32(i))
	}
	l.mu.queue.ops = make([]op, inFlight)
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // the ring's single issuer
		defer runtime.UnlockOSThread()
		defer close(l.ended) // when nothing is left, the ring included
		var err error
		if l.ring, err = uring.New(uring.Options{Entries: inFlight, SingleIssuer: true}); err != nil {
			ready <- err
			return
		}
		defer l.ring.Close()
		if l.waker, err = uring.NewMessenger(l.ring); err != nil {
			ready <- err
			return
		}
		defer l.waker.Close()
		if l.zeros, err = uring.AlignedBuffer(zeroPiece); err != nil {
			ready <- err
			return
		}
		defer uring.FreeBuffer(l.zeros)
		ready <- nil
		l.run()
	}()
	return l, <-ready
}

func (l *lane) submit(o op) {
	l.mu.Lock()
	if l.mu.closed {
		panic("backing: " + o.kind.String() + " submitted to a closed device")
	}
	l.mu.queue.push(o)
	wake := l.mu.idle
	l.mu.idle = false
	l.mu.Unlock()
	if wake {
		l.wake()
	}
}

// close ends the lane once everything submitted so far has finished.
func (l *lane) close() {
	l.mu.Lock()
	l.mu.closed = true
	l.mu.Unlock()
	l.wake()
	<-l.ended
}

func (l *lane) wake() {
	if err := l.waker.Post(wakeUp); err != nil {
		// A thread that cannot be woken is requests that hang for ever.
		panic(fmt.Sprintf("backing: wake the thread of a ring: %v", err))
	}
}

func (l *lane) run() {
	for l.fill() {
		if err := l.ring.Wait(1); err != nil {
			// Operations in flight may still use their buffers, so they cannot
			// be reported as failed either.
			panic(fmt.Sprintf("backing: %v", err))
		}
		l.mu.Lock()
		l.mu.idle = false
		l.mu.Unlock()
		for cqe, ok := l.ring.Next(); ok; cqe, ok = l.ring.Next() {
			if cqe.UserData != wakeUp {
				l.complete(uint32(cqe.UserData), cqe.Res)
			}
		}
	}
}

// fill moves operations from the queue to free slots, and tells whether there
// is anything to wait for.
func (l *lane) fill() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := int64(time.Since(epoch))
	for len(l.free) > 0 && l.mu.queue.n > 0 {
		i := l.free[len(l.free)-1]
		l.free = l.free[:len(l.free)-1]
		l.slots[i] = l.mu.queue.pop()
		l.since[i].Store(now)
		l.issue(i)
	}
	l.mu.idle = true
	return !l.mu.closed || len(l.free) < inFlight
}

// issue queues the operation in a slot. There is an entry for each slot, and a
// slot is issued at most once between two entries into the kernel.
func (l *lane) issue(i uint32) {
	o := &l.slots[i]
	sqe := l.ring.SQE()
	sqe.UserData = uint64(i)
	switch o.kind {
	case OpRead:
		sqe.PrepareRead(l.fd, o.buf, o.off)
	case OpWrite:
		sqe.PrepareWrite(l.fd, o.buf, o.off)
	case OpFlush:
		sqe.PrepareDatasync(l.fd)
	case OpZero:
		l.issueZero(sqe, o)
	}
}

func (l *lane) complete(i uint32, res int32) {
	o := &l.slots[i]
	if o.kind == OpZero && l.zeroMore(o, res) {
		l.issue(i)
		return
	}
	var err error
	switch {
	case res == -int32(syscall.ENOSPC) && l.block:
		err = fmt.Errorf("%s at byte %d of %s: %w", o.kind, o.off, l.path, errGone)
	case res < 0:
		err = fmt.Errorf("%s at byte %d of %s: %w", o.kind, o.off, l.path, syscall.Errno(-res))
	case res == 0 && len(o.buf) > 0:
		err = fmt.Errorf("%s at byte %d of %s: %w", o.kind, o.off, l.path, errShort)
	case int(res) < len(o.buf):
		o.buf = o.buf[res:]
		o.off += int64(res)
		l.issue(i)
		return
	}
	done := o.done
	*o = op{}
	l.since[i].Store(0)
	l.free = append(l.free, i)
	done(err)
}

// epoch is before any operation, on a clock that nobody sets.
var epoch = time.Now()

// waiting returns how long the device has owed an answer to the oldest operation
// with a slot; what waits for one is younger. Any goroutine.
func (l *lane) waiting() (longest time.Duration) {
	for i := range l.since {
		if at := l.since[i].Load(); at != 0 {
			longest = max(longest, time.Since(epoch)-time.Duration(at))
		}
	}
	return longest
}

// fifo is a queue that allocates only while it grows beyond its largest size.
type fifo struct {
	ops  []op // length a power of two
	head int
	n    int
}

func (q *fifo) push(o op) {
	if q.n == len(q.ops) {
		bigger := make([]op, 2*len(q.ops))
		copied := copy(bigger, q.ops[q.head:])
		copy(bigger[copied:], q.ops[:q.head])
		q.ops, q.head = bigger, 0
	}
	q.ops[(q.head+q.n)&(len(q.ops)-1)] = o
	q.n++
}

func (q *fifo) pop() op {
	o := q.ops[q.head]
	q.ops[q.head] = op{}
	q.head = (q.head + 1) & (len(q.ops) - 1)
	q.n--
	return o
}
