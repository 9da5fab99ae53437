//go:build vm

package ublk

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lender is a ramdisk whose first third is read on the queue's own ring, from a
// file.
type lender struct {
	*ramdisk
	t     *testing.T
	file  int
	reads []Request // by tag
	came  int       // reads in this turn
	most  int       // in one turn
}

func newLender(t *testing.T, r *ramdisk, file int) *lender {
	h := &lender{ramdisk: r, t: t, file: file, reads: make([]Request, r.q.Depth())}
	r.q.Lend(h.completed)
	return h
}

func (h *lender) Submit(req *Request) {
	if req.Op != Read || req.Offset >= lateFrom {
		h.ramdisk.Submit(req)
		return
	}
	h.held++
	h.reads[req.Tag] = *req
	h.q.Entry(uint32(req.Tag)).PrepareRead(h.file, req.Buf, req.Offset)
}

func (h *lender) Turn(done []Completion) []Completion {
	h.came = 0
	return h.ramdisk.Turn(done)
}

func (h *lender) completed(id uint32, res int32) {
	req := &h.reads[id]
	if int(res) != req.Len {
		h.t.Errorf("read of %d bytes at %d: %d", req.Len, req.Offset, res)
	}
	h.now = append(h.now, Completion{req.Tag, 0})
	h.came++
	h.most = max(h.most, h.came)
	*req = Request{}
}

// TestLend: a handler's own operations go through the queue's ring beside
// requests and messages, and each result comes to the operation it is of.
func TestLend(t *testing.T) {
	file, err := unix.Open(store(t), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(file)
	r := &ram{}
	if r.mem, err = unix.Mmap(file, 0, ramSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	var lenders []*lender
	if r.Device, err = Add(twoQueues, func(q *Queue) Handler {
		r.handler(q)
		lenders = append(lenders, newLender(t, r.queues[q.ID()], file))
		return lenders[q.ID()]
	}, func(err error) { panic(err) }); err != nil {
		t.Fatal(err)
	}
	fd := open(t, r.Path())
	var clients []*client
	for _, from := range []int64{0, lateFrom} {
		for i := range 16 {
			c := newClient(t, fd, i, lateFrom/16)
			c.base += from
			clients = append(clients, c)
		}
	}
	work(t, clients, 50, func(c *client) error {
		return errors.Join(c.write(), c.read(c.piece()), c.read(c.piece()))
	})
	unix.Close(fd)
	finish(t, r.Device)
	for i, h := range lenders {
		t.Logf("queue %d: up to %d reads in a turn", i, h.most)
		if h.most < 2 {
			t.Errorf("queue %d had no two reads at once", i)
		}
	}
}

// deaf is a ramdisk of which one read, on the queue's own ring, does not end.
type deaf struct {
	*ramdisk
	pipe  int
	asked chan struct{}
}

const deafAt = 1 << 20

func (h *deaf) Submit(req *Request) {
	if req.Op != Read || req.Offset != deafAt {
		h.ramdisk.Submit(req)
		return
	}
	h.q.Entry(uint32(req.Tag)).PrepareRead(h.pipe, req.Buf, 0)
	close(h.asked)
}

// TestLetGoWithLent: an operation that does not end keeps nobody from taking the
// device over, and its request is answered there.
func TestLetGoWithLent(t *testing.T) {
	empty, full, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	defer full.Close()
	r := &ram{mem: aligned(t, ramSize)}
	asked := make(chan struct{})
	if r.Device, err = Add(twoQueues, func(q *Queue) Handler {
		r.handler(q)
		q.Lend(func(id uint32, res int32) { t.Errorf("operation %d has ended: %d", id, res) })
		return &deaf{r.queues[q.ID()], int(empty.Fd()), asked}
	}, func(err error) { panic(err) }); err != nil {
		t.Fatal(err)
	}
	if err := r.CanLetGo(); err != nil {
		t.Log(err)
		finish(t, r.Device)
		return
	}
	fd := open(t, r.Path())
	got, want := aligned(t, 4096), r.mem[deafAt:deafAt+4096]
	fill(want, deafAt, 1)
	read := make(chan error)
	go func() {
		_, err := unix.Pread(fd, got, deafAt)
		read <- err
	}()
	<-asked
	next := &ram{mem: r.mem}
	s, err := Prepare(r.ID(), func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	r.LetGo()
	if next.Device, err = s.TakeOver(next.handler); err != nil {
		t.Fatal(err)
	}
	t.Logf("taken over in %v", time.Since(begin))
	if err := <-read; err != nil || !bytes.Equal(got, want) {
		t.Errorf("the read that was under way: %v, begins with %d", err, got[0])
	}
	unix.Close(fd)
	finish(t, next.Device)
}
