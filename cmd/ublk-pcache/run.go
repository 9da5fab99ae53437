package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// A service is a cache with a name, described in a file of configDir that has
// the options of add, one a line. systemd/ublk-pcache@.service runs it, and the
// udev rule next to that asks for its disk.
const configDir = "/etc/ublk-pcache"

// devicePatience is how long a service waits for disk and pmem to appear: as
// long as systemd waits for a device.
const devicePatience = 90 * time.Second

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

and possibly queues, depth, writeback-depth, data-crc, gc-percent. Empty lines and
those that begin with # do not count.

A device whose server has died is continued. Disk and pmem are waited for. A
blank PMEM is refused: when the cache has gone, its dirty data has, and somebody
should know. To begin with: ublk-pcache format PMEM.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := filepath.Join(configDir, args[0]+".conf")
			o, err := readConfig(path)
			if err != nil {
				return err
			}
			spec, err := pmem.ParseSpec(o.Device.PMEM)
			if err != nil {
				return err
			}
			for _, needed := range []string{spec.Path, o.Device.Backing} {
				if err := appear(needed); err != nil {
					return fmt.Errorf("%s: %w", path, err)
				}
			}
			if o, err = continued(o); err != nil {
				return err
			}
			return launch(o)
		},
	}
}

// readConfig reads the description of a service.
func readConfig(path string) (serveOptions, error) {
	var a addOptions
	flags := pflag.NewFlagSet(path, pflag.ContinueOnError)
	a.define(flags)
	if err := eachSetting(path, func(line int, name, value string) error {
		if flags.Lookup(name) == nil {
			return fmt.Errorf("%s:%d: no option %q (see 'ublk-pcache run --help')", path, line, name)
		}
		if err := flags.Set(name, value); err != nil {
			return fmt.Errorf("%s:%d: %w", path, line, err)
		}
		return nil
	}); err != nil {
		return serveOptions{}, err
	}
	o, err := a.options(flags)
	if err == nil {
		var spec pmem.Spec
		if spec, err = pmem.ParseSpec(o.Device.PMEM); err == nil && spec.Size != 0 {
			err = errors.New("a service makes no pmem: give a file that is there, without a size")
		}
	}
	if err != nil {
		return serveOptions{}, fmt.Errorf("%s: %w", path, err)
	}
	o.Foreground, o.Existing = true, true
	return o, nil
}

// eachSetting calls do with each line NAME = VALUE of a file.
func eachSetting(path string, do func(line int, name, value string) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		name, value, ok := strings.Cut(text, "=")
		if !ok {
			return fmt.Errorf("%s:%d: %q is not OPTION = VALUE", path, n, text)
		}
		if err := do(n, strings.TrimSpace(name), strings.TrimSpace(value)); err != nil {
			return err
		}
	}
	return lines.Err()
}

// appear waits for a device node.
func appear(path string) error {
	for begin := time.Now(); ; time.Sleep(deathStep) {
		_, err := os.Stat(path)
		if err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrNotExist) || time.Since(begin) > devicePatience {
			return err
		}
	}
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

// backedBy returns the name of a service whose backing device has one of the
// given names, relative ones being meant in /dev. A line that cannot be read
// must not keep another's disk from being found, so all errors are passed by.
func backedBy(dir string, names []string) (service string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.conf"))
	for _, file := range files {
		eachSetting(file, func(_ int, name, value string) error {
			for _, n := range names {
				if !filepath.IsAbs(n) {
					n = filepath.Join("/dev", n)
				}
				if name == "backing" && (filepath.Clean(value) == n || sameFile(value, n)) {
					service = strings.TrimSuffix(filepath.Base(file), ".conf")
				}
			}
			return nil
		})
	}
	return service
}
