//go:build vm

package ublk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// script runs a shell script in the background until the test ends; it has prepared what it is to prepare when this
// returns. With nobody it belongs to a user without rights.
func script(t *testing.T, nobody bool, name, text string, args ...string) (pid int) {
	t.Helper()
	cmd := exec.Command(name, append(args, "sh", "-ec", text+"\necho ready; read x")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if nobody {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
	}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	cmd.Stderr = os.Stderr
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	if said, err := io.ReadAll(io.LimitReader(out, 6)); string(said) != "ready\n" {
		t.Fatalf("%s says %q, %v", text, said, err)
	}
	return cmd.Process.Pid
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// use is a way to use a disk; what Users says of it has all these words.
type use struct {
	name string
	by   func(t *testing.T, disk string) []string
}

var uses = []use{
	{"open", func(t *testing.T, disk string) []string {
		pid := script(t, false, "env", "exec 3<"+disk)
		return []string{fmt.Sprintf("process %d (sh)", pid)}
	}},
	{"open under another name", func(t *testing.T, disk string) []string {
		var st unix.Stat_t
		node := "/dev/another"
		if err := errors.Join(unix.Stat(disk, &st), unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev))); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(node) })
		fd := open(t, node)
		t.Cleanup(func() { unix.Close(fd) })
		return []string{fmt.Sprintf("process %d (", os.Getpid())}
	}},
	{"a partition", func(t *testing.T, disk string) []string {
		must(t, "addpart", disk, "1", "2048", "20480")
		t.Cleanup(func() { must(t, "delpart", disk, "1") })
		part := disk + "p1"
		pid := script(t, false, "env", "exec 3<"+part)
		return []string{fmt.Sprintf("process %d (sh)", pid)}
	}},
	{"mounted", func(t *testing.T, disk string) []string {
		point := t.TempDir() + "/a \"b\xe9"
		must(t, "mkfs.ext4", "-q", "-F", disk, "8M")
		if err := errors.Join(os.Mkdir(point, 0o700), unix.Mount(disk, point, "ext4", unix.MS_RDONLY, "")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(point, 0) })
		return []string{"mounted on", strconv.Quote(point)}
	}},
	{"mounted elsewhere", func(t *testing.T, disk string) []string {
		must(t, "mkfs.ext4", "-q", "-F", disk, "8M")
		pid := script(t, false, "unshare", "mount -t ext4 -o ro "+disk+" /mnt", "-m", "--propagation", "private")
		return []string{"mounted on /mnt", fmt.Sprintf("process %d (sh)", pid)}
	}},
	{"swap", func(t *testing.T, disk string) []string {
		must(t, "mkswap", disk)
		must(t, "swapon", disk)
		t.Cleanup(func() { must(t, "swapoff", disk) })
		return []string{"swap"}
	}},
	{"loop device", func(t *testing.T, disk string) []string {
		must(t, "modprobe", "loop")
		loop := must(t, "losetup", "-f", "--show", disk)
		t.Cleanup(func() { must(t, "losetup", "-d", loop) })
		return []string{"loop device " + filepath.Base(loop)}
	}},
	{"device mapper", func(t *testing.T, disk string) []string {
		must(t, "dmsetup", "create", "--noudevsync", "ontop", "--table", "0 2048 linear "+disk+" 0")
		t.Cleanup(func() { must(t, "dmsetup", "remove", "--noudevsync", "ontop") })
		return []string{"dm-", "is on top"}
	}},
	{"NVMe target", func(t *testing.T, disk string) []string {
		must(t, "modprobe", "nvmet")
		must(t, "sh", "-ec", "mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config")
		const subsystem = "/sys/kernel/config/nvmet/subsystems/shared"
		const dir = subsystem + "/namespaces/1"
		must(t, "mkdir", "-p", dir)
		t.Cleanup(func() { must(t, "sh", "-ec", `echo 0 >"$0/enable"; rmdir "$0" "$1"`, dir, subsystem) })
		must(t, "sh", "-ec", `echo "$1" >"$0/device_path"; echo 1 >"$0/enable"`, dir, disk)
		return []string{"NVMe target 1"}
	}},
}

// pretences are what everybody can do, without any right to the disk.
var pretences = []use{
	{"a file of its name is open", func(t *testing.T, disk string) []string {
		script(t, true, "unshare", "mount -t tmpfs x /dev; touch "+disk+"; exec 3<"+disk, "-rm")
		return nil
	}},
	{"a mount is of its name", func(t *testing.T, disk string) []string {
		script(t, true, "unshare", "mount -t tmpfs "+disk+" /mnt", "-rm")
		return nil
	}},
	{"a file called like a partition is open", func(t *testing.T, disk string) []string {
		script(t, true, "unshare", "mount -t tmpfs x /dev; touch "+disk+"p1; exec 3<"+disk+"p1", "-rm")
		return nil
	}},
	{"a descriptor that opens nothing", func(t *testing.T, disk string) []string {
		fd, err := unix.Open(disk, unix.O_PATH|unix.O_CLOEXEC, 0) // takes no right to the file
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return nil
	}},
}

// TestUsers: who uses a disk is known by the disk's number, whether it has a server or waits for one; names deceive
// nobody, in neither direction.
func TestUsers(t *testing.T) {
	path := store(t)
	s := spawn(t, "add", path)
	unix.Close(open(t, diskPath(uint32(s.id))))
	used := func(u use, refused bool, remove func() error) {
		t.Run(u.name, func(t *testing.T) {
			if found := Users(s.id); len(found) > 0 {
				t.Fatalf("nobody uses it, but %q", found)
			}
			words := u.by(t, diskPath(uint32(s.id)))
			found := Users(s.id)
			for _, word := range words {
				if !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, word) }) {
					t.Errorf("%q does not tell of %q", found, word)
				}
			}
			if len(words) == 0 && len(found) > 0 {
				t.Errorf("it is said that %q", found)
			}
			if refused {
				if err := remove(); !errors.Is(err, ErrInUse) {
					t.Errorf("Remove: %v", err)
				}
			}
		})
	}
	for _, u := range uses {
		used(u, true, func() error { return Remove(s.id, false) })
	}
	for _, u := range pretences {
		used(u, true, func() error { // as before 7.0
			if err := checkUnused(uint32(s.id)); err != nil {
				return err
			}
			return ErrInUse
		})
	}

	// Without a server a file system cannot be mounted, but stays so; loop stands for what is in the kernel.
	loop := uses[slices.IndexFunc(uses, func(u use) bool { return u.name == "loop device" })]
	mounted := uses[slices.IndexFunc(uses, func(u use) bool { return u.name == "mounted" })]
	for _, u := range []use{loop, mounted} {
		t.Run("then killed/"+u.name, func(t *testing.T) {
			words := u.by(t, diskPath(uint32(s.id)))
			s.Process.Kill()
			s.Wait()
			for info := (Info{State: Live}); info.State != Quiesced; {
				var err error
				if info, err = Lookup(s.id); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Millisecond) // before 6.15 it may take half a minute
			}
			err := Remove(s.id, false)
			if !errors.Is(err, ErrInUse) {
				t.Fatalf("Remove: %v", err)
			}
			for _, word := range words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%v does not tell of %q", err, word)
				}
			}
			s = spawn(t, "recover", path, strconv.Itoa(s.id))
		})
	}
	s.Process.Kill()
	s.Wait()
	for _, u := range pretences {
		t.Run("dead/"+u.name, func(t *testing.T) {
			u.by(t, diskPath(uint32(s.id)))
			if found := Users(s.id); len(found) > 0 {
				t.Errorf("it is said that %q", found)
			}
		})
	}
	if err := Remove(s.id, false); err != nil {
		t.Error(err)
	}
	requireNone(t)
}

// TestMark: a device carries its mark, also without a server.
func TestMark(t *testing.T) {
	cfg := twoQueues
	cfg.Mark = 0x123456789abcdef0
	r := start(t, cfg)
	if info, err := Lookup(r.ID()); err != nil || info.Mark != cfg.Mark {
		t.Errorf("%+v, %v", info, err)
	}
	finish(t, r.Device)
}

// TestNames: no device is made whose name leads elsewhere.
func TestNames(t *testing.T) {
	mem := aligned(t, ramSize)
	for _, path := range []string{diskPath(9), charPath(9)} {
		for what, put := range map[string]func() error{
			"a file":   func() error { return os.WriteFile(path, []byte("precious"), 0o600) },
			"a link":   func() error { return os.Symlink("/dev/null", path) },
			"a folder": func() error { return os.Mkdir(path, 0o700) },
			// What stays of a device where the kernel does not make the nodes.
			"another device": func() error {
				kind := uint32(unix.S_IFBLK)
				if path == charPath(9) {
					kind = unix.S_IFCHR
				}
				return unix.Mknod(path, kind|0o600, int(unix.Mkdev(250, 250)))
			},
		} {
			if err := put(); err != nil {
				t.Fatal(err)
			}
			cfg := twoQueues
			cfg.ID = 9
			_, err := Add(cfg, (&ram{mem: mem}).handler, func(err error) { panic(err) })
			if !errors.Is(err, ErrNode) || !strings.Contains(err.Error(), path) {
				t.Errorf("with %s at %s: %v", what, path, err)
			}
			requireNone(t)
			if err := os.Remove(path); err != nil {
				t.Errorf("%s is not there any more: %v", path, err)
			}
		}
	}
	cfg := twoQueues
	cfg.ID = 9
	r := start(t, cfg)
	if err := CheckNode(9); err != nil {
		t.Error(err)
	}
	if err := CheckNode(8); !errors.Is(err, ErrNode) {
		t.Errorf("of no disk: %v", err)
	}
	finish(t, r.Device)
}

// TestNumbers: none is taken for another one.
func TestNumbers(t *testing.T) {
	cfg := twoQueues
	cfg.ID = 0
	r := start(t, cfg)
	for _, id := range []int{-1, MaxID + 1, 1 << 32, -1 << 32} {
		if _, err := Lookup(id); !errors.Is(err, ErrNoDevice) {
			t.Errorf("look up %d: %v", id, err)
		}
		if err := Remove(id, true); !errors.Is(err, ErrNoDevice) {
			t.Errorf("remove %d: %v", id, err)
		}
		if _, err := Prepare(id, nil); !errors.Is(err, ErrNoDevice) {
			t.Errorf("recover %d: %v", id, err)
		}
		if cfg.ID = id; id >= 0 {
			if err := cfg.check(); !errors.Is(err, ErrGeometry) {
				t.Errorf("add %d: %v", id, err)
			}
		}
	}
	finish(t, r.Device)
}
