//go:build vm

// These tests need root and the loop driver, and the NVMe disks of the test
// machine, which they only look at.
package backing

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a block device of testSize bytes.
func loopDevice(t *testing.T, args ...string) string {
	t.Helper()
	return loopOn(t, tempFile(t, testSize), args...)
}

func loopOn(t *testing.T, file string, args ...string) string {
	t.Helper()
	exec.Command("modprobe", "loop").Run() // fails where it is built in
	device := run(t, "losetup", append([]string{"--find", "--show", file}, args...)...)
	t.Cleanup(func() { run(t, "losetup", "--detach", device) })
	return device
}

func TestBlockDevice(t *testing.T) {
	for _, blockSize := range []string{"512", "4096"} {
		t.Run(blockSize, func(t *testing.T) {
			d := openDevice(t, loopDevice(t, "--sector-size", blockSize))
			defer d.Close()
			if d.Size() != testSize || strconv.Itoa(d.BlockSize()) != blockSize || d.Serial() != "" {
				t.Errorf("%d bytes in blocks of %d, serial %q", d.Size(), d.BlockSize(), d.Serial())
			}
			if !d.ZeroesCheaply() {
				t.Error("does not zero cheaply")
			}
			flags, err := unix.FcntlInt(uintptr(d.fd), unix.F_GETFL, 0)
			if err != nil || flags&unix.O_DIRECT == 0 {
				t.Errorf("not opened with O_DIRECT: %#x, %v", flags, err)
			}
			exercise(t, d)
		})
	}
}

// TestZeroWithoutCommand: the kernel's ramdisk cannot write zeros by itself.
func TestZeroWithoutCommand(t *testing.T) {
	run(t, "modprobe", "brd", "rd_nr=1", "rd_size="+strconv.Itoa(testSize>>10))
	t.Cleanup(func() { run(t, "rmmod", "brd") })
	d := openDevice(t, "/dev/ram0")
	defer d.Close()
	if d.ZeroesCheaply() {
		t.Error("zeroes cheaply")
	}
	exerciseZero(t, d)
	if d.lane.zeroing != zeroRange {
		t.Errorf("by way %d", d.lane.zeroing)
	}
}

// TestSerials: each of the machine's NVMe disks is recognised, whichever block
// size it has.
func TestSerials(t *testing.T) {
	disks, err := filepath.Glob("/dev/nvme*n[0-9]")
	if err != nil || len(disks) < 2 {
		t.Fatalf("NVMe disks: %v, %v", disks, err)
	}
	serials, blockSizes := map[string]bool{}, map[int]bool{}
	for _, path := range disks {
		d := openDevice(t, path)
		defer d.Close()
		t.Logf("%s: %q, blocks of %d", path, d.Serial(), d.BlockSize())
		if !d.ZeroesCheaply() {
			t.Errorf("%s does not zero cheaply", path)
		}
		if d.Serial() == "" || serials[d.Serial()] {
			t.Errorf("%s has the serial %q", path, d.Serial())
		}
		serials[d.Serial()] = true
		blockSizes[d.BlockSize()] = true
	}
	if !blockSizes[512] || !blockSizes[4096] {
		t.Errorf("block sizes %v", blockSizes)
	}
}

func TestBlockRefusals(t *testing.T) {
	refuse(t, loopDevice(t, "--read-only"), ErrReadOnly)

	loop := loopDevice(t)
	d := openDevice(t, loop)
	refuse(t, loop, ErrInUse, "another program")
	d.Close()

	run(t, "mkfs.ext4", "-q", loop)
	mnt := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", loop, mnt)
	file := filepath.Join(mnt, "file")
	if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	refuse(t, loop, ErrInUse, "mounted on "+mnt)
	run(t, "mount", "-o", "remount,ro", mnt)
	refuse(t, file, ErrReadOnly)
	run(t, "umount", mnt)

	run(t, "mkswap", loop)
	run(t, "swapon", loop)
	refuse(t, loop, ErrInUse, "swap")
	run(t, "swapoff", loop)
	openDevice(t, loop).Close()
}

// TestZonedDevice: what write-back cannot write to is refused at once.
func TestZonedDevice(t *testing.T) {
	run(t, "modprobe", "null_blk", "nr_devices=1", "gb=1", "zoned=1", "zone_size=64", "memory_backed=0")
	t.Cleanup(func() { run(t, "rmmod", "null_blk") })
	refuse(t, "/dev/nullb0", ErrZoned)
}

// TestFindsMount: a mount is named that this process does not see, and one whose
// name has a space.
func TestFindsMount(t *testing.T) {
	loop := loopDevice(t)
	run(t, "mkfs.ext4", "-q", loop)
	dir := filepath.Join(t.TempDir(), "my disk")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", loop, dir)
	refuse(t, loop, ErrInUse, "it is mounted on "+dir+": unmount it")
	run(t, "umount", dir)

	// In a namespace of its own, until its input ends.
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount "$0" "$1" && echo && read -r _`, loop, dir)
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err1 != nil || err2 != nil || cmd.Start() != nil {
		t.Fatal(err1, err2)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	refuse(t, loop, ErrInUse, "it is mounted on "+dir+" in the mount namespace of process "+strconv.Itoa(cmd.Process.Pid), "unmount it there")
	in.Close()
	cmd.Wait()
}
