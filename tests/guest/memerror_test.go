//go:build vm

package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lateKill are the flags of a thread that is not told of memory errors before it meets them, and that of one that is
// (include/linux/sched.h: PF_MCE_PROCESS, PF_MCE_EARLY).
const (
	lateKill  = 0x00000080
	earlyKill = 0x08000000
)

// mustBeToldLate checks all threads of a server.
func mustBeToldLate(t *testing.T, pid int) {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(stats) < 3 {
		t.Fatalf("the server has %d threads (%v)", len(stats), err)
	}
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it ended meanwhile
		}
		// The third field follows the name in parentheses, the ninth has the flags (proc_pid_stat(5)).
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if flags, err := strconv.ParseUint(fields[9-3], 10, 32); err != nil || flags&(lateKill|earlyKill) != lateKill {
			t.Errorf("a thread of the server is told of memory errors early: flags %#x (%v) of %s", flags, err, text)
		}
	}
}

// offline has the kernel treat a page of memory, given by its physical address, as one with an error that nobody has met
// yet.
func offline(t *testing.T, address uint64) {
	t.Helper()
	if err := os.WriteFile("/sys/devices/system/memory/hard_offline_page", fmt.Appendf(nil, "%#x", address), 0); err != nil {
		t.Fatalf("memory error at %#x: %v", address, err)
	}
}

// A memory error that nobody has met yet is announced by a signal where early kill is on, and to the server it is not,
// however it was started: it goes on, and what is still there is read. Of a plain file the page is gone, which is met by
// who reads it.
func TestMemoryErrorEarly(t *testing.T) {
	const setting = "/proc/sys/vm/memory_failure_early_kill"
	old := readLine(t, setting)
	t.Cleanup(func() { os.WriteFile(setting, []byte(old), 0) })
	// The kernel's marks on the pages go with the namespace.
	t.Cleanup(func() { namespaceMode(t, "devdax") })
	base, err := strconv.ParseUint(strings.TrimPrefix(readLine(t, "/sys/bus/dax/devices/dax0.0/resource"), "0x"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	next := base + 20<<10 + 5*16<<20 // of the pages to spoil
	for _, early := range []string{"0", "1"} {
		if err := os.WriteFile(setting, []byte(early), 0); err != nil {
			t.Fatal(err)
		}
		wipe(t, disk)
		d := add(t, "-p", dax, "-b", disk)
		must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=1M", "count=8", "oflag=direct", "status=none")
		head := []string{"sh", "-c", "dd if=" + d.path + " bs=1M count=8 iflag=direct status=none | sha256sum"}
		sum := must(t, head...)
		goesOn := func(how string) {
			t.Helper()
			pid := d.entry(t).PID
			mustBeToldLate(t, pid)
			// Nothing lies there, and the server has it mapped.
			next += 2 << 20
			offline(t, next&^(4<<10-1))
			if got := must(t, head...); got != sum {
				t.Errorf("early kill %s, %s: the device holds %s, before it was %s", early, how, got, sum)
			}
			if e := d.entry(t); e.PID != pid || e.State != "live" {
				t.Errorf("early kill %s, %s: process %d, now %+v", early, how, pid, e)
			}
		}
		goesOn("after add")
		pcache(t, "upgrade", d.id)
		goesOn("after upgrade")
		killServer(t, d, unix.SIGKILL)
		pcache(t, "recover", d.id)
		goesOn("after recover")
		d.del(t)

		end := begin(t, "ublk-pcache", "add", "--foreground", "-n", d.id, "-p", dax, "-b", disk)
		waitFor(t, func() string { return run(t, "ublk-pcache", "status", d.id).stderr })
		goesOn("in the foreground")
		pcache(t, "del", d.id)
		if r := end(); r.code != 0 {
			t.Errorf("%+v", r)
		}

		memoryErrorInFile(t, early)
	}
}

func memoryErrorInFile(t *testing.T, early string) {
	t.Helper()
	wipe(t, disk)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	dir := mount(t, disk4K)
	d := add(t, "-p", dir+"/cache,size=512M", "-b", disk, "-q", "1")
	want := bytes.Repeat([]byte("an error"), 64<<10/8)
	f := direct(t, d.path)
	if _, err := f.WriteAt(aligned(t, want), 1<<20); err != nil {
		t.Fatal(err)
	}
	pid := d.entry(t).PID
	offline(t, pageWith(t, dir+"/cache", want[:4096]))
	buf := aligned(t, want)
	_, err := f.ReadAt(buf, 1<<20)
	h := d.health(t)
	if err == nil || h.PID != pid || h.Health == "ok" || len(h.BadMemory) == 0 || !strings.Contains(h.BadMemory[0].Error, dir+"/cache") {
		t.Errorf("early kill %s: a page of the file is gone: read %v, process %d, now %+v", early, err, pid, h)
	}
	f.Close()
	d.remove(t)
	must(t, "umount", dir)
}

// aligned is a copy of p that can be used past the page cache.
func aligned(t *testing.T, p []byte) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, len(p), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	copy(b, p)
	return b
}

// pageWith returns the physical address of a whole page of a file's that has nothing but the text in it.
func pageWith(t *testing.T, path string, text []byte) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, 128<<20, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	at := 0
	for ; ; at += 4096 {
		if at == len(mem) {
			t.Fatalf("%s does not have it", path)
		}
		if bytes.Equal(mem[at:at+4096], text) {
			break
		}
	}
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	var entry [8]byte // present in bit 63, the page's number in bits 0 to 54 (Documentation/admin-guide/mm/pagemap.rst)
	if _, err := pagemap.ReadAt(entry[:], int64(addressOf(mem[at:])/4096*8)); err != nil {
		t.Fatal(err)
	}
	page := binary.LittleEndian.Uint64(entry[:])
	if page>>63 == 0 {
		t.Fatal("the page is not there")
	}
	return page & (1<<55 - 1) * 4096
}

func addressOf(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }
