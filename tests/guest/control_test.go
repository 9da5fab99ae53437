//go:build vm

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/ublk"
)

// A server that has been stopped keeps no command waiting. Each says which process that is and what can be done, and once
// the server goes on nothing has changed: what nobody waits for any more is not carried out.
func TestStoppedServer(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	pid := d.entry(t).PID
	signal := func(s unix.Signal) {
		if err := unix.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
	}
	signal(unix.SIGSTOP)
	t.Cleanup(func() { unix.Kill(pid, unix.SIGCONT) })
	var all sync.WaitGroup
	for _, args := range []string{"status", "flush", "upgrade", "del", "del --force", "set gc_percent=50", "status --json", "status --dm"} {
		all.Go(func() {
			command, option, _ := strings.Cut(args, " ")
			args := []string{command, d.id}
			if option != "" {
				args = append(args, option)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			out, err := exec.CommandContext(ctx, "ublk-pcache", args...).Output()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 4 || strings.Count(string(exit.Stderr), "\n") != 1 {
				t.Errorf("%q: %v", args, err)
				return
			}
			for _, says := range []string{"device " + d.id, fmt.Sprintf("process %d", pid), "stopped", fmt.Sprintf("kill -CONT %d", pid), fmt.Sprintf("kill -KILL %d", pid), "recover " + d.id, "del " + d.id} {
				if !strings.Contains(string(exit.Stderr), says) {
					t.Errorf("%q does not say %q: %s", args, says, exit.Stderr)
				}
			}
			if option == "--json" {
				var s map[string]any
				if err := json.Unmarshal(out, &s); err != nil || s["device"] != d.path || s["pid"] != float64(pid) || !strings.Contains(fmt.Sprint(s["error"]), "kill -CONT") {
					t.Errorf("%q prints %s", args, out)
				}
			}
		})
	}
	if e := d.entry(t); e.PID != pid {
		t.Errorf("list shows %+v", e)
	}
	all.Wait()
	signal(unix.SIGCONT)
	pcache(t, "flush", d.id)
	if e := d.entry(t); e.PID != pid || e.State != "live" {
		t.Errorf("once the server goes on: %+v", e)
	}
	var s struct {
		GCPercent int `json:"gc_percent"`
	}
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &s); err != nil || s.GCPercent == 50 {
		t.Errorf("a setting that was refused has been made: %+v, %v", s, err)
	}

	// The way out that was named.
	signal(unix.SIGSTOP)
	killServer(t, d, unix.SIGKILL)
	pcache(t, "recover", d.id)
	pid = d.entry(t).PID
	signal(unix.SIGSTOP)
	killServer(t, d, unix.SIGKILL)
	d.del(t)
}

// What can be told of a device without its server is told, to people and programs.
func TestStatusWithoutServer(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	file := filepath.Join(stateDir, d.id+".json")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	check := func(state, says string) {
		t.Helper()
		status := 4
		if state == "damaged" { // the file, of whose server nothing is known
			status = 1
		}
		r := run(t, "ublk-pcache", "status", "--json", d.id)
		var s struct {
			ID            int
			Device, State string
			Pmem, Error   string
			PID           int
		}
		err := json.Unmarshal([]byte(r.stdout), &s)
		if err != nil || strconv.Itoa(s.ID) != d.id || s.State != state || !strings.Contains(r.stderr, says) || r.code != status || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: status --json: %+v, %v", state, r, err)
		}
		if state != "damaged" && (!strings.Contains(s.Error, says) || s.Pmem != dax) {
			t.Errorf("%s: status --json prints %s", state, r.stdout)
		}
		r = run(t, "ublk-pcache", "status", d.id)
		if !strings.Contains(r.stdout, state) || !strings.Contains(r.stderr, says) || r.code != status {
			t.Errorf("%s: status: %+v", state, r)
		}
	}
	put := func(text []byte) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put([]byte("x"))
	check("damaged", "del "+d.id) // with a server
	put(good)
	killServer(t, d, unix.SIGKILL)
	check("dead", "recover "+d.id)
	put(nil)
	check("damaged", "del "+d.id)
	d.del(t)
	put(good)
	check("gone", "del "+d.id)
	d.del(t)
}

// Other users' mounts, whatever they are called, keep no server from starting, nor stay busy on account of one.
func TestMountsOfOthers(t *testing.T) {
	dir := t.TempDir()
	mountAt := func(dev, kind, point string) {
		t.Helper()
		if err := os.MkdirAll(point, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(dev, point, kind, 0, ""); err != nil {
			t.Fatalf("mount %q: %v", point, err)
		}
		t.Cleanup(func() { unix.Unmount(point, unix.MNT_DETACH) })
	}
	wipe(t, disk)
	odd := []string{dir + `/a"b`, dir + "/caf\xe9", dir + "/ \t\n\\040\u00a0"}
	for _, point := range odd {
		mountAt("none", "tmpfs", point)
	}
	must(t, "mkfs.ext4", "-q", "-F", tinyDisk)
	if err := unix.Unmount(odd[0], 0); err != nil {
		t.Fatal(err)
	}
	mountAt(tinyDisk, "ext4", odd[0])
	mountAt("none", "tmpfs", dir+"/m")
	mountAt("none", "tmpfs", dir+"/m/old")
	mountAt("none", "tmpfs", dir+"/m") // covers what is in the first one, and is needed
	if err := os.WriteFile(dir+"/m/backing", make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d := add(t, "-p", dax, "-b", dir+"/m/backing")
	log, err := os.ReadFile(filepath.Join(stateDir, d.id+".log"))
	if err != nil || !strings.Contains(string(log), dir+"/m/old") || strings.Contains(string(log), "caf") {
		t.Errorf("of mounts that cannot be left the log says %s, %v", log, err)
	}
	killServer(t, d, unix.SIGKILL)
	pcache(t, "recover", d.id)
	// Not held by the server.
	if err := unix.Unmount(odd[0], 0); err != nil {
		t.Error(err)
	}
	must(t, "mkfs.ext4", "-q", "-F", tinyDisk) // which claims it
	d.del(t)
	wipe(t, disk)
}

// Nobody has to read what a server in the foreground says, neither because he has gone nor because he stands still.
func TestNobodyReads(t *testing.T) {
	for _, gone := range []bool{true, false} {
		wipe(t, disk)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if gone {
			r.Close()
		} else {
			raw, err := w.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			raw.Control(func(fd uintptr) {
				for err == nil {
					_, err = unix.Write(int(fd), make([]byte, 1))
				}
			})
			if err != unix.EAGAIN {
				t.Fatalf("fill a pipe: %v", err)
			}
		}
		server := exec.Command("ublk-pcache", "add", "--foreground", "-n", "0", "-p", dax, "-b", disk)
		server.Stderr = w // which Go makes one that blocks, in there
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- server.Wait() }()
		w.Close()
		d := device{"/dev/ublkb0", "0"}
		t.Cleanup(func() { d.remove(t) })
		waitFor(t, func() string { return run(t, "ublk-pcache", "status", "0").stderr })
		f := direct(t, d.path)
		for range 3 { // makes it say something
			if err := server.Process.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			time.Sleep(300 * time.Millisecond)
		}
		must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
		pcache(t, "flush", "0")
		f.Close()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("with a reader that has gone (%t): %v", gone, err)
			}
		case <-time.After(patience):
			t.Fatalf("with a reader that has gone (%t): the server does not end", gone)
		}
		if left := leftovers(t); len(left) > 0 {
			t.Errorf("there still are %v", left)
		}
	}
}

// The log does not grow without end, what was in it before is kept for a while, and the runtime's last words are in it.
func TestLogIsBounded(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	path := filepath.Join(stateDir, d.id+".log")
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := log.WriteString(strings.Repeat(strings.Repeat("x", 99)+"\n", 1<<20/100)); err != nil {
		t.Fatal(err)
	}
	log.Close()
	f := direct(t, d.path)
	if err := unix.Kill(d.entry(t).PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() string {
		if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), "told to end") || len(text) > 10_000 || strings.Contains(string(text), "stacktrace") {
			return fmt.Sprintf("the log has %d bytes, %v: %.500s", len(text), err, text)
		}
		return ""
	})
	if old, err := os.ReadFile(path + ".1"); err != nil || !strings.Contains(string(old), "serving") || !strings.HasSuffix(string(old), "xxx\n") {
		t.Errorf("what was in it is not kept: %d bytes, %v", len(old), err)
	}
	killServer(t, d, unix.SIGABRT)
	if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), "SIGABRT") {
		t.Errorf("after a crash the log has %d bytes, %v", len(text), err)
	}
	f.Close()
	d.del(t)
}

// null reads as zeros and forgets what is written.
type null struct{ done []ublk.Completion }

func (n *null) Submit(r *ublk.Request) { n.done = append(n.done, ublk.Completion{Tag: r.Tag}) }
func (n *null) Turn(done []ublk.Completion) []ublk.Completion {
	done = append(done, n.done...)
	n.done = n.done[:0]
	return done
}

// A ublk device that is another program's is not ours to remove or to replace, and one of ours stays so when its state
// file is lost.
func TestWhoseDevice(t *testing.T) {
	wipe(t, disk, disk4K)
	other, err := ublk.Add(ublk.Config{ID: 5, Queues: 1, Depth: 8, Size: 16 << 20, BlockSize: 512, ChunkSize: 4 << 20},
		func(*ublk.Queue) ublk.Handler { return &null{} }, func(err error) { panic(err) })
	if err != nil {
		t.Fatal(err)
	}
	whose := fmt.Sprintf("process %d", os.Getpid())
	refuse(t, []string{dax, disk, disk4K}, t.TempDir(), []refusal{
		{name: "del", args: "del 5", says: []string{"/dev/ublkb5", "another program", whose, "del --force 5"}},
		{name: "add", args: "add -n 5 -p " + dax + " -b " + disk, says: []string{"/dev/ublkb5", "another program", whose}},
		{name: "status", args: "status 5", says: []string{"/dev/ublkb5", "another program", whose}},
		{name: "recover", args: "recover 5", says: []string{"/dev/ublkb5", "another program", whose}},
	})
	if l := list(t); len(l) > 0 {
		t.Errorf("list shows %+v", l)
	}
	t.Run("state file that has outlived its device", func(t *testing.T) { mustLeaveOthers(t, 5, 4) })
	letGo := make(chan error, 1)
	go func() {
		<-other.Done()
		letGo <- errors.Join(other.Stop(true), other.Delete())
	}()
	pcache(t, "del", "--force", "5")
	if err := <-letGo; err != nil && !errors.Is(err, ublk.ErrNoDevice) { // which is gone already
		t.Error(err)
	}
	if _, err := ublk.Lookup(5); !errors.Is(err, ublk.ErrNoDevice) {
		t.Errorf("after del --force: %v", err)
	}

	for _, alive := range []bool{true, false} {
		d := add(t, "-p", dax, "-b", disk)
		pid := d.entry(t).PID
		if !alive {
			killServer(t, d, unix.SIGKILL)
			pid = 0
		}
		if err := os.RemoveAll(stateDir); err != nil {
			t.Fatal(err)
		}
		if e := d.entry(t); e.State != "damaged" || e.PID != pid {
			t.Errorf("list shows %+v", e)
		}
		for _, command := range []string{"recover", "flush", "upgrade"} {
			run(t, "ublk-pcache", command, d.id).mustRefuse(t, []string{"missing", "del " + d.id})
		}
		run(t, "ublk-pcache", "add", "-n", d.id, "-p", dax, "-b", disk4K).mustRefuse(t, []string{"missing", "del " + d.id})
		f := direct(t, d.path)
		run(t, "ublk-pcache", "del", d.id).mustRefuse(t, []string{"in use", fmt.Sprintf("process %d", os.Getpid())})
		f.Close()
		d.del(t)
	}
}

// mustLeaveOthers: the state file of a device that has gone, or a damaged one, says nothing about another program's
// device that has the number others. The number ours is for the device whose state file that becomes.
func mustLeaveOthers(t *testing.T, others, ours int) {
	number, free := strconv.Itoa(others), strconv.Itoa(ours)
	d := add(t, "-n", free, "-p", dax, "-b", disk)
	killServer(t, d, unix.SIGKILL)
	state, err := os.ReadFile(filepath.Join(stateDir, free+".json"))
	if err != nil {
		t.Fatal(err)
	}
	pcache(t, "del", d.id)
	left := strings.ReplaceAll(strings.Replace(string(state), `"id":`+free, `"id":`+number, 1), "/dev/ublkb"+free, "/dev/ublkb"+number)
	file := filepath.Join(stateDir, number+".json")
	for _, text := range []string{left, "damaged"} {
		must(t, "mkdir", "-p", stateDir)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if l := list(t); len(l) != 1 || l[0].State != "gone" && l[0].State != "damaged" {
			t.Errorf("list shows %+v", l)
		}
		for _, command := range []string{"recover", "flush", "upgrade"} {
			run(t, "ublk-pcache", command, number).mustRefuse(t, []string{"del " + number})
		}
		pcache(t, "del", number)
		if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after del: %v", err)
		}
		if info, err := ublk.Lookup(others); err != nil || info.State != ublk.Live {
			t.Errorf("the other program's device: %+v, %v", info, err)
		}
	}
}

// No number is taken for another one, and no file in /dev for a device.
func TestNumbersAndNames(t *testing.T) {
	wipe(t, disk, disk4K)
	d := add(t, "-n", "0", "-p", dax, "-b", disk)
	tmp := t.TempDir()
	sparseFile(t, tmp, "other", 512<<20)
	file := func(path string) func(t *testing.T) {
		return func(t *testing.T) {
			if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if text, err := os.ReadFile(path); string(text) != "precious" || os.Remove(path) != nil {
					t.Errorf("the file at %s has %q, %v", path, text, err)
				}
			})
		}
	}
	addTo := func(id string) string { return "add -n " + id + " -p TMP/other,volatile -b " + disk4K }
	huge := strconv.Itoa(math.MaxUint32 + 1)
	refuse(t, []string{disk, disk4K}, tmp, []refusal{
		{name: "add of 2^32", args: addTo(huge), says: []string{"--id " + huge, "0 to 1048575"}},
		{name: "add of 2^32 - 1", args: addTo("4294967295"), says: []string{"--id 4294967295", "0 to 1048575"}},
		{name: "add of 2^20", args: addTo("1048576"), says: []string{"--id 1048576", "0 to 1048575"}},
		{name: "del of 2^32", args: "del --force " + huge, says: []string{huge, "0 to 1048575"}},
		{name: "del of a partition", args: "del --force /dev/ublkb0p1", says: []string{"/dev/ublkb0p1", "not a device"}},
		{name: "del of 00", args: "del 00", says: []string{`"00"`, "not a device"}},
		{name: "a file in place of the disk", prepare: file("/dev/ublkb3"), args: addTo("3"), says: []string{"/dev/ublkb3", "look at it", "move it away"}},
		{name: "a file in place of the server's device", prepare: file("/dev/ublkc3"), args: addTo("3"), says: []string{"/dev/ublkc3", "look at it", "move it away"}},
	})
	t.Run("next number", func(t *testing.T) {
		file("/dev/ublkb1")(t)
		other := add(t, "-p", tmp+"/other,volatile", "-b", disk4K)
		if other.id != "2" {
			t.Errorf("with number 0 in use and a file at /dev/ublkb1, add prints %s", other.path)
		}
		pcache(t, "del", other.id)
	})

	char := "/dev/ublkc" + d.id
	major, minor, _ := strings.Cut(strings.TrimSpace(must(t, "cat", "/sys/class/ublk-char/ublkc"+d.id+"/dev")), ":")
	mustNeedChar := func(t *testing.T, command string) {
		if err := os.Rename(char, char+".away"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Rename(char+".away", char); err != nil {
				t.Error(err)
			}
		})
		file(char)(t)
		run(t, "ublk-pcache", command, d.id).mustRefuse(t, []string{char, "move it away", "mknod " + char + " c " + major + " " + minor})
	}
	t.Run("upgrade", func(t *testing.T) {
		mustNeedChar(t, "upgrade")
		if e := d.entry(t); e.State != "live" {
			t.Errorf("list shows %+v", e)
		}
	})

	// A device that waits is continued all the same: its users have it open. New ones are warned.
	killServer(t, d, unix.SIGKILL)
	t.Run("recover", func(t *testing.T) { mustNeedChar(t, "recover") })
	if err := os.Remove(d.path); err != nil {
		t.Fatal(err)
	}
	file(d.path)(t)
	if r := run(t, "ublk-pcache", "recover", d.id); r.code != 0 || r.stdout != d.path+"\n" || !strings.Contains(r.stderr, "warning") || !strings.Contains(r.stderr, "move it away") {
		t.Errorf("with a file in place of the disk: %+v", r)
	}
	pcache(t, "del", d.id)
}

// del says who has a device open.
func TestDelNamesUsers(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "mkfs.ext4", "-q", "-F", d.path, "64M")
	dir := mount(t, d.path)
	sleeper := exec.Command("sh", "-c", "exec sleep 1000 <"+d.path)
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sleeper.Process.Kill(); sleeper.Wait() })
	says := fmt.Sprintf("process %d (sleep) has it open", sleeper.Process.Pid)
	waitFor(t, func() string {
		r := run(t, "ublk-pcache", "del", d.id)
		r.mustRefuse(t, []string{d.path, "in use", "mounted on " + dir, "--force"})
		if !strings.Contains(r.stderr, says) {
			return r.stderr
		}
		return ""
	})
	// The server's own reason to stay is the same.
	if err := unix.Kill(d.entry(t).PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() string {
		if log, err := os.ReadFile(filepath.Join(stateDir, d.id+".log")); err != nil || !strings.Contains(string(log), says) {
			return fmt.Sprintf("the log says %s, %v", log, err)
		}
		return ""
	})
	sleeper.Process.Kill()
	must(t, "umount", dir)
	d.del(t)
}

// A device whose server is dead goes from under those who have it open, and del does not wait for them.
func TestForcedDelOfDead(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	f := direct(t, d.path)
	defer f.Close()
	killServer(t, d, unix.SIGKILL)
	run(t, "ublk-pcache", "del", d.id).mustRefuse(t, []string{"in use", "--force"})
	if r := run(t, "ublk-pcache", "del", "--force", d.id); r.code != 0 || r.stderr != "ublk-pcache: "+d.path+" is gone, its number is free when the last who has it open closes it\n" {
		t.Fatalf("%+v", r)
	}
	if l := list(t); len(l) > 0 {
		t.Errorf("list shows %+v", l)
	}
	f.Close()
	id, err := strconv.Atoi(d.id)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() string {
		if _, err := ublk.Lookup(id); !errors.Is(err, ublk.ErrNoDevice) {
			return fmt.Sprintf("the number is not free: %v", err)
		}
		return ""
	})
	pcache(t, "del", add(t, "-n", d.id, "-p", dax, "-b", disk).id)
}

// A file system whose device has lost its server is unmounted when the device has one again, with all that was written.
func TestUmountOfDead(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "mkfs.ext4", "-q", "-F", d.path, "64M")
	dir := mount(t, d.path)
	if err := os.WriteFile(dir+"/file", []byte("written"), 0o600); err != nil {
		t.Fatal(err)
	}
	killServer(t, d, unix.SIGKILL)
	ended := make(chan error, 1)
	go func() { ended <- exec.Command("umount", dir).Run() }()
	select {
	case err := <-ended:
		t.Fatalf("umount ends without a server: %v", err)
	case <-time.After(time.Second):
	}
	pcache(t, "recover", d.id)
	if err := <-ended; err != nil {
		t.Errorf("umount: %v", err)
	}
	must(t, "mount", d.path, dir)
	if text, err := os.ReadFile(dir + "/file"); string(text) != "written" {
		t.Errorf("the file holds %q, %v", text, err)
	}
	must(t, "umount", dir)
	d.del(t)
}

// A service does not go on with the device of another cache because that has its disk.
func TestRunOnAnothersDisk(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	killServer(t, d, unix.SIGKILL)
	dir := t.TempDir()
	pcache(t, "format", dir+"/other,size=512M,volatile")
	const config = "/etc/ublk-pcache/other.conf"
	must(t, "mkdir", "-p", filepath.Dir(config))
	t.Cleanup(func() { os.Remove(config) })
	if err := os.WriteFile(config, []byte("pmem = "+dir+"/other,volatile\nbacking = "+disk+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run(t, "ublk-pcache", "run", "other")
	r.mustRefuse(t, []string{"device " + d.id, dax, dir + "/other", "recover " + d.id})
	if r.code != 78 {
		t.Errorf("run ends with %d", r.code)
	}
	pcache(t, "recover", d.id)
	d.del(t)
}

// A client that flushes does not notice that the server is replaced meanwhile.
func TestFlushDuringUpgrade(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	var stop atomic.Bool
	var clients sync.WaitGroup
	flushed := 0
	clients.Go(func() {
		f := direct(t, d.path)
		defer f.Close()
		buf := buffer(t)
		for i := int64(0); !stop.Load(); i++ {
			if _, err := f.WriteAt(buf[:4096], i%1000*4096); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var mu sync.Mutex
	for range 4 {
		clients.Go(func() {
			for !stop.Load() {
				if out, err := exec.Command("ublk-pcache", "flush", d.id).CombinedOutput(); err != nil {
					t.Errorf("flush: %v: %s", err, out)
				}
				mu.Lock()
				flushed++
				mu.Unlock()
			}
		})
	}
	for range 3 {
		time.Sleep(500 * time.Millisecond)
		pcache(t, "upgrade", d.id)
	}
	stop.Store(true)
	clients.Wait()
	t.Logf("%d flushes", flushed)
	d.del(t)
}

// Of two who want the same number, whose last server died on the way, one gets it, and keeps it.
func TestTwoForOneNumber(t *testing.T) {
	wipe(t, disk, disk4K)
	tmp := t.TempDir()
	for i := range 4 {
		stale := `{"id":3,"device":"/dev/ublkb3","pmem":"/nope/p","backing":"/nope/b","pid":4194304,"started":1,"queues":1,"writeback_depth":1,"depth":1}`
		if err := errors.Join(os.MkdirAll(stateDir, 0o700), os.WriteFile(stateDir+"/3.json", []byte(stale), 0o600)); err != nil {
			t.Fatal(err)
		}
		sparseFile(t, tmp, fmt.Sprint(i), 512<<20) // in memory, of which there is not enough for four
		var results [2]error
		var both sync.WaitGroup
		for n, args := range [][]string{{"-p", dax, "-b", disk, "--format", "--force"}, {"-p", fmt.Sprint(tmp, "/", i, ",volatile"), "-b", disk4K}} {
			both.Go(func() {
				out, err := exec.Command("ublk-pcache", append([]string{"add", "-n", "3", "-q", "1"}, args...)...).CombinedOutput()
				if err != nil && !strings.Contains(string(out), "device 3 exists already") {
					t.Errorf("%q: %v: %s", args, err, out)
				}
				results[n] = err
			})
		}
		both.Wait()
		if (results[0] == nil) == (results[1] == nil) {
			t.Errorf("who got it: %v", results)
		}
		d := device{"/dev/ublkb3", "3"}
		if e := d.entry(t); e.State != "live" || (e.Pmem == dax) != (results[0] == nil) {
			t.Errorf("there is %+v, where the two ended with %v", e, results)
		}
		d.del(t)
		if err := os.Remove(fmt.Sprint(tmp, "/", i)); err != nil {
			t.Fatal(err)
		}
	}
}
