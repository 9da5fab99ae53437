package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newSetCmd() *cobra.Command {
	var help strings.Builder
	for _, k := range knobs {
		fmt.Fprintf(&help, "\n  %-15s %s", k.name, k.help)
	}
	return &cobra.Command{
		Use:   "set ID NAME=VALUE...",
		Short: "Change settings of a running cache, now and for later",
		Long: `Change settings of a running cache, now and for later: all that are given, or none.
They are kept on the media.
` + help.String(),
		Args: cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			id, err := deviceID(args[0])
			if err != nil {
				return err
			}
			v := values{}
			if err := v.parse(args[1:]); err != nil {
				return err
			}
			_, err = ask(id, command{Do: "set", Settings: v})
			return err
		},
	}
}
