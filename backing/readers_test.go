//go:build vm

package backing

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/internal/filelock"
)

// nobody has no right to anything.
const nobody = 65534

// A reader is this program run as nobody, with a file that is open for reading.
// It locks that in one of these ways, writes a byte, and holds it until its input
// ends.
var readers = map[string]func(fd int) error{
	"flock shared":    func(fd int) error { return unix.Flock(fd, unix.LOCK_SH) },
	"flock exclusive": func(fd int) error { return unix.Flock(fd, unix.LOCK_EX) },
	"all locks": func(fd int) error {
		return errors.Join(unix.Flock(fd, unix.LOCK_EX),
			unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}))
	},
	"in no table of descriptors": func(fd int) error {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Flock(fd, unix.LOCK_EX),
			unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fd), nil, 0), unix.Close(fd))
	},
}

const readerEnv = "BACKING_TEST_READER"

func init() {
	how := readers[os.Getenv(readerEnv)]
	if how == nil {
		return
	}
	if err := how(3); err != nil {
		os.Stdout.WriteString(err.Error())
		os.Exit(1)
	}
	os.Stdout.WriteString("\n")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// startReader returns when it has the lock; end lets go.
func startReader(t *testing.T, path, how string) (end func()) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{readerEnv + "=" + how}
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("a reader that locks %s: %q, %v", how, line, err)
	}
	return func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// TestReadersLockNobodyOut: whatever who may only read the file does with it, a
// server can open it, and it alone, for as long as the reader stays and after.
func TestReadersLockNobodyOut(t *testing.T) {
	type scene struct {
		how, path string
		end       func()
		server    *Device
	}
	var scenes []scene
	for how := range readers {
		s := scene{how: how, path: tempFile(t, testSize)}
		s.end = startReader(t, s.path, how)
		d := openDevice(t, s.path)
		mustBeHeld(t, how, s.path)
		f, err := d.File()
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		s.server, err = Inherit(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		mustBeHeld(t, how, s.path)
		scenes = append(scenes, s)
	}
	for _, s := range scenes {
		s.end()
	}
	// A version that knows flock alone is kept out, too, soon after.
	for _, s := range scenes {
		older, err := unix.Open(s.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		for begin := time.Now(); unix.Flock(older, unix.LOCK_EX|unix.LOCK_NB) == nil; time.Sleep(50 * time.Millisecond) {
			unix.Flock(older, unix.LOCK_UN)
			if time.Since(begin) > 10*time.Second {
				t.Fatalf("%s: the lock is not taken when the reader has gone", s.how)
			}
		}
		unix.Close(older)
		mustBeHeld(t, s.how, s.path)
		s.server.Close()
		openDevice(t, s.path).Close()
	}
}

// mustBeHeld is refuse without the patience of Open.
func mustBeHeld(t *testing.T, how, path string) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := filelock.Take(fd, filelock.Exclusive); !errors.Is(err, filelock.ErrHeld) {
		t.Errorf("%s: a second server: %v", how, err)
	}
}

// A process that has the file open for writing has a right to lock it.
func TestWriterIsHeeded(t *testing.T) {
	path := tempFile(t, testSize)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	refuse(t, path, ErrInUse, "locked", "backing.test")
}
