package backing

import (
	"bytes"
	"errors"
	"runtime"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/internal/uring"
)

// readerSlots is how many reads a test's Reader has under way.
const readerSlots = 4

// readerThread makes the calling goroutine a thread with a ring of its own and a
// Reader on it. turn enters the kernel, waits for an answer and takes those that
// have come.
func readerThread(t *testing.T, d *Device) (r *Reader, turn func()) {
	t.Helper()
	runtime.LockOSThread()
	ring, err := uring.New(uring.Options{Entries: readerSlots, SingleIssuer: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ring.Close()
		runtime.UnlockOSThread()
	})
	used := map[uint32]bool{}
	r = d.NewReader(readerSlots, func(id uint32) *uring.SQE {
		if id >= readerSlots || used[id] {
			t.Errorf("number %d is used, in use: %v", id, used)
		}
		used[id] = true
		sqe := ring.SQE()
		sqe.UserData = uint64(id)
		return sqe
	})
	return r, func() {
		if err := ring.Wait(1); err != nil {
			t.Fatal(err)
		}
		for cqe, ok := ring.Next(); ok; cqe, ok = ring.Next() {
			delete(used, uint32(cqe.UserData))
			r.Complete(uint32(cqe.UserData), cqe.Res)
		}
	}
}

// TestReader: a thread reads on its own ring, more at once than there are places,
// and each answer is called once, with what is at its place.
func TestReader(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	defer d.Close()
	const n, unit = 10 * readerSlots, 4096
	data := aligned(t, n*unit)
	for i := range data {
		data[i] = byte(i >> 12)
	}
	if err := write(d, data, 0); err != nil {
		t.Fatal(err)
	}
	r, turn := readerThread(t, d)
	buf := aligned(t, n*unit)
	var answers [n]int
	left := n
	for i := range n {
		r.Read(buf[i*unit:(i+1)*unit], int64(n-1-i)*unit, func(err error) {
			if err != nil {
				t.Error(err)
			}
			answers[i]++
			left--
		})
	}
	if d.Waiting() == 0 {
		t.Error("reads that have not been answered are not waited for")
	}
	for left > 0 {
		turn()
	}
	for i := range n {
		if answers[i] != 1 || !bytes.Equal(buf[i*unit:(i+1)*unit], data[(n-1-i)*unit:(n-i)*unit]) {
			t.Errorf("read %d: %d answers, begins with %d", i, answers[i], buf[i*unit])
		}
	}
	if w := d.Waiting(); w != 0 {
		t.Errorf("after everything was answered the device has owed an answer for %v", w)
	}
	done := func(error) { left-- }
	allocated := testing.AllocsPerRun(100, func() {
		left = 1
		r.Read(buf[:unit], 0, done)
		for left > 0 {
			turn()
		}
	})
	if allocated != 0 {
		t.Errorf("%v allocations for a read", allocated)
	}
}

// TestReaderErrors: a read that fails, or ends early for good, is an error, and the next
// one is not concerned.
func TestReaderErrors(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	defer d.Close()
	r, turn := readerThread(t, d)
	read := func(buf []byte, off int64) (result error) {
		answered := false
		r.Read(buf, off, func(err error) { result, answered = err, true })
		for !answered {
			turn()
		}
		return result
	}
	buf := aligned(t, 8192)
	if err := read(buf, testSize-4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("read beyond the end: %v", err)
	}
	if err := read(buf, -4096); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("read before the beginning: %v", err)
	}
	if err := read(buf, 0); err != nil {
		t.Errorf("read after failures: %v", err)
	}
}

// TestReadsPassWriteBack: whatever the device's own thread is kept from going on
// with, and its queue full, a Reader goes on.
func TestReadsPassWriteBack(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	buf := aligned(t, 4096)
	r, turn := readerThread(t, d)
	for what, block := range map[string]func(done func(error)){
		"write": func(done func(error)) { d.Write(buf, 0, done) },
		"flush": d.Flush,
		"zero":  func(done func(error)) { d.Zero(0, 4096, done) },
	} {
		release := make(chan struct{})
		overdue := time.AfterFunc(5*time.Minute, func() {
			t.Errorf("reads wait behind a %s", what)
			close(release)
		})
		block(func(error) { <-release })
		for i := range int64(2 * inFlight) {
			d.Write(buf, i*4096, func(error) {})
		}
		for range 100 {
			answered := false
			r.Read(buf, testSize/2, func(err error) {
				if err != nil {
					t.Error(err)
				}
				answered = true
			})
			for !answered {
				turn()
			}
		}
		if overdue.Stop() {
			close(release)
		}
	}
	d.Close()
}
