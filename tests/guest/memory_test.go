//go:build vm

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// A cgroup is a folder of the second hierarchy with a limit of memory.
type cgroup string

// newCgroup makes one, and gives its processes back at the end.
func newCgroup(t *testing.T, root, name string, limit int64) cgroup {
	t.Helper()
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, pid := range strings.Fields(cgroup(dir).read(t, "cgroup.procs")) {
			cgroup(root).write(t, "cgroup.procs", pid)
		}
		os.Remove(dir)
	})
	cgroup(dir).write(t, "memory.max", fmt.Sprint(limit))
	return cgroup(dir)
}

func (c cgroup) write(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(string(c), name), []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

func (c cgroup) read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(string(c), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// What PR_SET_IO_FLUSHER sets (include/linux/sched.h: PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE).
const ioFlusher = 0x00080000 | 0x00100000

// mustBeProtected checks that memory that is short does not stop the server, in the part that can be seen from outside,
// and returns its threads.
func mustBeProtected(t *testing.T, d device) (threads map[string]bool) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d", d.entry(t).PID)
	stats, err := filepath.Glob(proc + "/task/*/stat")
	if err != nil || len(stats) < 3 {
		t.Fatalf("the server has %d threads (%v)", len(stats), err)
	}
	threads = map[string]bool{}
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it ended meanwhile
		}
		// The third field follows the name in parentheses, the ninth has the flags (proc_pid_stat(5)).
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if flags, err := strconv.ParseUint(fields[9-3], 10, 32); err != nil || flags&ioFlusher != ioFlusher {
			t.Errorf("a thread of the server may wait for itself when it needs memory: flags %#x (%v) of %s", flags, err, text)
		}
		threads[name] = true
	}
	if m := regexp.MustCompile(`VmLck:\s+([0-9]+) kB`).FindStringSubmatch(cgroup(proc).read(t, "status")); m == nil || m[1] == "0" {
		t.Errorf("the server's memory is not locked: %q", m)
	}
	if adj := cgroup(proc).read(t, "oom_score_adj"); adj != "-1000" {
		t.Errorf("the server's oom_score_adj is %s", adj)
	}
	return threads
}

// The device carries a file system's dirty pages and swap, both of somebody who may have a third of the memory that he
// uses, and the server itself has little; everything has to go through a cache that is full all the time. Nobody waits
// for himself, and everything that was written, or swapped out, is there.
func TestLowMemory(t *testing.T) {
	const (
		users = 16 << 20 // small, since paging is slow in the emulator
		dirty = 16 << 20 // through the page cache
		heap  = 32 << 20
	)
	quiet := quietKernel(t)
	root := t.TempDir()
	must(t, "mount", "-t", "cgroup2", "none", root)
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	cgroup(root).write(t, "cgroup.subtree_control", "+memory")
	// Of 2 queues with 16 buffers of 1 MiB each, as many of write-back, the index, the program and a little.
	small := newCgroup(t, root, "server", 112<<20)
	user := newCgroup(t, root, "user", users)

	wipe(t, disk)
	cgroup(small).write(t, "cgroup.procs", fmt.Sprint(os.Getpid())) // the server is a child
	d := add(t, "-p", dax, "-b", disk, "-q", "2", "-d", "16", "--gc-percent", "5")
	cgroup(root).write(t, "cgroup.procs", fmt.Sprint(os.Getpid()))
	early := mustBeProtected(t, d)
	swap, fs := slice(t, d, "swap", 0, 512<<20), slice(t, d, "fs", 1<<30, 1<<30)
	must(t, "mkfs.ext4", "-q", fs)
	dir := mount(t, fs)
	must(t, "mkswap", swap)
	must(t, "swapon", swap)
	t.Cleanup(func() { run(t, "swapoff", swap) })

	user.write(t, "cgroup.procs", fmt.Sprint(os.Getpid()))
	start := time.Now()
	var work sync.WaitGroup
	work.Go(func() {
		f, err := os.Create(filepath.Join(dir, "file"))
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if err := fillAndVerify(stamp.New(f, 0, dirty)); err != nil {
			t.Errorf("a file: %v", err)
		}
		t.Logf("the file took %v", time.Since(start).Round(time.Millisecond))
	})
	work.Go(func() {
		// Without a file behind it, so its pages go to swap.
		memory, err := stamp.Buffer(heap)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Munmap(memory)
		if err := fillAndVerify(stamp.New(pages(memory), 0, heap)); err != nil {
			t.Errorf("memory: %v", err)
		}
		t.Logf("the memory took %v", time.Since(start).Round(time.Millisecond))
	})
	ended := make(chan struct{})
	go func() { work.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatalf("no end after %v; the server's memory: %s, the user's: %s\n%s", patience, small.read(t, "memory.events"), user.read(t, "memory.events"), blocked())
	}
	cgroup(root).write(t, "cgroup.procs", fmt.Sprint(os.Getpid()))
	for range 20 { // so that the server has its garbage collections, too
		pcache(t, "status", "--json", d.id)
	}
	t.Logf("the server uses %s bytes of memory: %s", small.read(t, "memory.peak"), strings.ReplaceAll(small.read(t, "memory.events"), "\n", ", "))
	t.Logf("the user: %s", strings.ReplaceAll(user.read(t, "memory.events"), "\n", ", "))
	if swapped, err := strconv.ParseInt(user.read(t, "memory.swap.peak"), 10, 64); err != nil || swapped < heap/4 {
		t.Errorf("%d bytes were swapped out at most (%v), so this was no test", swapped, err)
	}
	late := 0
	for thread := range mustBeProtected(t, d) {
		if !early[thread] {
			late++
		}
	}
	t.Logf("%d threads at first, %d came later", len(early), late)
	if late == 0 {
		t.Error("no thread came later, so nothing was learnt of those")
	}

	must(t, "swapoff", swap)
	must(t, "umount", dir)
	must(t, "e2fsck", "-fn", fs)
	must(t, "dmsetup", "remove", "fs", "swap")
	pcache(t, "flush", d.id)
	d.del(t)
	quiet()
}

// pages are memory as a stamp.Device wants it.
type pages []byte

func (p pages) ReadAt(b []byte, off int64) (int, error)  { return copy(b, p[off:]), nil }
func (p pages) WriteAt(b []byte, off int64) (int, error) { return copy(p[off:], b), nil }
func (pages) Sync() error                                { return nil }

// fillAndVerify writes everything, from the front, and reads it.
func fillAndVerify(d *stamp.Device) error {
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		if err := d.Write(buf, off); err != nil {
			return err
		}
	}
	if err := d.Flush(); err != nil {
		return err
	}
	return d.Verify(buf)
}
