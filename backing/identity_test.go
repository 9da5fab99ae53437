//go:build vm

package backing

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func identity(t *testing.T, path string) string {
	t.Helper()
	d := openDevice(t, path)
	defer d.Close()
	return d.Identity()
}

// TestIdentityOfFiles: a file keeps its identity whatever it is called and
// however it is reached; another file has another one.
func TestIdentityOfFiles(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		dir := mountedLoop(t, fs)
		path := filepath.Join(dir, "disk")
		run(t, "truncate", "-s", strconv.Itoa(testSize), path)
		first := identity(t, path)
		if kind(first) != filePrefix {
			t.Fatalf("%s: a file is known as %q", fs, first)
		}
		if err := os.Rename(path, path+"2"); err != nil {
			t.Fatal(err)
		}
		run(t, "cp", "--sparse=always", path+"2", path)
		if copied := identity(t, path); kind(copied) != filePrefix || copied == first {
			t.Errorf("%s: the copy of %q is known as %q", fs, first, copied)
		}
		loop := loopOn(t, path+"2")
		if got := identity(t, loop); got != first {
			t.Errorf("%s: a loop device on %q is known as %q", fs, first, got)
		}
		if got := identity(t, loopOn(t, path+"2", "--offset", "1048576")); got != first+"+1048576" {
			t.Errorf("%s: a part of %q is known as %q", fs, first, got)
		}
		if found, err := Find(first); err != nil || found != loop {
			t.Errorf("%s: found %q, %v, should be %s", fs, found, err, loop)
		}
		run(t, "mount", "-o", "remount", dir)
		if got := identity(t, path+"2"); got != first {
			t.Errorf("%s: %q is known as %q later", fs, first, got)
		}
		// Another one in the place of the first.
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		run(t, "truncate", "-s", strconv.Itoa(testSize), path)
		if got := identity(t, path); kind(got) != filePrefix || got == first {
			t.Errorf("%s: a new file is known as %q", fs, got)
		}
	}
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "tmpfs", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	run(t, "truncate", "-s", "1M", dir+"/disk")
	if got := identity(t, dir+"/disk"); got != "" {
		t.Errorf("in memory: %q", got)
	}
}

// TestIdentityOfTables: a disk without a serial number is known by its partition
// table, and so are its partitions, by theirs and not by its own.
func TestIdentityOfTables(t *testing.T) {
	run(t, "modprobe", "brd", "rd_nr=2", "max_part=4", "rd_size="+strconv.Itoa(testSize>>10))
	t.Cleanup(func() { run(t, "rmmod", "brd") })
	if got := identity(t, "/dev/ram0"); got != "" {
		t.Errorf("without a table: %q", got)
	}
	for i, disk := range []string{"/dev/ram0", "/dev/ram1"} {
		if err := os.WriteFile(disk, gpt(512, byte(0xA0+i), byte(1+i), 0, byte(3+i)), 0); err != nil {
			t.Fatal(err)
		}
		run(t, "blockdev", "--rereadpt", disk)
	}
	for path, want := range map[string]string{
		"/dev/ram0": "gpt:030201a0-0504-0706-0809-0a0b0c0d0e0f", "/dev/ram1": "gpt:030201a1-0504-0706-0809-0a0b0c0d0e0f",
		"/dev/ram0p1": "partuuid:03020101-0504-0706-0809-0a0b0c0d0e0f", "/dev/ram1p1": "partuuid:03020102-0504-0706-0809-0a0b0c0d0e0f",
		"/dev/ram0p3": "partuuid:03020103-0504-0706-0809-0a0b0c0d0e0f",
	} {
		if got := identity(t, path); got != want {
			t.Errorf("%s: %q, should be %q", path, got, want)
		}
		if found, err := Find(want); err != nil || found != path {
			t.Errorf("found %q, %v, should be %s", found, err, path)
		}
	}
}
