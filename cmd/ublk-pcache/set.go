package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newSetCmd() *cobra.Command {
	var settings, promises strings.Builder
	for _, k := range knobs {
		fmt.Fprintf(&settings, "  %-15s %s\n", k.name, k.help)
	}
	for _, m := range modes {
		fmt.Fprintf(&promises, "  %-15v %s\n", m.mode, m.does)
	}
	var asJSON *bool
	cmd := &cobra.Command{
		Use:   "set ID NAME=VALUE…",
		Short: "Change settings of a running cache, now and for later",
		Long: `Change settings of a running cache, now and for later: all that are given, or none.
They are kept on the media, but for log_level, which is kept until the device is removed.

` + settings.String() + `
The modes. In the last three the cache is clean: BACKING alone has every write that
was answered, and PMEM may be lost.

` + promises.String() + `
A change from one of the first two to one of the last three waits until all dirty data
has been written to BACKING. Broken off (^C), it leaves all settings as they were.`,
		Example: `  ublk-pcache set 0 gc_percent=50
  ublk-pcache set data mode=writethrough seq_cutoff=4M`,
	}
	onDevice(cmd, 1, func(id int, args []string) error {
		v := values{}
		if err := v.parse(args); err != nil {
			return &usageError{err}
		}
		ctx, stop := untilBrokenOff()
		defer stop()
		context.AfterFunc(ctx, stop) // a second signal does not wait for the server
		if err := askShowing(ctx, id, command{Do: "set", Settings: v}); err != nil || !*asJSON {
			return err
		}
		return tellDevice(cmd.OutOrStdout(), *asJSON, id)
	})
	asJSON = jsonFlag(cmd, "a JSON object, as status does")
	cmd.ValidArgsFunction = completeSetting
	return cmd
}
