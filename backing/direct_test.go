//go:build vm

package backing

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mountedLoop makes a file system on a loop device, whose sectors have the size
// that args ask for, and returns its folder.
func mountedLoop(t *testing.T, fs string, args ...string) string {
	t.Helper()
	loop := loopOn(t, tempFile(t, 400<<20), args...) // XFS takes no less than 300 MiB
	run(t, "mkfs."+fs, "-q", loop)
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", loop, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

func isDirect(t *testing.T, d *Device) bool {
	t.Helper()
	flags, err := unix.FcntlInt(uintptr(d.fd), unix.F_GETFL, 0)
	if err != nil {
		t.Fatal(err)
	}
	return flags&unix.O_DIRECT != 0
}

// TestFileOnLargeSectors: a file takes transfers of 512 bytes also where its
// disk does not, whatever its blocks hold when it is opened, and goes without
// the page cache where it can.
func TestFileOnLargeSectors(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		for _, sector := range []string{"512", "4096"} {
			dir := mountedLoop(t, fs, "--sector-size", sector)
			for name, command := range map[string]string{
				"sparse":    "truncate -s 16M %s",
				"allocated": "fallocate -l 16M %s",
				"written":   "dd status=none if=/dev/zero bs=1M count=16 conv=fsync of=%s",
			} {
				t.Run(strings.Join([]string{fs, sector, name}, "/"), func(t *testing.T) {
					path := filepath.Join(dir, name)
					words := strings.Fields(fmt.Sprintf(command, path))
					run(t, words[0], words[1:]...)
					d := openDevice(t, path)
					if d.BlockSize() != 512 || isDirect(t, d) != (sector == "512") {
						t.Errorf("blocks of %d, O_DIRECT %v", d.BlockSize(), isDirect(t, d))
					}
					smallTransfers(t, d, 0x5A)

					// What an older version may hand over.
					f, err := d.File()
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, openFlags|unix.O_DIRECT); err != nil {
						t.Fatal(err)
					}
					heir, err := Inherit(f)
					if err != nil {
						t.Fatal(err)
					}
					defer heir.Close()
					smallTransfers(t, heir, 0xA5)
				})
			}
		}
	}
}

// smallTransfers writes single blocks, first over data, then into holes, and
// reads them.
func smallTransfers(t *testing.T, d *Device, fill byte) {
	t.Helper()
	data := bytes.Repeat([]byte{fill}, 4096)
	buf := aligned(t, 4096)
	copy(buf, data)
	if err := write(d, buf, 0); err != nil {
		t.Error(err)
	}
	for _, off := range []int64{512, 1<<20 + 512, d.Size() - 512} {
		copy(buf, data)
		if err := write(d, buf[:512], off); err != nil {
			t.Error(err)
		}
		if err := wait(d.Flush); err != nil {
			t.Error(err)
		}
		clear(buf)
		if err := read(d, buf[:512], off); err != nil || !bytes.Equal(buf[:512], data[:512]) {
			t.Errorf("read at %d: %v, begins with %#x", off, err, buf[:1])
		}
	}
	if err := zero(d, 1<<20+512, 512); err != nil {
		t.Error(err)
	}
	if err := read(d, buf[:512], 1<<20+512); err != nil || buf[0] != 0 {
		t.Errorf("read after zeroing: %v, begins with %#x", err, buf[:1])
	}
}

// TestFileSystemDoesNotSay: where the kernel does not tell the alignment, the
// page cache takes every one.
func TestFileSystemDoesNotSay(t *testing.T) {
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "tmpfs", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	run(t, "truncate", "-s", "16M", dir+"/disk")
	d := openDevice(t, dir+"/disk")
	defer d.Close()
	if isDirect(t, d) {
		t.Error("opened with O_DIRECT")
	}
	smallTransfers(t, d, 0x5A)
}
