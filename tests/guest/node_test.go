//go:build vm

package guest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A device-dax device has one lock, by whatever node it is opened, also if another program knows of only one of them.
func TestSecondNode(t *testing.T) {
	wipe(t, disk)
	var stat unix.Stat_t
	if err := unix.Stat(dax, &stat); err != nil {
		t.Fatal(err)
	}
	node := t.TempDir() + "/node"
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(stat.Rdev)); err != nil {
		t.Fatal(err)
	}
	inUse := func(path string) {
		t.Helper()
		for _, command := range [][]string{{"format", "--force"}, {"check"}} {
			run(t, append(append([]string{"ublk-pcache"}, command...), path)...).mustRefuse(t, []string{path, "in use"})
		}
	}
	for _, c := range [][2]string{{dax, node}, {node, dax}} {
		d := add(t, "-p", c[0], "-b", disk)
		if e := d.entry(t); e.Pmem != c[0] {
			t.Errorf("list says %+v", e)
		}
		inUse(c[1])
		pcache(t, "upgrade", d.id)
		inUse(c[1])
		d.del(t)
		pcache(t, "check", c[1])
	}
	f, err := os.OpenFile(node, os.O_RDWR, 0) // as one who may write
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	inUse(node)
}
