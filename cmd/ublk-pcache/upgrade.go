package main

import (
	"fmt"
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
	}, func(id int) error {
		from := versionServing(id)
		r, err := ask(id, command{Do: "upgrade"})
		if err != nil {
			return err
		}
		fmt.Printf("device %s is served by process %d, version %s in place of %s, requests waited for %v\n",
			titleOf(id), r.Upgrade.PID, versionServing(id), from, r.Upgrade.Pause.Round(time.Millisecond))
		return nil
	})
}
