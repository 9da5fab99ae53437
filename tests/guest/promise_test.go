//go:build vm

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// daxFileSystem makes an ext4 on the pmem namespace in mode fsdax, with room for
// a small cache, and returns a function that mounts it anew.
func daxFileSystem(t *testing.T) (mountAgain func(dax string) (dir string)) {
	t.Helper()
	dir := t.TempDir()
	namespaceMode(t, "fsdax")
	t.Cleanup(func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		namespaceMode(t, "devdax")
	})
	must(t, "mkfs.ext4", "-q", "-m0", "-N64", "-J", "size=4", fsdax)
	mounted := false
	return func(dax string) string {
		t.Helper()
		if mounted {
			must(t, "umount", dir)
		}
		must(t, "mount", "-o", "dax="+dax, fsdax, dir)
		mounted = true
		// ext4 keeps 16 MiB to itself; the device is hardly larger than the cache.
		if err := os.WriteFile("/sys/fs/ext4/pmem0/reserved_clusters", []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		return dir
	}
}

// A device that has told its users that they need no flushes is not continued where they would: on its own file, on a
// mount without dax. It waits, and goes on when dax is back. The other way round nothing is lost.
func TestRecoverWithoutDAX(t *testing.T) {
	wipe(t, disk)
	mountAgain := daxFileSystem(t)
	pmem := mountAgain("always") + "/cache"
	d := add(t, "-p", pmem+",size=512M", "-b", disk, "-q", "1")
	if p := d.persistence(t); p != "persistent" {
		t.Errorf("a file on dax is %s", p)
	}
	cached := func(want string) {
		t.Helper()
		if got := readLine(t, "/sys/block/"+filepath.Base(d.path)+"/queue/write_cache"); got != want {
			t.Errorf("the device is %q, want %q", got, want)
		}
	}
	cached("write through")
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	head := []string{"sh", "-c", "dd if=" + d.path + " bs=64k count=16 iflag=direct status=none | sha256sum"}
	sum := must(t, head...)

	killServer(t, d, unix.SIGKILL)
	mountAgain("never")
	before := contents(t, []string{disk}, filepath.Dir(pmem))
	run(t, "ublk-pcache", "recover", d.id).mustRefuse(t, []string{pmem, "dax", "recover " + d.id, "del --force " + d.id, "the device waits"})
	mustNotHaveChanged(t, before, contents(t, []string{disk}, filepath.Dir(pmem)))
	if e := d.entry(t); e.State != "dead" {
		t.Errorf("after a refusal: %+v", e)
	}
	mountAgain("always")
	pcache(t, "recover", d.id)
	if got := must(t, head...); got != sum {
		t.Errorf("the device holds %s, before it was %s", got, sum)
	}
	pcache(t, "upgrade", d.id)
	d.del(t)

	mountAgain("never")
	d = add(t, "-p", pmem, "-b", disk)
	cached("write back")
	if p := d.persistence(t); p != "on-sync" {
		t.Errorf("the same file without dax is %s", p)
	}
	killServer(t, d, unix.SIGKILL)
	mountAgain("always")
	pcache(t, "recover", d.id)
	cached("write back")
	if p := d.persistence(t); p != "persistent" {
		t.Errorf("with dax again it is %s", p)
	}
	if got := must(t, head...); got != sum {
		t.Errorf("the device holds %s, before it was %s", got, sum)
	}
	d.del(t)
}

func readLine(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}
