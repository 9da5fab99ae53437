package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ownStateDir gives the test a folder of its own for state files.
func ownStateDir(t *testing.T) {
	t.Helper()
	before := stateDir
	t.Cleanup(func() { stateDir = before })
	stateDir = filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
}

func someDevice(id int) *device {
	return &device{ID: id, PMEM: "/dev/dax0.0", Backing: "/dev/nvme0n1", PID: 1, Queues: 1, Writeback: 16, Depth: 128}
}

// TestStateFileAppearsWhole: many want the same number at once; one gets it,
// and nobody ever sees half a file, neither when it is made nor when it is
// replaced.
func TestStateFileAppearsWhole(t *testing.T) {
	ownStateDir(t)
	for id := range 50 {
		var made, tried sync.WaitGroup
		stop := make(chan struct{})
		winners := make(chan string, 8)
		for i := range cap(winners) {
			tried.Go(func() {
				d := someDevice(id)
				d.Backing = fmt.Sprintf("/dev/nvme%dn1", i)
				ok, err := d.create()
				if err != nil {
					t.Error(err)
				}
				if ok {
					winners <- d.Backing
					if err := d.save(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		made.Go(func() {
			for {
				if _, err := readState(id); errors.Is(err, errDamaged) {
					t.Errorf("seen while it was made: %v", err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		tried.Wait()
		close(stop)
		made.Wait()
		close(winners)
		if len(winners) != 1 {
			t.Fatalf("%d got the number %d", len(winners), id)
		}
		d, err := readState(id)
		if err != nil {
			t.Fatal(err)
		}
		if won := <-winners; d.Backing != won || d.PID != os.Getpid() {
			t.Errorf("device %d went to the one with %s, the file says %+v", id, won, d)
		}
		if err := d.remove(); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(stateDir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestAlive: a server is told apart from a later process with its number, and from
// what the kernel keeps of it until its parent has asked.
func TestAlive(t *testing.T) {
	now := func() uint64 {
		var since unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
			t.Fatal(err)
		}
		return uint64(since.Nano() / 1e7) // a tick is a hundredth of a second
	}
	before := now()
	sleeper := exec.Command("sleep", "600")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	after := now()
	d := someDevice(0)
	d.PID = sleeper.Process.Pid
	d.Started = startOf(d.PID)
	if d.Started < before || d.Started > after || !d.alive() {
		t.Errorf("a process that runs does not, or was not started at %d, between %d and %d", d.Started, before, after)
	}
	other := *d
	if other.Started--; other.alive() {
		t.Error("so does one that was started before, with the same number")
	}
	sleeper.Process.Kill()
	if err := unix.Waitid(unix.P_PID, d.PID, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if d.alive() {
		t.Error("a process that has ended runs")
	}
	sleeper.Wait()
	if d.alive() || startOf(d.PID) != 0 {
		t.Error("so does one of which nothing is left")
	}
}

// TestDamagedStateFiles: whatever stands where a state file should is named,
// with the way out, and is in nobody's way but that of a new device.
func TestDamagedStateFiles(t *testing.T) {
	good, err := json.Marshal(someDevice(3))
	if err != nil {
		t.Fatal(err)
	}
	text := func(s string) func(path string) error {
		return func(path string) error { return os.WriteFile(path, []byte(s), 0o600) }
	}
	for name, put := range map[string]func(path string) error{
		"empty":         text(""),
		"cut short":     text(string(good[:len(good)/2])),
		"zeros":         text(string(make([]byte, 4096))),
		"too long":      text(strings.Repeat(" ", stateSize) + string(good)),
		"not JSON":      text("device 3\n"),
		"two":           text(string(good) + string(good)),
		"null":          text("null"),
		"array":         text("[]"),
		"object":        text("{}"),
		"of another":    text(strings.Replace(string(good), `"id":3`, `"id":4`, 1)),
		"other types":   text(strings.Replace(string(good), `"pid":1`, `"pid":"1"`, 1)),
		"no server":     text(strings.Replace(string(good), `"pid":1`, `"pid":-1`, 1)),
		"relative path": text(strings.Replace(string(good), `/dev/dax0.0`, `dax0.0`, 1)),
		"no queues":     text(strings.Replace(string(good), `"queues":1`, `"queues":0`, 1)),
		"too deep":      text(strings.Replace(string(good), `"depth":128`, `"depth":1000000`, 1)),
		"no write-back": text(strings.Replace(string(good), `"writeback_depth":16`, `"writeback_depth":-16`, 1)),
		"a folder":      func(path string) error { return os.Mkdir(path, 0o700) },
		"a pipe":        func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"a link":        func(path string) error { return os.Symlink("/proc/self/environ", path) },
		"a broken link": func(path string) error { return os.Symlink("nowhere", path) },
		"a link to good": func(path string) error {
			return errors.Join(text(string(good))(path+".x"), os.Symlink(path+".x", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ownStateDir(t)
			if err := someDevice(5).save(); err != nil {
				t.Fatal(err)
			}
			if err := put(statePath(3, ".json")); err != nil {
				t.Fatal(err)
			}
			_, err := readState(3)
			fails(t, err, statePath(3, ".json"), "ublk-pcache del 3", "add it again")
			fails(t, unreachableError(3, err), statePath(3, ".json"), "ublk-pcache del 3")
			all, err := readStates()
			if err != nil || len(all) != 2 || all[0].ID != 3 || all[0].damage == nil || all[1].ID != 5 || all[1].damage != nil {
				t.Errorf("of devices 3 and 5 are seen %+v, %v", all, err)
			}
			// It may be that of the same cache.
			fails(t, refuseShared(someDevice(6).PMEM, someDevice(6).Backing), "ublk-pcache del 3")
			if ok, err := someDevice(3).create(); ok || err != nil {
				t.Errorf("number 3 is given away: %t, %v", ok, err)
			}
			if err := (&device{ID: 3}).remove(); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(statePath(3, ".json")); !os.IsNotExist(err) {
				t.Errorf("it cannot be removed: %v", err)
			}
		})
	}
	ownStateDir(t)
	for _, other := range []string{"-1.json", "03.json", "x.json", ".json", "3.log", "3.json.new"} {
		if err := text("x")(filepath.Join(stateDir, other)); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := readStates(); err != nil || len(all) > 0 {
		t.Errorf("files that are of no device make %+v, %v", all, err)
	}
}

// TestStatesWhileOneGoes: those who look at all devices are not kept from the rest by one that is removed meanwhile.
func TestStatesWhileOneGoes(t *testing.T) {
	ownStateDir(t)
	if err := someDevice(3).save(); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var comings sync.WaitGroup
	for id := 4; id < 8; id++ {
		comings.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := errors.Join(someDevice(id).save(), someDevice(id).removeLocked()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 2000 {
		if all, err := readStates(); err != nil || len(all) == 0 || all[0].ID != 3 {
			t.Errorf("seen are %+v, %v", all, err)
			break
		}
	}
	close(stop)
	comings.Wait()
}

// TestStateDirOfOthers: a folder that somebody else has prepared is not used.
func TestStateDirOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(dir string) error
		refused bool
	}{
		"ours":              {func(dir string) error { return nil }, false},
		"not there yet":     {os.Remove, false},
		"readable":          {func(dir string) error { return os.Chmod(dir, 0o755) }, false},
		"group writes":      {func(dir string) error { return os.Chmod(dir, 0o770) }, true},
		"everybody writes":  {func(dir string) error { return os.Chmod(dir, 0o777) }, true},
		"with a sticky bit": {func(dir string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, true},
		"nobody's":          {func(dir string) error { return os.Chown(dir, 65534, 65534) }, true},
		"a link": {func(dir string) error {
			return errors.Join(os.Rename(dir, dir+".x"), os.Symlink(dir+".x", dir))
		}, true},
		"a file": {func(dir string) error { return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600)) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			ownStateDir(t)
			if err := c.prepare(stateDir); err != nil {
				t.Fatal(err)
			}
			if err := checkStateDir(); c.refused {
				fails(t, err, stateDir, "only root", "move it away")
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSaveNeedsNoRoom: once a device has its state file, it can be replaced in a
// folder that takes nothing more.
func TestSaveNeedsNoRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	ownStateDir(t)
	if err := syscall.Mount("none", stateDir, "tmpfs", 0, "size=64k,nr_inodes=8,mode=700"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(stateDir, syscall.MNT_DETACH) })
	d := someDevice(5)
	if ok, err := d.create(); !ok || err != nil {
		t.Fatal(ok, err)
	}
	var full error
	for i := 0; full == nil; i++ {
		full = os.WriteFile(filepath.Join(stateDir, fmt.Sprint("fill", i)), make([]byte, 64<<10), 0o600)
	}
	if err := os.WriteFile(filepath.Join(stateDir, "more"), make([]byte, 4096), 0o600); err == nil {
		t.Fatal("the folder is not full")
	}
	for i := range 3 {
		d.PID = 1_000_000 + i
		if err := d.save(); err != nil {
			t.Fatalf("save %d in a full folder: %v", i, err)
		}
		if got, err := readState(5); err != nil || got.PID != d.PID {
			t.Fatalf("saved process %d, read %+v, %v", d.PID, got, err)
		}
	}
	if _, err := someDevice(6).create(); err == nil {
		t.Error("a second device was made in a full folder")
	}
	left, err := filepath.Glob(filepath.Join(stateDir, "6.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("what could not be made has left %v (%v)", left, err)
	}
}
