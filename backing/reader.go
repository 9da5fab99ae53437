package backing

import (
	"math/bits"

	"ublk-pcache/internal/uring"
)

// Reader reads the device for one thread, on a ring that this thread enters
// anyway. Its reads go to the kernel, and their results come back, together with
// all else that the thread does there. It takes no other thread, and no message,
// which costs more than the read itself where the device is fast.
//
// The methods are for that thread alone.
type Reader struct {
	flight
	queue fifo // reads that wait for a slot
}

// NewReader makes a Reader that has up to n reads under way. entry returns the
// ring's next entry; the caller gives its answer to Complete with the same
// number. Numbers are below n, and none is used again before its answer has
// come, so the ring needs room for n entries.
func (d *Device) NewReader(n int, entry func(id uint32) *uring.SQE) *Reader {
	r := &Reader{flight: d.newFlight(n), queue: fifo{ops: make([]op, 1<<bits.Len(uint(n)))}}
	r.entry = entry
	d.readers.Lock()
	defer d.readers.Unlock()
	d.readers.all = append(d.readers.all, r)
	return r
}

// Read is Device.Read; done is called by Complete.
func (r *Reader) Read(buf []byte, off int64, done func(error)) {
	r.queue.push(op{kind: OpRead, buf: buf, off: off, done: done})
	r.start(&r.queue)
}

// Complete takes the kernel's answer to an entry.
func (r *Reader) Complete(id uint32, res int32) {
	r.complete(id, res)
	r.start(&r.queue)
}
