package main

import (
	"encoding/gob"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/vm/wire"
)

// A link sends frames; the two output streams of a program share it.
type link struct {
	mu struct {
		sync.Mutex
		out *gob.Encoder
	}
}

func (l *link) send(f wire.Frame) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.mu.out.Encode(f); err != nil {
		fmt.Println("agent: send to the host:", err)
		os.Exit(1)
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

// serve tells the host how bringing up went, then answers requests until the machine ends.
func serve(broughtUp error) {
	port, err := appear("/dev/vport*")
	if err != nil {
		fmt.Println("agent:", errors.Join(broughtUp, err))
		os.Exit(1)
	}
	f, err := os.OpenFile(port, os.O_RDWR, 0)
	if err != nil {
		fmt.Println("agent:", errors.Join(broughtUp, err))
		os.Exit(1)
	}
	l := &link{}
	l.mu.out = gob.NewEncoder(f)
	ready := wire.Frame{Exited: true}
	if broughtUp != nil {
		ready.Failure = broughtUp.Error()
	}
	l.send(ready)
	in := gob.NewDecoder(f)
	for {
		var r wire.Request
		if err := in.Decode(&r); err != nil {
			fmt.Println("agent: read from the host:", err)
			os.Exit(1)
		}
		if r.Halt {
			halt()
		}
		l.send(run(l, r))
	}
}

func run(l *link, r wire.Request) wire.Frame {
	cmd := exec.Command(r.Args[0], r.Args[1:]...)
	cmd.Env = append(os.Environ(), r.Env...)
	cmd.Stdout = writer(func(p []byte) { l.send(wire.Frame{Stdout: p}) })
	cmd.Stderr = writer(func(p []byte) { l.send(wire.Frame{Stderr: p}) })
	// A server left in the background that kept the output open must not keep the host waiting.
	cmd.WaitDelay = time.Second
	end := wire.Frame{Exited: true}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		end.Failure = err.Error()
		return end
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	end.Code = status.ExitStatus()
	if status.Signaled() {
		end.Code = 128 + int(status.Signal())
	}
	return end
}

// halt resets the machine, which ends the emulator (-no-reboot); powering off hangs there.
func halt() {
	unix.Sync()
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0); err != nil {
		fmt.Println("agent: reset:", err)
	}
	select {}
}
