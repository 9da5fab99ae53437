package backing

import (
	"fmt"
	"runtime"
	"sync"

	"ublk-pcache/internal/uring"
)

// lane is the device's own ring with its thread. Invariant: an operation is in
// exactly one place, the queue, a slot, or finished, and done is called when it
// leaves the slot (or, after a failure of the ring, the queue), on the lane's
// thread.
//
// # Who enters the ring
//
// Any goroutine may submit. The obvious way is a lock around the submission
// queue, the submitter entering the kernel itself, and one goroutine waiting
// for completions. But io_uring finishes an operation in the context of the
// task that submitted it. A completion would interrupt the submitter, here
// mostly a queue thread asleep in its own ring, only to let it do the
// bookkeeping of another ring; the waiting goroutine would hear of it after
// that. So submitters hand over instead: they append to the queue, and one
// thread submits, waits and reaps, in the same system call, on a ring that no
// other thread enters. A batch that is handed over while the thread is busy
// costs the thread one system call, and the submitters none.
//
// # When a message is needed
//
// idle says that the thread is waiting in the kernel, or about to. A submitter
// that finds it set clears it and sends the message. So there is at most one
// message per sleep, and none from done callbacks or while the thread is busy.
// The thread sets it in the same critical section in which it finds the queue
// empty or the slots full; with full slots a completion will wake it, and a
// message too many does no harm.
//
// The thread waits as in any blocking system call, and gives up its P: that
// costs less than the device's latency, and one thread fewer holds a P for
// long.
type lane struct {
	flight
	ring  *uring.Ring
	waker *uring.Messenger
	ended chan struct{}

	mu struct {
		sync.Mutex
		queue  fifo
		idle   bool
		closed bool
	}
}

// inFlight is how many operations the lane gives the device at once.
const inFlight = 256

// wakeUp is the user data of a message; operations carry their slot.
const wakeUp = inFlight

// startLane returns when the lane is ready for submissions.
func startLane(f flight) (*lane, error) {
	l := &lane{flight: f, ended: make(chan struct{})}
	l.entry = func(slot uint32) *uring.SQE {
		sqe := l.ring.SQE()
		sqe.UserData = uint64(slot)
		return sqe
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

// wake lets the thread look at the queue. If the thread has ended meanwhile, because a
// completion woke it and the lane is closed, it has done all its work.
func (l *lane) wake() {
	if err := l.waker.Post(wakeUp); err != nil && err != uring.ErrClosed {
		// If the thread cannot be woken, requests hang for ever.
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
	l.start(&l.mu.queue)
	l.mu.idle = true
	return !l.mu.closed || !l.empty()
}
