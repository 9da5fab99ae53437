//go:build vm

package pmem

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPersistenceOfRealDisks: as TestPersistenceOfDisks, with what the kernel
// makes of real ones, and of file systems on them.
func TestPersistenceOfRealDisks(t *testing.T) {
	run(t, "modprobe", "brd", "rd_nr=2", "rd_size=32768")
	t.Cleanup(func() { run(t, "rmmod", "brd") })
	run(t, "modprobe", "-a", "loop", "overlay")
	tmpfs := mountTmpfs(t, "64m")
	const nvme = "/dev/nvme2n1" // 16 MiB
	run(t, "mkfs.ext4", "-q", "-F", nvme)
	onDisk := mountOn(t, nvme)

	image := filepath.Join(tmpfs, "a b,image")
	if err := os.WriteFile(image, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", image).Output()
	if err != nil {
		t.Fatal(err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	run(t, "mkfs.ext4", "-q", loop)
	onLoop := mountOn(t, loop)
	run(t, "mkfs.ext4", "-q", "/dev/ram0")
	onRAM := mountOn(t, "/dev/ram0")
	run(t, "dmsetup", "create", "onram", "--table", "0 1024 linear /dev/ram1 32768")
	t.Cleanup(func() { run(t, "dmsetup", "remove", "onram") })
	run(t, "dmsetup", "mknodes")

	overlay := func(upper, options string) string {
		t.Helper()
		for _, dir := range []string{"/up er,", "/work"} {
			if err := os.MkdirAll(upper+dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		dir := t.TempDir()
		data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s%s", t.TempDir(), strings.ReplaceAll(upper+"/up er,", ",", `\,`), upper+"/work", options)
		if err := unix.Mount("overlay", dir, "overlay", 0, data); err != nil {
			t.Fatalf("%s: %v", data, err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		return dir
	}
	for _, c := range []struct {
		what, path string
		want       Persistence
		why        string
	}{
		{"disk", nvme, OnSync, ""}, {"file system", onDisk, OnSync, ""},
		{"tmpfs", tmpfs, Volatile, "tmpfs"}, {"devtmpfs", "/dev", Volatile, "tmpfs"},
		{"brd", "/dev/ram0", Volatile, "ram0"}, {"file system on brd", onRAM, Volatile, "ram0"}, {"dm on brd", "/dev/mapper/onram", Volatile, "ram1"},
		{"loop on tmpfs", loop, Volatile, "tmpfs"}, {"file system on loop on tmpfs", onLoop, Volatile, "tmpfs"},
		{"overlay in tmpfs", overlay(tmpfs+"/o", ""), Volatile, "tmpfs"}, {"overlay on disk", overlay(onDisk+"/o", ""), OnSync, ""},
		{"overlay without syncs", overlay(onDisk+"/p", ",volatile"), Volatile, "overlay"},
		{"sysfs", "/sys/kernel", OnSync, ""},
	} {
		if p, why := PersistenceOf(c.path); p != c.want || !strings.Contains(why, c.why) || (p == Volatile) != (why != "") {
			t.Errorf("%s (%s): %s, %q, want %s, %q", c.what, c.path, p, why, c.want, c.why)
		}
	}
}

func mountOn(t *testing.T, dev string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	run(t, "mount", dev, dir)
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}
