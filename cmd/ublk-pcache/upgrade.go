package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
)

func newUpgradeCmd() *cobra.Command {
	return onDevices(&cobra.Command{
		Use:   "upgrade ID",
		Short: "Replace a running server by the program that is installed now",
		Long: `Replace a running server by the program that is installed now, where the
server was started from. Requests wait for a moment, which is printed, and
none fails.

If the new server does not get ready, the old one goes on, and the message says
why. If it fails after that, the device waits for 'ublk-pcache recover'.`,
		Example: `  ublk-pcache upgrade 0
  ublk-pcache upgrade --all`,
	}, func(id int, _ bool) (told, error) {
		from := versionServing(id)
		r, err := ask(id, command{Do: "upgrade"})
		if err != nil {
			return nil, err
		}
		pause := r.Upgrade.Pause
		return &replaced{id, r.Upgrade.PID, versionServing(id), from, pause.Seconds() * 1000, pause}, nil
	})
}

// replaced is what upgrade tells.
type replaced struct {
	ID      int     `json:"id"`
	PID     int     `json:"pid"`
	Version string  `json:"version"`
	Before  string  `json:"version_before"`
	PauseMS float64 `json:"pause_ms"`

	pause time.Duration
}

func (r *replaced) print(out io.Writer) error {
	_, err := fmt.Fprintf(out, "device %s is served by process %d, version %s in place of %s, requests waited for %v\n",
		titleOf(r.ID), r.PID, r.Version, r.Before, r.pause.Round(time.Millisecond))
	return err
}
