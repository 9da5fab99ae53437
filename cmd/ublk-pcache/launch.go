package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// A server protects the machine it serves: the kernel may need it to write
// out dirty pages just when memory is short. Three of its protections are
// inherited rather than set: every thread of the Go runtime must have
// PR_SET_IO_FLUSHER, which survives fork and exec but covers only the calling
// thread (kernel/fork.c and include/linux/sched.h: PF_MEMALLOC_NOIO), and a
// mount namespace of its own, without which a server that is the last to leave
// a namespace would be asked to serve the unmount of its own device while it
// exits. So whoever starts a server takes both on one thread and starts the
// server from that thread.
//
// It takes a third thing there. Memory in which the hardware finds an error that
// nobody has met yet can be announced to whoever has it mapped
// (vm.memory_failure_early_kill), by a SIGBUS in any thread. The thread may be at
// something else and can do nothing about it, and Go's runtime takes it for a crash.
// A process that asks for late kill is told when the memory is touched, in the access
// itself, which package pmem guards. The kernel asks thread by thread
// (mm/memory-failure.c, find_early_kill_thread; 6.12 and 7.3), and the answer survives
// fork and exec as well (PF_MCE_PROCESS).

// A server outlives its caller and runs for others, so it inherits nothing else. Its
// working directory (whose file system could never be unmounted), descriptors and
// environment are seen to here, stray signal masks in main, limits in protect.

// launch starts a server for o and returns the device's path once it is ready,
// or why it is not. With Foreground this process becomes the server,
// so that whoever started it has it for a child.
func launch(o serveOptions) (path string, err error) {
	spec, err := o.region()
	if err != nil {
		return "", err
	}
	if !o.Recover {
		if err := refuseShared(spec.Path, o.Device.Backing); err != nil {
			return "", err
		}
	}
	if err := o.see(spec); err != nil {
		return "", err
	}
	spec.Path = o.PMEM.Path
	if err := spec.RefuseVolatile(); err != nil {
		return "", o.startError(err)
	}
	o.Exit = o.Exit || o.AnswerFD == 0 // or this is not who is answered
	config, err := json.Marshal(o)
	if err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	isolate := func() error { return isolate(self, o.PMEM.Path, o.Backing.Path) }
	if o.Foreground {
		return "", become(self, string(config), isolate)
	}
	var answer string
	if systemd, ok := reachSystemd(); ok {
		defer systemd.Close()
		answer, err = spawnUnit(systemd, self, o)
	} else {
		answer, err = spawn(self, string(config), isolate, o)
	}
	if err != nil {
		return "", err
	}
	for {
		warning, rest, ok := strings.Cut(answer, "\n")
		if !ok || !strings.HasPrefix(warning, warningPrefix) {
			break
		}
		fmt.Fprintln(os.Stderr, "ublk-pcache:", warning)
		answer = rest
	}
	path, ready := strings.CutPrefix(answer, readyPrefix)
	if !ready {
		return "", refusal(answer)
	}
	return strings.TrimSuffix(path, "\n"), nil
}

// become makes this process the server.
func become(self, config string, isolate func() error) error {
	runtime.LockOSThread()
	if err := isolate(); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := unix.Dup3(int(null.Fd()), unix.Stdin, 0); err != nil {
		return fmt.Errorf("leave standard input: %w", err)
	}
	return fmt.Errorf("execute %s: %w", self, unix.Exec(self, []string{os.Args[0], "serve", config}, serverEnv()))
}

// spawn starts a server in the background and returns its answer.
func spawn(self, config string, isolate func() error, o serveOptions) (answer string, err error) {
	interrupted, stop := untilBrokenOff()
	defer stop()
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	cmd := exec.Command(self, "serve", config)
	cmd.Dir, cmd.Env = "/", serverEnv()
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	started := make(chan error)
	go func() {
		// Never unlocked: a thread with these properties ends with its goroutine.
		runtime.LockOSThread()
		err := isolate()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	err = <-started
	w.Close()
	if err != nil {
		return "", fmt.Errorf("start the server: %w", err)
	}
	stopWaiting := context.AfterFunc(interrupted, func() { r.SetReadDeadline(time.Now()) })
	defer stopWaiting()
	said, err := io.ReadAll(r)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "", takeBack(cmd, o)
	case err != nil:
		return "", fmt.Errorf("wait for the server: %w", err)
	case len(said) == 0:
		return "", fmt.Errorf("the server died before it was ready: %v", cmd.Wait())
	}
	return string(said), cmd.Process.Release()
}

// untilBrokenOff returns a context that ends when somebody breaks the command off.
func untilBrokenOff() (context.Context, context.CancelFunc) {
	signals := []os.Signal{os.Interrupt, unix.SIGTERM}
	if !signal.Ignored(unix.SIGHUP) { // as with nohup
		signals = append(signals, unix.SIGHUP)
	}
	return signal.NotifyContext(context.Background(), signals...)
}

// takeBack ends a server that nobody waits for any more. It takes back what it has
// made of a new device by itself, once its disk answers; a device that was there
// before waits again.
func takeBack(cmd *exec.Cmd, o serveOptions) error {
	cmd.Process.Signal(o.breakOff())
	if _, ok := inTime(cmd.Wait); !ok {
		return o.lateEnd(fmt.Sprintf("process %d", cmd.Process.Pid))
	}
	return errInterrupted
}

var errInterrupted = errors.New("interrupted")

// breakOff is the signal that ends a server which is not ready yet.
func (o *serveOptions) breakOff() syscall.Signal {
	if o.Recover {
		return unix.SIGKILL // at any other it might remove the device
	}
	return unix.SIGTERM
}

// lateEnd says that a server that was told to end is still there.
func (o *serveOptions) lateEnd(what string) error {
	if o.Recover {
		return fmt.Errorf("interrupted: %s waits for its disk, and ends when that answers", what)
	}
	return fmt.Errorf("interrupted: %s waits for its disk, and when that answers it takes back what it has begun", what)
}

// serverEnv is what a server gets of the environment: where programs are, what
// systemd tells it, and the time zone for its log.
func serverEnv() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, name := range []string{"TZ", "NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "GOTRACEBACK"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// readyPrefix begins the answer of a server that is ready; the path of its
// device follows. Any other answer is an error.
const readyPrefix = "ready "

// warningPrefix begins lines before that, for people.
const warningPrefix = "warning: "

// exitPrefix begins the line before an error that has what the command ends with.
const exitPrefix = "exit "

// refusal is the answer of a server that does not get ready.
func (o *serveOptions) refusal(err error) string {
	if !o.Exit {
		return oneLine(err)
	}
	return fmt.Sprintf("%s%d\n%s", exitPrefix, exitStatus(err), oneLine(err))
}

// refusal is the error that a server has answered.
func refusal(answer string) error {
	first, rest, _ := strings.Cut(answer, "\n")
	if number, has := strings.CutPrefix(first, exitPrefix); has {
		if status, err := strconv.Atoi(number); err == nil {
			return exitWith(status, errors.New(rest))
		}
	}
	return errors.New(answer)
}

// readyFD is where a server finds the pipe for its answer.
const readyFD = 3

// isolate gives the calling thread what its children inherit. keep are paths
// that the server needs.
func isolate(keep ...string) error {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become an I/O flusher: %w", err)
	}
	if err := unix.Prctl(unix.PR_MCE_KILL, unix.PR_MCE_KILL_SET, unix.PR_MCE_KILL_LATE, 0, 0); err != nil {
		return fmt.Errorf("ask for late memory errors: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("leave the mount namespace: %w", err)
	}
	// Slave, not private: what is mounted and unmounted outside reaches the
	// copies in here, where the outside shares its mounts. It need not, so all
	// copies that are not needed go: a file system on the device itself would
	// stay busy in here for as long as the server lives.
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("leave the mount namespace: %w", err)
	}
	unmountAllBut(neededPaths(keep...))
	return nil
}

// configCmd is a command that only this program runs, with the options of a
// server as its argument.
func configCmd(name string, run func(serveOptions) error) *cobra.Command {
	return &cobra.Command{
		Use:    name + " CONFIG",
		Hidden: true,
		Args:   takes(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			var o serveOptions
			if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
				return err
			}
			return run(o)
		},
	}
}

func newServeCmd() *cobra.Command {
	return configCmd("serve", serve)
}

func serve(o serveOptions) error {
	if o.Foreground && o.Upgrade == nil && o.AnswerFD == 0 {
		s, err := start(o)
		if err != nil {
			return o.startError(err)
		}
		fmt.Println(s.dev.Device)
		daemon.SdNotify(false, serving(s.dev.Device))
		s.wait()
		return nil
	}
	fd, refused := uintptr(readyFD), 1
	if o.AnswerFD != 0 {
		fd = uintptr(o.AnswerFD)
		if !o.Recover { // or the device waits, and the unit goes on to try
			refused = exitFinal
		}
	}
	ready := inherited(fd, "ready")
	var s *server
	var err error
	if o.Upgrade != nil {
		s, err = takeOver(o, ready)
	} else {
		s, err = start(o)
	}
	if err != nil {
		fmt.Fprint(ready, o.refusal(err))
		os.Exit(refused)
	}
	if o.AnswerFD != 0 {
		daemon.SdNotify(false, serving(s.dev.Device))
	}
	for _, w := range s.warnings {
		fmt.Fprintln(ready, warningPrefix+w)
	}
	fmt.Fprintln(ready, readyPrefix+s.dev.Device)
	ready.Close()
	s.wait()
	return nil
}

// inherited is a file that was open when this process began.
func inherited(fd uintptr, name string) *os.File {
	unix.CloseOnExec(int(fd))
	return os.NewFile(fd, name)
}
