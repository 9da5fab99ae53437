//go:build vm

package guest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a reboot takes is nobody's cache by accident. Said by name it is one, and goes on whatever happens to its server.
func TestVolatilePmem(t *testing.T) {
	wipe(t, disk)
	dir, err := os.MkdirTemp("/dev/shm", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sparseFile(t, dir, "there", 512<<20)
	refuse(t, theDevices, dir, []refusal{
		{name: "new", args: "add -p TMP/cache,size=512M -b " + disk, says: []string{"TMP/cache", "tmpfs", "TMP/cache,size=536870912,volatile"}},
		{name: "there", args: "add -p TMP/there -b " + disk, says: []string{"TMP/there", "tmpfs", "TMP/there,volatile"}},
		{name: "format", args: "format TMP/there", says: []string{"TMP/there", "tmpfs", "TMP/there,volatile"}},
		{name: "missing device", args: "add -p /dev/dax9.9 -b " + disk, says: []string{"/dev/dax9.9", "no such device"}},
		{name: "missing device of a size", args: "add -p /dev/dax9.9,size=1G -b " + disk, says: []string{"/dev/dax9.9", "no such device"}},
	})
	r := run(t, "ublk-pcache", "add", "-p", dir+"/cache,size=512M,volatile", "-b", disk)
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("%+v", r)
	}
	path := strings.TrimSpace(r.stdout)
	d := device{path, strings.TrimPrefix(path, "/dev/ublkb")}
	t.Cleanup(func() { d.remove(t) })
	if e := d.entry(t); e.Pmem != dir+"/cache" {
		t.Errorf("list says %+v", e)
	}
	killServer(t, d, unix.SIGKILL)
	pcache(t, "recover", d.id)
	pcache(t, "upgrade", d.id)
	if p := d.persistence(t); p != "volatile" {
		t.Errorf("it is %s", p)
	}
	if text := pcache(t, "status", d.id); !strings.Contains(text, "tmpfs") {
		t.Errorf("status says nothing of it:\n%s", text)
	}
	d.del(t)
	pcache(t, "writeback", dir+"/cache", "-b", disk)

	// As far as only the command can see, not the server.
	sparseFile(t, dir, "image", 600<<20)
	must(t, "modprobe", "loop")
	loop := strings.TrimSpace(must(t, "losetup", "-f", "--show", dir+"/image"))
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	must(t, "mkfs.ext4", "-q", "-m0", loop)
	onLoop := mount(t, loop)
	refuse(t, theDevices, onLoop, []refusal{
		{name: "loop", args: "add -p TMP/cache,size=512M -b " + disk, says: []string{"TMP/cache", "tmpfs.?, below a loop device", "TMP/cache,size=536870912,volatile"}},
	})
	must(t, "umount", onLoop)

	// A disk in memory is a warning.
	sparseFile(t, dir, "disk", 64<<20)
	wipe(t)
	r = run(t, "ublk-pcache", "add", "-n", d.id, "-p", dax, "-b", dir+"/disk")
	if r.code != 0 || strings.Count(r.stderr, "\n") != 2 || !strings.Contains(r.stderr, "warning: backing device "+dir+"/disk") || !strings.Contains(r.stderr, "tmpfs") {
		t.Errorf("%+v", r)
	}
	if p := d.persistence(t); p != "persistent" {
		t.Errorf("%s is %s", dax, p)
	}
	if log, err := os.ReadFile(filepath.Join(stateDir, d.id+".log")); err != nil || !strings.Contains(string(log), "backing device "+dir+"/disk does not survive a power cut") {
		t.Errorf("the log says %s, %v", log, err)
	}
	d.del(t)
}

// persistence is what status --json says of what a power cut leaves.
func (d device) persistence(t *testing.T) string {
	t.Helper()
	var s struct{ Persistence string }
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &s); err != nil {
		t.Fatal(err)
	}
	return s.Persistence
}
