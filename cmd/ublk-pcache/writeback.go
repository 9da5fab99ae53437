package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newWritebackCmd() *cobra.Command {
	var o writebackOptions
	cmd := &cobra.Command{
		Use:   "writeback PMEM -b BACKING",
		Short: "Save the dirty data of a cache that is not in use, without a device",
		Long: `Write all intact dirty data of the cache on PMEM to BACKING, which it belongs to,
and flush that. PMEM is not changed, and may be damaged: it is read as repair
would mend it, with what damaged parts of the log held given up. What could not
be saved is listed by sectors, and the exit code is 1.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if c := engine.Choice(o.changed); c != engine.Refuse && c != engine.Overwrite {
				return fmt.Errorf("--changed=%s: give overwrite, or leave it out", o.changed)
			}
			o.pmem = args[0]
			return o.run(cmd)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.backing, "backing", "b", "", "the block device or file that the cache belongs to (required)")
	f.StringVar(&o.changed, "changed", "", "overwrite: write even if BACKING was written without its cache")
	f.BoolVar(&o.force, "force", false, "take a BACKING with another serial number, or one that cannot be verified")
	cmd.MarkFlagRequired("backing")
	return cmd
}

type writebackOptions struct {
	pmem, backing, changed string
	force                  bool
}

// run has the engine do it, on the cache as it would be after a repair: a copy in
// memory of what is changed, over PMEM, which is only read.
func (o *writebackOptions) run(cmd *cobra.Command) error {
	r, err := pmem.Open(o.pmem, pmem.ReadOnly)
	if err != nil {
		return err
	}
	defer r.Close()
	rep := ondisk.Repair(r, r.Size(), ondisk.RepairOptions{Durable: r.Durable(), GiveUpLog: true})
	layout, err := ondisk.ReadLayout(rep, rep.Size())
	if err != nil {
		return fmt.Errorf("cache %s: %w", r.Path(), errors.Join(append(rep.Left, err)...))
	}
	dev, err := backing.Open(o.backing)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := o.mayWrite(r, rep, layout, dev); err != nil {
		return err
	}
	if o.changed != "" {
		if err := forgetFingerprint(rep, layout); err != nil {
			return err
		}
	}
	cache, err := engine.Open(offline{rep.Overlay, r.Durable()}, disk{dev}, engine.Options{Queues: 1, Log: stderrLog{}})
	if errors.Is(err, engine.ErrChanged) {
		return fmt.Errorf("cache %s: %s: %w (to write that over what is there now: --changed=overwrite)", r.Path(), dev.Path(), err)
	} else if err != nil {
		return fmt.Errorf("cache %s: %w", r.Path(), err)
	}
	for _, s := range rep.Mended {
		fmt.Fprintln(cmd.OutOrStdout(), "read as if mended:", s)
	}
	left, err := flushAll(cache)
	if closed := cache.Close(); err == nil {
		err = closed
	}
	left.total.Each(func(off, n int64) {
		fmt.Fprintf(cmd.OutOrStdout(), "not written: sectors %d-%d, %d bytes\n", off>>9, (off+n)>>9-1, n)
	})
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %d bytes of dirty data written to %s, %d bytes were not\n", r.Path(), left.before-left.total.Bytes(), dev.Path(), left.total.Bytes())
	switch {
	case err != nil:
		return fmt.Errorf("%s: not everything was written: %w", r.Path(), err)
	case left.total.Bytes() > 0:
		return fmt.Errorf("%s: not everything was written: %w", r.Path(), engine.ErrDamaged)
	case rep.LostLog:
		return fmt.Errorf("%s: all that is intact was written, but the log was damaged, and what it held there is lost", r.Path())
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s is unchanged, and would write the same again if it were added (to start anew: ublk-pcache format --force %s)\n", r.Path(), r.Path())
	return nil
}

// mayWrite refuses a backing device that is not the one, as add does.
func (o *writebackOptions) mayWrite(r *pmem.Region, rep *ondisk.Repaired, l *ondisk.Layout, dev *backing.Device) error {
	if rep.Unbound && !o.force {
		return fmt.Errorf("cache %s: its identity record is damaged, so nothing tells that %s is its backing device (if it is: --force)", r.Path(), dev.Path())
	}
	if l.Identity == nil {
		return nil
	}
	return misfit(r.Path(), l.Identity, dev.Path(), identityOf(dev), o.force)
}

// forgetFingerprint lets the engine find nothing to compare the disk with.
func forgetFingerprint(rep *ondisk.Repaired, l *ondisk.Layout) error {
	var buf [ondisk.FingerprintSize]byte
	off := ondisk.EncodeFingerprint(buf[:], l.FingerprintCopies.Newest.Next(), &ondisk.Fingerprint{})
	_, err := rep.WriteAt(buf[:], off)
	return err
}

// unwritten is what is dirty before and after.
type unwritten struct {
	before int64
	total  ondisk.Ranges
}

// flushTries is how often a flush is asked for: write-back halves what cannot be
// written each time, and 1 MiB is a sector after the eleventh.
const flushTries = 12

// flushAll writes what it can.
func flushAll(cache *engine.Cache) (left unwritten, err error) {
	dirty := func() int64 {
		st := cache.Status()
		return st.DirtyBytes + st.ZeroBytes - st.RoundBytes
	}
	left.before = dirty()
	done := make(chan error, 1)
	go func() {
		var err error
		for range flushTries {
			if err = cache.Flush(context.Background()); err == nil {
				break
			}
		}
		done <- err
	}()
	err = showProgress(done, func() (int64, error) { return dirty(), nil })
	cache.Dirty(left.total.Add)
	return left, err
}

// offline is a cache as the engine sees it: all that it stores stays in memory.
type offline struct {
	*ondisk.Overlay
	durable bool // as the region below, whose log the engine is to judge
}

func (o offline) Durable() bool { return o.durable }

// stderrLog shows what goes wrong.
type stderrLog struct{}

func (stderrLog) Info(string, error) {}

func (stderrLog) Error(msg string, err error) {
	if err != nil {
		msg += ": " + oneLine(err)
	}
	fmt.Fprintln(os.Stderr, msg)
}
