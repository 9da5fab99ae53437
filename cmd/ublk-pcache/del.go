package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

func newDelCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "del ID",
		Short: "Remove a device; its dirty data stays in the cache",
		Long: `Remove a device and end its server. Dirty data stays in the cache, and a line
says how much; to have it on the backing device, flush first. A device that is
open is not removed. A backing device that does not answer is not waited for.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			id, err := deviceID(args[0])
			if err != nil {
				return err
			}
			d, err := readState(id)
			if errors.Is(err, errDamaged) {
				d, err = bare(id)
			}
			if err != nil {
				return err
			}
			if d.alive() {
				r, err := ask(id, command{Do: "del", Force: force})
				if err != nil {
					return err
				}
				for _, left := range r.Left {
					fmt.Fprintln(os.Stderr, "ublk-pcache:", left)
				}
				d.printDirty("", dirtyBytes(*r.Status))
				return nil
			}
			if err := d.removeDead(force); err != nil {
				return err
			}
			return d.printDirtyOfDead()
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if the device is open")
	return cmd
}

// removeDead removes a device without a server. Everything acknowledged is in the
// cache; all that is left to remove is the device.
func (d *device) removeDead(force bool) error {
	if err := ublk.Remove(d.ID, force); err != nil && !errors.Is(err, ublk.ErrNoDevice) {
		return d.removalError(err)
	}
	return d.remove()
}

// removalError says what to do about a device that cannot be removed.
func (d *device) removalError(err error) error {
	if errors.Is(err, ublk.ErrInUse) {
		return fmt.Errorf("%s is in use (unmount it and close what has it open, or remove it from under them: ublk-pcache del --force %d)", d.Device, d.ID)
	}
	return err
}

// printDirty says what the backing device of a removed device does not have.
func (d *device) printDirty(about string, bytes int64) {
	if bytes > 0 {
		fmt.Printf("%s%d bytes of dirty data stay in cache %s, %s does not have them (to have them there: add again, then flush)\n", about, bytes, d.PMEM, d.Backing)
	}
}

// printDirtyOfDead is printDirty by what is on the media.
func (d *device) printDirtyOfDead() error {
	if d.PMEM == "" {
		return nil // its state file was damaged
	}
	r, err := pmem.Spec{Path: d.PMEM}.Open(pmem.ReadOnly)
	if err != nil {
		return fmt.Errorf("device %d is removed, but how much of cache %s is dirty cannot be told: %w", d.ID, d.PMEM, err)
	}
	defer r.Close()
	// Ranges that were written more than once count as often.
	d.printDirty("up to ", ondisk.Check(r, r.Size(), false).DirtyBytes)
	return nil
}
