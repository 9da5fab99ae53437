package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"ublk-pcache/ublk"
)

func newDelCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "del ID",
		Short: "Remove a device; its dirty data stays in the cache",
		Long: `Remove a device and end its server. Dirty data stays in the cache; to have it
on the backing device, flush first. A device that is open is not removed.`,
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
				_, err := ask(id, command{Do: "del", Force: force})
				return err
			}
			// Everything acknowledged is in the cache; all that is left to
			// remove is the device.
			if err := ublk.Remove(id, force); err != nil && !errors.Is(err, ublk.ErrNoDevice) {
				return d.removalError(err)
			}
			return d.remove()
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if the device is open")
	return cmd
}

// removalError says what to do about a device that cannot be removed.
func (d *device) removalError(err error) error {
	if errors.Is(err, ublk.ErrInUse) {
		return fmt.Errorf("%s is in use (unmount it and close what has it open, or remove it from under them: ublk-pcache del --force %d)", d.Device, d.ID)
	}
	return err
}
