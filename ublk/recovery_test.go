//go:build vm

package ublk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKillAndRecover kills servers while clients write and read back: no
// request may fail, and none that was acknowledged may be lost.
func TestKillAndRecover(t *testing.T) {
	path := store(t)
	s := spawn(t, "add", path)
	id := strconv.Itoa(s.id)
	fd := open(t, "/dev/ublkb"+id)
	const clients = 8
	var (
		wg   sync.WaitGroup
		stop atomic.Bool
		all  [clients]*client
	)
	for i := range clients {
		c := newClient(t, fd, i, failFrom/clients)
		all[i] = c
		wg.Go(func() {
			for !stop.Load() {
				if err := c.write(); err != nil {
					t.Error(err)
					return
				}
				if err := c.read(c.piece()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 5 {
		time.Sleep(300 * time.Millisecond) // of writes under way
		s.Process.Kill()
		killed := time.Now()
		s.Wait()
		s = spawn(t, "recover", path, id)
		t.Logf("recovered %v after the kill", time.Since(killed))
		before := all[0].writes.Load()
		for all[0].writes.Load() == before && !t.Failed() {
			time.Sleep(time.Millisecond)
		}
	}
	stop.Store(true)
	wg.Wait()
	for i, c := range all {
		t.Logf("client %d: %d writes", i, c.writes.Load())
		if err := c.verify(); err != nil {
			t.Errorf("client %d: %v", i, err)
		}
	}
	unix.Close(fd)
	s.in.Close()
	if err := s.Wait(); err != nil {
		t.Errorf("clean stop: %v", err)
	}
	requireNone(t)
}

// TestLetGo: a server hands its device to the next again and again while
// clients write and read back.
func TestLetGo(t *testing.T) {
	r := start(t, twoQueues)
	if err := r.CanLetGo(); err != nil {
		if !errors.Is(err, ErrTooOld) || r.info.flags&featureQuiesce != 0 {
			t.Error(err)
		}
		t.Log(err) // such a kernel crashes of what follows
		finish(t, r.Device)
		return
	}
	fd := open(t, r.Path())
	const clients = 8
	var (
		wg   sync.WaitGroup
		stop atomic.Bool
		all  [clients]*client
	)
	for i := range clients {
		c := newClient(t, fd, i, failFrom/clients)
		all[i] = c
		wg.Go(func() {
			for !stop.Load() {
				if err := errors.Join(c.write(), c.read(c.piece())); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 5 {
		fatal := func(err error) { panic(err) }
		next := &ram{mem: r.mem}
		s, err := Prepare(r.ID(), fatal)
		if err != nil {
			t.Fatal(err)
		}
		before := all[0].writes.Load()
		for all[0].writes.Load() == before && !t.Failed() {
			time.Sleep(time.Millisecond)
		}
		begin := time.Now()
		r.LetGo()
		gone := time.Now()
		if next.Device, err = s.TakeOver(next.handler); err != nil {
			t.Fatal(err)
		}
		t.Logf("let go in %v, taken over in %v", gone.Sub(begin), time.Since(gone))
		r = next
	}
	stop.Store(true)
	wg.Wait()
	for i, c := range all {
		if err := c.verify(); err != nil {
			t.Errorf("client %d: %v", i, err)
		}
	}
	unix.Close(fd)
	finish(t, r.Device)
}

// TestDeadServer: what is seen of a device whose server was killed, and that
// it can be removed.
func TestDeadServer(t *testing.T) {
	s := spawn(t, "add", store(t))
	// Opening a disk waits for its partition scan, which a dead server cannot serve.
	unix.Close(open(t, diskPath(uint32(s.id))))
	s.Process.Kill()
	s.Wait()
	var info Info
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var err error
		if info, err = Lookup(s.id); err != nil {
			t.Fatal(err)
		}
		if info.State == Quiesced {
			break
		}
	}
	if info.State != Quiesced || info.Size != ramSize {
		t.Errorf("after the kill: %+v", info)
	}
	fd := open(t, info.Path)
	if err := Remove(s.id, false); !errors.Is(err, ErrInUse) {
		t.Errorf("Remove of an open device: %v", err)
	}
	unix.Close(fd)
	if err := Remove(s.id, false); err != nil {
		t.Error(err)
	}
	requireNone(t)
	if err := Remove(s.id, false); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Remove of no device: %v", err)
	}
}

// TestRemoveUnderPartitionScan: a device can be removed whose server died while
// the kernel was looking for partitions. Where it does that in START_DEV, before
// 6.18, there is no device yet.
func TestRemoveUnderPartitionScan(t *testing.T) {
	if have, err := Features(); err != nil || have&featureSafeStopDev == 0 {
		t.Logf("features %#x, %v: no such device", have, err)
		return
	}
	s := spawn(t, "mute", store(t))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) { // until the kernel waits for an answer
		text, err := os.ReadFile(fmt.Sprintf("/sys/block/ublkb%d/inflight", s.id))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(strings.TrimSpace(string(text)), "0") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the kernel does not look for partitions")
		}
	}
	s.Process.Kill()
	s.Wait()
	removed := make(chan error, 1)
	go func() { removed <- Remove(s.id, false) }()
	select {
	case err := <-removed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Remove waits for the partition scan")
	}
	requireNone(t)
}

// TestRecoverShortOfDescriptors: a recovery that fails leaves the disk waiting
// for the next one.
func TestRecoverShortOfDescriptors(t *testing.T) {
	s := spawn(t, "add", store(t))
	fd := open(t, diskPath(uint32(s.id)))
	s.Process.Kill()
	s.Wait()
	r := &ram{mem: aligned(t, ramSize)}
	shortOfDescriptors(t, func() (err error) {
		r.Device, err = Recover(s.id, r.handler, func(err error) { panic(err) })
		return err
	}, func(err error) {
		if !errors.Is(err, unix.EMFILE) {
			t.Errorf("failed in another way: %v", err)
		}
	})
	c := newClient(t, fd, 0, 1<<20)
	if err := errors.Join(c.write(), c.verify()); err != nil {
		t.Error(err)
	}
	unix.Close(fd)
	finish(t, r.Device)
}

// TestKillWithAllTagsInFlight: the driver before 6.15 notices such a death only
// by the block layer's timeout, so this takes half a minute there.
func TestKillWithAllTagsInFlight(t *testing.T) {
	path := store(t)
	s := spawn(t, "stuck", path)
	fd := open(t, diskPath(uint32(s.id)))
	var wg sync.WaitGroup
	for i := range 8 { // the device has four tags
		c := newClient(t, fd, i, 1<<20)
		c.base += lateFrom
		wg.Go(func() {
			onCPU(t, i%2)
			if err := errors.Join(c.write(), c.verify()); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	s.Process.Kill()
	killed := time.Now()
	s.Wait()
	s = spawn(t, "recover", path, strconv.Itoa(s.id))
	t.Logf("recovered %v after the kill", time.Since(killed))
	wg.Wait()
	unix.Close(fd)
	s.in.Close()
	if err := s.Wait(); err != nil {
		t.Errorf("clean stop: %v", err)
	}
	requireNone(t)
}

// TestBrokenLoop: a queue that cannot go on must end the server, and the
// device must be recoverable.
func TestBrokenLoop(t *testing.T) {
	path := store(t)
	s := spawn(t, "add", path)
	fd := open(t, fmt.Sprintf("/dev/ublkb%d", s.id))
	c := newClient(t, fd, 0, 1<<20)
	if err := c.write(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(s.in, "break\n")
	done := make(chan error)
	go func() {
		for range 100 {
			if err := c.write(); err != nil {
				done <- err
				return
			}
		}
		done <- c.verify()
	}()
	var exit *exec.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitFatal {
		t.Errorf("server ended with %v", err)
	}
	s = spawn(t, "recover", path, strconv.Itoa(s.id))
	if err := <-done; err != nil {
		t.Error(err)
	}
	unix.Close(fd)
	s.in.Close()
	if err := s.Wait(); err != nil {
		t.Errorf("clean stop: %v", err)
	}
	requireNone(t)
}
