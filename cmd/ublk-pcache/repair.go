package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newRepairCmd() *cobra.Command {
	var inPlace, giveUp bool
	var asJSON *bool
	cmd := &cobra.Command{
		Use:   "repair PMEM [COPY]",
		Short: "Mend a damaged cache that is not in use, on a copy",
		Long: `Mend what is wrong with the cache on PMEM, and write the result to COPY, a new
sparse file, or to PMEM itself with --in-place. With neither, nothing is
changed. Each thing mended is a line, and so is each thing that remains. COPY
is made also where nothing is wrong, and not where it would not be a cache that
opens.

It ends as fsck does: with 0 where nothing was wrong, or only clean data, which the
backing device has; with 1 where all was mended, 4 where something remains.

Where the log is damaged in the middle, mending it gives up acknowledged writes.
That is only done with --give-up-log-damage; the lines say what it costs.`,
		Example: `  ublk-pcache repair /dev/dax0.0
  ublk-pcache repair /dev/dax0.0 /srv/mended.img
  ublk-pcache repair --in-place --give-up-log-damage /dev/dax0.0`,
		Args: takes(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			mode := pmem.ReadOnly
			if inPlace {
				mode = pmem.ReadWrite
				if len(args) == 2 {
					return usagef("--in-place: changes %s itself, so leave out %s", args[0], args[1])
				}
			}
			spec, err := pmem.ParseSpec(args[0])
			if err != nil {
				return err
			}
			spec.Volatile = true // it is mended wherever it is
			r, err := spec.Open(mode)
			if err != nil {
				return err
			}
			defer r.Close()
			rep := ondisk.Repair(r, r.Size(), ondisk.RepairOptions{Durable: r.Durable(), GiveUpLog: giveUp})
			rep.Verify()
			res := &repaired{
				PMEM: r.Path(), InPlace: inPlace, Mended: append([]string{}, rep.Mended...),
				Remains: linesOf(append(rep.Left, rep.Report.Problems...)), MoreRemains: rep.Report.More,
			}
			if len(args) == 2 {
				res.Copy = args[1]
			}
			err = finishRepair(res, r, rep)
			err = errors.Join(tell(cmd.OutOrStdout(), *asJSON, res), err)
			if err == nil && len(rep.Mended) > 0 {
				return errMended
			}
			return err
		},
	}
	asJSON = jsonFlag(cmd, "a JSON object")
	f := cmd.Flags()
	f.BoolVar(&inPlace, "in-place", false, "mend PMEM itself")
	f.BoolVar(&giveUp, "give-up-log-damage", false, "give up the writes that damaged parts of the log held")
	return cmd
}

// repaired is what repair tells of a cache. Without Result it was not stored anywhere, and
// the error says why.
type repaired struct {
	PMEM        string   `json:"pmem"`
	Copy        string   `json:"copy"` // empty without one
	InPlace     bool     `json:"in_place"`
	Mended      []string `json:"mended"`
	Remains     []string `json:"remains"` // the first
	MoreRemains int      `json:"remains_more"`
	Result      string   `json:"result"`
}

func (res *repaired) print(out io.Writer) (err error) {
	for _, s := range res.Mended {
		fmt.Fprintln(out, s)
	}
	for _, s := range res.Remains {
		fmt.Fprintln(out, "remains:", s)
	}
	if res.MoreRemains > 0 {
		fmt.Fprintf(out, "remains: and %d more\n", res.MoreRemains)
	}
	if res.Result != "" {
		_, err = fmt.Fprintf(out, "%s: %s\n", res.PMEM, res.Result)
	}
	return err
}

// finishRepair stores the result where it belongs, and says what has become of it.
func finishRepair(res *repaired, r *pmem.Region, rep *ondisk.Repaired) error {
	inPlace, out := res.InPlace, res.Copy
	var left error
	if remains := unmendedError(r, rep); remains != nil {
		left = exitWith(exitDamaged, remains)
	}
	mends := len(rep.Mended) > 0
	switch {
	case out != "" && !rep.Opens():
		return fmt.Errorf("%w; %s was not made", left, out)
	case out != "":
		if err := writeCopy(rep, out); err != nil {
			return err
		}
	case mends && inPlace:
		if err := rep.Store(r); err != nil {
			return exitWith(exitDamaged, fmt.Errorf("%s: not all of it was mended: %w (the memory itself is bad; repair to a copy)", r.Path(), err))
		}
	case mends && left != nil:
		return fmt.Errorf("%w; nothing was changed (give a file for the mended copy, or --in-place)", left)
	case mends:
		return exitWith(exitDamaged, fmt.Errorf("%s: nothing was changed (give a file for the mended copy, or --in-place)", r.Path()))
	}
	if left != nil {
		return left
	}
	res.Result = "mended"
	switch {
	case !mends && rep.Report.Harmless > 0:
		res.Result = "nothing to mend: what remains is clean data, which the backing device has as well"
	case !mends:
		res.Result = "in order, nothing to mend"
	}
	if out != "" {
		res.Result += "; the copy is " + out
	}
	return nil
}

// unmendedError says what to do about damage that could not be mended, nil if there is none.
func unmendedError(r *pmem.Region, rep *ondisk.Repaired) error {
	path := r.Path()
	switch {
	case rep.Done():
		return nil
	case rep.Report.End.Damage != nil:
		return fmt.Errorf("%s: the log is still damaged (to give up what the damaged part held: --give-up-log-damage; to save all else: ublk-pcache writeback)", path)
	case rep.Report.Damaged.Bytes() > 0:
		return fmt.Errorf("%s: damaged dirty data remains, an I/O error until it is written again: %v", path, &rep.Report.Damaged)
	case rep.Opens():
		return fmt.Errorf("%s: damage remains (to save what can be read: ublk-pcache writeback)", path)
	}
	if ondisk.Survey(r, r.Size(), r.Durable()).Mendable {
		return fmt.Errorf("%s: damage remains (to give up what damaged parts of the log held: --give-up-log-damage; to save all else: ublk-pcache writeback)", path)
	}
	return fmt.Errorf("%s: damage remains that cannot be mended, as said (to give up what is there: ublk-pcache format --force %s)", path, path)
}

// writeCopy makes the file, or leaves nothing behind.
func writeCopy(rep *ondisk.Repaired, path string) (err error) {
	if err := rep.Copyable(); err != nil {
		return fmt.Errorf("%s was not made: %w (repair --in-place, or save the rest with writeback)", path, err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%s exists (give the name of a file that does not)", path)
	} else if err != nil {
		return err
	}
	defer func() {
		if closed := f.Close(); err == nil {
			err = closed
		}
		if err != nil {
			os.Remove(path)
		}
	}()
	if err := f.Truncate(rep.Size()); err != nil {
		return err
	}
	if err := rep.Copy(f); err != nil {
		return fmt.Errorf("write the copy: %w", err)
	}
	return nil
}
