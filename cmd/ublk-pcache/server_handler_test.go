package main

import (
	"bytes"
	"fmt"
	"io"
	"syscall"
	"testing"

	"go.uber.org/zap"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// heapDisk is a disk whose buffers need no alignment.
type heapDisk struct{ *backing.Fake }

func (heapDisk) Buffer(n int) []byte { return make([]byte, n) }

// TestErrno: a request that succeeds allocates nothing.
func TestErrno(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { errno(nil) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	for err, want := range map[error]syscall.Errno{
		nil: 0, engine.ErrInvalid: syscall.EINVAL, io.EOF: syscall.EIO,
		fmt.Errorf("write: %w", syscall.ENOSPC): syscall.ENOSPC,
	} {
		if got := errno(err); got != want {
			t.Errorf("%v becomes %v, not %v", err, got, want)
		}
	}
}

// TestHandler: each of the driver's operations becomes what it means to the
// engine, with its whole range and FUA, and ends under its tag.
func TestHandler(t *testing.T) {
	const size = 16 << 20
	mem := pmem.NewFake(ondisk.MinSize)
	if err := ondisk.Format(mem, ondisk.FormatOptions{GCPercent: ondisk.DefaultGCPercent}); err != nil {
		t.Fatal(err)
	}
	disk := backing.NewFake(size, 512, 1)
	defer disk.Close()
	cache, err := engine.Open(mem, heapDisk{disk}, engine.Options{Queues: 1, Log: logger{zap.NewNop()}})
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	wake := make(chan struct{}, 1)
	cache.Queue(0).OnWake(func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	h := &handler{queue: cache.Queue(0), requests: make([]engine.Request, 4)}

	var tag uint16
	do := func(r ublk.Request) syscall.Errno {
		t.Helper()
		tag = (tag + 1) % uint16(len(h.requests))
		r.Tag, r.Len = tag, max(r.Len, len(r.Buf))
		h.Submit(&r)
		for {
			switch done := h.Turn(nil); {
			case len(done) == 1 && done[0].Tag == tag:
				return done[0].Err
			case len(done) > 0:
				t.Fatalf("request %d ended as %v", tag, done)
			}
			<-wake
		}
	}
	must := func(what string, r ublk.Request) {
		t.Helper()
		if err := do(r); err != 0 {
			t.Fatalf("%s: %v", what, err)
		}
	}

	data := bytes.Repeat([]byte{7}, size)
	for off := 0; off < size; off += ublk.MaxIO {
		must("write", ublk.Request{Op: ublk.Write, Offset: int64(off), Buf: data[off : off+ublk.MaxIO]})
	}
	for _, r := range []ublk.Request{
		{Op: ublk.Discard, Offset: 512, Len: 512},
		{Op: ublk.Discard, Offset: 1<<20 + 512, Len: 9 << 20}, // over three stripes
		{Op: ublk.WriteZeroes, Offset: 12<<20 - 512, Len: 1024},
		{Op: ublk.WriteZeroes, Offset: 15 << 20, Len: 1 << 20, FUA: true},
	} {
		must("zero", r)
		if fua := h.requests[tag].FUA; fua != r.FUA {
			t.Errorf("FUA is %t, should be %t", fua, r.FUA)
		}
		clear(data[r.Offset : r.Offset+int64(r.Len)])
	}
	got := make([]byte, size)
	for off := 0; off < size; off += ublk.MaxIO {
		must("read", ublk.Request{Op: ublk.Read, Offset: int64(off), Buf: got[off : off+ublk.MaxIO]})
	}
	for off := 0; off < size; off += 512 {
		if !bytes.Equal(got[off:off+512], data[off:off+512]) {
			t.Fatalf("the sector at %d begins with %d, should with %d", off, got[off], data[off])
		}
	}
	for what, c := range map[string]struct {
		r    ublk.Request
		want syscall.Errno
	}{
		"beyond the end": {ublk.Request{Op: ublk.Discard, Offset: size - 512, Len: 1024}, syscall.EINVAL},
		"too long":       {ublk.Request{Op: ublk.WriteZeroes, Len: engine.MaxZero + 512}, syscall.EINVAL},
		"unknown":        {ublk.Request{Op: 4, Len: 512}, syscall.EOPNOTSUPP},
	} {
		if err := do(c.r); err != c.want {
			t.Errorf("%s: %v, should be %v", what, err, c.want)
		}
	}
}
