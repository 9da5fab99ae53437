//go:build vm

package guest

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// The disk under a cache that is a plain file refuses writes for a while. A flush fails then, and the kernel has taken what
// it lost for written. The server dies, and the next one begins when the disk is well: it is told of nothing, and has
// everything all the same. Memory is short after its first flush, and still nothing is missing.
func TestSyncFailsAndServerDies(t *testing.T) {
	const before, after = 8 << 20, 16 << 20 // is written until the disk fails, and until the server dies
	under := newBadDisk(t, disk, "under", 1<<30)
	must(t, "mkfs.ext4", "-q", "-F", "-O", "^has_journal", under.path)
	dir := mount(t, under.path, "-o", "noatime")
	pmem := filepath.Join(dir, "cache")
	b := newBadDisk(t, disk4K, "bad", badSize)
	d := add(t, "-p", pmem+",size=512M", "-b", b.path, "-q", "1")
	b.becomes(t, b.flakey(0, badSize, "error_writes")) // all stays dirty
	f := direct(t, d.path)
	want, buf := stamp.New(f, 0, worked), buffer(t)
	write := func(from, to int64) {
		t.Helper()
		for off := from; off < to; off += int64(len(buf)) {
			if err := want.Write(buf, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	verify := func(when string) {
		t.Helper()
		if err := want.Verify(buf); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	suspend := func() { must(t, "dmsetup", "suspend", "--nolockfs", under.name) }
	write(0, before)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	suspend() // which must not write
	under.becomes(t, under.flakey(0, under.size, "error_writes"))
	write(before/2, after)
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		t.Fatalf("a flush that cannot be kept: %v", err)
	}
	d.awaitHealth(t, "failed", "sync the cache")
	verify("after the flush failed")
	killServer(t, d, unix.SIGKILL)
	for range 2 {
		if r := run(t, "ublk-pcache", "recover", d.id); r.code != 1 || !strings.Contains(r.stderr, pmem) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("recover on a disk that still fails: %+v", r)
		}
	}
	suspend()
	under.heal(t)
	pcache(t, "recover", d.id)
	if h := d.health(t); h.Health == "failed" {
		t.Errorf("recovered: %+v", h)
	}
	verify("recovered")
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	killServer(t, d, unix.SIGKILL)
	must(t, "umount", dir) // with its page cache
	must(t, "mount", under.path, dir)
	pcache(t, "recover", d.id)
	verify("after a flush, and with nothing left in memory")
	f.Close()
	b.heal(t)
	pcache(t, "flush", d.id)
	d.del(t)
	if err := want.On(direct(t, b.path)).Verify(buf); err != nil {
		t.Errorf("on the disk alone: %v", err)
	}
}

// The server is replaced while a round of write-back is under way that the disk takes a minute for. It waits for what the
// disk has begun, and no more.
func TestUpgradeBreaksWritebackOff(t *testing.T) {
	const delay = 500 * time.Millisecond // for one write, of which 32 are under way
	b := newBadDisk(t, disk, "slow", badSize)
	wipe(t)
	d := add(t, "-p", dax, "-b", b.path, "-q", "1")
	f := direct(t, d.path)
	want, buf := stamp.New(f, 0, worked), buffer(t)
	b.becomes(t, b.line(0, badSize, "delay", "0", b.under, "0", "500"))
	for off := int64(0); off < worked; off += 8192 { // no two are neighbours
		if err := want.Write(buf[:4096], off); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	flushed := begin(t, "ublk-pcache", "flush", d.id)
	waitFor(t, func() string {
		if s := pcache(t, "status", "--json", d.id); strings.Contains(s, `"written_back_bytes": 0`) {
			return "write-back has not begun"
		}
		return ""
	})
	server, start := d.entry(t).PID, time.Now()
	t.Log(strings.TrimSpace(pcache(t, "upgrade", d.id)))
	if took := time.Since(start); took > worked/8192/32*delay/2 {
		t.Errorf("it took %v, as if all of the round had been waited for", took)
	}
	requireEnd(t, server)
	flushed() // however it ended
	b.heal(t)
	pcache(t, "flush", d.id)
	d.del(t)
	if err := want.On(direct(t, b.path)).Verify(buf); err != nil {
		t.Errorf("on the disk alone: %v", err)
	}
}
