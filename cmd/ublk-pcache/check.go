package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newCheckCmd() *cobra.Command {
	var asJSON *bool
	cmd := &cobra.Command{
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
			printed := tell(cmd.OutOrStdout(), *asJSON, newChecked(r.Path(), rep))
			if n := len(rep.Problems) + rep.More; n > 0 {
				if ondisk.Survey(r, r.Size(), r.Durable()).Mendable {
					return exitWith(exitDamaged, fmt.Errorf("%s: problems found: %d (%s)", r.Path(), n, saveOrMend(r.Path(), "")))
				}
				return exitWith(exitDamaged, fmt.Errorf("%s: problems found: %d", r.Path(), n))
			}
			return printed
		},
	}
	asJSON = jsonFlag(cmd, "a JSON object")
	return cmd
}

// checked is what check tells of a cache.
type checked struct {
	PMEM         string   `json:"pmem"`
	Problems     []string `json:"problems"` // the first
	MoreProblems int      `json:"problems_more"`
	Harmless     int      `json:"problems_of_clean_data"` // of all of them; BACKING has that
	Keys         int      `json:"keys"`
	Clean        int      `json:"clean_keys"`
	Dirty        int      `json:"dirty_keys"`
	DirtyBytes   int64    `json:"dirty_bytes"`   // what is overwritten counts, too
	ZeroBytes    int64    `json:"zero_bytes"`    // to be zeroed on BACKING
	DamagedBytes int64    `json:"damaged_bytes"` // of the dirty ones
	Ksets        int      `json:"ksets"`
	End          string   `json:"log_end"`
}

func newChecked(path string, rep *ondisk.Report) *checked {
	return &checked{
		PMEM: path, Problems: linesOf(rep.Problems), MoreProblems: rep.More, Harmless: rep.Harmless,
		Keys: rep.Keys, Clean: rep.Clean, Dirty: rep.Dirty,
		DirtyBytes: rep.DirtyBytes, ZeroBytes: rep.ZeroBytes, DamagedBytes: rep.Damaged.Bytes(),
		Ksets: rep.Ksets, End: rep.End.Pos.String(),
	}
}

// linesOf are errors as they are told.
func linesOf(errs []error) []string {
	lines := []string{}
	for _, err := range errs {
		lines = append(lines, oneLine(err))
	}
	return lines
}

func (c *checked) print(out io.Writer) error {
	for _, p := range c.Problems {
		fmt.Fprintln(out, p)
	}
	var err error
	switch {
	case c.MoreProblems > 0:
		_, err = fmt.Fprintf(out, "and %d more\n", c.MoreProblems)
	case len(c.Problems) == 0:
		_, err = fmt.Fprintf(out, "%s: in order, %d keys (%d clean, %d dirty with %s) in %d ksets up to %s\n",
			c.PMEM, c.Keys, c.Clean, c.Dirty, ondisk.Unwritten(c.DirtyBytes, c.ZeroBytes), c.Ksets, c.End)
	}
	return err
}
