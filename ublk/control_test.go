package ublk

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The masks are what GET_FEATURES returns on these kernels.
func TestCheckFeatures(t *testing.T) {
	for kernel, mask := range map[string]uint64{"6.12": 0x1fe, "6.18": 0x7fff, "7.3": 0x1fffff} {
		if err := checkFeatures(mask); err != nil {
			t.Errorf("%s: %v", kernel, err)
		}
	}
	for bit, name := range map[uint64]string{3: "USER_RECOVERY", 4: "USER_RECOVERY_REISSUE", 6: "CMD_IOCTL_ENCODE"} {
		err := checkFeatures(0x1fe &^ (1 << bit))
		if !errors.Is(err, ErrTooOld) || !strings.HasSuffix(err.Error(), "_"+name) {
			t.Errorf("without %s: %v", name, err)
		}
	}
}

func TestDeviceErrors(t *testing.T) {
	if err := deviceError("stop", 3, nil); err != nil {
		t.Error(err)
	}
	err := deviceError("stop", 3, syscall.ENODEV)
	if !errors.Is(err, ErrNoDevice) || err.Error() != "stop ublk device 3: no such ublk device" {
		t.Error(err)
	}
	if err := addError(3, syscall.EEXIST); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	if err := addError(anyID, syscall.EACCES); !strings.Contains(err.Error(), "ublks_max") {
		t.Error(err)
	}
}

func TestRunning(t *testing.T) {
	if !running(os.Getpid()) {
		t.Error("this process does not run")
	}
	child := exec.Command("cat")
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if !running(child.Process.Pid) {
		t.Error("a child that waits does not run")
	}
	in.Close()
	for begin := time.Now(); running(child.Process.Pid); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatal("a zombie runs")
		}
	}
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	if running(child.Process.Pid) {
		t.Error("a child that is gone runs")
	}
}
