//go:build vm

// These tests need the ublk driver and root, and nothing else; without them
// they fail. Each runs a ramdisk on the real driver. Compile them with
//
//	CGO_ENABLED=0 go test -c -tags vm -o ublk.test ./ublk
//
// and run the result where the driver is.

package ublk

import (
	"bytes"
	"errors"
	"sync"
	"syscall"
	"testing"

	"ublk-pcache/internal/uring"
)

const (
	ramSize = 96 << 20

	// Behaviour by address: the first third is an ordinary ramdisk, requests
	// to the second are finished by another goroutine, those to the third fail.
	lateFrom = 32 << 20
	failFrom = 64 << 20

	discarded = 0xdd // what a discard leaves behind, to be told from zeros
)

// ramdisk is the handler of one queue.
type ramdisk struct {
	q    *Queue
	mem  []byte
	late chan Request // to a goroutine that finishes them
	now  []Completion

	served, most, held int // requests; most at once; with the handler now

	mu struct {
		sync.Mutex
		finished []Completion
	}
}

func (r *ramdisk) Submit(req *Request) {
	r.served++
	r.held++
	r.most = max(r.most, r.held)
	switch {
	case req.Offset < lateFrom || req.Op == Flush:
		r.now = append(r.now, r.carryOut(req))
	case req.Offset < failFrom:
		r.late <- *req
	case req.Op == Read:
		r.now = append(r.now, Completion{req.Tag, syscall.EIO})
	default:
		r.now = append(r.now, Completion{req.Tag, syscall.ENOSPC})
	}
}

func (r *ramdisk) carryOut(req *Request) Completion {
	at := r.mem[req.Offset : req.Offset+int64(req.Len)]
	switch req.Op {
	case Read:
		copy(req.Buf, at)
	case Write:
		copy(at, req.Buf)
	case Discard:
		copy(at, bytes.Repeat([]byte{discarded}, len(at)))
	case WriteZeroes:
		clear(at)
	case Flush:
	default:
		return Completion{req.Tag, syscall.EOPNOTSUPP}
	}
	return Completion{req.Tag, 0}
}

func (r *ramdisk) Turn(done []Completion) []Completion {
	r.mu.Lock()
	done = append(done, r.mu.finished...)
	r.mu.finished = r.mu.finished[:0]
	r.mu.Unlock()
	done = append(done, r.now...)
	r.now = r.now[:0]
	r.held -= len(done)
	return done
}

func (r *ramdisk) finishLate() {
	for req := range r.late {
		c := r.carryOut(&req)
		r.mu.Lock()
		r.mu.finished = append(r.mu.finished, c)
		r.mu.Unlock()
		r.q.Wake()
	}
}

type ram struct {
	*Device
	mem    []byte
	queues []*ramdisk
}

func (r *ram) handler(q *Queue) Handler {
	h := &ramdisk{q: q, mem: r.mem, late: make(chan Request, q.Depth())}
	r.queues = append(r.queues, h)
	go h.finishLate()
	return h
}

var twoQueues = Config{ID: -1, Queues: 2, Depth: 32, Size: ramSize, BlockSize: 512, ChunkSize: 4 << 20}

func start(t *testing.T, cfg Config) *ram {
	t.Helper()
	mem, err := uring.AlignedBuffer(ramSize)
	if err != nil {
		t.Fatal(err)
	}
	r := &ram{mem: mem}
	if r.Device, err = Add(cfg, r.handler, func(err error) { panic(err) }); err != nil {
		t.Fatal(err)
	}
	return r
}

// finish stops a device that nobody uses any more and checks that nothing is left.
func finish(t *testing.T, d *Device) {
	t.Helper()
	if err := d.Stop(false); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	default:
		t.Fatal("stopped, but the queues have not ended")
	}
	if err := d.Delete(); err != nil {
		t.Fatal(err)
	}
	if _, err := Lookup(d.ID()); !errors.Is(err, ErrNoDevice) {
		t.Fatalf("after Delete: %v", err)
	}
	requireNone(t)
}

func requireNone(t *testing.T) {
	t.Helper()
	left, err := List()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Fatalf("devices left behind: %+v", left)
	}
}
