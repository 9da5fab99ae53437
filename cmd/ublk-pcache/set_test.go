package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// lateDisk writes when it is told to.
type lateDisk struct {
	disk
	asked, write chan struct{}
}

func (d *lateDisk) Write(buf []byte, off int64, done func(error)) {
	go func() {
		d.asked <- struct{}{}
		<-d.write
		d.disk.Write(buf, off, done)
	}()
}

// dirtyServer serves device 3, whose cache has a dirty block that the disk is late with.
func dirtyServer(t *testing.T) (*server, *lateDisk) {
	t.Helper()
	ownStateDir(t)
	late := &lateDisk{asked: make(chan struct{}, 10), write: make(chan struct{})}
	s := serverOnDisk(t, pmem.NewFake(ondisk.MinSize), func(d disk) engine.Disk {
		late.disk = d
		return late
	})
	t.Cleanup(func() { s.cache.Close() })
	if _, err := s.execute(t.Context(), command{Do: "set", Settings: values{"writeback": "off"}}); err != nil {
		t.Fatal(err)
	}
	q := s.cache.Queue(0)
	q.Submit(&engine.Request{Op: engine.Write, Off: 1 << 20, Buf: make([]byte, 4096)})
	if done := q.Turn(); len(done) != 1 || done[0].Err != nil {
		t.Fatalf("a write: %+v", done)
	}
	served(t, s.execute)
	return s, late
}

// TestSetBrokenOff: a drain that its user breaks off has changed nothing, and a line says so. The next one ends.
func TestSetBrokenOff(t *testing.T) {
	s, late := dirtyServer(t)
	before := s.cache.Settings()
	ctx, breakOff := context.WithCancel(t.Context())
	set := command{Do: "set", Settings: values{"mode": "writearound", "gc_percent": "50"}}
	answered := make(chan error, 1)
	go func() { answered <- askShowing(ctx, 3, set) }()
	<-late.asked
	breakOff()
	err := <-answered
	fails(t, err, "broken off: all settings are as they were, mode=writeback")
	if now := s.cache.Settings(); now != before {
		t.Errorf("the settings are %+v, and were %+v", now, before)
	}
	close(late.write)
	if err := askShowing(t.Context(), 3, set); err != nil {
		t.Error(err)
	}
	if now := s.status(); now.Settings.Mode != ondisk.WriteAround || now.Settings.GCPercent != 50 || now.DirtyBytes != 0 {
		t.Errorf("%v, %d %%, %d bytes are dirty", now.Settings.Mode, now.Settings.GCPercent, now.DirtyBytes)
	}
}

// TestSetDraws: a terminal is shown how far a drain is, and an error on a line of its own.
func TestSetDraws(t *testing.T) {
	_, late := dirtyServer(t)
	terminal, shown := pty(t)
	was := os.Stderr
	t.Cleanup(func() { os.Stderr = was })
	os.Stderr = terminal
	ctx, breakOff := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() {
		answered <- askShowing(ctx, 3, command{Do: "set", Settings: values{"mode": "writethrough"}})
	}()
	var screen strings.Builder
	p := make([]byte, 1000)
	read := func(until string) {
		t.Helper()
		for !strings.Contains(screen.String(), until) {
			n, err := shown.Read(p)
			if err != nil {
				t.Fatalf("the terminal shows %q, not %q: %v", screen.String(), until, err)
			}
			screen.Write(p[:n])
		}
	}
	read("flushing")
	breakOff()
	fmt.Fprintln(terminal, <-answered)
	read("mode=writeback")
	if !strings.Contains(screen.String(), "\nbroken off: ") || strings.Contains(screen.String(), "100%") {
		t.Errorf("the terminal shows %q", screen.String())
	}
	close(late.write)
}

// pty returns a terminal, and what shows on it.
func pty(t *testing.T) (terminal *os.File, shown io.Reader) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	n, err1 := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	err2 := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	terminal, err3 := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return terminal, master
}
