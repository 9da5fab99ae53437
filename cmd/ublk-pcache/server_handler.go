package main

import (
	"errors"
	"syscall"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ublk"
)

// handler hands the requests of one ublk queue to one queue of the engine.
// Both sides use it on the queue's own thread alone.
type handler struct {
	queue    *engine.Queue
	requests []engine.Request // by tag
	refused  []ublk.Completion
}

func newHandler(q *engine.Queue, from *ublk.Queue, disk *backing.Device) *handler {
	q.OnWake(from.Wake)
	reader := disk.NewReader(from.Depth(), from.Entry)
	from.Lend(reader.Complete)
	q.ReadBy(reader.Read)
	return &handler{queue: q, requests: make([]engine.Request, from.Depth())}
}

// Submit implements ublk.Handler.
func (h *handler) Submit(r *ublk.Request) {
	e := &h.requests[r.Tag]
	e.Tag, e.FUA, e.Off, e.Buf = int(r.Tag), r.FUA, r.Offset, r.Buf
	switch r.Op {
	case ublk.Read:
		e.Op = engine.Read
	case ublk.Write:
		e.Op = engine.Write
	case ublk.Flush:
		e.Op = engine.Flush
	case ublk.Discard, ublk.WriteZeroes:
		e.Op, e.Len = engine.Zero, r.Len
	default:
		h.refused = append(h.refused, ublk.Completion{Tag: r.Tag, Err: syscall.EOPNOTSUPP})
		return
	}
	h.queue.Submit(e)
}

// Turn implements ublk.Handler.
func (h *handler) Turn(done []ublk.Completion) []ublk.Completion {
	for _, e := range h.queue.Turn() {
		done = append(done, ublk.Completion{Tag: uint16(e.Tag), Err: errno(e.Err)})
	}
	done = append(done, h.refused...)
	h.refused = h.refused[:0]
	return done
}

// errno is what the user of the disk gets to see of an error.
func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	return errnoOf(err)
}

func errnoOf(err error) syscall.Errno {
	var n syscall.Errno // on the heap, since As takes its address
	switch {
	case errors.Is(err, engine.ErrInvalid):
		return syscall.EINVAL
	case errors.As(err, &n) && n != 0:
		return n
	default:
		return syscall.EIO
	}
}
