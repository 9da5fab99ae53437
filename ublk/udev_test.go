//go:build vm

package ublk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStopWhileUdevLooks: a stop waits for somebody who has the disk open while
// udev is at work, and not for long.
func TestStopWhileUdevLooks(t *testing.T) {
	if err := os.MkdirAll(filepath.Dir(udevQueue), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(udevQueue, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(udevQueue) })
	r := start(t, twoQueues)

	fd := open(t, r.Path())
	begin := time.Now()
	err := r.Stop(false)
	if waited := time.Since(begin); !errors.Is(err, ErrInUse) || waited < udevPatience || waited > 5*udevPatience {
		t.Errorf("Stop of a disk that stays open: %v after %v", err, waited)
	}

	time.AfterFunc(udevPatience/10, func() {
		unix.Close(fd)
		os.Remove(udevQueue)
	})
	finish(t, r.Device)
}
