//go:build vm

package guest

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A sparse file for which there is no room is refused for that, and keeps nothing of what was tried. Once there is room
// it has its blocks before it is served.
func TestSparsePmem(t *testing.T) {
	const size = 512 << 20
	wipe(t, disk)
	must(t, "mkfs.ext4", "-q", "-F", "-m0", disk4K)
	dir := mount(t, disk4K)
	sparseFile(t, dir, "cache", size)
	f, err := os.OpenFile(dir+"/cache", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 1<<20), 200<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	// used is what the file has, and free what the file system has.
	room := func() (used, free int64) {
		t.Helper()
		var stat unix.Stat_t
		var fs unix.Statfs_t
		if err := unix.Stat(dir+"/cache", &stat); err != nil {
			t.Fatal(err)
		}
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		return stat.Blocks * 512, int64(fs.Bfree) * fs.Bsize
	}
	// With less than it takes, and with what seems to be enough, but of which ext4 keeps 16 MiB to itself.
	for _, left := range []int64{300 << 20, size + 4<<20} {
		_, free := room()
		must(t, "fallocate", "-l", fmt.Sprint(free-left), dir+"/filler")
		before, _ := room()
		run(t, "ublk-pcache", "add", "-p", dir+"/cache", "-b", disk).mustRefuse(t, []string{dir + "/cache", "no space", "make room"})
		run(t, "ublk-pcache", "format", dir+"/cache").mustRefuse(t, []string{dir + "/cache", "no space", "make room"})
		if after, free := room(); after > before+1<<20 || free < left-1<<20 {
			t.Errorf("with %d bytes left the refusals have taken: the file had %d bytes, now it has %d, and %d are left", left, before, after, free)
		}
		if err := os.Remove(dir + "/filler"); err != nil {
			t.Fatal(err)
		}
	}
	d := add(t, "-p", dir+"/cache", "-b", disk)
	if used, _ := room(); used < size {
		t.Errorf("%d bytes of the file have blocks", used)
	}
	d.del(t)
}
