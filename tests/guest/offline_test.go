//go:build vm

package guest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/ondisk"
)

// A region without a superblock whose first dirty kset is damaged holds dirty data all the same: no command makes a new cache
// there unless it is forced, none says that there is no cache, and each names what helps.
func TestRefusesToFormatWhatIsLeft(t *testing.T) {
	leaveDamaged(t, func(mem []byte, l *ondisk.Layout) {
		clear(mem[ondisk.SuperblockOff:][:ondisk.SuperblockSize])
		mem[l.Offset(l.DirtyTail.Seg, l.DirtyTail.Off)] ^= 0xFF
	})
	says := []string{dax, "damaged cache, in which [1-9][0-9]* bytes of dirty data", "superblock", "ublk-pcache check " + dax, "ublk-pcache writeback " + dax, "ublk-pcache repair " + dax, "--force"}
	refuse(t, theDevices, t.TempDir(), []refusal{
		{name: "format", args: "format " + dax, says: says},
		{name: "add", args: "add -p " + dax + " -b " + disk, says: says},
		{name: "add --format", args: "add --format -p " + dax + " -b " + disk, says: says},
	})
	if err := os.MkdirAll("/etc/ublk-pcache", 0o755); err != nil {
		t.Fatal(err)
	}
	config := "/etc/ublk-pcache/left.conf"
	if err := os.WriteFile(config, []byte("pmem = "+dax+"\nbacking = "+disk+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(config) })
	refuse(t, theDevices, t.TempDir(), []refusal{{name: "run", args: "run left", says: says}})

	// The superblock alone is mended, and then the log is what is damaged.
	if r := run(t, "ublk-pcache", "repair", dax, "--in-place"); r.code != 4 || strings.Contains(r.stdout, "nothing to mend") || !strings.Contains(r.stderr, "--give-up-log-damage") {
		t.Errorf("repair: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	refuse(t, theDevices, t.TempDir(), []refusal{
		{name: "add of a damaged log", args: "add -p " + dax + " -b " + disk, says: []string{dax, "log is damaged", "ublk-pcache check " + dax, "ublk-pcache writeback " + dax + " -b " + disk, "ublk-pcache repair " + dax}},
	})
}

// The file system of the backing file has no room for all dirty data: writeback writes what it can, again when there is more
// room, and then the rest. Neither it nor the cache takes that for somebody else's work, and both still notice that.
func TestWritebackOntoAFullFileSystem(t *testing.T) {
	wipe(t, disk)
	must(t, "mkfs.ext4", "-q", "-F", "-m", "0", slice(t, device{path: disk}, "small", 0, 64<<20))
	dir := mount(t, "/dev/mapper/small")
	back, ballast := filepath.Join(dir, "backing"), filepath.Join(dir, "ballast")
	// A file that is nothing but a hole.
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const size = 32 << 20
	if err := os.Truncate(back, size); err != nil {
		t.Fatal(err)
	}
	fill := func() {
		t.Helper()
		f, err := os.Create(ballast)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for n := 1 << 20; n >= 4096; {
			if _, err := f.Write(make([]byte, n)); err != nil {
				n /= 2
			}
		}
		f.Sync()
	}
	fill()
	d := add(t, "-p", dax, "-b", back)
	data := bytes.Repeat([]byte("dirty"), 16<<20/5)[:12<<20]
	in := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "dd", "if="+in, "of="+d.path, "bs=1M", "oflag=direct", "conv=notrunc", "status=none")
	if r := run(t, "ublk-pcache", "flush", d.id); r.code == 0 {
		t.Fatal("a full file system took the data")
	}
	d.del(t)

	room := func(mib int64) {
		t.Helper()
		info, err := os.Stat(ballast)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(ballast, max(0, info.Size()-mib<<20)); err != nil {
			t.Fatal(err)
		}
		unix.Sync()
	}
	for range 2 {
		room(4)
		r := run(t, "ublk-pcache", "writeback", dax, "-b", back)
		if r.code != 1 || !strings.Contains(r.stderr, "no space left") || !strings.Contains(r.stdout, "not written: sectors") || strings.Contains(r.stderr, "without its cache") {
			t.Fatalf("writeback without room for all of it: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
		}
	}
	room(64)
	for range 2 {
		if text := pcache(t, "writeback", dax, "-b", back); !strings.Contains(text, ", 0 bytes were not") || !strings.Contains(text, "format --force "+dax) {
			t.Errorf("writeback says\n%s", text)
		}
	}
	got, err := os.ReadFile(back)
	if err != nil || !bytes.Equal(got, append(data, make([]byte, size-len(data))...)) {
		t.Errorf("the file does not hold what was written (%v)", err)
	}
	// Somebody else's work is noticed, whichever looks first.
	f, err := os.OpenFile(back, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range []byte{'!', data[4096]} {
		if _, err := f.WriteAt([]byte{b}, 4096); err != nil {
			t.Fatal(err)
		}
		if f.Sync(); i == 1 {
			break
		}
		refuse(t, []string{dax, back}, t.TempDir(), []refusal{
			{name: "add", args: "add -p " + dax + " -b " + back, says: []string{dax, back, "written without its cache", "--changed=overwrite"}},
			{name: "writeback", args: "writeback " + dax + " -b " + back, says: []string{dax, back, "written without its cache", "--changed=overwrite"}},
		})
	}
	f.Close()
	d = add(t, "-p", dax, "-b", back)
	out := filepath.Join(t.TempDir(), "out")
	must(t, "dd", "if="+d.path, "of="+out, "bs=1M", fmt.Sprintf("count=%d", len(data)>>20), "iflag=direct", "status=none")
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the device does not hold what was written (%v)", err)
	}
	d.del(t)
	must(t, "umount", dir)
	must(t, "dmsetup", "remove", "small")
}

// PMEM is a file that cannot be written to any more: its data is saved, and what add will ask is said.
func TestWritebackFromReadOnly(t *testing.T) {
	path, setBroken := breakable(t)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	dir := mount(t, disk4K)
	cache := filepath.Join(dir, "cache")
	d := add(t, "-p", cache+",size=512M", "-b", path)
	setBroken(true)
	data := bytes.Repeat([]byte("dirty"), 1<<20/5+1)[:1<<20]
	in := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "dd", "if="+in, "of="+d.path, "bs=1M", "oflag=direct", "conv=notrunc", "status=none")
	d.del(t)
	setBroken(false)
	must(t, "mount", "-o", "remount,ro", dir)
	if text := pcache(t, "writeback", cache, "-b", path); !strings.Contains(text, "read-only") || !strings.Contains(text, "--changed=overwrite is right") {
		t.Errorf("writeback says\n%s", text)
	}
	got := make([]byte, len(data))
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the disk does not hold what was written (%v)", err)
	}
	f.Close()
	must(t, "mount", "-o", "remount,rw", dir)
	d = add(t, "--changed=overwrite", "-p", cache, "-b", path)
	d.del(t)
	must(t, "umount", dir)
	must(t, "dmsetup", "remove", "breakable")
}
