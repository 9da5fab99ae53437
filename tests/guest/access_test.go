//go:build vm

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const nobody = 65534 // a user

// asNobody calls f on a thread that belongs to a user without any rights, and that ends with f.
func asNobody(t *testing.T, f func() error) error {
	t.Helper()
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		// The raw calls are for this thread alone. User last: it takes the right to do the rest away.
		for _, call := range [][2]uintptr{{unix.SYS_SETGROUPS, 0}, {unix.SYS_SETRESGID, nobody}, {unix.SYS_SETRESUID, nobody}} {
			ids := call[1]
			if _, _, errno := unix.RawSyscall(call[0], ids, ids, ids); errno != 0 {
				result <- fmt.Errorf("become nobody: %w", errno)
				return
			}
		}
		result <- f()
	}()
	return <-result
}

// Somebody without rights tries everything on a running cache, which was made under a careless umask: the commands, the
// socket, the devices, the state file, the log, the cache file, the process. Nothing is to be had.
func TestNobody(t *testing.T) {
	wipe(t, disk, disk4K)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	dir := mount(t, disk4K)
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	umask := unix.Umask(0)
	d := add(t, "-p", dir+"/cache,size=512M", "-b", disk)
	unix.Umask(umask)
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	pcache(t, "flush", d.id) // so that nothing is left to write back
	untouched := []string{dax, disk, tinyDisk}
	before := contents(t, untouched, t.TempDir())

	for _, args := range [][]string{
		{"add", "-p", dax, "-b", tinyDisk}, {"recover", d.id}, {"del", d.id}, {"del", "--force", d.id}, {"flush", d.id}, {"status", d.id},
		{"list"}, {"set", d.id, "gc_percent=80"}, {"format", dax}, {"format", "--force", dir + "/cache"}, {"dump", dir + "/cache"},
		{"check", dax}, {"serve", "{}"},
	} {
		cmd := exec.Command("ublk-pcache", args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		runCommand(t, cmd).mustRefuse(t, []string{"root"})
	}

	pid := d.entry(t).PID
	proc := fmt.Sprintf("/proc/%d/", pid)
	socket := filepath.Join(stateDir, d.id+".sock")
	paths := []string{
		stateDir, filepath.Join(stateDir, d.id+".json"), filepath.Join(stateDir, d.id+".log"), socket,
		d.path, "/dev/ublkc" + d.id, "/dev/ublk-control", dir + "/cache", dax, proc + "fd", proc + "mem", proc + "environ",
	}
	for _, path := range paths {
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("this is not there to be tried: %v", err)
		}
	}
	tries := map[string]func() error{
		"connect":     func() error { _, err := net.Dial("unix", socket); return err },
		"new file":    func() error { return os.WriteFile(filepath.Join(stateDir, "9.json"), nil, 0o600) },
		"remove":      func() error { return os.Remove(socket) },
		"kill":        func() error { return unix.Kill(pid, unix.SIGKILL) },
		"take memory": func() error { return unix.PtraceAttach(pid) },
	}
	for _, path := range paths {
		for how, flags := range map[string]int{"read ": os.O_RDONLY, "write ": os.O_WRONLY, "append ": os.O_RDWR | os.O_APPEND} {
			tries[how+path] = func() error {
				f, err := os.OpenFile(path, flags, 0)
				if err == nil {
					f.Close()
				}
				return err
			}
		}
	}
	for what, try := range tries {
		if err := asNobody(t, try); !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EISDIR) {
			t.Errorf("%s: %v, want a refusal", what, err)
		}
	}
	// Each has to be safe by itself, not by the folder it is in.
	filepath.WalkDir(stateDir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		if info, err := e.Info(); err != nil || info.Mode()&0o077 != 0 || info.Sys().(*syscall.Stat_t).Uid != 0 {
			t.Errorf("%s has mode %v (%v)", path, info.Mode(), err)
		}
		return nil
	})
	// And if all that were wrong, the server asks.
	for path, mode := range map[string]os.FileMode{stateDir: 0o755, socket: 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range []string{`{"do":"status"}`, `{"do":"del","force":true}`} {
		var answer string
		if err := asNobody(t, func() (err error) { answer, err = talk(socket, line+"\n"); return err }); err != nil || !strings.Contains(answer, "only root") {
			t.Errorf("%s from nobody is answered %q, %v", line, answer, err)
		}
	}
	if err := os.Chmod(stateDir, 0o700); err != nil {
		t.Fatal(err)
	}

	mustNotHaveChanged(t, before, contents(t, untouched, t.TempDir()))
	pcache(t, "status", d.id)
	d.del(t)

	// A cache that was made before somebody opened it up, or its disk, is refused as a new one is. A device that is there
	// continues, not without a word.
	open := func(path string, mode os.FileMode) {
		t.Helper()
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	d = add(t, "-p", dir+"/cache", "-b", disk)
	open(dir+"/cache", 0o644)
	killServer(t, d, unix.SIGKILL)
	pcache(t, "recover", d.id)
	log, err := os.ReadFile(filepath.Join(stateDir, d.id+".log"))
	if err != nil || !strings.Contains(string(log), "open to all users") || !strings.Contains(string(log), "chmod o= "+dir+"/cache") {
		t.Errorf("with a cache that all can read, the log says %q, %v", log, err)
	}
	d.del(t)
	tmp := t.TempDir()
	sparseFile(t, tmp, "disk", 64<<20)
	open(tmp+"/disk", 0o604)
	refuse(t, []string{disk, dir + "/cache"}, tmp, []refusal{
		{name: "old cache", args: "add -p " + dir + "/cache -b " + disk, says: []string{"open to all users", "chmod o= " + dir + "/cache"}},
		{name: "backing file", args: "add -p " + dax + " -b TMP/disk", says: []string{"open to all users", "chmod o= TMP/disk"}},
	})
}

// A folder that somebody else may have prepared is not used, by no command.
func TestStateDirOfAnother(t *testing.T) {
	wipe(t, disk)
	writable := func(t *testing.T) {
		t.Cleanup(func() { os.RemoveAll(stateDir) })
		if err := errors.Join(os.RemoveAll(stateDir), os.Mkdir(stateDir, 0o700), os.Chmod(stateDir, 0o777)); err != nil {
			t.Fatal(err)
		}
	}
	says := []string{stateDir, "only root", "move it away"}
	refuse(t, theDevices, t.TempDir(), []refusal{
		{name: "add", prepare: writable, args: "add -p " + dax + " -b " + disk, says: says},
		{name: "del", prepare: writable, args: "del 0", says: says},
	})
}

// A state file that is no good any more keeps nobody from anything but from making new devices, and goes with its device.
func TestDamagedStateFile(t *testing.T) {
	for _, alive := range []bool{true, false} {
		wipe(t, disk)
		d := add(t, "-p", dax, "-b", disk)
		must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
		head := []string{"sh", "-c", "head -c 1M " + d.path + " | sha256sum"}
		sum := must(t, head...)
		pid := d.entry(t).PID
		if !alive {
			killServer(t, d, unix.SIGKILL)
		}
		file := filepath.Join(stateDir, d.id+".json")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if !alive {
			pid = 0
		}
		if e := d.entry(t); e.State != "damaged" || e.PID != pid {
			t.Errorf("list shows %+v", e)
		}
		for _, args := range [][]string{{"status", d.id}, {"recover", d.id}, {"add", "-p", dax, "-b", tinyDisk}} {
			if args[0] == "status" && !alive {
				continue
			}
			r := run(t, append([]string{"ublk-pcache"}, args...)...)
			if args[0] == "status" && strings.Contains(r.stdout, "damaged") {
				r.stdout = "" // what the server says
			}
			r.mustRefuse(t, []string{file, "del " + d.id})
		}
		d.del(t)
		d = add(t, "-p", dax, "-b", disk)
		if got := must(t, head...); got != sum {
			t.Errorf("the device holds %s, before its state file was damaged %s", got, sum)
		}
		d.del(t)
	}
}

// Nonsense, half commands, too much and too many at once: each gets a line, and the server goes on, with as many
// descriptors as before. And of many who remove a device at once, nobody removes it twice.
func TestJunkOnTheSocket(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	socket := filepath.Join(stateDir, d.id+".sock")
	pid := d.entry(t).PID
	before := descriptors(t, pid)

	junk := []string{"", "\n", "GET / HTTP/1.1\r\n\r\n", `{"do":"stat`, strings.Repeat("x", 1<<20), "\x00\xff\xfe\n", `{"do":"set"}` + "\n", `{"do":"flush","x":1}` + "\n"}
	var clients sync.WaitGroup
	for i := range 200 {
		clients.Go(func() {
			answer, err := talk(socket, junk[i%len(junk)])
			line, whole := strings.CutSuffix(answer, "\n")
			var said struct{ Error string }
			if err != nil || !whole || strings.Contains(line, "\n") || json.Unmarshal([]byte(line), &said) != nil || said.Error == "" {
				t.Errorf("%.20q is answered %q, %v", junk[i%len(junk)], answer, err)
			}
		})
	}
	clients.Wait()
	pcache(t, "status", d.id)

	// A server without descriptors to spare is deaf for as long as that lasts, and no longer.
	limit := unix.Rlimit{Cur: 0, Max: 1 << 20}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(time.Second)) // time to fail in
	io.WriteString(conn, "{\"do\":\"status\"}\n")
	if n, err := conn.Read(make([]byte, 1)); n > 0 {
		t.Errorf("a server without descriptors answers (%v)", err)
	}
	conn.Close()
	limit.Cur = 1 << 20
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	pcache(t, "status", d.id)
	if now := descriptors(t, pid); now != before {
		t.Errorf("the server has %d descriptors, before the junk it had %d", now, before)
	}

	d.del(t)

	end := begin(t, "ublk-pcache", "add", "--foreground", "-n", "7", "-p", dax, "-b", disk)
	waitFor(t, func() string { return run(t, "ublk-pcache", "status", "7").stderr })
	var removed sync.WaitGroup
	for range 8 {
		removed.Go(func() {
			out, err := exec.Command("ublk-pcache", "del", "7").CombinedOutput()
			// Too late is a fine thing to be told.
			if text := string(out); err != nil && !strings.Contains(text, "no device 7") && !strings.Contains(text, "died before it answered") && !strings.Contains(text, "is dead") && !strings.Contains(text, "does not answer") {
				t.Errorf("one of many del: %v: %s", err, text)
			}
		})
	}
	removed.Wait()
	if r := end(); r.code != 0 {
		t.Errorf("a server removed by many ends with exit status %d: %s", r.code, r.stderr)
	}
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
	pcache(t, "check", dax)
}

// A server that crashes leaves no core, even where everything is set up for one.
func TestNoCore(t *testing.T) {
	const pattern = "/proc/sys/kernel/core_pattern"
	old, err := os.ReadFile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(pattern, old, 0) })
	dir := t.TempDir()
	if err := os.WriteFile(pattern, []byte(dir+"/core.%e.%p"), 0); err != nil {
		t.Fatal(err)
	}
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unlimited); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOTRACEBACK", "crash")
	cores := func() []string {
		found, err := filepath.Glob(dir + "/*")
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	run(t, "sh", "-c", "kill -ABRT $$")
	if found := cores(); len(found) != 1 {
		t.Fatalf("a shell that crashes leaves %v", found)
	}
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	killServer(t, d, unix.SIGABRT)
	if found := cores(); len(found) != 1 {
		t.Errorf("now there are %v", found)
	}
	d.del(t)
}
