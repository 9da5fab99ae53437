// Command ublk-pcache serves block devices with a persistent-memory cache in
// front of a slow disk.
//
// It is one binary in two roles. A command (add, list, del, …) is short-lived
// and talks to the servers; a server (the hidden command serve) owns one
// cache, one backing device and one /dev/ublkbN, and lives until del. They
// meet in three places, all under /run/ublk-pcache, which belongs to root:
// a state file per device says what it is made of and survives its server, a
// socket per device takes requests while the server lives, and a log, where
// the server is in the background and in no unit.
//
// A command is in the file that has its name. The server is in server.go and the files
// whose names begin so. Between them are launch.go and unit.go,
// by which a command becomes, or starts, a server, and state.go and ask.go, by which
// commands know of servers and talk to them.
package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"ublk-pcache/ublk"
)

func main() {
	if err := leaveCaller(); err != nil {
		fmt.Fprintln(os.Stderr, "ublk-pcache:", err)
		os.Exit(1)
	}
	root := newRootCmd()
	if cmd, err := root.ExecuteC(); err != nil {
		if !errors.Is(err, errMended) {
			fmt.Fprintln(os.Stderr, "ublk-pcache:", oneLine(err))
		}
		status := statusAfter(cmd, err)
		awaitRetry(cmd.Name(), status)
		os.Exit(status)
	}
}

// more are commands that some builds have (man.go).
var more []*cobra.Command

func newRootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:           "ublk-pcache",
		Short:         "A persistent-memory cache in front of a slow disk, served in user space",
		Version:       longVersion(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          unknownCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Example: `  ublk-pcache add -p /dev/dax0.0 -b /dev/nvme1n1
  ublk-pcache list`,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if isForAnybody(cmd) {
				return nil
			}
			if os.Geteuid() != 0 {
				return ublk.ErrNotRoot
			}
			// Our files are root's alone, whatever umask we were given.
			syscall.Umask(0o077)
			return checkStateDir()
		},
	}
	cobra.EnableCommandSorting = false // their order is of how they are used
	root.SuggestionsMinimumDistance = 2
	root.SetFlagErrorFunc(flagError)
	root.SetGlobalNormalizationFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(dashes(name))
	})
	addGroup(root, "devices", "Devices:",
		newAddCmd(), newRecoverCmd(), newDelCmd(), newFlushCmd(), newStatusCmd(), newListCmd(), newSetCmd(), newUpgradeCmd())
	addGroup(root, "offline", "Caches that are not in use:",
		newFormatCmd(), newCheckCmd(), newRepairCmd(), newWritebackCmd(), newDumpCmd())
	addGroup(root, "around", "Planning, services, help:", newEstimateCmd(), newRunCmd(), newExporterCmd())
	root.SetHelpCommandGroupID("around")
	root.SetCompletionCommandGroupID("around")
	root.AddCommand(more...)
	root.AddCommand(newIsBackingCmd(), newDiskGoneCmd(), newClaimCmd(), newServeCmd(), newUnitCmd())
	return root
}

// isForAnybody reports whether a command only tells about the program: the help and what
// shells ask for completions.
func isForAnybody(cmd *cobra.Command) bool {
	for cmd.HasParent() && cmd.Parent().HasParent() {
		cmd = cmd.Parent()
	}
	return !cmd.HasParent() || slices.Contains([]string{"help", "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}, cmd.Name())
}

// leaveCaller keeps what this process was given by its caller from those that it
// starts: blocked signals, which every thread and child inherits, and descriptors
// that the caller did not close.
func leaveCaller() error {
	var blocked unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &blocked); err != nil {
		return fmt.Errorf("ask which signals are blocked: %w", err)
	}
	if blocked != (unix.Sigset_t{}) {
		// The runtime has taken note of the mask already: it takes another start.
		runtime.LockOSThread()
		if err := unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{}, nil); err != nil {
			return fmt.Errorf("unblock signals: %w", err)
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		return fmt.Errorf("unblock signals: %w", unix.Exec(self, os.Args, os.Environ()))
	}
	firstOther := uint(unix.Stderr + 1)
	if err := unix.CloseRange(firstOther, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep descriptors to this process: %w", err)
	}
	return nil
}
