package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

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

// launch starts a server for o and prints the device's path once it is ready,
// or returns why it is not. With Foreground this process becomes the server,
// so that whoever started it has it for a child.
func launch(o serveOptions) error {
	config, err := json.Marshal(o)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if o.Foreground {
		runtime.LockOSThread()
		if err := isolate(self, o.Device.PMEM, o.Device.Backing); err != nil {
			return err
		}
		return fmt.Errorf("execute %s: %w", self, unix.Exec(self, []string{os.Args[0], "serve", string(config)}, os.Environ()))
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self, "serve", string(config))
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	started := make(chan error)
	go func() {
		// Never unlocked: a thread with these properties ends with its goroutine.
		runtime.LockOSThread()
		err := isolate(self, o.Device.PMEM, o.Device.Backing)
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	err = <-started
	w.Close()
	if err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	answer, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("wait for the server: %w", err)
	}
	path, ready := strings.CutPrefix(string(answer), readyPrefix)
	switch {
	case ready:
		fmt.Print(path)
		return cmd.Process.Release()
	case len(answer) > 0:
		return fmt.Errorf("%s", answer)
	default:
		return fmt.Errorf("the server died before it was ready: %v", cmd.Wait())
	}
}

// readyPrefix begins the answer of a server that is ready; the path of its
// device follows. Any other answer is an error.
const readyPrefix = "ready "

// readyFD is where a server finds the pipe for its answer.
const readyFD = 3

// isolate gives the calling thread what its children inherit. keep are paths
// that the server needs.
func isolate(keep ...string) error {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become an I/O flusher: %w", err)
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
	return unmountAllBut(append(keep, "/dev", "/proc", stateDir, "/sys"))
}

// unmountAllBut detaches every mount of the calling thread's namespace that is
// on the way to none of the paths.
func unmountAllBut(keep []string) error {
	info, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(string(info)), "\n")
	// Later mounts may cover earlier ones.
	for _, line := range slices.Backward(lines) {
		// Field 5 is the mount point, with \040 and the like for special bytes
		// (fs/proc_namespace.c, show_mountinfo).
		point, err := strconv.Unquote(`"` + strings.Fields(line)[4] + `"`)
		if err != nil {
			return fmt.Errorf("list mounts: %q: %w", line, err)
		}
		below := strings.TrimSuffix(point, "/") + "/"
		if slices.ContainsFunc(keep, func(path string) bool { return strings.HasPrefix(path+"/", below) }) {
			continue
		}
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
			return fmt.Errorf("unmount %s in the server's namespace: %w", point, err)
		}
	}
	return nil
}

func newServeCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "serve CONFIG",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var o serveOptions
			if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
				return err
			}
			if o.Foreground && o.Upgrade == nil {
				s, err := start(o)
				if err != nil {
					return err
				}
				fmt.Println(s.dev.Device)
				daemon.SdNotify(false, daemon.SdNotifyReady)
				s.wait()
				return nil
			}
			ready := inherited(readyFD, "ready")
			var s *server
			var err error
			if o.Upgrade != nil {
				s, err = succeed(o, ready)
			} else {
				s, err = start(o)
			}
			if err != nil {
				fmt.Fprint(ready, oneLine(err))
				os.Exit(1)
			}
			fmt.Fprintln(ready, readyPrefix+s.dev.Device)
			ready.Close()
			s.wait()
			return nil
		},
	}
}

// inherited is a file that was open when this process began.
func inherited(fd uintptr, name string) *os.File {
	unix.CloseOnExec(int(fd))
	return os.NewFile(fd, name)
}
