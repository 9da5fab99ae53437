//go:build vm

package guest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A user who may read the files of a cache, and no more, waits in line for their locks, and has them when the server dies.
// The server comes back all the same, and nobody else can start a second one meanwhile.
func TestReadersLockNobodyOut(t *testing.T) {
	wipe(t, disk, disk4K)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	dir := mount(t, disk4K)
	sparseFile(t, dir, "cache", 512<<20)
	sparseFile(t, dir, "disk", 64<<20)
	files := []string{dir + "/cache", dir + "/disk"}
	d := add(t, "-p", files[0], "-b", files[1])
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	want := must(t, "sha256sum", d.path)

	locked := make(chan error)
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		go func() { locked <- asNobody(t, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX) }) }()
	}
	killServer(t, d, unix.SIGKILL)
	for range files {
		if err := <-locked; err != nil {
			t.Fatal(err)
		}
	}
	pcache(t, "recover", d.id)
	if got := must(t, "sha256sum", d.path); got != want {
		t.Errorf("the device is %s, was %s", got, want)
	}
	must(t, "mv", stateDir+"/"+d.id+".json", stateDir+"/aside") // so that the lock alone is left
	refuse(t, []string{disk}, t.TempDir(), []refusal{
		{name: "same pmem", args: "add -n 7 -p " + files[0] + " -b " + disk, says: []string{files[0], "in use"}},
		{name: "same backing", args: "add -n 7 -p " + dax + " -b " + files[1], says: []string{files[1], "in use"}},
	})
	must(t, "mv", stateDir+"/aside", stateDir+"/"+d.id+".json")
	d.del(t)
}
