package main

import (
	"context"
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
` + help.String() + `

The modes. In the last three the cache is clean: BACKING alone has every write that
was answered, and PMEM may be lost.

  writeback       a write is answered when PMEM has it; BACKING gets it later
  writeonly       the same, but what is read from BACKING is not kept
  writethrough    a write is answered when BACKING has it and has flushed it
  writearound     the same; it is kept only where something is cached already
  passthrough     the same as writearound, and what is read is not kept either

A change from one of the first two to one of the last three waits until all dirty data
has been written to BACKING. Broken off (^C), it leaves all settings as they were.`,
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
			ctx, stop := untilBrokenOff()
			defer stop()
			context.AfterFunc(ctx, stop) // a second signal does not wait for the server
			return askShowing(ctx, id, command{Do: "set", Settings: v})
		},
	}
}
