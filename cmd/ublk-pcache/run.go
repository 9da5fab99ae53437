package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"ublk-pcache/backing"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// A service is a cache with a name, described in a file of configDir that has
// the options of add, one a line (see config.go).
// systemd/ublk-pcache@.service runs it, and the udev rule next to that asks for
// its disk.
//
// systemd starts a server that has died again, for as long as its device waits
// for one. A start without such a device that fails would fail again: it ends
// with exitFinal, which the unit excludes.
const configDir = "/etc/ublk-pcache"

// devicePatience is how long a service waits for disk and pmem to appear: as
// long as systemd waits for a device.
const devicePatience = 90 * time.Second

// exitFinal is EX_CONFIG of sysexits.h; systemctl status shows it as CONFIG.
const exitFinal = 78

// finalError is one that would come again if the same were tried again.
type finalError struct{ error }

func (f finalError) Unwrap() error { return f.error }

// exitStatus is what the program ends with after an error.
func exitStatus(err error) int {
	if errors.As(err, &finalError{}) {
		return exitFinal
	}
	return 1
}

// startError says whether the error of a start is final. Who holds the disk, or
// the pmem, may let go of it.
func (o *serveOptions) startError(err error) error {
	if !o.Existing || o.Recover || errors.Is(err, backing.ErrInUse) || errors.Is(err, pmem.ErrInUse) {
		return err
	}
	return finalError{err}
}

func newRunCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "run NAME",
		Short: "Serve the cache that is described in " + configDir + "/NAME.conf (for systemd)",
		Long: `Serve the cache that is described in ` + configDir + `/NAME.conf, in the
foreground. It is meant for systemd (systemctl enable --now ublk-pcache@NAME).

The file has options of add, one a line:

  pmem = /dev/dax0.0
  backing = /dev/disk/by-id/nvme-…
  id = 0

and possibly queues, depth, writeback-depth, data-crc, gc-percent. Paths begin
with /, and nothing is put in quotes. Empty lines and those that begin with # do
not count. Of more queues than there are CPUs, one for each CPU is made.

A device whose server has died is continued. Disk and pmem are waited for. A
blank PMEM is refused: when the cache has gone, its dirty data has, and somebody
should know. To begin with: ublk-pcache format PMEM.

An error that would come again has exit status ` + fmt.Sprint(exitFinal) + `.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := filepath.Join(configDir, args[0]+".conf")
			o, err := readConfig(path)
			if err != nil {
				return finalError{err}
			}
			spec, err := o.region()
			if err != nil {
				return finalError{err}
			}
			for _, needed := range []string{o.Device.Backing, spec.Path} {
				if err := appear(needed); err != nil {
					o.Recover = waits(o.Device.Backing)
					return o.startError(fmt.Errorf("%s: %w", path, err))
				}
			}
			if o, err = continued(o); err != nil {
				return err
			}
			return launch(o)
		},
	}
}

// appear waits for a device node, and says so. A file is there or not: a service
// comes before anything is mounted.
func appear(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(path, "/dev/") {
		return err
	}
	fmt.Fprintf(os.Stderr, "ublk-pcache: waiting for %s to appear, up to %v\n", path, devicePatience)
	daemon.SdNotify(false, "STATUS=waiting for "+path+" to appear")
	for begin := time.Now(); time.Since(begin) < devicePatience; time.Sleep(deathStep) {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return fmt.Errorf("%s has not appeared within %v (start the service when it has)", path, devicePatience)
}

// waits reports whether a device of this disk may wait for a server.
func waits(disk string) bool {
	devices, _ := readStates()
	return slices.ContainsFunc(devices, func(d *device) bool { return sameFile(d.Backing, disk) })
}

// serving is what systemd is told of a service that is up.
func serving(device string) string {
	return daemon.SdNotifyReady + "\nSTATUS=serving " + device
}

// continued returns what to do for a service whose server may have died: to
// recover the device that waits, if one does. What is left of any other is
// taken away.
func continued(o serveOptions) (serveOptions, error) {
	devices, err := readStates()
	if err != nil {
		return o, err
	}
	for _, d := range devices {
		if !sameFile(d.Backing, o.Device.Backing) {
			continue
		}
		if d.alive() {
			return o, d.servedError()
		}
		switch info, err := ublk.Lookup(d.ID); {
		case errors.Is(err, ublk.ErrNoDevice):
		case err != nil:
			return o, err
		case info.State != ublk.Dead:
			o = recovery(d, info)
			o.Foreground = true
			return o, nil
		default:
			if err := ublk.Remove(d.ID, true); err != nil {
				return o, err
			}
		}
		d.remove()
	}
	return o, nil
}

// newIsBackingCmd is for the udev rule, which may call it before the links are
// made that the disk is configured by.
func newIsBackingCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "is-backing NAME...",
		Short:  "Find the service whose backing device has one of these names",
		Hidden: true,
		Args:   cobra.MinimumNArgs(1),
		Run: func(_ *cobra.Command, args []string) {
			service := backedBy(configDir, args)
			if service == "" {
				os.Exit(1) // without a word: there are many disks
			}
			fmt.Println(service)
		},
	}
}

// The folders, in /dev, of the links by what is on a disk.
const (
	byUUID  = "disk/by-uuid/"
	byLabel = "disk/by-label/"
)

// backedBy returns the name of a service whose backing device has one of the
// given names, relative ones being meant in /dev. A description that is refused
// must not keep its disk, or another's, from being found.
func backedBy(dir string, names []string) (service string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.conf"))
	for _, file := range files {
		all, _ := settings(file)
		for _, s := range all {
			if s.name != "backing" {
				continue
			}
			for _, n := range names {
				if !filepath.IsAbs(n) {
					n = filepath.Join("/dev", n)
				}
				if filepath.Clean(s.value) == n || sameFile(s.value, n) {
					return strings.TrimSuffix(filepath.Base(file), ".conf")
				}
			}
		}
	}
	return ""
}
