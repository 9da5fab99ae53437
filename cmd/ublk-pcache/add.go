package main

import (
	"fmt"
	"io"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ublk-pcache/engine"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

const (
	// maxDepth is the driver's (drivers/block/ublk_drv.c, UBLK_MAX_QUEUE_DEPTH).
	maxDepth = 4096
	// maxWriteback is as much as anything but an array of disks can use, and
	// takes half as many MiB of memory.
	maxWriteback = 256
	// defaultQueues is how many queues a device has at most unless more are asked for.
	// They share the log, and come to the end of what that can do (docs/design.md).
	defaultQueues = 16
	// queueSegments is how many segments a cache has for each of them, since each
	// fills one of its own.
	queueSegments = 8
)

// queuesFor returns how many queues a cache of so many segments has at most, unless
// more are asked for.
func queuesFor(segments int) int {
	return max(1, min(defaultQueues, (segments+queueSegments-1)/queueSegments))
}

func newAddCmd() *cobra.Command {
	var a addOptions
	var asJSON *bool
	o := &a.o
	cmd := &cobra.Command{
		Use:   "add -p PMEM -b BACKING",
		Short: "Put a cache in front of a disk and print the new device's path",
		Long: `Put a cache in front of a disk and print the new device's path.

PMEM is a device-dax device (/dev/dax0.0), a file on a DAX file system, or any
file ("cache.img,size=1G" makes it). A file that a reboot would take, one in
/dev/shm say, is refused, unless that is said: "/dev/shm/cache.img,size=1G,volatile".
A cache that is there is opened, whichever of this program and the kernel's
dm-pcache wrote it; a blank PMEM is formatted; anything else needs --format.

BACKING is a block device or a file. Nobody else may use it meanwhile. If it was
written without its cache, which is noticed when it was mounted or partitioned,
clean data in the cache is given up; if there is dirty data, --changed must say
what becomes of that:

  overwrite  written over what is on BACKING now, before the device appears.
             This can be given also where the change was not noticed.
  discard    given up. Only where the change was noticed.

With a --mode that promises a clean cache ('ublk-pcache set --help') all dirty data
is written to BACKING before the device appears.`,
		Example: `  ublk-pcache add -p /dev/dax0.0 -b /dev/nvme1n1
  ublk-pcache add -p /dev/dax0.0 -b /dev/disk/by-id/nvme-SERIAL --name data --mode writethrough
  ublk-pcache add -p /srv/cache.img,size=4G -b /dev/sdb --gc-percent 80 --seq-cutoff 4M`,
		Args: takes(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := a.options(cmd.Flags())
			if err != nil {
				return err
			}
			if err := bringUp(cmd.OutOrStdout(), o, *asJSON); err != nil {
				return err
			}
			for _, w := range o.Device.doubts() {
				fmt.Fprintln(cmd.ErrOrStderr(), "ublk-pcache: warning:", w)
			}
			return nil
		},
	}
	asJSON = jsonFlag(cmd, "a JSON object, as status does")
	f := cmd.Flags()
	a.define(f)
	for _, k := range knobs {
		complete := completeNothing
		if len(k.choices) > 0 {
			complete = cobra.FixedCompletions(k.choices, noFiles)
		}
		cmd.RegisterFlagCompletionFunc(dashes(k.name), complete)
	}
	f.StringVar((*string)(&o.Changed), "changed", "", "what becomes of dirty data if BACKING was written without its cache: overwrite, discard")
	f.BoolVar(&o.Format, "format", false, "make a new cache even if PMEM is not blank")
	f.BoolVar(&o.Force, "force", false, "with --format: even if PMEM holds dirty data; without: even if BACKING is another device or file than the cache belongs to")
	f.BoolVar(&o.Foreground, "foreground", false, "stay, and log to the terminal")
	f.StringVar(&o.Device.Name, "name", "", "what the device can be called, by commands and as /dev/ublk-pcache/NAME")
	return cmd
}

// bringUp starts a server, and prints what it serves.
func bringUp(out io.Writer, o serveOptions, asJSON bool) error {
	if o.Foreground && asJSON {
		return usagef("give --foreground or --json: a server in the foreground prints its log")
	}
	path, err := launch(o)
	if err != nil {
		return err
	}
	if !asJSON {
		_, err := fmt.Fprintln(out, path)
		return err
	}
	id, err := deviceID(path)
	if err != nil {
		return err
	}
	return tellDevice(out, asJSON, id)
}

// addOptions are those that describe a device and its cache.
type addOptions struct {
	o     serveOptions
	crc   bool
	knobs []string // as knobs
}

func (a *addOptions) define(f *pflag.FlagSet) {
	o := &a.o
	f.StringVarP(&o.Device.PMEM, "pmem", "p", "", "persistent memory: /dev/daxN.N, FILE, or FILE,size=SIZE; with ,volatile it may be in memory")
	f.StringVarP(&o.Device.Backing, "backing", "b", "", "backing device or file")
	f.IntVarP(&o.Device.ID, "id", "n", -1, "number of the device (by default the first free one)")
	f.Lookup("id").DefValue = "0" // which the help leaves out
	f.IntVarP(&o.Device.Queues, "queues", "q", min(defaultQueues, runtime.NumCPU()), "number of queues, each a thread; fewer by default in front of a cache of less than 2 GiB")
	f.IntVarP(&o.Device.Depth, "depth", "d", 128, "requests in flight per queue")
	f.IntVar(&o.Device.Writeback, "writeback-depth", engine.DefaultWritebackDepth, "writes of up to 512 KiB in flight to the disk when dirty data is written back")
	f.BoolVar(&a.crc, "data-crc", false, "keep checksums of the data (new caches; default: on for plain files)")
	a.knobs = make([]string, len(knobs))
	for i, k := range knobs {
		f.StringVar(&a.knobs[i], dashes(k.name), "", k.help+" ("+k.kept()+")")
	}
}

// options returns what was given.
func (a *addOptions) options(f *pflag.FlagSet) (serveOptions, error) {
	o := a.o
	o.AnyQueues = !f.Changed("queues")
	if f.Changed("data-crc") {
		o.DataCRC = &a.crc
	}
	for i, k := range knobs {
		if !f.Changed(dashes(k.name)) {
			continue
		}
		if o.Settings == nil {
			o.Settings = values{}
		}
		o.Settings[k.name] = a.knobs[i]
		if err := k.parse(&engine.Settings{}, a.knobs[i]); err != nil {
			return o, usagef("--%s %s: %w", dashes(k.name), a.knobs[i], err)
		}
	}
	return o, o.check(f.Changed("id"))
}

// check refuses options that cannot work, and makes paths independent of the
// working directory.
func (o *serveOptions) check(idGiven bool) error {
	d := &o.Device
	switch {
	case d.PMEM == "":
		return usagef("no persistent memory given: -p PMEM")
	case d.Backing == "":
		return usagef("no backing device given: -b BACKING")
	case idGiven && (d.ID < 0 || d.ID > ublk.MaxID):
		return usagef("--id %d: give 0 to %d", d.ID, ublk.MaxID)
	case d.Name != "" && checkName(d.Name) != nil:
		return usagef("--name %s: %w", d.Name, checkName(d.Name))
	case d.Queues < 1 || d.Queues > runtime.NumCPU():
		return usagef("--queues %d: give 1 to %d, the number of CPUs", d.Queues, runtime.NumCPU())
	case d.Depth < 1 || d.Depth > maxDepth:
		return usagef("--depth %d: give 1 to %d", d.Depth, maxDepth)
	case d.Writeback < 1 || d.Writeback > maxWriteback:
		return usagef("--writeback-depth %d: give 1 to %d", d.Writeback, maxWriteback)
	case o.Changed != engine.Refuse && o.Changed != engine.Overwrite && o.Changed != engine.Discard:
		return usagef("--changed=%s: give overwrite or discard", o.Changed)
	}
	var err error
	if d.Backing, err = filepath.Abs(d.Backing); err != nil {
		return err
	}
	spec, err := pmem.ParseSpec(d.PMEM)
	if err != nil {
		return &usageError{err}
	}
	if spec.Path, err = filepath.Abs(spec.Path); err != nil {
		return err
	}
	d.PMEM = spec.String()
	return nil
}
