package backing

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"ublk-pcache/internal/uring"
)

// flight is the operations that the device has on one ring. Invariant: a slot is
// free or has one operation, from start until done is called. Only the ring's
// thread uses it, but any may call waiting.
type flight struct {
	fd    int
	path  string // for errors
	block bool   // a block device, not a file

	// entry returns the ring's entry for the operation in a slot. There is one for
	// each slot, and a slot is issued at most once between two entries into the
	// kernel.
	entry func(slot uint32) *uring.SQE

	slots []op
	since []atomic.Int64 // by slot: when the operation got it, nanoseconds since epoch, 0 for none
	free  []uint32       // slots

	zeroing zeroing // the best way that has not been refused
	zeros   []byte  // only read
}

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

func (d *Device) newFlight(slots int) flight {
	f := flight{fd: d.fd, path: d.path, block: d.block, slots: make([]op, slots), since: make([]atomic.Int64, slots)}
	for i := range f.slots {
		f.free = append(f.free, uint32(i))
	}
	return f
}

func (f *flight) empty() bool { return len(f.free) == len(f.slots) }

// start moves operations from a queue to free slots.
func (f *flight) start(queue *fifo) {
	now := time.Since(epoch)
	for len(f.free) > 0 && queue.n > 0 {
		i := f.free[len(f.free)-1]
		f.free = f.free[:len(f.free)-1]
		f.slots[i] = queue.pop()
		f.since[i].Store(int64(now))
		f.issue(i)
	}
}

func (f *flight) issue(i uint32) {
	o := &f.slots[i]
	sqe := f.entry(i)
	switch o.kind {
	case OpRead:
		sqe.PrepareRead(f.fd, o.buf, o.off)
	case OpWrite:
		sqe.PrepareWrite(f.fd, o.buf, o.off)
	case OpFlush:
		sqe.PrepareDatasync(f.fd)
	case OpZero:
		f.issueZero(sqe, o)
	}
}

// complete takes the result of the operation in a slot.
func (f *flight) complete(i uint32, res int32) {
	o := &f.slots[i]
	if o.kind == OpZero && f.zeroMore(o, res) {
		f.issue(i)
		return
	}
	var err error
	switch {
	case res == -int32(syscall.ENOSPC) && f.block:
		err = fmt.Errorf("%s at byte %d of %s: %w", o.kind, o.off, f.path, errGone)
	case res < 0:
		err = fmt.Errorf("%s at byte %d of %s: %w", o.kind, o.off, f.path, syscall.Errno(-res))
	case res == 0 && len(o.buf) > 0:
		err = fmt.Errorf("%s at byte %d of %s: %w", o.kind, o.off, f.path, errShort)
	case int(res) < len(o.buf):
		o.buf = o.buf[res:]
		o.off += int64(res)
		f.issue(i)
		return
	}
	done := o.done
	*o = op{}
	f.since[i].Store(0)
	f.free = append(f.free, i)
	done(err)
}

// epoch is before any operation, on a clock that nobody sets.
var epoch = time.Now()

// waiting returns the age of the oldest operation with a slot; those that wait
// for a slot are younger. Any goroutine may call it.
func (f *flight) waiting() (longest time.Duration) {
	for i := range f.since {
		if at := f.since[i].Load(); at != 0 {
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
