package backing

import (
	"bytes"
	"errors"
	"syscall"
	"testing"
	"time"
)

// asyncDisk is what Device and Fake have in common.
type asyncDisk interface {
	Read(buf []byte, off int64, done func(error))
	Write(buf []byte, off int64, done func(error))
	Flush(done func(error))
	Zero(off, n int64, done func(error))
}

func wait(submit func(done func(error))) error {
	c := make(chan error, 1)
	submit(func(err error) { c <- err })
	return <-c
}

func read(d asyncDisk, buf []byte, off int64) error {
	return wait(func(done func(error)) { d.Read(buf, off, done) })
}

func write(d asyncDisk, buf []byte, off int64) error {
	return wait(func(done func(error)) { d.Write(buf, off, done) })
}

func zero(d asyncDisk, off, n int64) error {
	return wait(func(done func(error)) { d.Zero(off, n, done) })
}

func block(b byte) []byte { return bytes.Repeat([]byte{b}, 512) }

// versions crashes the disk many times and returns which first bytes block 0
// was found with.
func versions(f *Fake) map[byte]bool {
	seen := map[byte]bool{}
	for range 100 {
		after := f.Crash()
		got := make([]byte, 512)
		after.ReadAt(got, 0)
		after.Close()
		if !bytes.Equal(got, block(got[0])) {
			panic("a block was torn")
		}
		seen[got[0]] = true
	}
	return seen
}

func requireVersions(t *testing.T, when string, got map[byte]bool, want ...byte) {
	t.Helper()
	ok := len(got) == len(want)
	for _, v := range want {
		ok = ok && got[v]
	}
	if !ok {
		t.Errorf("%s, a crash leaves %v, should leave any of %v", when, got, want)
	}
}

func TestFakeCrash(t *testing.T) {
	f := NewFake(8192, 512, 1)
	defer f.Close()
	requireVersions(t, "in the beginning", versions(f), 0)
	write(f, block(1), 0)
	requireVersions(t, "after a write", versions(f), 0, 1)
	write(f, block(2), 0)
	requireVersions(t, "after two writes", versions(f), 0, 1, 2)
	wait(f.Flush)
	requireVersions(t, "after a flush", versions(f), 2)

	f.Script(func(Op) Fault { return Fault{Hold: true} })
	f.Write(block(3), 0, func(error) {})
	requireVersions(t, "with a write in flight", versions(f), 2, 3)
	f.Script(nil)
	f.Release()
	for f.Counters().Writes < 3 {
		time.Sleep(time.Millisecond)
	}
	wait(f.Flush)
	zero(f, 0, 512)
	requireVersions(t, "after zeroing", versions(f), 0, 3)
	write(f, block(4), 0)
	wait(f.Flush)
	requireVersions(t, "after a flush of what was zeroed and written", versions(f), 4)

	f.Script(func(Op) Fault { return Fault{Hold: true} })
	f.Zero(0, 512, func(error) {})
	requireVersions(t, "with a zeroing in flight", versions(f), 0, 4)
	f.Script(nil)
	f.Release()
	for f.Counters().Zeros < 2 {
		time.Sleep(time.Millisecond)
	}
	wait(f.Flush)
	requireVersions(t, "after a flush of zeros", versions(f), 0)
}

// A failed flush must sometimes lose a write for good, also behind the back of
// a later flush that succeeds, and reads must not show it.
func TestFakeFailedFlush(t *testing.T) {
	lost, kept := false, false
	for seed := range uint64(50) {
		f := NewFake(8192, 512, seed)
		write(f, block(1), 0)
		f.Script(func(o Op) Fault { return Fault{Err: syscall.EIO} })
		if err := wait(f.Flush); !errors.Is(err, syscall.EIO) {
			t.Fatalf("failing flush: %v", err)
		}
		f.Script(nil)
		if err := wait(f.Flush); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 512)
		if err := read(f, got, 0); err != nil || got[0] != 1 {
			t.Fatalf("read after a failed flush: %d, %v", got[0], err)
		}
		switch seen := versions(f); {
		case len(seen) != 1:
			t.Fatalf("not decided by the flush: %v", seen)
		case seen[0]:
			lost = true
		default:
			kept = true
		}
		f.Close()
	}
	if !lost || !kept {
		t.Errorf("lost: %v, kept: %v", lost, kept)
	}
}

func TestFakeFaults(t *testing.T) {
	f := NewFake(1<<20, 4096, 1)
	buf := bytes.Repeat([]byte{7}, 64*4096)
	f.Script(func(o Op) Fault {
		switch {
		case o.Kind == OpWrite && o.Off == 0:
			return Fault{Err: syscall.EIO}
		}
		return Fault{}
	})
	if err := write(f, buf, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("scripted failure: %v", err)
	}
	got := make([]byte, len(buf))
	f.ReadAt(got, 0)
	if n := bytes.Count(got, []byte{7}); n == 0 || n == len(got) || n%4096 != 0 {
		t.Errorf("a failed write wrote %d of %d bytes", n, len(buf))
	}
	const second = 64 * 4096
	f.WriteAt(buf, second)
	f.Script(func(o Op) Fault {
		if o != (Op{OpZero, second, int64(len(buf))}) {
			t.Errorf("scripted: %+v", o)
		}
		return Fault{Err: syscall.EIO}
	})
	if err := zero(f, second, int64(len(buf))); !errors.Is(err, syscall.EIO) {
		t.Errorf("scripted failure of a zeroing: %v", err)
	}
	f.ReadAt(got, second)
	if n := bytes.Count(got, []byte{7}); n == 0 || n == len(got) || n%4096 != 0 {
		t.Errorf("a failed zeroing left %d of %d bytes", n, len(buf))
	}
	f.Script(func(o Op) Fault {
		if o.Kind == OpRead && o.Off == 4096 {
			return Fault{Delay: 20 * time.Millisecond}
		}
		return Fault{}
	})
	if err := zero(f, 8192, 4096); err != nil {
		t.Error(err)
	}
	start := time.Now()
	if err := read(f, got[:4096], 4096); err != nil || time.Since(start) < 20*time.Millisecond {
		t.Errorf("delayed read: %v after %v", err, time.Since(start))
	}
	for _, off := range []int64{-4096, 512, 1 << 20} {
		if err := read(f, got[:4096], off); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	if err := read(f, got[:512], 0); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("read of half a block: %v", err)
	}
	if c, want := f.Counters(), (Counters{Reads: 5, Writes: 1, Zeros: 2, Failed: 6, BytesRead: 4096, BytesZeroed: 4096}); c != want {
		t.Errorf("counters %+v, should be %+v", c, want)
	}

	// Completions come out of order, and Close waits for what is held.
	f.Script(func(o Op) Fault { return Fault{Hold: true} })
	var order []int64
	for i := range int64(20) {
		f.Read(got[:4096], i*4096, func(error) { order = append(order, i) })
	}
	if f.Held() != 20 {
		t.Errorf("%d held", f.Held())
	}
	f.Close()
	inOrder := len(order) == 20
	for i, v := range order {
		inOrder = inOrder && int64(i) == v
	}
	if len(order) != 20 || inOrder {
		t.Errorf("finished in the order %v", order)
	}
}
