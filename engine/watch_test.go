package engine

import (
	"runtime"
	"testing"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestCached: of what was written, was read, or is being read, and of parts of it, before and
// after it is gone.
func TestCached(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	c, err := Open(mem, &benchDisk{size: 8 << 20}, Options{Queues: 1, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	q := c.Queue(0)
	check := func(off int64, n int, want bool) {
		t.Helper()
		if got := c.Cached(off, n); got != want {
			t.Errorf("%d bytes at %d are cached: %t", n, off, got)
		}
	}
	check(0, 512, false)
	turn(t, q, &Request{Op: Write, Off: 4096, Buf: make([]byte, 4096)})
	check(4096, 4096, true)
	check(4608, 512, true)
	check(4096, 4608, false)
	check(3584, 1024, false)
	turn(t, q, &Request{Op: Zero, Off: 8192, Len: 512})
	check(4096, 4608, true)

	answer := make(chan func(error), 1)
	q.ReadBy(func(_ []byte, _ int64, done func(error)) { answer <- done })
	r := &Request{Op: Read, Off: 1 << 20, Buf: make([]byte, 4096)}
	q.Submit(r)
	q.Turn()
	check(1<<20, 4096, false)
	(<-answer)(nil)
	if len(q.Turn()) != 1 || r.Err != nil {
		t.Fatal(r.Err)
	}
	check(1<<20, 4096, true)
	check(2<<20, 4096, false)

	c.index.forgetClean()
	check(1<<20, 4096, false)
	check(4096, 4096, true)
}

// TestQuiet: once it is, the collector has made the room that it is to make, and write-back has
// written what it was asked for.
func TestQuiet(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := &benchDisk{size: 512 << 20}
	c, err := Open(mem, disk, Options{Queues: 1, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	q := c.Queue(0)
	buf := make([]byte, 1<<20)
	for off := int64(0); off < disk.size; off += int64(len(buf)) {
		turn(t, q, &Request{Op: Write, Off: off, Buf: buf})
		for !c.Quiet() {
			runtime.Gosched()
		}
		if c.gcNeeded() {
			t.Fatalf("at %d it is quiet with %d free segments", off, c.segments.free())
		}
		if _, cleaned := c.tails.dirtyTail(); cleaned < c.writeback.want.Load() {
			t.Fatalf("at %d it is quiet with %d of %d ksets written back", off, cleaned, c.writeback.want.Load())
		}
	}
}
