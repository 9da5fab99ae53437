package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"ublk-pcache/engine"
	"ublk-pcache/ublk"
)

func newRecoverCmd() *cobra.Command {
	var foreground bool
	var changed engine.Choice
	var backing string
	var asJSON *bool
	cmd := &cobra.Command{
		Use:   "recover ID",
		Short: "Continue a device whose server has died",
		Long: `Continue a device whose server has died.

The device has been there all the time; its users have been waiting. A new
server replays the cache and answers them. Nothing that was acknowledged is
lost, flushed or not.

A backing device that has another name by now is found by its serial number, its
PARTUUID or the GUID of its partition table; without these, or a file, give it
with --backing. If it was written meanwhile, see add
--changed. Here the dirty data can only be written over what is there now: it has
been promised.`,
		Example: `  ublk-pcache recover 0
  ublk-pcache recover data -b /dev/sdc`,
	}
	onDevice(cmd, 0, func(id int, _ []string) error {
		if changed != engine.Refuse && changed != engine.Overwrite {
			return usagef("--changed=%s: give overwrite (to give up dirty data: ublk-pcache del --force %d, then add --changed=discard)", changed, id)
		}
		d, err := readState(id)
		if err != nil {
			return err
		}
		info, err := d.lookup()
		if err != nil {
			return err
		}
		if d.alive() {
			return d.servedError()
		}
		if err := ublk.CheckNode(id); err != nil {
			// Those who wait have it open already.
			fmt.Fprintln(os.Stderr, "ublk-pcache: warning:", oneLine(err))
		}
		o := recovery(d, info)
		o.Foreground, o.Changed = foreground, changed
		if backing != "" {
			if o.Device.Backing, err = filepath.Abs(backing); err != nil {
				return err
			}
			o.Chosen = true
		}
		return bringUp(cmd.OutOrStdout(), o, *asJSON)
	})
	asJSON = jsonFlag(cmd, "a JSON object, as status does")
	cmd.Flags().StringVar((*string)(&changed), "changed", "", "what becomes of dirty data if the backing device was written meanwhile: overwrite")
	cmd.Flags().StringVarP(&backing, "backing", "b", "", "the backing device, if it has another name now and cannot be found")
	cmd.Flags().BoolVar(&foreground, "foreground", false, "stay, and log to the terminal")
	return cmd
}

// recovery is how to continue a device.
func recovery(d *device, info ublk.Info) serveOptions {
	o := serveOptions{Device: *d, Recover: true}
	o.Device.Queues, o.Device.Depth, o.Device.Unit = info.Queues, info.Depth, ""
	return o
}

func (d *device) servedError() error {
	return fmt.Errorf("device %s has a server, process %d: there is nothing to recover (to end it: ublk-pcache del %d)", d.title(), d.PID, d.ID)
}
