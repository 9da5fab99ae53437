package engine

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// hangingDisk holds every operation until hangs is false and release was called.
func hangingDisk(size int64) (disk *backing.Fake, hangs *atomic.Bool) {
	disk, hangs = backing.NewFake(size, 512, 1), new(atomic.Bool)
	disk.Script(func(backing.Op) backing.Fault { return backing.Fault{Hold: hangs.Load()} })
	return disk, hangs
}

// awaitHeld waits until the disk holds n operations at least.
func awaitHeld(disk *backing.Fake, n int) {
	for disk.Held() < n {
		time.Sleep(time.Millisecond)
	}
}

// TestDiskHangs: while the disk answers nothing, only who needs it waits. On the
// one queue there is, hits and writes go on, as does asking for the status. And
// when it comes back everything goes on where it was.
func TestDiskHangs(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 70)
	disk, hangs := hangingDisk(64 << 20)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	clean, dirty := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	r.write(t, 0, clean)
	within(t, "a flush", func() {
		if err := r.Flush(t.Context()); err != nil {
			t.Error(err)
		}
	})

	hangs.Store(true)
	miss := &Request{Op: Read, Off: 32 << 20, Buf: make([]byte, 4096)}
	missed := r.begin(0, miss)
	awaitHeld(disk, 1)
	r.write(t, 4096, dirty)
	flushed := make(chan error, 1)
	go func() { flushed <- r.Flush(t.Context()) }()
	awaitHeld(disk, 2)
	within(t, "using the cache while the disk hangs", func() {
		for i := range int64(100) {
			r.write(t, 1<<20+i*4096, dirty)
			for off, want := range map[int64][]byte{0: clean, 4096: dirty, 1<<20 + i*4096: dirty} {
				if !bytes.Equal(r.read(t, off, 4096), want) {
					t.Errorf("wrong data at %d", off)
				}
			}
			r.Status()
		}
		// Also where the disk is being asked.
		r.write(t, miss.Off, dirty)
	})
	select {
	case err := <-flushed:
		t.Errorf("a flush ended while the disk hung: %v", err)
	default:
	}

	hangs.Store(false)
	disk.Release()
	within(t, "what waited for the disk", func() {
		if err := errors.Join(missed(), <-flushed, r.Flush(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if !bytes.Equal(r.read(t, miss.Off, 4096), dirty) {
		t.Error("the disk's answer was taken for newer than what was written since it was asked")
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestAbort: all who wait hear of it, for space or for a disk that hangs, by
// their own read of it or another queue's; the cache closes, and what the disk
// answers later is nobody's. Nothing acknowledged is lost.
func TestAbort(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 90)
	disk, hangs := hangingDisk(64 << 20)
	defer disk.Close()
	r := newRig(t, mem, disk, 2)
	hangs.Store(true)
	var users sync.WaitGroup
	use := func(queue int, req *Request, ended func(error)) {
		wait := r.begin(queue, req)
		users.Go(func() { ended(wait()) })
	}
	aborted := func(err error) {
		if !errors.Is(err, ErrAborted) {
			t.Errorf("a read of the disk: %v", err)
		}
	}
	// A read with two holes, and one from the other queue that waits for the same.
	r.write(t, 60<<20+4096, make([]byte, 4096))
	for queue := range 2 {
		use(queue, &Request{Op: Read, Off: 60 << 20, Buf: make([]byte, 3*4096)}, aborted)
		awaitHeld(disk, 2)
	}
	const count = 60
	var acknowledged, finished atomic.Int64
	for i := range int64(count) {
		use(int(i%2), &Request{Op: Write, Off: i << 20, Buf: bytes.Repeat([]byte{byte(i + 1)}, 1<<20)}, func(err error) {
			switch {
			case err == nil:
				acknowledged.Add(1)
			case !errors.Is(err, ErrAborted):
				t.Error(err)
			}
			finished.Add(1)
		})
	}
	for r.Status().Waiting == 0 || r.Status().Waiting+int(finished.Load()) < count {
		time.Sleep(time.Millisecond)
	}
	awaitHeld(disk, 3) // write-back, too

	r.Abort()
	r.Abort()
	within(t, "waiting for a cache that was aborted", users.Wait)
	for _, req := range []*Request{
		{Op: Read, Off: 0, Buf: make([]byte, 4096)}, {Op: Read, Off: 62 << 20, Buf: make([]byte, 4096)},
		{Op: Write, Off: 0, Buf: make([]byte, 4096)}, {Op: Zero, Off: 0, Len: 4096},
	} {
		if err := r.do(0, req); !errors.Is(err, ErrAborted) {
			t.Errorf("request %d at %d after Abort: %v", req.Op, req.Off, err)
		}
	}
	closed := make(chan error, 1)
	go func() { closed <- r.Close() }()
	within(t, "closing a cache whose disk hangs", func() {
		if err := <-closed; !errors.Is(err, ErrAborted) {
			t.Errorf("close: %v", err)
		}
	})
	if s := r.Status(); s.DirtyBytes < acknowledged.Load()<<20 {
		t.Errorf("%d MiB were acknowledged, %d bytes are dirty", acknowledged.Load(), s.DirtyBytes)
	}
	hangs.Store(false)
	disk.Release()
	for disk.Counters().Reads < 2 {
		time.Sleep(time.Millisecond)
	}
	for i, l := range r.loops {
		// A request that ends a second time is none of the loop's any more.
		r.do(i, &Request{Op: Read, Off: 0, Buf: make([]byte, 4096)})
		close(l.quit)
		<-l.ended
	}

	r = newRig(t, mem, disk, 1)
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for i := range int64(count) {
		p := make([]byte, 1<<20)
		disk.ReadAt(p, i<<20)
		if bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, 1<<20)) {
			n++
		}
	}
	if n < acknowledged.Load() {
		t.Errorf("%d of %d acknowledged writes are on the disk", n, acknowledged.Load())
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestFlushTriesItself: a flush that begins after the disk has healed does not
// end with the error of a write that was under way before.
func TestFlushTriesItself(t *testing.T) {
	for _, c := range []struct {
		name  string
		fails func(backing.Op) bool
	}{
		{"all writes", func(op backing.Op) bool { return op.Kind == backing.OpWrite }},
		{"one write", func(op backing.Op) bool { return op.Kind == backing.OpWrite && op.Off == 0 }},
		{"the flush", func(op backing.Op) bool { return op.Kind == backing.OpFlush }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mem := pmem.Heap(ondisk.MinSize)
				formatSmall(t, mem, 20, false, 70)
				disk := backing.NewFake(64<<20, 512, 1)
				defer disk.Close()
				r := newRig(t, mem, disk, 1)
				var healed atomic.Bool
				disk.Script(func(op backing.Op) (f backing.Fault) {
					if c.fails(op) && !healed.Load() {
						f = backing.Fault{Err: syscall.EIO, Hold: true}
					}
					return f
				})
				for off := int64(0); off < 8<<20; off += 2 << 20 {
					r.write(t, off, make([]byte, 4096))
				}
				awaitHeld(disk, 1) // a round that will fail
				healed.Store(true)
				flushed := make(chan error, 1)
				go func() { flushed <- r.Flush(t.Context()) }()
				synctest.Wait() // until it waits
				disk.Release()
				within(t, "a flush", func() {
					if err := <-flushed; err != nil {
						t.Error(err)
					}
				})
				if err := r.kill(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// TestAbandonHoldsNothing: a queue that gives up its reads may have to wait for
// a shard whose holder needs a new fill, so it must not keep fills from being
// made meanwhile.
func TestAbandonHoldsNothing(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 70)
	disk, hangs := hangingDisk(64 << 20)
	defer disk.Close()
	c, err := Open(mem, fakeDisk{disk}, Options{Queues: 2, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	hangs.Store(true)
	woken := make(chan struct{})
	c.queues[1].OnWake(func() { close(woken) })
	for _, r := range []struct {
		queue int
		off   int64
	}{{0, 0}, {1, 0}, {0, ondisk.StripeSize}} { // the second waits for what the first is reading
		c.queues[r.queue].Submit(&Request{Op: Read, Off: r.off, Buf: make([]byte, 4096)})
		c.queues[r.queue].Turn()
	}
	awaitHeld(disk, 2)

	second := &c.index.shards[1]
	second.Lock()
	abandoned := make(chan struct{})
	go func() {
		defer close(abandoned)
		c.queues[0].abandonFills()
	}()
	<-woken // the first has been given up, the second cannot be yet
	within(t, "making a fill while another queue gives up its own", func() { c.queues[1].newFill() })
	second.Unlock()
	<-abandoned

	hangs.Store(false)
	disk.Release()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}
