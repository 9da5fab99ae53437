package main

import (
	"errors"
	"os/exec"
	"syscall"
	"testing"

	"ublk-pcache/ublk"
)

// TestDelBesideAStoppedProcess: a process that has the number of a server which has died is not taken for that.
func TestDelBesideAStoppedProcess(t *testing.T) {
	sleeper := exec.Command("sleep", "600")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleeper.Process.Kill(); sleeper.Wait() })
	pid := sleeper.Process.Pid
	if err := sleeper.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if _, err := syscall.Wait4(pid, nil, syscall.WUNTRACED, nil); err != nil || !halted(pid) {
		t.Fatalf("process %d does not stop: %v", pid, err)
	}
	d := someDevice(ublk.MaxID + 1) // which no driver has
	d.PID, d.Started = pid, startOf(pid)
	_, err := d.removeByDriver(false)
	fails(t, err, "stopped", "kill -CONT")
	d.Started--
	if _, err := d.removeByDriver(false); !errors.Is(err, ublk.ErrNoDevice) {
		t.Errorf("beside a process with its server's number: %v", err)
	}
}
