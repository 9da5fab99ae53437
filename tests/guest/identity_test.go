//go:build vm

package guest

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A cache belongs to one file, whatever that is called: another one of its size is refused, as is a copy unless it is
// confirmed, and then the cache belongs to that.
func TestBelongsToAFile(t *testing.T) {
	wipe(t, disk, disk4K)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	dir := mount(t, disk4K) + "/files" // and nothing else
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		sparseFile(t, dir, name, 64<<20)
	}
	exchange := func() {
		t.Helper()
		must(t, "mv", dir+"/a", dir+"/c")
		must(t, "mv", dir+"/b", dir+"/a")
		must(t, "mv", dir+"/c", dir+"/b")
	}
	another := func(t *testing.T) {
		t.Helper()
		refuse(t, []string{dax}, dir, []refusal{
			{name: "add", args: "add -p " + dax + " -b TMP/a", says: []string{dax, "belongs to", "TMP/a", "--force"}},
			{name: "writeback", args: "writeback " + dax + " -b TMP/a", says: []string{dax, "belongs to", "TMP/a", "--force"}},
		})
	}

	pcache(t, "format", dax)
	d := add(t, "-p", dax, "-b", dir+"/a") // the first one binds it
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	want := must(t, "sha256sum", d.path)
	d.del(t)
	exchange()
	another(t)
	exchange()
	d = add(t, "-p", dax, "-b", dir+"/a")
	killServer(t, d, unix.SIGKILL)
	pcache(t, "recover", d.id)
	if got := must(t, "sha256sum", d.path); got != want {
		t.Errorf("the device is %s, was %s", got, want)
	}
	d.del(t)

	// A copy takes the place of the file.
	must(t, "cp", "--sparse=always", dir+"/a", dir+"/b")
	exchange()
	another(t)
	d = add(t, "--force", "-p", dax, "-b", dir+"/a")
	if got := must(t, "sha256sum", d.path); got != want {
		t.Errorf("the device over the copy is %s, was %s", got, want)
	}
	d.del(t)
	exchange()
	another(t)
	exchange()
	add(t, "-p", dax, "-b", dir+"/a").del(t)
}

// gpt is the head of a disk with blocks of 512 bytes and a partition table, which has this GUID and one partition of
// the size of the disk, but for a MiB at each end.
func gpt(guid byte, size int64) []byte {
	le := binary.LittleEndian
	p := make([]byte, 34*512)
	p[510], p[511] = 0x55, 0xAA
	p[450] = 0xEE // protective, from block 1 on
	le.PutUint32(p[454:], 1)
	le.PutUint32(p[458:], uint32(size/512-1))
	entries := p[1024:]
	entries[0], entries[16] = 0xAF, guid
	le.PutUint64(entries[32:], 2048)
	le.PutUint64(entries[40:], uint64(size/512-2049))
	h := p[512:][:92]
	copy(h, "EFI PART")
	le.PutUint32(h[8:], 0x10000)
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[32:], uint64(size/512-1))
	le.PutUint64(h[40:], 34)
	le.PutUint64(h[48:], uint64(size/512-34))
	h[56] = guid
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	return p
}

func writeTable(t *testing.T, dev string, guid byte, size int64) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_WRONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(gpt(guid, size), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// Disks without serial numbers that changed places are told apart by their partition tables, or those of the disks that
// they are partitions of. What is partitioned through the cache is the same disk, however its server ends.
func TestDisksChangedPlaces(t *testing.T) {
	const size = 64 << 20
	must(t, "modprobe", "brd", "rd_nr=2", "max_part=4", "rd_size=65536")
	t.Cleanup(func() { run(t, "rmmod", "brd") })
	const a, b = "/dev/ram0", "/dev/ram1"
	wipe(t)
	addTo := func(dev string, args ...string) device {
		t.Helper()
		return add(t, append([]string{"-p", dax, "-b", dev}, args...)...)
	}
	another := func(dev string) {
		t.Helper()
		refuse(t, []string{dax, a, b}, t.TempDir(), []refusal{
			{name: filepath.Base(dev), args: "add -p " + dax + " -b " + dev, says: []string{dax, "belongs to", dev, "--force"}},
		})
	}

	// With nothing to tell them apart there is a warning, and then the table that is made through the cache tells.
	r := run(t, "ublk-pcache", "add", "-p", dax, "-b", a)
	if r.code != 0 || !strings.Contains(r.stderr, "warning: nothing tells backing device "+a) || strings.Count(r.stderr, "\n") != 2 {
		t.Fatalf("add of a disk without any identity: %d, %s%s", r.code, r.stdout, r.stderr)
	}
	d := device{strings.TrimSpace(r.stdout), strings.TrimPrefix(strings.TrimSpace(r.stdout), "/dev/ublkb")}
	t.Cleanup(func() { d.remove(t) })
	writeTable(t, d.path, 1, size)
	pcache(t, "flush", d.id)
	d.del(t)
	writeTable(t, b, 2, size)
	another(b)
	d = addTo(a)

	// A table that replaces the first, in all states in which the server may end.
	for guid, end := range []func(){
		func() { d.del(t); d = addTo(a) },
		func() { pcache(t, "flush", d.id); d.del(t); d = addTo(a) },
		func() { killServer(t, d, unix.SIGKILL); pcache(t, "recover", d.id) },
		func() { pcache(t, "flush", d.id); killServer(t, d, unix.SIGKILL); pcache(t, "recover", d.id) },
		func() {
			pcache(t, "flush", d.id)
			killServer(t, d, unix.SIGKILL)
			pcache(t, "del", d.id)
			d = addTo(a)
		},
	} {
		writeTable(t, d.path, byte(0x10+guid), size)
		end()
		head := make([]byte, 34*512)
		f, err := os.Open(d.path)
		if err != nil {
			t.Fatal(err)
		}
		f.ReadAt(head, 0)
		f.Close()
		if !bytes.Equal(head, gpt(byte(0x10+guid), size)) {
			t.Errorf("way %d: the table is not the one that was made", guid)
		}
	}
	pcache(t, "flush", d.id)
	d.del(t)
	another(b)
	addTo(a).del(t)
	d = addTo(b, "--force")
	d.del(t)
	another(a)

	// The first partition of either.
	for _, dev := range []string{a, b} {
		must(t, "blockdev", "--rereadpt", dev)
	}
	wipe(t)
	d = addTo(a + "p1")
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	d.del(t)
	another(b + "p1")
	addTo(a + "p1").del(t)
}
