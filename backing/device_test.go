package backing

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/uring"
)

// tempFile makes an empty file of a size.
func tempFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openDevice(t *testing.T, path string) *Device {
	t.Helper()
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func aligned(t *testing.T, n int) []byte {
	t.Helper()
	b, err := uring.AlignedBuffer(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { uring.FreeBuffer(b) })
	return b
}

const testSize = 64 << 20

// TestInherit: a device is handed on with its claim, which nobody else can get
// in between.
func TestInherit(t *testing.T) {
	path := tempFile(t, testSize)
	old := openDevice(t, path)
	f, err := old.File()
	if err != nil {
		t.Fatal(err)
	}
	heir, err := Inherit(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrInUse) {
		t.Errorf("opened besides its heir: %v", err)
	}
	if heir.Path() != path || heir.Size() != testSize || heir.BlockSize() != 512 {
		t.Errorf("the heir of %s: %+v", path, heir)
	}
	buf, ended := aligned(t, 4096), make(chan error)
	heir.Read(buf, 0, func(err error) { ended <- err })
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := heir.Close(); err != nil {
		t.Fatal(err)
	}
	openDevice(t, path).Close()
}

func TestFile(t *testing.T) {
	path := tempFile(t, testSize)
	d := openDevice(t, path)
	defer d.Close()
	if d.Size() != testSize || d.BlockSize() != 512 || d.Path() != path || d.Serial() != "" {
		t.Errorf("%d bytes in blocks of %d, path %q, serial %q", d.Size(), d.BlockSize(), d.Path(), d.Serial())
	}
	exercise(t, d)
}

// exercise has many goroutines write, read back and zero, with more
// operations at once than there are slots.
func exercise(t *testing.T, d *Device) {
	const workers, rounds, batch = 4, 4, 128
	part := d.Size() / workers
	var wg sync.WaitGroup
	for w := range workers {
		rng := rand.New(rand.NewPCG(uint64(w), 0))
		unit := d.BlockSize()
		buf := aligned(t, batch*8*unit)
		wg.Go(func() {
			base := int64(w) * part
			for round := range rounds {
				sizes := make([]int, batch)
				each := func(f func(piece []byte, off int64, done func(error))) error {
					errs := make(chan error, batch)
					off, at := base, 0
					for _, n := range sizes {
						f(buf[at:at+n], off, func(err error) { errs <- err })
						off, at = off+int64(n), at+n
					}
					var err error
					for range sizes {
						err = errors.Join(err, <-errs)
					}
					return err
				}
				for i := range sizes {
					sizes[i] = (1 + rng.IntN(8)) * unit
				}
				for i := range buf {
					buf[i] = byte(i*7 + i>>9 + w + round*31)
				}
				want := bytes.Clone(buf)
				if err := each(d.Write); err != nil {
					t.Errorf("write: %v", err)
				}
				if err := wait(d.Flush); err != nil {
					t.Errorf("flush: %v", err)
				}
				clear(buf)
				if err := each(d.Read); err != nil {
					t.Errorf("read: %v", err)
				}
				total := 0
				for _, n := range sizes {
					total += n
				}
				if !bytes.Equal(buf[:total], want[:total]) {
					t.Errorf("worker %d, round %d: data differ", w, round)
				}
			}
		})
	}
	wg.Wait()
	if w := d.Waiting(); w != 0 {
		t.Errorf("after everything was answered the device has owed an answer for %v", w)
	}
	exerciseZero(t, d)
}

// exerciseZero zeroes ranges between data, of one block, of some, and of more
// than is written at once, all in flight together.
func exerciseZero(t *testing.T, d *Device) {
	t.Helper()
	unit := int64(d.BlockSize())
	data := aligned(t, int(d.Size()))
	for i := range data {
		data[i] = byte(i>>9) | 1
	}
	if err := write(d, data, 0); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, inFlight)
	off, n := unit, 0
	for i := int64(0); off < d.Size(); i++ {
		size := []int64{unit, 3 * unit, 16 * unit, 5 * zeroPiece / 2}[i%4]
		if off+size > d.Size() {
			break
		}
		d.Zero(off, size, func(err error) { errs <- err })
		clear(data[off : off+size])
		off += size + (1+i%3)*unit
		n++
	}
	for range n {
		if err := <-errs; err != nil {
			t.Errorf("zero: %v", err)
		}
	}
	got := aligned(t, len(data))
	if err := read(d, got, 0); err != nil {
		t.Fatal(err)
	}
	for i := int64(0); i < d.Size(); i += unit {
		if !bytes.Equal(got[i:i+unit], data[i:i+unit]) {
			t.Fatalf("block %d of %d begins with %d, should with %d (zeroing %d)", i/unit, d.Size()/unit, got[i], data[i], d.lane.zeroing)
		}
	}
}

// allocated is how many bytes a file takes on its disk.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestZeroWays takes a file system that can punch holes but not zero ranges, by
// all ways; a refusal leads to the next, and is remembered.
func TestZeroWays(t *testing.T) {
	for first, last := range map[zeroing]zeroing{punchHole: punchHole, zeroRange: writeZeros, writeZeros: writeZeros} {
		fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC) // is tmpfs
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		const size = 16 << 20
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		path := fmt.Sprintf("/proc/self/fd/%d", fd)
		d := openDevice(t, path)
		if !d.ZeroesCheaply() {
			t.Error("does not zero cheaply")
		}
		d.lane.zeroing = first // nothing has been submitted
		exerciseZero(t, d)
		if d.lane.zeroing != last {
			t.Errorf("beginning with way %d, ended with %d, should with %d", first, d.lane.zeroing, last)
		}
		if err := zero(d, 0, size); err != nil {
			t.Error(err)
		}
		if n := allocated(t, path); first == punchHole && n != 0 || first != punchHole && n == 0 {
			t.Errorf("by way %d, %d bytes stay allocated", first, n)
		}
		d.Close()
	}
}

// Zeroing that fails for another reason than that it is not supported is an
// error, and nothing is concluded from it.
func TestZeroFails(t *testing.T) {
	path := tempFile(t, testSize)
	d := openDevice(t, path)
	defer d.Close()
	if err := zero(d, -4096, 4096); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("zero before the beginning: %v", err)
	}
	if d.lane.zeroing != punchHole {
		t.Errorf("then by way %d", d.lane.zeroing)
	}
	if err := zero(d, 0, 4096); err != nil {
		t.Errorf("zero after a failure: %v", err)
	}
}

// Operations that reach beyond the end are errors, not short.
func TestBeyondTheEnd(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	defer d.Close()
	buf := aligned(t, 8192)
	if err := read(d, buf, testSize-4096); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v", err)
	}
	if err := read(d, buf, -4096); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("read before the beginning: %v", err)
	}
	if err := read(d, buf, 0); err != nil {
		t.Errorf("read after failures: %v", err)
	}
}

// Close waits for everything that was submitted.
func TestClose(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	buf := aligned(t, 4096)
	var reads, writes int // touched by one thread only
	const n = 3 * inFlight
	for i := range int64(n) {
		d.Read(buf, i*4096, func(error) { reads++ })
		d.Write(buf, i*4096, func(error) { writes++ })
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if reads != n || writes != n {
		t.Errorf("%d reads and %d writes of %d finished", reads, writes, n)
	}
}

// TestLateWake: whoever has handed an operation over, or closes the device, may come to
// waking its thread when that has done everything and ended.
func TestLateWake(t *testing.T) {
	d := openDevice(t, tempFile(t, 1<<20))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d.lane.wake()
}

// A callback may submit the next operation.
func TestChain(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	defer d.Close()
	buf := aligned(t, 512)
	left := 2000
	finished := make(chan error)
	var next func(error)
	next = func(err error) {
		if left--; left == 0 || err != nil {
			finished <- err
			return
		}
		d.Read(buf, 0, next)
	}
	d.Read(buf, 0, next)
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
}

func TestNoAllocations(t *testing.T) {
	d := openDevice(t, tempFile(t, testSize))
	defer d.Close()
	buf := aligned(t, 4096)
	finished := make(chan error)
	done := func(err error) { finished <- err }
	n := testing.AllocsPerRun(200, func() {
		d.Read(buf, 0, done)
		d.Write(buf, 4096, done)
		<-finished
		<-finished
	})
	if n != 0 {
		t.Errorf("%v allocations for a read and a write", n)
	}
}

// refuse checks that Open fails with a class of error, in one line that has
// the path and some words in it.
func refuse(t *testing.T, path string, want error, words ...string) {
	t.Helper()
	d, err := Open(path)
	if err == nil {
		d.Close()
	}
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, should be: %v", path, err, want)
		return
	}
	t.Log(err)
	for _, w := range append(words, path) {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not mention %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q is more than a line", err)
	}
}

// TestOpensOnceFree: who has closed a file may hold it a little longer.
func TestOpensOnceFree(t *testing.T) {
	file := tempFile(t, testSize)
	last, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(last.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(stillHeld/10, func() { last.Close() })
	openDevice(t, file).Close()
}

func TestFileRefusals(t *testing.T) {
	dir := t.TempDir()
	refuse(t, filepath.Join(dir, "missing"), ErrMissing)
	refuse(t, dir, ErrKind)
	refuse(t, os.DevNull, ErrKind)
	refuse(t, tempFile(t, 0), ErrSize)
	refuse(t, tempFile(t, 1000), ErrSize, "1000", "512")

	file := tempFile(t, testSize)
	d := openDevice(t, file)
	refuse(t, file, ErrInUse, "locked")
	d.Close()
	openDevice(t, file).Close()
}

func TestSerial(t *testing.T) {
	sys := t.TempDir()
	for path, content := range map[string]string{
		"nvme/wwid":             "eui.0025385b\n",
		"nvme/device/serial":    "S123 \n",
		"nvme/p1/partition":     "1\n",
		"scsi/device/wwid":      "naa.5000\n",
		"virtio/serial":         "vol-1",
		"none/queue/rotational": "1\n",
	} {
		path = filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for dir, want := range map[string]string{
		"nvme": "eui.0025385b", "nvme/p1": "eui.0025385b-part1", "scsi": "naa.5000", "virtio": "vol-1", "none": "", "missing": "",
	} {
		if got := diskAt(filepath.Join(sys, dir)).serial(); got != want {
			t.Errorf("%s: %q, should be %q", dir, got, want)
		}
	}
}

func TestFifo(t *testing.T) {
	q := fifo{ops: make([]op, 2)}
	var in, out int64
	rng := rand.New(rand.NewPCG(1, 1))
	for range 10000 {
		if q.n == 0 || rng.IntN(100) < 51 {
			q.push(op{off: in})
			in++
		} else if o := q.pop(); o.off != out {
			t.Fatalf("%d came out instead of %d", o.off, out)
		} else {
			out++
		}
	}
	if len(q.ops) < 4 || int64(q.n) != in-out {
		t.Fatalf("%d places, %d operations, %d in, %d out", len(q.ops), q.n, in, out)
	}
}

// TestCloseGivesEverythingBack: neither a device that is used and closed nor
// one that cannot be opened leaves a descriptor or a mapping.
func TestCloseGivesEverythingBack(t *testing.T) {
	good, bad := tempFile(t, 1<<20), tempFile(t, 0)
	held := func() (descriptors, mappings int) {
		open, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return len(open), bytes.Count(maps, []byte("\n"))
	}
	cycle := func() {
		d, err := Open(good)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		d.Zero(0, 1<<20, func(err error) { done <- err })
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := Open(bad); !errors.Is(err, ErrSize) {
			t.Errorf("open an empty file: %v", err)
		}
	}
	cycle()
	const cycles = 50
	files, maps := held()
	for range cycles {
		cycle()
	}
	// Mappings of the runtime's come and go.
	if f, m := held(); f != files || m > maps+cycles/2 {
		t.Errorf("after %d devices there are %d descriptors and %d mappings, before %d and %d", cycles, f, m, files, maps)
	}
}
