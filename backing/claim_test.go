//go:build vm

package backing

import (
	"errors"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// TestClaim: a disk that is claimed is so against everybody but Open, and is
// claimed again after that.
func TestClaim(t *testing.T) {
	const disk = "/dev/nvme0n1"
	exclusively := func() error {
		fd, err := unix.Open(disk, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	if out, err := exec.Command("modprobe", "loop").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() { unclaim(disk) })
	for range 3 {
		for range 2 { // the second time it is claimed already
			if err := Claim(disk); err != nil {
				t.Fatal(err)
			}
		}
		if err := exclusively(); !errors.Is(err, unix.EBUSY) {
			t.Fatalf("claimed by another, too: %v", err)
		}
		if err := unix.Mount(disk, t.TempDir(), "ext4", unix.MS_RDONLY, ""); !errors.Is(err, unix.EBUSY) {
			t.Errorf("mount: %v, want %v", err, unix.EBUSY)
		}
		d, err := Open(disk)
		if err != nil {
			t.Fatal(err)
		}
		if err := Claim(disk); err != nil {
			t.Errorf("claim of an open disk: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if err := exclusively(); err != nil {
			t.Errorf("after the close: %v", err)
		}
	}
	for _, claimed := range []bool{false, true} {
		if claimed {
			if err := Claim(disk); err != nil {
				t.Fatal(err)
			}
		}
		d, err := Open(disk)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.PutBack(); err != nil {
			t.Error(err)
		}
		if err := exclusively(); errors.Is(err, unix.EBUSY) != claimed {
			t.Errorf("put back, claimed before %t: %v", claimed, err)
		}
	}
	for _, path := range []string{t.TempDir(), "/dev/nowhere"} {
		if err := Claim(path); err != nil {
			t.Errorf("claim of what is no device: %v", err)
		}
	}
}
