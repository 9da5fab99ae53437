//go:build vm

package guest

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

var leakCycles = flag.Int("leak.cycles", 6, "how often devices are added and removed, and a server is worked")

// numbers reads "Name: 123 kB" lines, which is how /proc says most things.
func numbers(t *testing.T, path string) map[string]int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := map[string]int{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if fields := strings.Fields(rest); len(fields) > 0 {
			all[name], _ = strconv.Atoi(fields[0])
		}
	}
	return all
}

// count is how many files match.
func count(t *testing.T, pattern string) int {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}

// openFiles is how many files are open in the whole system, if two counts agree: others may open some meanwhile.
func openFiles(t *testing.T) int {
	t.Helper()
	last := -1
	for range 20 {
		n := countOpenFiles(t)
		if n == last {
			return n
		}
		last = n
	}
	t.Fatal("others open files, or close them, all the time")
	return 0
}

// countOpenFiles counts them if nobody opens or closes any. The kernel's own number is wrong by up to 31 for each
// processor on Linux 6.12: a processor brings its part of it up to date in steps of 32 (fs/file_table.c, proc_nr_files).
// A processor that opens files until the number changes has nothing left to tell.
func countOpenFiles(t *testing.T) int {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	defer unix.SchedSetaffinity(0, &all)
	number, err := os.Open("/proc/sys/fs/file-nr")
	if err != nil {
		t.Fatal(err)
	}
	defer number.Close()
	read := func() int {
		text := make([]byte, 64)
		n, err := number.ReadAt(text, 0)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		files, err := strconv.Atoi(strings.Fields(string(text[:n]))[0])
		if err != nil {
			t.Fatal(err)
		}
		return files
	}

	ours := 1
	for cpu := range runtime.NumCPU() {
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			t.Fatal(err)
		}
		for before := read(); read() == before; ours++ {
			f, err := os.Open("/dev/null")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
		}
	}
	return read() - ours
}

// system is what there is of everything that a server could leave behind in the kernel.
func system(t *testing.T) map[string]int {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	memory := numbers(t, "/proc/meminfo")
	return map[string]int{
		"open files":          openFiles(t),
		"mounts":              strings.Count(string(mounts), "\n"),
		"block devices":       count(t, "/sys/class/block/*"),
		"ublk devices":        count(t, "/sys/class/ublk-char/*"),
		"KiB of slab":         memory["SUnreclaim"],
		"KiB of vmalloc":      memory["VmallocUsed"],
		"KiB of percpu":       memory["Percpu"],
		"KiB of page tables":  memory["PageTables"],
		"KiB of locked pages": memory["Mlocked"],
	}
}

// allowance is by how much a system may have grown after some cycles. What is counted one by one must be back where it
// was, but for what others do meanwhile, less than one in two cycles. Memory that is not is noise of the kernel's: less
// than a device takes, 256 requests with all that belongs to them.
func allowance(what string, cycles int) int {
	switch {
	case what == "open files":
		return cycles / 2
	case strings.HasPrefix(what, "KiB"):
		return 1024 + 32*cycles
	}
	return 0
}

// leavesNothing returns a function that fails the test if the system has grown since leavesNothing was called.
func leavesNothing(t *testing.T) (check func(cycles int)) {
	t.Helper()
	before := system(t)
	return func(cycles int) {
		t.Helper()
		waitFor(t, func() string { // the kernel takes its time to clear up
			for what, n := range system(t) {
				if n > before[what]+allowance(what, cycles) {
					return fmt.Sprintf("%d cycles have left behind %s: %d, before %d", cycles, what, n, before[what])
				}
			}
			return ""
		})
		t.Logf("%d cycles, before %v, now %v", cycles, before, system(t))
	}
}

// Devices come, are written to, and go.
func TestAddAndDelLeaveNothing(t *testing.T) {
	wipe(t, disk)
	cycle := func() {
		d := add(t, "-p", dax, "-b", disk)
		must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
		d.del(t)
	}
	cycle() // what the kernel makes once and keeps
	check := leavesNothing(t)
	for range *leakCycles {
		cycle()
	}
	check(*leakCycles)
}

// A server that does the same again and again has no more of anything than when it had done it a few times.
func TestServerStaysTheSame(t *testing.T) {
	wipe(t, disk)
	// Few tags: the buffer of each is touched, and from then on resident, when it is first used.
	d := add(t, "-p", dax, "-b", disk, "-q", "1", "-d", "8")
	f := direct(t, d.path)
	want := stamp.New(f, 0, 32<<20)
	pid := d.entry(t).PID
	process := func() map[string]int {
		status := numbers(t, fmt.Sprintf("/proc/%d/status", pid))
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		if err != nil {
			t.Fatal(err)
		}
		return map[string]int{"descriptors": descriptors(t, pid), "mappings": strings.Count(string(maps), "\n"),
			"threads": status["Threads"], "KiB of memory": status["RssAnon"], "KiB of locked memory": status["VmLck"]}
	}
	// The runtime starts a thread, or takes another arena, when it likes: it has 15 to 27 threads after the first rounds,
	// and no more than 27 after 40. One that each round leaves is seen, since there are more rounds than it may start.
	// Descriptors are ours alone.
	may := map[string]int{"mappings": 32, "threads": 16, "KiB of memory": 16 << 10, "KiB of locked memory": 128 << 10}
	const settled = 3
	var before map[string]int
	for round := range settled + 3**leakCycles {
		if round == settled {
			before = process()
		}
		if _, err := (stamp.Load{Depth: 4, BlockSize: 512, Seed: *seed + uint64(round), Flush: true, Zero: zeroer(f)}).Run(want, 8<<20, nil); err != nil {
			t.Fatalf("seed %d: %v", *seed, err)
		}
		pcache(t, "set", d.id, fmt.Sprintf("gc_percent=%d", 10+round%2))
		pcache(t, "flush", d.id)
		pcache(t, "status", d.id)
		if answer, err := talk(filepath.Join(stateDir, d.id+".sock"), "junk\n"); err != nil {
			t.Errorf("junk is answered %q, %v", answer, err)
		}
		if before == nil {
			continue
		}
		for what, n := range process() {
			if n > before[what]+may[what] {
				t.Errorf("after %d rounds: %s: %d, were %d", round, what, n, before[what])
			}
		}
	}
	t.Logf("after %d rounds %v, after all %v", settled, before, process())
	f.Close()
	d.del(t)
}
