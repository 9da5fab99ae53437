package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newCheckCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "check PMEM",
		Short: "Verify a cache that is not in use, without changing it",
		Long: `Verify everything on PMEM: all metadata in both copies, the log, and the
cached data, with its checksums if the cache keeps them. Each thing wrong is a
line on stdout. It ends as fsck does: with 4 if there is any, else with 0.`,
		Example: `  ublk-pcache check /dev/dax0.0`,
		Args:    takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := pmem.Open(args[0], pmem.ReadOnly)
			if err != nil {
				return err
			}
			defer r.Close()
			rep := ondisk.Check(r, r.Size(), true)
			for _, p := range rep.Problems {
				fmt.Fprintln(cmd.OutOrStdout(), oneLine(p))
			}
			if n := len(rep.Problems) + rep.More; n > 0 {
				if rep.More > 0 {
					fmt.Fprintf(cmd.OutOrStdout(), "and %d more\n", rep.More)
				}
				if ondisk.Survey(r, r.Size(), r.Durable()).Mendable {
					return exitWith(exitDamaged, fmt.Errorf("%s: problems found: %d (%s)", r.Path(), n, saveOrMend(r.Path(), "")))
				}
				return exitWith(exitDamaged, fmt.Errorf("%s: problems found: %d", r.Path(), n))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: in order, %d keys (%d clean, %d dirty with %s) in %d ksets up to %v\n",
				r.Path(), rep.Keys, rep.Clean, rep.Dirty, ondisk.Unwritten(rep.DirtyBytes, rep.ZeroBytes), rep.Ksets, rep.End.Pos)
			return nil
		},
	}
}
