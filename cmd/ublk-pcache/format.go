package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newFormatCmd() *cobra.Command {
	var dataCRC, force bool
	gc := ondisk.DefaultGCPercent
	cmd := &cobra.Command{
		Use:   "format PMEM",
		Short: "Make a new, empty cache",
		Long: `Make a new, empty cache on PMEM: a device-dax device, a file on a DAX file
system, or a plain file, made when given as PATH,size=1G.

A device that is not blank is refused unless --force is given. The cache is
bound to its backing device by the first add.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if gc < 0 || gc > ondisk.MaxGCPercent {
				return fmt.Errorf("--gc-percent %d: give 0 to %d", gc, ondisk.MaxGCPercent)
			}
			r, err := pmem.Open(args[0], pmem.ReadWrite)
			if err != nil {
				return err
			}
			defer r.Close()
			if !force {
				if err := refuseFormat(r); err != nil {
					return err
				}
			}
			if err := exposed(r.Path()); err != nil {
				return err
			}
			if !cmd.Flags().Changed("data-crc") {
				dataCRC = !r.Durable()
			}
			if err := ondisk.Format(r, ondisk.FormatOptions{DataCRC: dataCRC, GCPercent: gc}); err != nil {
				return fmt.Errorf("format %s: %w", r.Path(), err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s (%v): empty cache of %d segments of 16 MiB, data crc %s, gc at %d %%\n",
				r.Path(), r.Kind(), ondisk.SegmentsIn(r.Size()), onOff(dataCRC), gc)
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&dataCRC, "data-crc", false, "keep a checksum of all cached data (default: on a plain file only)")
	f.IntVar(&gc, "gc-percent", gc, "how full garbage collection lets the cache become, 0 to 90")
	f.BoolVar(&force, "force", false, "overwrite whatever the device holds, dirty data too")
	return cmd
}

// refuseFormat returns what a format would destroy, nil if nothing.
func refuseFormat(r *pmem.Region) error {
	blank, err := ondisk.Blank(r, r.Size())
	if err != nil {
		return fmt.Errorf("%s: %w (to format it all the same: --force)", r.Path(), err)
	}
	if blank {
		return nil
	}
	rep := ondisk.Check(r, r.Size(), false)
	switch {
	case len(rep.Problems) > 0 && errors.Is(rep.Problems[0], ondisk.ErrNotFormatted) && rep.Keys == 0:
		return fmt.Errorf("%s holds no cache, but is not blank (to overwrite what is there: --force)", r.Path())
	case len(rep.Problems) > 0:
		return fmt.Errorf("%s holds a cache that is not in order, with %d bytes of dirty data: %w (save that with ublk-pcache writeback, mend it with repair, or give up what it holds with --force)", r.Path(), rep.DirtyBytes, rep.Problems[0])
	case rep.Dirty > 0:
		return fmt.Errorf("%s holds a cache with %d bytes of dirty data that its backing device does not have (flush it first, or lose them with --force)", r.Path(), rep.DirtyBytes)
	}
	return fmt.Errorf("%s holds a cache without dirty data (to give up what it holds: --force)", r.Path())
}

// exposed returns an error if users without any right to the disk may read or
// write the cache. A new cache is not made there. One that exists is opened all
// the same: this is no reason for a machine not to come up.
func exposed(pmem string) error {
	info, err := os.Stat(pmem)
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return fmt.Errorf("%s is open to all users (%v), and a cache holds the data of its disk (chmod o= %s)", pmem, mode, pmem)
	}
	return nil
}
