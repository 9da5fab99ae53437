//go:build vm

package guest

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

var stormKills = flag.Int("storm.kills", 6, "how often the server is killed, at least")

// A storm kills servers, each time in another way and while they are busy with something else.
type storm struct {
	rnd   *rand.Rand
	kills int
	how   map[string]int // for the log
}

func newStorm(t *testing.T) *storm {
	s := &storm{rnd: rand.New(rand.NewPCG(*seed, 0)), how: map[string]int{}}
	t.Cleanup(func() { t.Logf("seed %d: %d kills, %v", *seed, s.kills, s.how) })
	return s
}

// sleep is for a random time, which is what a moment is found by.
func (s *storm) sleep(least, most time.Duration) {
	time.Sleep(least + time.Duration(s.rnd.Int64N(int64(most-least))))
}

// while starts a command, kills the servers in the middle of it, or at least when it has been started, and waits for it
// to end: well, or with a line.
func (s *storm) while(t *testing.T, most time.Duration, args ...string) {
	t.Helper()
	serving := servers(t)
	end := begin(t, append([]string{"ublk-pcache"}, args...)...)
	s.sleep(0, most)
	if len(serving) == 0 { // the command makes one, if it has come that far
		serving = servers(t)
	}
	s.kill(t, args[0], serving)
	if r := end(); r.code != 0 {
		r.stdout = ""
		r.mustRefuse(t, nil)
	}
}

// kill kills servers in any way there is.
func (s *storm) kill(t *testing.T, while string, servers []int) {
	t.Helper()
	// The runtime handles all of them but the first, in its own way: with a trace in the log, as it does for a fault or a
	// panic of its own.
	signals := []unix.Signal{unix.SIGKILL, unix.SIGSEGV, unix.SIGABRT, unix.SIGQUIT}
	for _, pid := range servers {
		signal := signals[s.rnd.IntN(len(signals))]
		if end(t, pid, killedBy(signal)) {
			s.count(unix.SignalName(signal), while)
		}
	}
}

func (s *storm) count(how, while string) {
	s.kills++
	s.how[how]++
	s.how[while]++
}

// servers are the processes that serve, or are about to.
func servers(t *testing.T) (pids []int) {
	t.Helper()
	for _, pid := range strings.Fields(run(t, "pgrep", "-f", "ublk-pcache serve ").stdout) {
		n, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, n)
	}
	return pids
}

// recoveryMayBeKilled: on 6.12 a recovery that ends between the fetches of the first and the last queue is what the next
// one dies of in the kernel (see makeQueues of package ublk).
func recoveryMayBeKilled(t *testing.T) bool {
	t.Helper()
	return !strings.HasPrefix(must(t, "uname", "-r"), "6.12.")
}

// The server is killed in the middle of writes and recovered, again and again: while it does nothing else, for lack of
// memory, while it flushes, while it is told to collect more or less garbage, while it is asked to go, and while it
// recovers. Of the servers nothing is left behind, and each has as many descriptors as the first.
func TestServerKilled(t *testing.T) {
	storm, recoverToo := newStorm(t), recoveryMayBeKilled(t)
	// What the kernel makes once and keeps, some of it only under load.
	underLoad(t, func(device) { storm.sleep(time.Second, 2*time.Second) })
	check := leavesNothing(t)
	underLoad(t, func(d device) {
		open := descriptors(t, d.entry(t).PID)
		for round := 0; storm.kills < *stormKills && !t.Failed(); round++ {
			storm.sleep(500*time.Millisecond, 2*time.Second) // of undisturbed work
			switch round % 5 {
			case 0:
				if end(t, d.entry(t).PID, outOfMemory) {
					storm.count("out of memory", "nothing else")
				}
			case 1:
				storm.kill(t, "nothing else", servers(t))
			case 2:
				storm.while(t, 300*time.Millisecond, "flush", d.id)
			case 3:
				storm.while(t, 300*time.Millisecond, "set", d.id, fmt.Sprintf("gc_percent=%d", storm.rnd.IntN(91)))
			case 4:
				storm.while(t, 300*time.Millisecond, "del", d.id) // in vain: it is in use
			}
			for recoverToo && storm.rnd.IntN(2) == 0 {
				storm.while(t, time.Second, "recover", d.id)
			}
			if len(servers(t)) == 0 {
				start := time.Now()
				pcache(t, "recover", d.id)
				t.Logf("round %d: recovered in %v", round, time.Since(start).Round(time.Millisecond))
			}
			if n := descriptors(t, d.entry(t).PID); n != open {
				t.Errorf("the server of round %d has %d descriptors, the first one had %d", round, n, open)
			}
		}
	})
	check(storm.kills)
}

// underLoad runs disturb while one half of a device carries a mounted file system in which files are made and synced, and
// the other is written raw and never flushed. No request may fail, and everything that was acknowledged must be there,
// during all this and afterwards.
func underLoad(t *testing.T, disturb func(d device)) {
	t.Helper()
	quiet := quietKernel(t)
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk, "-q", "2")
	fs, raw := slice(t, d, "fs", 0, 1<<30), slice(t, d, "raw", 1<<30, 1<<30)
	must(t, "mkfs.ext4", "-q", fs)
	dir := mount(t, fs)
	// Programs that have the device open wait for a server, and so would all other cleaning up.
	t.Cleanup(func() {
		if t.Failed() {
			go exec.Command("ublk-pcache", "del", "--force", d.id).Run()
		}
	})

	f := direct(t, raw)
	want := stamp.New(f, 0, 1<<30)
	stop := make(chan struct{})
	var users sync.WaitGroup
	users.Add(2)
	go func() {
		defer users.Done()
		written, err := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed}.Run(want, math.MaxInt64, stop)
		t.Logf("raw: %d MiB acknowledged", written>>20)
		if err != nil {
			t.Errorf("raw, seed %d: %v", *seed, err)
		}
	}()
	var files map[string][32]byte
	go func() {
		defer users.Done()
		var err error
		files, err = makeFiles(dir, stop)
		t.Logf("files: %d acknowledged", len(files))
		if err != nil {
			t.Errorf("files, seed %d: %v", *seed, err)
		}
	}()

	disturb(d)
	close(stop)
	users.Wait()

	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := want.Verify(buf); err != nil {
		t.Errorf("raw, seed %d: %v", *seed, err)
	}
	f.Close()
	must(t, "umount", dir)
	must(t, "e2fsck", "-fn", fs)
	must(t, "mount", fs, dir) // nothing of it is in the page cache any more
	for name, sum := range files {
		if data, err := os.ReadFile(name); err != nil || sha256.Sum256(data) != sum {
			t.Errorf("%s is not what was synced (%v)", name, err)
		}
	}
	must(t, "umount", dir)
	must(t, "dmsetup", "remove", "fs", "raw")
	d.del(t)
	quiet()
}

// slice makes a device out of a part of another, in bytes. Nothing else makes the node: there is no udev.
func slice(t *testing.T, d device, name string, from, size int64) string {
	t.Helper()
	must(t, "dmsetup", "create", name, "--table", fmt.Sprintf("0 %d linear %s %d", size/512, d.path, from/512))
	t.Cleanup(func() { run(t, "dmsetup", "remove", "--force", name) })
	must(t, "dmsetup", "mknodes")
	return "/dev/mapper/" + name
}

// Servers are killed while they make a device and while they remove one. Whatever is left can be removed, after which
// nothing is left, and the cache still holds everything.
func TestKilledComingAndGoing(t *testing.T) {
	// A device that is removed while it waits to be searched for partitions fails the search.
	quiet := quietKernel(t, ", sector 0 op 0x0:(READ)", ", logical block 0, async page read")
	wipe(t, disk)
	storm := newStorm(t)
	clean := func() {
		t.Helper()
		for _, e := range list(t) {
			pcache(t, "del", strconv.Itoa(e.ID))
		}
		if left := leftovers(t); len(left) > 0 {
			t.Fatalf("still there are %v", left)
		}
	}
	var want *stamp.Device
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	for storm.kills < *stormKills/2 {
		storm.while(t, time.Second, "add", "-p", dax, "-b", disk)
		clean()
		d := add(t, "-p", dax, "-b", disk)
		f := direct(t, d.path)
		if want == nil {
			want = stamp.New(f, 0, 64<<20)
		}
		want = want.On(f)
		if err := want.Verify(buf); err != nil {
			t.Fatalf("seed %d: %v", *seed, err)
		}
		if _, err := (stamp.Load{Depth: 4, BlockSize: 512, Seed: storm.rnd.Uint64()}).Run(want, 4<<20, nil); err != nil {
			t.Fatalf("seed %d: %v", *seed, err)
		}
		f.Close()
		storm.while(t, 300*time.Millisecond, "del", d.id)
		clean()
	}
	pcache(t, "check", dax)
	quiet()
}

// killServer kills the server of a device, see end.
func killServer(t *testing.T, d device, signal unix.Signal) {
	t.Helper()
	if pid := d.entry(t).PID; !end(t, pid, killedBy(signal)) {
		t.Fatalf("server %d has ended by itself", pid)
	}
}

// end makes a process die and waits until it is no more, which is not the end of its last requests. If it has ended by
// itself there is none to end.
func end(t *testing.T, pid int, die func(pid int) error) bool {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return false
	}
	if err != nil {
		t.Fatalf("server %d: %v", pid, err)
	}
	defer unix.Close(pidfd)
	if err := die(pid); errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
		return false
	} else if err != nil {
		t.Fatalf("end server %d: %v", pid, err)
	}
	n, err := 0, error(unix.EINTR)
	for err == unix.EINTR {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
	}
	if n != 1 {
		t.Fatalf("server %d still runs: %v", pid, err)
	}
	return true
}

func killedBy(signal unix.Signal) func(pid int) error {
	return func(pid int) error { return unix.Kill(pid, signal) }
}

// outOfMemory lets the kernel's killer go round. It spares servers, so this one is first made the one to choose.
func outOfMemory(pid int) error {
	score := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	if now, err := os.ReadFile(score); err != nil {
		return err
	} else if string(now) != "-1000\n" {
		return fmt.Errorf("%s is %q, not -1000", score, now)
	}
	if err := os.WriteFile(score, []byte("1000"), 0); err != nil {
		return err
	}
	return os.WriteFile("/proc/sysrq-trigger", []byte("f"), 0)
}

// keptFiles bounds the room that makeFiles takes; beyond it, old files are overwritten.
const keptFiles = 1000

// makeFiles writes and syncs files until stop is closed, and returns what the acknowledged ones hold.
func makeFiles(dir string, stop <-chan struct{}) (map[string][32]byte, error) {
	acknowledged := map[string][32]byte{}
	rnd := rand.NewChaCha8([32]byte{})
	for i := 0; ; i++ {
		select {
		case <-stop:
			return acknowledged, nil
		default:
		}
		data := make([]byte, 1+i*4099%(64<<10))
		rnd.Read(data)
		name := filepath.Join(dir, fmt.Sprintf("file%d", i%keptFiles))
		if err := replace(name, data); err != nil {
			return acknowledged, err
		}
		acknowledged[name] = sha256.Sum256(data)
	}
}

func replace(name string, data []byte) error {
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}
