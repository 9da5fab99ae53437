package uring

import (
	"errors"
	"sync"
	"syscall"
	"time"
)

// Messenger wakes the thread that waits in one ring, from any goroutine, by
// putting a completion there (IORING_OP_MSG_RING). So other threads tell a
// thread that sleeps in io_uring_enter that they have finished work for it. A
// message takes 2.5 µs. A channel to a goroutine on a locked thread costs
// more than twice that, and cannot be waited for together with I/O.
//
// It owns a small ring, because the target may be entered only by its own
// thread. Close it before the target: a descriptor number is reused at once,
// and a late message would reach whatever ring got the number next.
type Messenger struct {
	target int
	mu     struct {
		sync.Mutex
		ring *Ring // nil once closed
	}
}

// NewMessenger makes a messenger to target.
func NewMessenger(target *Ring) (*Messenger, error) {
	// One entry: each message is submitted alone, and while the kernel has not
	// taken one, no other can be queued behind it.
	ring, err := New(Options{Entries: 1})
	if err != nil {
		return nil, err
	}
	m := &Messenger{target: target.Fd()}
	m.mu.ring = ring
	return m, nil
}

// Post makes a completion with this user data and a result of zero appear in
// the target. Any number of goroutines may call it. It returns ErrClosed
// after Close.
//
// The kernel allocates the completion, and keeps it aside if the target's
// queue is full, so no message is lost. When memory for that is short, Post
// tries again: the target must not sleep through the message.
func (m *Messenger) Post(userData uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		err := m.postLocked(userData)
		if !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, syscall.ENOMEM) && !errors.Is(err, syscall.EOVERFLOW) {
			return err
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func (m *Messenger) postLocked(userData uint64) error {
	ring := m.mu.ring
	if ring == nil {
		return ErrClosed
	}
	if sqe := ring.SQE(); sqe != nil { // otherwise this is a repeated attempt
		sqe.prepareMessage(m.target, userData)
	}
	if err := ring.Submit(); err != nil {
		return err
	}
	var err error
	for cqe, ok := ring.Next(); ok; cqe, ok = ring.Next() {
		err = messageError(syscall.Errno(-cqe.Res))
	}
	return err
}

// Close waits for a Post in progress and makes later ones fail.
func (m *Messenger) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.ring != nil {
		m.mu.ring.Close()
		m.mu.ring = nil
	}
}
