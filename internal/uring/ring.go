// Package uring is one io_uring: its memory, its two indices, and the system
// call that moves them. It knows the operations, but not their purpose.
//
// It exists because the available Go bindings cannot do what a ublk server
// needs: 128-byte submission entries for the driver's control commands, and a
// choice of how the waiting thread looks to the Go scheduler (see Turn). The
// surface is the few operations this project uses.
//
// A Ring is not safe for concurrent use; a Messenger is.
//
// # Memory ordering
//
// The kernel and we are two threads sharing four indices. Each is written by
// one side only. The tail we publish must come after the entries it covers,
// the tail we read must come before the entries it announces, and a head that
// is given back must come after the last look at the entry. The interface
// asks for release stores and acquire loads; sync/atomic's are sequentially
// consistent, hence at least that on every architecture, and since they run
// once per system call, and not once per entry, the difference costs nothing.
// Nothing else needs a barrier. In particular, a command that seems never to
// arrive is no problem of ordering: with DEFER_TASKRUN, completions are
// produced only inside io_uring_enter, by the thread that calls it.
package uring

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Options describes a ring.
type Options struct {
	// Entries is the number of operations that can be queued between two
	// entries into the kernel, rounded up to a power of two. There is room for
	// twice as many completions before the kernel has to store them elsewhere.
	Entries uint32

	// SQE128 doubles the submission entry, for commands of up to 80 bytes.
	SQE128 bool

	// SingleIssuer promises that only the creating OS thread enters the ring,
	// and has the kernel run completion work there and only while it is
	// inside: no signal-like interruption at arbitrary moments, and a whole
	// batch of completions for one wake-up. The goroutine must be locked to
	// its thread before New. Any other thread gets EEXIST.
	SingleIssuer bool
}

// Ring is one io_uring instance.
type Ring struct {
	fd  int
	mem []byte // both index blocks and the completion entries
	sq  struct {
		mem        []byte
		head, tail *uint32
		flags      *uint32
		next       uint32 // our tail, ahead of the published one while entries are being filled
		entries    uint32
		shift      uint8 // log2 of the entry size
	}
	cq struct {
		head, tail *uint32
		at         uint32 // our head, ahead of the published one while completions are being read
		known      uint32 // the kernel's tail when last looked at
		mask       uint32
		entries    unsafe.Pointer
	}
}

// New creates a ring. It needs Linux 6.1.
func New(o Options) (*Ring, error) {
	p := params{flags: setupSubmitAll}
	if o.SQE128 {
		p.flags |= setupSQE128
	}
	if o.SingleIssuer {
		p.flags |= setupSingleIssuer | setupDeferTaskrun | setupCoopTaskrun | setupTaskrunFlag
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(o.Entries), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, setupError(errno)
	}
	r := &Ring{fd: int(fd)}
	if err := r.mapMemory(&p); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Ring) mapMemory(p *params) error {
	if p.features&featSingleMmap == 0 || p.features&featNoDrop == 0 {
		return ErrTooOld
	}
	size := max(p.sq.array+4*p.sqEntries, p.cq.cqes+cqeSize*p.cqEntries)
	var err error
	if r.mem, err = mapRing(r.fd, offSQRing, int(size)); err != nil {
		return err
	}
	r.sq.shift = 6
	if p.flags&setupSQE128 != 0 {
		r.sq.shift = 7
	}
	if r.sq.mem, err = mapRing(r.fd, offSQEs, int(p.sqEntries)<<r.sq.shift); err != nil {
		return err
	}

	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.mem[off])) }
	r.sq.head, r.sq.tail, r.sq.entries = word(p.sq.head), word(p.sq.tail), p.sqEntries
	r.sq.flags = word(p.sq.flags)
	r.cq.head, r.cq.tail, r.cq.mask = word(p.cq.head), word(p.cq.tail), p.cqEntries-1
	r.cq.entries = unsafe.Pointer(&r.mem[p.cq.cqes])

	// The kernel finds entries through an array of indices, for callers that
	// fill them out of order. Ours never changes: index i is entry i.
	array := unsafe.Slice(word(p.sq.array), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	return nil
}

// Fd is the ring's file descriptor, the address for messages to it.
func (r *Ring) Fd() int { return r.fd }

// Close gives the ring back. The kernel cancels operations in flight some
// time afterwards, so memory that they use must stay mapped.
func (r *Ring) Close() {
	if r.sq.mem != nil {
		unix.Munmap(r.sq.mem)
	}
	if r.mem != nil {
		unix.Munmap(r.mem)
	}
	unix.Close(r.fd)
}

// SQE returns the next submission entry, zeroed, or nil when as many entries
// are queued as the ring has. It is submitted by the next Submit, Wait or Turn.
func (r *Ring) SQE() *SQE {
	if r.queued() == r.sq.entries {
		return nil
	}
	at := (r.sq.next & (r.sq.entries - 1)) << r.sq.shift
	r.sq.next++
	entry := r.sq.mem[at : at+1<<r.sq.shift]
	*(*[sqeSize]byte)(entry) = [sqeSize]byte{} // without a call, as clear would make
	clear(entry[sqeSize:])
	return (*SQE)(unsafe.Pointer(&entry[0]))
}

func (r *Ring) queued() uint32 { return r.sq.next - atomic.LoadUint32(r.sq.head) }

// Next takes the next completion, if there is one that an earlier entry into
// the kernel has produced.
func (r *Ring) Next() (CQE, bool) {
	if r.ready() == 0 {
		atomic.StoreUint32(r.cq.head, r.cq.at)
		return CQE{}, false
	}
	cqe := *(*CQE)(unsafe.Add(r.cq.entries, uintptr(r.cq.at&r.cq.mask)*cqeSize))
	r.cq.at++
	return cqe, true
}

// ready returns the number of completions that can be taken. It looks at
// the kernel's tail only when the known ones are used up, so reading a
// batch costs one load.
func (r *Ring) ready() uint32 {
	if r.cq.at == r.cq.known {
		r.cq.known = atomic.LoadUint32(r.cq.tail)
	}
	return r.cq.known - r.cq.at
}

// Pending reports whether there is a completion to take, or the kernel says that
// entering it would make one. It makes no system call. The kernel says so only to
// a ring made with SingleIssuer. That may be out of date: the kernel takes it
// back only when it has some work to do (6.12 to 7.3, io_uring.c), so an entry
// may find nothing.
func (r *Ring) Pending() bool {
	return r.ready() > 0 || atomic.LoadUint32(r.sq.flags)&(sqTaskrun|sqCQOverflow) != 0
}

// Submit hands the queued entries to the kernel without waiting for any.
func (r *Ring) Submit() error {
	for r.queued() > 0 {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, r.publish(), uintptr(r.queued()), 0, 0, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return enterError(errno)
		}
	}
	return nil
}

// Wait submits the queued entries and returns when at least n completions can
// be taken. It is an ordinary blocking system call for the Go scheduler.
func (r *Ring) Wait(n uint32) error {
	return r.enterUntil(n, unix.Syscall6)
}

// Turn is Wait for a thread that does nothing else: it enters the kernel at
// least once, also for n = 0, and keeps its P while it sleeps.
//
// An ordinary blocking call tells the scheduler "this thread may be away":
// the P is retaken and handed to another thread, and on return the goroutine
// has to find a P again, often by waking a thread. A queue thread would pay
// that on every turn. Its wait is measured in microseconds, and nobody
// misses its P as long as there are some to spare. So it makes the raw call
// and keeps the P.
//
// Preemption makes that legal. The runtime, when it stops the world or finds the
// goroutine running for more than 10 ms, sends SIGURG to the thread. The sleep
// then ends in EINTR. The handler itself cannot preempt, because the interrupted
// instruction is in a system call, but it leaves the request in the goroutine's
// stack guard, and the prologue of the next ordinary function honours it. hold is
// that function: it must not be inlined, and the loop must come back to it after
// every return from the kernel. A signal that hits between the prologue and the
// call is lost, but the runtime repeats it.
//
// So three things are required of the program: GOMAXPROCS exceeds the number
// of threads in Turn by a few, asynchronous preemption is on, and nobody
// waits for this goroutine while holding what stops the world.
func (r *Ring) Turn(n uint32) error {
	return r.enterUntil(n, hold)
}

//go:noinline
func hold(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2 uintptr, errno syscall.Errno) {
	return syscall.RawSyscall6(trap, a1, a2, a3, a4, a5, a6)
}

// enterUntil waits for n completions, or for fewer when memory is short. It
// trusts the indices and not the result of the call: an interrupted call
// returns the number of entries that it submitted, and no EINTR.
func (r *Ring) enterUntil(n uint32, call func(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2 uintptr, errno syscall.Errno)) error {
	for {
		_, _, errno := call(unix.SYS_IO_URING_ENTER, r.publish(), uintptr(r.queued()), uintptr(n), enterGetEvents, 0, 0)
		switch errno {
		case 0, unix.EINTR:
		case unix.EAGAIN, unix.EBUSY:
			// No memory for a request, or for storing completions: it helps to take
			// the completions that are there.
			if r.ready() > 0 {
				return nil
			}
			runtime.Gosched()
		default:
			return enterError(errno)
		}
		r.cq.known = atomic.LoadUint32(r.cq.tail)
		if r.queued() == 0 && r.ready() >= n {
			return nil
		}
	}
}

// publish makes our side of both indices visible and returns the ring as a
// system call argument.
func (r *Ring) publish() uintptr {
	atomic.StoreUint32(r.cq.head, r.cq.at)
	atomic.StoreUint32(r.sq.tail, r.sq.next)
	return uintptr(r.fd)
}
