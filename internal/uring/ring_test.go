package uring

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func newRing(t *testing.T, o Options) *Ring {
	t.Helper()
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func TestReadWrite(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := int(f.Fd())

	const block, blocks = 4096, 20 // more than the ring holds at once
	buf, err := AlignedBuffer(block * blocks)
	if err != nil {
		t.Fatal(err)
	}
	defer FreeBuffer(buf)
	part := func(i int) []byte { return buf[i*block : (i+1)*block] }

	for _, o := range []Options{{Entries: 8}, {Entries: 8, SQE128: true}, {Entries: 8, SingleIssuer: true}} {
		r := newRing(t, o)
		run := func(prepare func(s *SQE, i int)) {
			seen := map[uint64]bool{}
			take := func() {
				for cqe, ok := r.Next(); ok; cqe, ok = r.Next() {
					if cqe.Res != block || seen[cqe.UserData] {
						t.Fatalf("%+v: %+v, seen before: %v", o, cqe, seen[cqe.UserData])
					}
					seen[cqe.UserData] = true
				}
			}
			for i := range blocks {
				s := r.SQE()
				if s == nil {
					if err := r.Turn(8); err != nil {
						t.Fatal(err)
					}
					take()
					s = r.SQE()
				}
				prepare(s, i)
				s.UserData = uint64(i)
			}
			for len(seen) < blocks {
				if err := r.Wait(1); err != nil {
					t.Fatal(err)
				}
				take()
			}
		}
		for i := range blocks {
			copy(part(i), bytes.Repeat([]byte{byte(i + 1)}, block))
		}
		run(func(s *SQE, i int) { s.PrepareWrite(fd, part(i), int64(i*block)) })
		clear(buf)
		run(func(s *SQE, i int) { s.PrepareRead(fd, part(i), int64(i*block)) })
		for i, b := range buf {
			if b != byte(i/block+1) {
				t.Fatalf("%+v: byte %d is %d", o, i, b)
			}
		}
	}
}

// An entry that was used before must not leak into the next operation.
func TestEntriesAreZeroed(t *testing.T) {
	r := newRing(t, Options{Entries: 1, SQE128: true})
	for range 3 {
		s := r.SQE()
		if *s != (SQE{}) {
			t.Fatalf("entry not zeroed: %+v", *s)
		}
		args := (*[80]byte)(s.PrepareCommand(-1, 1))
		if *args != ([80]byte{}) {
			t.Fatal("command area not zeroed")
		}
		for i := range args {
			args[i] = 0xff
		}
		if r.SQE() != nil {
			t.Fatal("a full ring handed out an entry")
		}
		if err := r.Wait(1); err != nil {
			t.Fatal(err)
		}
		if cqe, ok := r.Next(); !ok || syscall.Errno(-cqe.Res) != syscall.EBADF {
			t.Fatalf("command on a bad descriptor: %+v, %v", cqe, ok)
		}
	}
}

// A failing operation must not keep those queued behind it from being
// submitted.
func TestFailureDoesNotStopSubmission(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	r.SQE().opcode = 255
	r.SQE().PrepareDatasync(-1)
	if err := r.Wait(2); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if cqe, ok := r.Next(); !ok || cqe.Res >= 0 {
			t.Fatalf("%+v, %v", cqe, ok)
		}
	}
}

func TestSingleIssuerIsEnforced(t *testing.T) {
	rings := make(chan *Ring)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		r, err := New(Options{Entries: 1, SingleIssuer: true})
		if err != nil {
			t.Error(err)
		}
		rings <- r
	}()
	r := <-rings
	if r == nil {
		return
	}
	defer r.Close()
	r.SQE().PrepareDatasync(-1)
	if err := r.Submit(); !errors.Is(err, syscall.EEXIST) {
		t.Fatalf("entering from another thread: %v", err)
	}
}

// Many posters, few slots: every message arrives, though the target's
// completion queue (2 entries) overflows.
func TestMessengerLosesNothing(t *testing.T) {
	const posters, each = 4, 500
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r := newRing(t, Options{Entries: 1, SingleIssuer: true})
	m, err := NewMessenger(r)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for p := range posters {
		wg.Go(func() {
			for i := range each {
				if err := m.Post(uint64(p*each + i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	if err := r.Turn(1); err != nil { // some come while the thread waits
		t.Fatal(err)
	}
	wg.Wait() // the rest overflows
	seen := map[uint64]bool{}
	for len(seen) < posters*each && !t.Failed() {
		if err := r.Turn(1); err != nil {
			t.Fatal(err)
		}
		for cqe, ok := r.Next(); ok; cqe, ok = r.Next() {
			if cqe.Res != 0 || seen[cqe.UserData] {
				t.Fatalf("%+v, seen before: %v", cqe, seen[cqe.UserData])
			}
			seen[cqe.UserData] = true
		}
	}
	m.Close()
	if err := m.Post(1); !errors.Is(err, ErrClosed) {
		t.Fatalf("post after close: %v", err)
	}
}

func TestMessageToWhatIsNoRing(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := NewMessenger(&Ring{fd: int(f.Fd())})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for range 2 {
		if err := m.Post(1); !errors.Is(err, syscall.EBADFD) {
			t.Fatalf("%v", err)
		}
	}
}

// sleepers starts n threads that sleep in Turn and returns a function that
// wakes and ends them all.
func sleepers(t *testing.T, n int) (stop func()) {
	messengers := make(chan *Messenger, n)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			r, err := New(Options{Entries: 1, SingleIssuer: true})
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			m, err := NewMessenger(r)
			if err != nil {
				t.Error(err)
				return
			}
			defer m.Close()
			messengers <- m
			if err := r.Turn(1); err != nil {
				t.Error(err)
			}
		})
	}
	var all []*Messenger
	for range n {
		all = append(all, <-messengers)
	}
	return func() {
		for _, m := range all {
			if err := m.Post(0); err != nil {
				t.Error(err)
			}
		}
		wg.Wait()
	}
}

// Threads asleep in Turn hold their P. Collections must still complete, timers
// fire, and goroutines hand over to each other promptly. A runtime that waits
// for a sleeping thread hangs as a whole, with every timeout in it, so this
// happens in a process of its own.
func TestSleepersDoNotHoldUpTheRuntime(t *testing.T) {
	out, err := sleeperProcess(t, time.Minute)
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	t.Logf("%s", out)
}

// Without asynchronous preemption the same hangs, which shows that the test
// above can fail, and why a server must refuse to run that way.
func TestSleepersNeedPreemption(t *testing.T) {
	t.Setenv("GODEBUG", "asyncpreemptoff=1")
	if out, err := sleeperProcess(t, 2*time.Second); err == nil {
		t.Errorf("threads in Turn can be stopped without asynchronous preemption: %s", out)
	}
}

const sleeperEnv = "URING_TEST_SLEEPERS"

// TestPending: a thread that does not enter the kernel learns that it should.
func TestPending(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r := newRing(t, Options{Entries: 8, SingleIssuer: true})
	m, err := NewMessenger(r)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for i := range uint64(100) {
		if r.Pending() {
			t.Fatal("pending before anything was sent")
		}
		go m.Post(i)
		for !r.Pending() {
			runtime.Gosched()
		}
		if err := r.Turn(0); err != nil {
			t.Fatal(err)
		}
		if cqe, ok := r.Next(); !ok || cqe.UserData != i {
			t.Fatalf("%+v, %v", cqe, ok)
		}
		r.Next()
	}
}

func sleeperProcess(t *testing.T, patience time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestSleeperProcess$", "-test.v")
	cmd.Env = append(os.Environ(), sleeperEnv+"=1")
	return cmd.CombinedOutput()
}

// TestSleeperProcess is the process, and nothing by itself.
func TestSleeperProcess(t *testing.T) {
	if os.Getenv(sleeperEnv) == "" {
		return
	}
	const n = 4
	runtime.GOMAXPROCS(n + 4)
	stop := sleepers(t, n)
	time.Sleep(20 * time.Millisecond) // let them all fall asleep

	// What is seen does not depend on n: tens of milliseconds for a collection
	// on a busy machine with two CPUs, a few for the others.
	prompt := func(what string, rounds int, f func()) {
		worst := time.Duration(0)
		for range rounds {
			start := time.Now()
			f()
			worst = max(worst, time.Since(start))
		}
		t.Logf("%s: at most %v", what, worst)
		if worst > 10*time.Second {
			t.Errorf("%s took %v while %d threads slept in Turn", what, worst, n)
		}
	}
	var sink atomic.Pointer[[]byte]
	prompt("collection", 50, func() {
		for range 1000 {
			b := make([]byte, 1<<10)
			sink.Store(&b)
		}
		runtime.GC()
	})
	prompt("stopping the world", 50, func() { var ms runtime.MemStats; runtime.ReadMemStats(&ms) })
	prompt("timer", 50, func() { time.Sleep(time.Millisecond) })
	ping, pong := make(chan int), make(chan int)
	go func() {
		for v := range ping {
			pong <- v
		}
	}()
	prompt("hand-over", 1000, func() { ping <- 1; <-pong })
	close(ping)
	stop()
}

// Wait counts completions that were there before it, and sees those that came
// since a batch was begun.
func TestWaitWithCompletionsLeft(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	for range 3 {
		r.SQE().PrepareDatasync(-1)
	}
	if err := r.Wait(3); err != nil {
		t.Fatal(err)
	}
	r.Next() // two are left
	r.SQE().PrepareDatasync(-1)
	if err := r.Wait(3); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, ok := r.Next(); ok; _, ok = r.Next() {
		n++
	}
	if n != 3 {
		t.Fatalf("%d completions, should be 3", n)
	}
}

func TestNoAllocations(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	n := testing.AllocsPerRun(100, func() {
		r.SQE().PrepareDatasync(-1)
		if err := r.Turn(1); err != nil {
			t.Fatal(err)
		}
		for _, ok := r.Next(); ok; _, ok = r.Next() {
		}
	})
	if n != 0 {
		t.Fatalf("%v allocations per turn", n)
	}
}
