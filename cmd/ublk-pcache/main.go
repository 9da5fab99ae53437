// Command ublk-pcache serves block devices with a persistent-memory cache in
// front of a slow disk.
//
// It is one binary in two roles. A command (add, list, del, …) is short-lived
// and talks to the servers; a server (the hidden command serve) owns one
// cache, one backing device and one /dev/ublkbN, and lives until del. They
// meet in three places, all under /run/ublk-pcache, which belongs to root:
// a state file per device says what it is made of and survives its server, a
// socket per device takes requests while the server lives, and a log.
//
// There is one file per command; server.go is what a server does, launch.go
// how it becomes one, state.go and control.go where the two roles meet.
package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"ublk-pcache/ublk"
)

func main() {
	root := &cobra.Command{
		Use:           "ublk-pcache",
		Short:         "A persistent-memory cache in front of a slow disk, served in user space",
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if os.Geteuid() != 0 {
				return ublk.ErrNotRoot
			}
			// What we make is root's alone, whatever umask we were given.
			syscall.Umask(0o077)
			return checkStateDir()
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(
		newAddCmd(), newRecoverCmd(), newDelCmd(), newFlushCmd(),
		newStatusCmd(), newListCmd(), newSetCmd(), newUpgradeCmd(),
		newFormatCmd(), newDumpCmd(), newCheckCmd(), newRepairCmd(), newWritebackCmd(),
		newRunCmd(), newIsBackingCmd(), newServeCmd(),
	)
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "ublk-pcache:", oneLine(err))
		os.Exit(1)
	}
}

// oneLine keeps an error that was joined from several on one line.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

// deviceID reads the argument of the commands that take a device: its number,
// or its path.
func deviceID(arg string) (int, error) {
	id, err := strconv.Atoi(strings.TrimPrefix(arg, "/dev/ublkb"))
	if err != nil || id < 0 {
		return 0, fmt.Errorf("%q is not a device: give its number, as in 'ublk-pcache list'", arg)
	}
	return id, nil
}
