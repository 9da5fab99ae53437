//go:build vm

package ublk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestData drives both queues deeply, from both CPUs, and checks every sector
// through the disk and in the ramdisk's own memory.
func TestData(t *testing.T) {
	cfg := twoQueues
	cfg.Depth = 128
	r := start(t, cfg)
	fd := open(t, r.Path())
	const clients = 32
	var wg sync.WaitGroup
	all := make([]*client, clients)
	for i := range clients {
		c := newClient(t, fd, i, failFrom/clients)
		all[i] = c
		wg.Go(func() {
			onCPU(t, i%2)
			for n := range 100 {
				err := c.write()
				if n%3 == 0 {
					err = errors.Join(err, c.read(c.piece()))
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i, c := range all {
		if err := c.verify(); err != nil {
			t.Errorf("client %d, through the disk: %v", i, err)
		}
		if err := c.compare(r.mem[c.base:c.base+int64(len(c.versions))*512], 0); err != nil {
			t.Errorf("client %d, in memory: %v", i, err)
		}
	}
	unix.Close(fd)
	finish(t, r.Device)
	for i, q := range r.queues {
		t.Logf("queue %d: %d requests, up to %d at once", i, q.served, q.most)
		if q.served < 1000 || q.most < 4 {
			t.Errorf("queue %d was not exercised", i)
		}
	}
}

// TestStart checks that the partition scan is served, and the parameters as the
// block layer understood them.
func TestStart(t *testing.T) {
	cfg := twoQueues
	cfg.VolatileCache = true
	r := start(t, cfg)
	for name, want := range map[string]string{
		"size":                         strconv.Itoa(ramSize / 512),
		"queue/logical_block_size":     "512",
		"queue/physical_block_size":    "4096",
		"queue/minimum_io_size":        "4096",
		"queue/optimal_io_size":        "4096",
		"queue/max_hw_sectors_kb":      "1024",
		"queue/chunk_sectors":          "8192",
		"queue/write_cache":            "write back",
		"queue/fua":                    "1",
		"queue/rotational":             "0",
		"queue/discard_max_bytes":      "0",
		"queue/write_zeroes_max_bytes": "0",
		"ro":                           "0",
	} {
		got, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(r.Path()), name))
		if err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is %q (%v), should be %q", name, got, err, want)
		}
	}
	info, err := Lookup(r.ID())
	want := Info{ID: r.ID(), State: Live, PID: os.Getpid(), Path: r.Path(), Queues: 2, Depth: 32,
		MaxIO: MaxIO, Size: ramSize}
	if err != nil || info != want {
		t.Errorf("Lookup: %+v, %v", info, err)
	}
	unix.Close(open(t, r.Path())) // waits for the scan, which may go on in the background
	finish(t, r.Device)
	if r.queues[0].served+r.queues[1].served == 0 {
		t.Error("no reads from a partition scan")
	}
}

func TestFlushAndFUA(t *testing.T) {
	cfg := twoQueues
	cfg.VolatileCache = true
	var flushes, fuas atomic.Int32
	r := &ram{mem: aligned(t, ramSize)}
	var err error
	r.Device, err = Add(cfg, func(q *Queue) Handler {
		return spy{r.handler(q), func(req *Request) {
			if req.Op == Flush {
				flushes.Add(1)
			}
			if req.Op == Write && req.FUA {
				fuas.Add(1)
			}
		}}
	}, func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	fd := open(t, r.Path())
	buf := aligned(t, 4096)
	if _, err := unix.Pwrite(fd, buf, 0); err != nil {
		t.Fatal(err)
	}
	if flushes.Load() != 0 || fuas.Load() != 0 {
		t.Errorf("after a plain write: %d flushes, %d FUA writes", flushes.Load(), fuas.Load())
	}
	if err := unix.Fdatasync(fd); err != nil || flushes.Load() == 0 {
		t.Errorf("after fdatasync: %d flushes, %v", flushes.Load(), err)
	}
	if _, err := unix.Pwritev2(fd, [][]byte{buf}, 0, unix.RWF_DSYNC); err != nil || fuas.Load() == 0 {
		t.Errorf("after a write with RWF_DSYNC: %d FUA writes, %v", fuas.Load(), err)
	}
	unix.Close(fd)
	finish(t, r.Device)
}

// TestDiscardAndWriteZeroes asks for both in all the ways that programs have,
// off the 4 KiB grid, larger than one request may be. Every byte of a range must
// be asked for once, by the right operation, and no byte beside it.
func TestDiscardAndWriteZeroes(t *testing.T) {
	const off, size = 3 * 512, 24<<20 + 512
	cfg := twoQueues
	cfg.MaxDiscard, cfg.MaxZeroes = 16<<20, 8<<20
	var seen struct {
		sync.Mutex
		requests []Request
	}
	r := &ram{mem: aligned(t, ramSize)}
	var err error
	r.Device, err = Add(cfg, func(q *Queue) Handler {
		return spy{r.handler(q), func(req *Request) {
			if req.Op != Read {
				seen.Lock()
				seen.requests = append(seen.requests, *req)
				seen.Unlock()
			}
		}}
	}, func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{
		"discard_max_bytes": cfg.MaxDiscard, "write_zeroes_max_bytes": cfg.MaxZeroes,
		"discard_granularity": 1 << physicalShift, // never less than a physical block
	} {
		got, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(r.Path()), "queue", name))
		if err != nil || strings.TrimSpace(string(got)) != strconv.Itoa(want) {
			t.Errorf("%s is %q (%v), should be %d", name, got, err, want)
		}
	}
	fd := open(t, r.Path())
	for _, c := range []struct {
		name  string
		op    Op
		limit int
		left  byte
		call  func() error
	}{
		{"BLKDISCARD", Discard, cfg.MaxDiscard, discarded, func() error {
			return ioctlRange(fd, unix.BLKDISCARD, off, size)
		}},
		{"BLKZEROOUT", WriteZeroes, cfg.MaxZeroes, 0, func() error {
			return ioctlRange(fd, unix.BLKZEROOUT, off, size)
		}},
		{"punching a hole", WriteZeroes, cfg.MaxZeroes, 0, func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
		}},
		{"zeroing a range", WriteZeroes, cfg.MaxZeroes, 0, func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, size)
		}},
	} {
		mem := r.mem[:lateFrom]
		want := bytes.Repeat([]byte{1}, len(mem))
		copy(mem, want)
		copy(want[off:], bytes.Repeat([]byte{c.left}, size))
		if err := c.call(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		seen.Lock()
		requests := seen.requests
		seen.requests = nil
		seen.Unlock()
		slices.SortFunc(requests, func(a, b Request) int { return int(a.Offset - b.Offset) })
		end := int64(off)
		for _, req := range requests {
			if req.Op != c.op || req.Offset != end || req.Len <= 0 || req.Len > c.limit || req.Buf != nil {
				t.Errorf("%s: operation %d of %d bytes at %d, should be one of %d at %d", c.name, req.Op, req.Len, req.Offset, c.op, end)
			}
			end = req.Offset + int64(req.Len)
		}
		if end != off+size {
			t.Errorf("%s ends at %d, should at %d", c.name, end, off+size)
		}
		if !bytes.Equal(mem, want) {
			t.Errorf("%s: not exactly its range has changed", c.name)
		}
		t.Logf("%s: %d requests, the largest of %d KiB", c.name, len(requests), largest(requests)>>10)
	}
	if err := ioctlRange(fd, unix.BLKDISCARD, failFrom, 4096); err != unix.ENOSPC {
		t.Errorf("a discard that fails: %v", err)
	}
	unix.Close(fd)
	finish(t, r.Device)
}

func ioctlRange(fd int, request uint, off, n int64) error {
	span := [2]int64{off, n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}

func largest(requests []Request) (n int) {
	for _, r := range requests {
		n = max(n, r.Len)
	}
	return n
}

// TestNothingOffered: without limits there are no discards, and zeros come as
// writes.
func TestNothingOffered(t *testing.T) {
	r := start(t, twoQueues)
	fd := open(t, r.Path())
	for i := range r.mem[:8192] {
		r.mem[i] = 1
	}
	if err := ioctlRange(fd, unix.BLKDISCARD, 0, 4096); err != unix.EOPNOTSUPP {
		t.Errorf("discard: %v", err)
	}
	if err := ioctlRange(fd, unix.BLKZEROOUT, 4096, 4096); err != nil {
		t.Errorf("write zeroes: %v", err)
	}
	if r.mem[4095] != 1 || r.mem[4096] != 0 || r.mem[8191] != 0 {
		t.Error("what was to be zeroed was not, or more was")
	}
	unix.Close(fd)
	finish(t, r.Device)
}

type spy struct {
	Handler
	see func(*Request)
}

func (s spy) Submit(r *Request) {
	s.see(r)
	s.Handler.Submit(r)
}

// TestErrors: the errno of a result is what the program gets, and it is no
// matter for the rest of the disk.
func TestErrors(t *testing.T) {
	r := start(t, twoQueues)
	fd := open(t, r.Path())
	buf := aligned(t, 8192)
	if _, err := unix.Pwrite(fd, buf, failFrom); err != unix.ENOSPC {
		t.Errorf("failing write: %v", err)
	}
	if _, err := unix.Pread(fd, buf, failFrom+4096); err != unix.EIO {
		t.Errorf("failing read: %v", err)
	}
	if n, err := unix.Pwrite(fd, buf, 0); n != len(buf) || err != nil {
		t.Errorf("write next to it: %d, %v", n, err)
	}
	unix.Close(fd)
	finish(t, r.Device)
}

// TestWake: requests finished by other goroutines, one at a time (the queue's
// thread is asleep) and many (it mostly is not). A lost wake-up hangs.
func TestWake(t *testing.T) {
	r := start(t, twoQueues)
	fd := open(t, r.Path())
	buf := aligned(t, 4096)
	for i := range 500 {
		if _, err := unix.Pwrite(fd, buf, lateFrom+int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	var clients []*client
	for i := range 16 {
		c := newClient(t, fd, i, 1<<20)
		c.base += lateFrom
		clients = append(clients, c)
	}
	work(t, clients, 100, (*client).write)
	unix.Close(fd)
	finish(t, r.Device)
}

// TestWakeDuringTurn: a Wake that comes when the queue's thread is awake sends
// no message, and must keep it from falling asleep instead.
func TestWakeDuringTurn(t *testing.T) {
	r := &ram{mem: aligned(t, ramSize)}
	var err error
	r.Device, err = Add(twoQueues, func(q *Queue) Handler {
		r.handler(q)
		return &oneTurnLate{ramdisk: r.queues[q.ID()]}
	}, func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	fd := open(t, r.Path())
	c := newClient(t, fd, 0, 1<<20)
	for range 100 {
		if err := errors.Join(c.write(), c.read(c.piece())); err != nil {
			t.Fatal(err)
		}
	}
	unix.Close(fd)
	finish(t, r.Device)
}

// oneTurnLate returns what a turn has finished at the end of the next.
type oneTurnLate struct {
	*ramdisk
	aside []Completion
}

func (h *oneTurnLate) Turn(done []Completion) []Completion {
	done = append(done, h.aside...)
	h.aside = h.ramdisk.Turn(h.aside[:0])
	if len(h.aside) > 0 {
		h.q.Wake()
	}
	return done
}

// TestStopWhileOpen: a careful Stop refuses, for an opener and for a mount-like
// claim, and leaves the disk working; a forced one ends requests in flight.
func TestStopWhileOpen(t *testing.T) {
	r := start(t, twoQueues)
	buf := aligned(t, 4096)
	for _, flags := range []int{0, unix.O_EXCL} {
		fd, err := unix.Open(r.Path(), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC|flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Stop(false); !errors.Is(err, ErrInUse) {
			t.Fatalf("Stop of an open disk: %v", err)
		}
		if _, err := unix.Pwrite(fd, buf, 0); err != nil {
			t.Fatalf("after a refused Stop: %v", err)
		}
		unix.Close(fd)
	}

	fd := open(t, r.Path())
	stopping := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		c := newClient(t, fd, i, 1<<20)
		c.base += lateFrom
		wg.Go(func() {
			for c.write() == nil {
			}
			<-stopping // a write failed before the disk was stopped: hang
		})
	}
	time.Sleep(200 * time.Millisecond) // of writes under way
	close(stopping)
	if err := r.Stop(true); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	unix.Close(fd)
	if err := r.Delete(); err != nil {
		t.Fatal(err)
	}
	requireNone(t)
}

// TestStopByAnother: the device is stopped and deleted by another program;
// the server only sees its queues end.
func TestStopByAnother(t *testing.T) {
	r := start(t, twoQueues)
	c, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.stop(uint32(r.ID())); err != nil {
		t.Fatal(err)
	}
	<-r.Done()
	if err := r.Stop(false); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(); err != nil {
		t.Fatal(err)
	}
	requireNone(t)
}

// TestQuiesce: the driver aborts the tags it holds while the handler holds
// others. The queues must end all the same, acknowledge what they held, and
// lose nothing for the next server.
func TestQuiesce(t *testing.T) {
	const cmdQuiesceDev = ctrlWrite | 0x16
	have, err := Features()
	if err != nil {
		t.Fatal(err)
	}
	if have&featureQuiesce == 0 {
		t.Log("this kernel's driver has no QUIESCE_DEV, so queues are only aborted when idle")
		return
	}
	r := &ram{mem: aligned(t, ramSize)}
	hold := make(chan struct{})
	r.Device, err = Add(twoQueues, func(q *Queue) Handler {
		h := &ramdisk{q: q, mem: r.mem, late: make(chan Request, q.Depth())}
		r.queues = append(r.queues, h)
		go func() { <-hold; h.finishLate() }()
		return h
	}, func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	fd := open(t, r.Path())
	var wg sync.WaitGroup
	for i := range 4 {
		c := newClient(t, fd, i, 1<<20)
		c.base += lateFrom
		wg.Go(func() {
			if err := c.write(); err != nil {
				t.Error(err)
			}
			if err := c.verify(); err != nil {
				t.Error(err)
			}
		})
	}
	for held := false; !held && !t.Failed(); time.Sleep(time.Millisecond) {
		held = slices.ContainsFunc(r.queues, func(h *ramdisk) bool { return len(h.late) > 0 })
	}
	c, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.command(cmdQuiesceDev, uint32(r.ID()), 1000, 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // nothing must happen in: there is no event to wait for
	select {
	case <-r.Done():
		t.Fatal("the queues ended with requests in hand")
	default:
	}
	close(hold)
	select {
	case <-r.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the queues do not end")
	}
	if err := r.Stop(false); err != nil {
		t.Fatal(err)
	}
	r2 := &ram{mem: r.mem}
	if r2.Device, err = Recover(r.ID(), r2.handler, func(err error) { panic(err) }); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	unix.Close(fd)
	finish(t, r2.Device)
}

func TestAddRefuses(t *testing.T) {
	noHandler := func(*Queue) Handler { return &ramdisk{} }
	noFatal := func(err error) { panic(err) }
	for what, change := range map[string]func(*Config){
		"no size":        func(c *Config) { c.Size = 0 },
		"half a block":   func(c *Config) { c.Size += 256 },
		"block size 256": func(c *Config) { c.BlockSize = 256 },
		"no queues":      func(c *Config) { c.Queues = 0 },
		"too deep":       func(c *Config) { c.Depth = maxQueueDepth + 1 },
		"odd discards":   func(c *Config) { c.MaxDiscard = 513 },
		"huge zeroes":    func(c *Config) { c.MaxZeroes = 1 << 33 },
	} {
		cfg := twoQueues
		change(&cfg)
		if d, err := Add(cfg, noHandler, noFatal); err == nil {
			t.Errorf("%s: accepted as %s", what, d.Path())
		}
		requireNone(t)
	}

	cfg := twoQueues
	cfg.ID = 7
	r := start(t, cfg)
	if r.ID() != 7 || r.Path() != "/dev/ublkb7" {
		t.Errorf("asked for number 7, got %d", r.ID())
	}
	if _, err := Add(cfg, noHandler, noFatal); !errors.Is(err, ErrExists) {
		t.Errorf("number taken: %v", err)
	}
	if _, err := Recover(7, noHandler, noFatal); !errors.Is(err, ErrServed) {
		t.Errorf("recovering a served device: %v", err)
	}
	finish(t, r.Device)
	if _, err := Recover(7, noHandler, noFatal); !errors.Is(err, ErrNoDevice) {
		t.Errorf("recovering no device: %v", err)
	}

	t.Setenv("GODEBUG", "asyncpreemptoff=1")
	if _, err := Add(twoQueues, noHandler, noFatal); !errors.Is(err, ErrNoPreemption) {
		t.Errorf("without preemption: %v", err)
	}
	requireNone(t)
}

// shortOfDescriptors makes an attempt fail at every point where it opens
// something, and returns when it has succeeded.
func shortOfDescriptors(t *testing.T, attempt func() error, failed func(error)) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	next, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	for extra := range 20 {
		short := unix.Rlimit{Cur: uint64(next + extra), Max: limit.Max}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &short); err != nil {
			t.Fatal(err)
		}
		err := attempt()
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		if err == nil {
			if extra < 7 { // control and its ring, the device, two rings for each queue
				t.Errorf("only %d ways to fail", extra)
			}
			return
		}
		failed(err)
	}
	t.Fatal("it never succeeds")
}

func TestAddShortOfDescriptors(t *testing.T) {
	r := &ram{mem: aligned(t, ramSize)}
	shortOfDescriptors(t, func() (err error) {
		r.Device, err = Add(twoQueues, r.handler, func(err error) { panic(err) })
		return err
	}, func(error) { requireNone(t) })
	finish(t, r.Device)
}
