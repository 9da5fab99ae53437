package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newFormatCmd() *cobra.Command {
	var dataCRC, force bool
	var asJSON *bool
	gc := ondisk.DefaultGCPercent
	cmd := &cobra.Command{
		Use:   "format PMEM",
		Short: "Make a new, empty cache",
		Long: `Make a new, empty cache on PMEM: a device-dax device, a file on a DAX file
system, or a plain file, made when given as PATH,size=1G. A file that a reboot
would take is refused, unless it is given as PATH,volatile.

A device that is not blank is refused unless --force is given. The cache is
bound to its backing device by the first add.`,
		Example: `  ublk-pcache format /dev/dax0.0
  ublk-pcache format /srv/cache.img,size=4G --gc-percent 80`,
		Args: takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if gc < 0 || gc > ondisk.MaxGCPercent {
				return usagef("--gc-percent %d: give 0 to %d", gc, ondisk.MaxGCPercent)
			}
			r, err := pmem.Open(args[0], pmem.ReadWrite)
			if err != nil {
				return err
			}
			defer r.Close()
			if err := formatCommand(force).check(r, ""); err != nil {
				return err
			}
			if err := exposed(r.Path()); err != nil {
				return err
			}
			if !cmd.Flags().Changed("data-crc") {
				dataCRC = !r.Durable()
			}
			if err := r.Reserve(); err != nil {
				return err
			}
			if err := ondisk.Format(r, ondisk.FormatOptions{DataCRC: dataCRC, GCPercent: gc}); err != nil {
				return fmt.Errorf("format %s: %w", r.Path(), err)
			}
			return tell(cmd.OutOrStdout(), *asJSON, &formatted{r.Path(), r.Kind().String(), ondisk.SegmentsIn(r.Size()), dataCRC, gc})
		},
	}
	asJSON = jsonFlag(cmd, "a JSON object")
	f := cmd.Flags()
	f.BoolVar(&dataCRC, "data-crc", false, "keep a checksum of all cached data (default: on a plain file only)")
	f.IntVar(&gc, "gc-percent", gc, "how full garbage collection lets the cache become, 0 to 90")
	f.BoolVar(&force, "force", false, "overwrite whatever the device holds, dirty data too")
	return cmd
}

// formatted is a cache that has been made.
type formatted struct {
	PMEM      string `json:"pmem"`
	Kind      string `json:"kind"` // what PMEM is
	Segments  uint32 `json:"segments"`
	DataCRC   bool   `json:"data_crc"`
	GCPercent int    `json:"gc_percent"`
}

func (f *formatted) print(out io.Writer) error {
	_, err := fmt.Fprintf(out, "%s (%s): empty cache of %d segments of 16 MiB, data crc %s, gc at %d %%\n",
		f.PMEM, f.Kind, f.Segments, onOff(f.DataCRC), f.GCPercent)
	return err
}

// exposed returns an error if all users may read or write the cache or the
// backing device at path.
func exposed(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return exitWith(exitRefused, fmt.Errorf("%s is open to all users (%v), and a cache holds the data of its disk (chmod o= %s)", path, mode, path))
	}
	return nil
}
