package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
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
// with exitFinal, which the unit excludes. One that need not fail again ends after
// a pause.
const configDir = "/etc/ublk-pcache"

// configExt is what the name of such a file has behind the service's.
const configExt = ".conf"

// devicePatience is how long a service waits for disk and pmem to appear: as
// long as systemd waits for a device.
const devicePatience = 90 * time.Second

// exitFinal is EX_CONFIG of sysexits.h; systemctl status shows it as CONFIG.
const exitFinal = 78

// finalError is one that would come again if the same were tried again.
type finalError struct{ error }

func (f finalError) Unwrap() error { return f.error }

// underSystemd are the commands that units run.
var underSystemd = []string{"run", "unit", "serve"}

// retryPause is how long a server waits before it ends with an error that may
// pass, such as a disk that has gone for a while. systemd starts the next at once,
// but only so many in a while (StartLimitBurst), which is for servers that crash; in
// units of older versions, 20 in a minute.
const retryPause = 3100 * time.Millisecond

// awaitRetry keeps a command from ending too early with status. A signal ends it.
func awaitRetry(command string, status int) {
	if status == exitFinal || os.Getenv("NOTIFY_SOCKET") == "" || !slices.Contains(underSystemd, command) {
		return
	}
	signal.Reset(unix.SIGTERM)
	time.Sleep(retryPause)
}

// startError says whether the error of a start is final. The holder of the disk, or of
// the pmem, may let go of it. A device that waits is tried for again, unless a
// person has to decide or mend something: the cache must not be held meanwhile.
func (o *serveOptions) startError(err error) error {
	var damage *ondisk.Damage
	if o.Recover && (errors.Is(err, engine.ErrChanged) || errors.As(err, &damage)) {
		return finalError{err}
	}
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

and possibly queues, depth, writeback-depth, data-crc, and whatever set can
change, as in 'ublk-pcache set --help'. Paths begin with /. A value may be in
quotes ("..." or '...'), and has to be if there is a # behind a space in it.
Empty lines and those that begin with # do not count. Of more queues than there
are CPUs, one for each CPU is made.

A device whose server has died is continued, with the settings that it has; a
server that lives, and of which systemd does not know any more, becomes the
service's again. Disk and pmem are waited for. A blank PMEM is refused: when the
cache has gone, its dirty data has, and somebody should know. To begin with:
ublk-pcache format PMEM.

An error that would come again has exit status ` + fmt.Sprint(exitFinal) + `.`,
		Example: `  systemctl enable --now ublk-pcache@data
  ublk-pcache run data`,
		Args: takes(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := filepath.Join(configDir, args[0]+configExt)
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
			refreshLinks(o.Device.Backing)
			o, server, err := continued(o)
			switch {
			case err != nil:
				return err
			case server != nil:
				return adopt(server)
			}
			_, err = launch(o)
			return err
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
// recover the device that waits, if one does, or nothing but to adopt its
// server. The remains of any other are taken away.
func continued(o serveOptions) (_ serveOptions, server *device, err error) {
	spec, err := o.region()
	if err != nil {
		return o, nil, err
	}
	devices, err := readStates()
	if err != nil {
		return o, nil, err
	}
	for _, d := range devices {
		// The disk may have another name by now, which only the description has.
		samePMEM := sameFile(d.PMEM, spec.Path)
		if !samePMEM && !sameFile(d.Backing, o.Device.Backing) {
			continue
		}
		if d.alive() {
			if !samePMEM {
				err = finalError{fmt.Errorf("device %s is served with the cache on %s, and not that on %s (ublk-pcache del %d, or change the description)", d.title(), d.PMEM, spec.Path, d.ID)}
			}
			return o, d, err
		}
		switch info, err := d.lookup(); {
		case errors.Is(err, ublk.ErrNoDevice):
		case err != nil:
			return o, nil, err
		case info.State != ublk.Dead && !samePMEM:
			return o, nil, finalError{fmt.Errorf("device %s waits for a server with the cache on %s, and not that on %s (ublk-pcache recover %d, or del %d, or change the description)", d.title(), d.PMEM, spec.Path, d.ID, d.ID)}
		case info.State != ublk.Dead:
			r := recovery(d, info)
			r.Foreground, r.Device.Backing = true, o.Device.Backing
			if err := r.Device.takeName(o.Device.Name); err != nil {
				fmt.Fprintln(os.Stderr, "ublk-pcache: the device has only a number:", oneLine(err))
			}
			return r, nil, nil
		default:
			if err := ublk.Remove(d.ID, true); err != nil {
				return o, nil, err
			}
		}
		d.remove()
	}
	return o, nil, nil
}

// adopt makes a live server the main process of this service, as root may
// (systemd, src/core/service.c, service_notify_message: any process that is not
// of another unit). It is where a server is after a stop that failed; one that
// was started by hand is moved there.
func adopt(server *device) error {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return server.servedError()
	}
	theirs, err := controlGroup(server.PID)
	if err != nil {
		return err
	}
	ours, err := controlGroup(os.Getpid())
	if err != nil {
		return err
	}
	switch {
	case theirs == ours:
	case strings.HasSuffix(theirs, ".service"):
		return finalError{fmt.Errorf("device %s has a server already, process %d of %s (ublk-pcache del %d, then start this service)", server.title(), server.PID, filepath.Base(theirs), server.ID)}
	default:
		if err := os.WriteFile("/sys/fs/cgroup"+ours+"/cgroup.procs", fmt.Append(nil, server.PID), 0); err != nil {
			return fmt.Errorf("adopt server %d: %w", server.PID, err)
		}
	}
	fmt.Printf("%s goes on with its server, process %d\n", server.Device, server.PID)
	if _, err := daemon.SdNotify(false, fmt.Sprintf("MAINPID=%d\n%s", server.PID, serving(server.Device))); err != nil {
		return fmt.Errorf("adopt server %d: %w", server.PID, err)
	}
	// One that has died meanwhile is not taken, and this process still is the
	// service: its end must not look like the removal of the device.
	if !server.alive() {
		return fmt.Errorf("server %d has died meanwhile", server.PID)
	}
	return nil
}

// notifySocket is where systemd listens, for a server that it has not started.
const notifySocket = "/run/systemd/notify"

// adopted reports whether this process is a service's (systemd/ublk-pcache@.service).
func adopted() bool {
	group, err := controlGroup(os.Getpid())
	return err == nil && strings.HasPrefix(filepath.Base(group), "ublk-pcache@")
}

// controlGroup is where a process is in the unified hierarchy, from its root on.
func controlGroup(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return group, nil
		}
	}
	return "", fmt.Errorf("process %d is in no control group of the unified hierarchy", pid)
}

// refreshLinks has udev look at a disk and its partitions, which it may know from
// before they were a cache's.
func refreshLinks(path string) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	partitions, _ := filepath.Glob(dir + "*/partition")
	for _, file := range append(partitions, dir+"partition") {
		os.WriteFile(filepath.Join(filepath.Dir(file), "uevent"), []byte("change"), 0)
	}
}

// newClaimCmd is for the unit, when a service has ended, for whatever reason: a
// description that is refused has a disk as well.
func newClaimCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "claim NAME",
		Short:  "Keep others from the disk of a service that does not run",
		Hidden: true,
		Args:   takes(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			all, err := settings(filepath.Join(configDir, args[0]+configExt))
			for _, s := range all {
				if s.name == "backing" {
					err = errors.Join(err, backing.Claim(s.value))
				}
			}
			return err
		},
	}
}

// newIsBackingCmd is for the udev rule, which may call it before the links are
// made that the disk is configured by. It prints the service, and those of the
// links that the disk keeps.
func newIsBackingCmd() *cobra.Command {
	var of string
	cmd := &cobra.Command{
		Use:    "is-backing NODE LINK...",
		Short:  "Find the service whose backing device has one of these names",
		Hidden: true,
		Args:   takes(1, -1),
		Run: func(_ *cobra.Command, args []string) {
			service := backedBy(configDir, args)
			links := hardwareLinks(args[1:], service == "")
			if service == "" {
				service = of
			}
			if service == "" {
				os.Exit(1) // without a word: there are many disks
			}
			fmt.Println(strings.Join(append([]string{service}, links...), " "))
		},
	}
	cmd.Flags().StringVar(&of, "partition-of", "", "the service that the whole disk belongs to")
	return cmd
}

// The folders, in /dev, of the links by which udev finds what is on a disk, and
// the partitions of one.
const (
	byUUID      = "disk/by-uuid/"
	byLabel     = "disk/by-label/"
	byPartUUID  = "disk/by-partuuid/"
	byPartLabel = "disk/by-partlabel/"
)

// hardwareLinks returns those of the links that tell where a disk is and what it
// is, but not what is on it: the cache's device has that, too. Within means a
// partition of a disk that has a cache: there is one of the same name on the
// cache's device. A partition that has a cache of its own keeps its names.
func hardwareLinks(links []string, within bool) (kept []string) {
	shared := []string{byUUID, byLabel}
	if within {
		shared = append(shared, byPartUUID, byPartLabel)
	}
	for _, link := range links {
		if !slices.ContainsFunc(shared, func(dir string) bool { return strings.HasPrefix(link, dir) }) {
			kept = append(kept, link)
		}
	}
	return kept
}

// backedBy returns the name of a service whose backing device has one of the
// given names, relative ones being meant in /dev. A description that is refused
// must not keep its disk, or another's, from being found.
func backedBy(dir string, names []string) (service string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*"+configExt))
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
					return strings.TrimSuffix(filepath.Base(file), configExt)
				}
			}
		}
	}
	return ""
}
