//go:build vm

package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long any one command may take; the slowest is a flush of a full cache.
const patience = 2 * time.Minute

// stateDir is where commands and servers meet.
const stateDir = "/run/ublk-pcache"

type result struct {
	code           int
	stdout, stderr string
	commandLine    string
}

// run runs a program. A program that does not end is a failed test, not a hung one.
func run(t *testing.T, args ...string) result {
	t.Helper()
	return runCommand(t, exec.Command(args[0], args[1:]...))
}

func runCommand(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience) // t.Context is over when cleanups run
	defer cancel()
	var out, errs bytes.Buffer
	limited := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	limited.SysProcAttr, limited.Env = cmd.SysProcAttr, cmd.Env
	limited.Stdout, limited.Stderr, limited.WaitDelay = &out, &errs, time.Second
	err := limited.Run()
	line := strings.Join(cmd.Args, " ")
	switch {
	case errors.Is(err, exec.ErrWaitDelay):
		t.Errorf("%s ended but left its output open", line)
	case ctx.Err() != nil:
		t.Fatalf("%s: no end after %v\n%s%s%s", line, patience, out.String(), errs.String(), blocked())
	case limited.ProcessState == nil:
		t.Fatalf("%s: %v", line, err)
	}
	return result{code: limited.ProcessState.ExitCode(), stdout: out.String(), stderr: errs.String(), commandLine: line}
}

// blocked tells which threads of the machine wait where in the kernel, for what does not end.
func blocked() string {
	out, _ := exec.Command("sh", "-c", `for t in /proc/[0-9]*/task/[0-9]*; do
		case "$(cat $t/comm $t/stat | tr '\n' ' ')" in
		*") D "*|ublk-pcache*) echo "$t $(cut -d ' ' -f 2,3 $t/stat)"; cat $t/stack;;
		esac
	done 2>/dev/null`).CombinedOutput()
	return string(out)
}

// begin starts a program; end waits for it.
func begin(t *testing.T, args ...string) (end func() result) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &errs, time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() result {
		t.Helper()
		defer cancel()
		cmd.Wait()
		line := strings.Join(args, " ")
		if ctx.Err() != nil {
			t.Fatalf("%s: no end after %v\n%s%s%s", line, patience, out.String(), errs.String(), blocked())
		}
		return result{code: cmd.ProcessState.ExitCode(), stdout: out.String(), stderr: errs.String(), commandLine: line}
	}
}

// must runs a program that has to succeed and returns what it prints.
func must(t *testing.T, args ...string) string {
	t.Helper()
	r := run(t, args...)
	if r.code != 0 {
		t.Fatalf("%s: exit status %d\n%s%s", r.commandLine, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// pcache runs the program under test, which has to succeed.
func pcache(t *testing.T, args ...string) string {
	t.Helper()
	return must(t, append([]string{"ublk-pcache"}, args...)...)
}

// An entry is one element of what list --json prints.
type entry struct {
	ID      int    `json:"id"`
	Device  string `json:"device"`
	Pmem    string `json:"pmem"`
	Backing string `json:"backing"`
	State   string `json:"state"`
	PID     int    `json:"pid"`
	Version string `json:"version"`
}

func list(t *testing.T) []entry {
	t.Helper()
	var entries []entry
	text := pcache(t, "list", "--json")
	if err := json.Unmarshal([]byte(text), &entries); err != nil {
		t.Fatalf("list --json printed %q: %v", text, err)
	}
	return entries
}

// A device is a running cache.
type device struct {
	path string // /dev/ublkbN
	id   string
}

// add starts a cache and checks what every successful add must do. The test removes it, or its end does.
func add(t *testing.T, args ...string) device {
	t.Helper()
	r := run(t, append([]string{"ublk-pcache", "add"}, args...)...)
	if r.code != 0 {
		t.Fatalf("%s: exit status %d\n%s%s", r.commandLine, r.code, r.stdout, r.stderr)
	}
	path := strings.TrimSuffix(r.stdout, "\n")
	id, ok := strings.CutPrefix(path, "/dev/ublkb")
	if _, err := strconv.Atoi(id); !ok || err != nil {
		t.Fatalf("%s printed %q, want the device alone", r.commandLine, r.stdout)
	}
	d := device{path, id}
	t.Cleanup(func() { d.remove(t) })
	if info, err := os.Stat(path); err != nil || info.Mode()&os.ModeDevice == 0 {
		t.Fatalf("%s is not a device right after add: %v", path, err)
	}
	return d
}

// del stops the cache and checks that nothing of it is left.
func (d device) del(t *testing.T) {
	t.Helper()
	pcache(t, "del", d.id)
	if left := leftovers(t); len(left) > 0 {
		t.Fatalf("after del %s there still are %v", d.id, left)
	}
}

// remove makes sure that a failed test does not make the next one fail.
func (d device) remove(t *testing.T) {
	if _, err := os.Stat(d.path); err != nil {
		return
	}
	if out, err := exec.Command("ublk-pcache", "del", "--force", d.id).CombinedOutput(); err != nil {
		t.Logf("remove %s: %v\n%s", d.path, err, out)
	}
}

// entry is the device's line in list.
func (d device) entry(t *testing.T) entry {
	t.Helper()
	for _, e := range list(t) {
		if e.Device == d.path {
			return e
		}
	}
	t.Fatalf("list does not show %s", d.path)
	return entry{}
}

// leftovers names everything that exists only while a cache runs: ublk devices, files of servers, servers.
func leftovers(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"/dev/ublkb*", "/dev/ublkc*", "/run/ublk-pcache/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	for _, pid := range strings.Fields(run(t, "pgrep", "-x", "ublk-pcache").stdout) {
		all = append(all, "process "+pid)
	}
	slices.Sort(all)
	return all
}

// talk sends text to a socket and returns the answer.
func talk(socket, text string) (string, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	io.WriteString(conn, text) // the answer may come first
	answer, err := io.ReadAll(conn)
	if len(answer) > 0 { // a server that has not read everything resets the connection
		err = nil
	}
	return string(answer), err
}

// descriptors is how many a server has open when it is through with all commands: one that has its answer and has ended
// may do so before the server has closed their connection.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	waitFor(t, func() string {
		sockets, err := os.ReadFile("/proc/net/unix")
		if err != nil {
			t.Fatal(err)
		}
		for socket := range strings.Lines(string(sockets)) {
			const listens = " 00010000 " // __SO_ACCEPTCON, in the flags
			if strings.Contains(socket, stateDir) && !strings.Contains(socket, listens) {
				return "a server has an open connection: " + socket
			}
		}
		return ""
	})
	open, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

// waitFor waits until nothing is wrong any more; what is after a while fails the test.
func waitFor(t *testing.T, wrong func() string) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		w := wrong()
		if w == "" {
			return
		}
		if time.Since(begin) > patience {
			t.Fatalf("after %v: %s", patience, w)
		}
	}
}

// wipe makes pmem and disks blank.
func wipe(t *testing.T, disks ...string) {
	t.Helper()
	mapped(t, dax, func(mem []byte) {
		clear(mem[:1<<20])
		// What formatting looks at, and what a log starts with, is at the head of each segment.
		for seg := 20 << 10; seg < len(mem); seg += 16 << 20 {
			clear(mem[seg:min(seg+64<<10, len(mem))])
		}
	})
	for _, d := range disks {
		must(t, "blkdiscard", "-f", "-z", d)
	}
}

// mapped hands a mapping of a whole device-dax to use.
func mapped(t *testing.T, path string, use func(mem []byte)) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, cacheSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatalf("map %s: %v", path, err)
	}
	defer unix.Munmap(mem)
	use(mem)
}

// direct opens a device or file for requests that go past the page cache.
func direct(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// quietKernel returns a function that fails the test if the kernel has complained since quietKernel was called, but for
// lines that have one of the excuses in them.
func quietKernel(t *testing.T, excuses ...string) (check func()) {
	t.Helper()
	mark := "guest test " + t.Name() + " starts"
	if err := os.WriteFile("/dev/kmsg", []byte(mark+"\n"), 0); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		_, since, ok := strings.Cut(must(t, "dmesg"), mark)
		if !ok {
			t.Fatal("the kernel's log no longer reaches back to the start of the test")
		}
		for _, line := range strings.Split(since, "\n") {
			if slices.ContainsFunc(excuses, func(e string) bool { return strings.Contains(line, e) }) {
				continue
			}
			for _, bad := range []string{"I/O error", "EXT4-fs error", "Remounting", "Shutting down filesystem", "Metadata corruption", "BUG:", "WARNING:", "blocked for more than"} {
				if strings.Contains(line, bad) {
					t.Errorf("the kernel says: %s", line)
				}
			}
		}
	}
}

// mount mounts a device on a folder of the test, which is unmounted at its end at the latest.
func mount(t *testing.T, dev string, options ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	must(t, slices.Concat([]string{"mount"}, options, []string{dev, dir})...)
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// health is what status --json says of how a cache is.
type health struct {
	Health      string `json:"health"`
	Error       string `json:"error"`
	PID         int    `json:"pid"`
	DirtyBytes  int64  `json:"dirty_bytes"`
	ZeroBytes   int64  `json:"zero_bytes"`
	Segments    int    `json:"segments"`
	BadSegments []int  `json:"bad_segments"`
	BadMemory   []struct {
		What    string `json:"what"`
		Offset  int64  `json:"offset"`
		Segment int    `json:"segment"`
		Error   string `json:"error"`
	} `json:"bad_memory"`
}

func (d device) health(t *testing.T) (h health) {
	t.Helper()
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &h); err != nil {
		t.Fatal(err)
	}
	return h
}
