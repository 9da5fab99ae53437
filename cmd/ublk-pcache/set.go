package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
)

func newSetCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "set ID gc_percent=N",
		Short: "Change a setting of a running cache, now and for later",
		Args:  cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			id, err := deviceID(args[0])
			if err != nil {
				return err
			}
			name, value, _ := strings.Cut(args[1], "=")
			if dashes(name) != "gc-percent" {
				return fmt.Errorf("no setting %q: there is gc_percent=N", name)
			}
			n, err := strconv.Atoi(value)
			if err != nil || n < 0 || n > ondisk.MaxGCPercent {
				return fmt.Errorf("gc_percent=%s: give 0 to %d", value, ondisk.MaxGCPercent)
			}
			_, err = ask(id, command{Do: "set", GCPercent: &n})
			return err
		},
	}
}
