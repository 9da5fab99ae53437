package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ublk-pcache/ublk"
)

// listed is a device as list shows it.
type listed struct {
	ID      int    `json:"id"`
	Device  string `json:"device"`
	PMEM    string `json:"pmem"`
	Backing string `json:"backing"`
	State   string `json:"state"`   // starting, live, dead (recover it), gone or damaged (del it)
	Version string `json:"version"` // of the server, or of the last one; empty of one that does not tell
	PID     int    `json:"pid"`     // 0 without a server
}

func newListCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show all devices, also those whose server has died",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			devices, err := readStates()
			if err != nil {
				return err
			}
			devices = append(devices, withoutState(devices)...)
			all := []listed{}
			for _, d := range devices {
				l, err := describe(d)
				if err != nil {
					return err
				}
				all = append(all, l)
			}
			if asJSON {
				return printJSON(os.Stdout, all)
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tDEVICE\tPMEM\tBACKING\tSTATE\tPID\tVERSION")
			for _, l := range all {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%d\t%s\n", l.ID, l.Device, l.PMEM, l.Backing, l.State, l.PID, orUnknown(l.Version))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	return cmd
}

// withoutState are our devices without a state file. Where the driver cannot be asked
// there are none.
func withoutState(known []*device) (others []*device) {
	all, _ := ublk.List()
	for _, info := range all {
		if isOurs(info) && !slices.ContainsFunc(known, func(d *device) bool { return d.ID == info.ID }) {
			others = append(others, &device{ID: info.ID, damage: unusable(info.ID, errMissing)})
		}
	}
	return others
}

// describe finds out how a device is, from its server and from the driver.
func describe(d *device) (listed, error) {
	if d.damage != nil {
		b, err := deviceOfDriver(d.ID, false)
		if err != nil {
			return listed{}, err
		}
		if !b.alive() { // which the driver notices later
			b.PID = 0
		}
		return listed{ID: b.ID, Device: b.Device, State: "damaged", PID: b.PID}, nil
	}
	l := listed{ID: d.ID, Device: d.Device, PMEM: d.PMEM, Backing: d.Backing, PID: d.PID, Version: d.Version}
	alive := d.alive()
	if !alive {
		l.PID = 0
	}
	info, err := d.lookup()
	switch {
	case errors.Is(err, ublk.ErrNoDevice) && alive:
		l.State = "starting"
	case errors.Is(err, ublk.ErrNoDevice):
		l.State = "gone"
	case err != nil:
		return l, err
	case alive && info.State == ublk.Live:
		l.State = "live"
	case alive:
		l.State = "starting"
	default:
		l.State = "dead"
	}
	return l, nil
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
