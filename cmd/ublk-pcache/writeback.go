package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newWritebackCmd() *cobra.Command {
	var o writebackOptions
	var asJSON *bool
	cmd := &cobra.Command{
		Use:   "writeback PMEM -b BACKING",
		Short: "Save the dirty data of a cache that is not in use, without a device",
		Long: `Write all intact dirty data of the cache on PMEM to BACKING, which it belongs to,
and flush that. PMEM may be damaged: it is read as repair would mend it, with what
damaged parts of the log held given up. What could not be saved is listed by
sectors, and the exit status is not 0. Then it can be repeated.

PMEM stays as it is, dirty data and all, but for the record of what BACKING looks
like: what is written here is not to be taken for somebody else's work. Where
PMEM cannot be written, a line says so, and what to answer to add.`,
		Example: `  ublk-pcache writeback /dev/dax0.0 -b /dev/nvme1n1`,
		Args:    takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if c := engine.Choice(o.changed); c != engine.Refuse && c != engine.Overwrite {
				return usagef("--changed=%s: give overwrite, or leave it out", o.changed)
			}
			if o.backing == "" {
				return usagef("give BACKING: %s", line(cmd))
			}
			o.pmem = args[0]
			if !*asJSON {
				return o.run(cmd.OutOrStdout())
			}
			err := o.run(io.Discard)
			if o.saved == nil {
				return err
			}
			return errors.Join(printJSON(cmd.OutOrStdout(), o.saved), err)
		},
	}
	asJSON = jsonFlag(cmd, "a JSON object")
	f := cmd.Flags()
	f.StringVarP(&o.backing, "backing", "b", "", "the block device or file that the cache belongs to")
	f.StringVar(&o.changed, "changed", "", "overwrite: write even if BACKING was written without its cache")
	f.BoolVar(&o.force, "force", false, "take another BACKING than the cache belongs to, or one that cannot be verified")
	return cmd
}

type writebackOptions struct {
	pmem, backing, changed string
	force                  bool

	saved *saved // once something may have been written
}

// saved is what writeback tells programs.
type saved struct {
	PMEM           string   `json:"pmem"`
	Backing        string   `json:"backing"`
	Mended         []string `json:"mended"` // as which PMEM was read
	WrittenBytes   int64    `json:"written_bytes"`
	ZeroedBytes    int64    `json:"zeroed_bytes"`
	UnwrittenBytes int64    `json:"unwritten_bytes"`
	Unwritten      []extent `json:"unwritten"`
	Record         string   `json:"record"`      // what the next add will find of BACKING, if that is not what was written
	LostLog        bool     `json:"log_damaged"` // what it held there is lost
}

// extent is a part of BACKING, in bytes.
type extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// run opens both, for save.
func (o *writebackOptions) run(out io.Writer) error {
	r, readOnly, err := openToSave(o.pmem)
	if err != nil {
		return err
	}
	defer r.Close()
	dev, err := backing.Open(o.backing)
	if err != nil {
		return err
	}
	if err := o.save(out, r, readOnly, dev, disk{dev}); err != nil {
		dev.PutBack() // what the cache has alone is still there
		return err
	}
	return dev.Close()
}

// openToSave opens the region for writing if it can be, and returns why not.
func openToSave(text string) (r *pmem.Region, readOnly, err error) {
	spec, err := pmem.ParseSpec(text)
	if err != nil {
		return nil, nil, err
	}
	spec.Volatile = true // it is saved wherever it is
	// For reading first, since that makes no file.
	if r, err = spec.Open(pmem.ReadOnly); err != nil {
		return nil, nil, err
	}
	r.Close()
	r, err = spec.Open(pmem.ReadWrite)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		readOnly = err
		r, err = spec.Open(pmem.ReadOnly)
	}
	return r, readOnly, err
}

// save has the engine do it, on the cache as it would be after a repair: a copy in
// memory of what is changed, over the region.
func (o *writebackOptions) save(out io.Writer, r *pmem.Region, readOnly error, dev *backing.Device, to engine.Disk) error {
	rep := ondisk.Repair(r, r.Size(), ondisk.RepairOptions{Durable: r.Durable(), GiveUpLog: true})
	layout, err := ondisk.ReadLayout(rep, rep.Size())
	if err != nil {
		return fmt.Errorf("cache %s: %w", r.Path(), errors.Join(append(rep.Left, err)...))
	}
	if err := o.mayWrite(r, rep, layout, dev); err != nil {
		return err
	}
	if o.changed != "" {
		if err := forgetFingerprint(rep, layout); err != nil {
			return err
		}
	}
	record := newRecord(r, layout, o.changed != "")
	record.mu.err = readOnly
	if layout.Identity != nil && !sameDevice(layout, dev.Identity()) {
		record.region = nil // it is about another device
	}
	cache, err := engine.Open(offline{rep.Overlay, r.Durable(), record}, to, engine.Options{Queues: 1, Log: stderrLog{}})
	if errors.Is(err, engine.ErrChanged) {
		return fmt.Errorf("cache %s: %s: %w (to write that over what is there now: --changed=overwrite)", r.Path(), dev.Path(), err)
	} else if err != nil {
		return fmt.Errorf("cache %s: %w", r.Path(), err)
	}
	for _, s := range rep.Mended {
		fmt.Fprintln(out, "read as if mended:", s)
	}
	left, err := flushAll(cache)
	cache.Rest(context.Background())
	cache.RenewFingerprint() // whose failure report knows
	if closed := cache.Close(); err == nil {
		err = closed
	}
	o.saved = &saved{
		PMEM: r.Path(), Backing: dev.Path(), Mended: append([]string{}, rep.Mended...), LostLog: rep.LostLog,
		WrittenBytes: left.data, ZeroedBytes: left.zeros, UnwrittenBytes: left.total.Bytes(), Unwritten: []extent{},
	}
	left.total.Each(func(off, n int64) {
		o.saved.Unwritten = append(o.saved.Unwritten, extent{off, n})
		fmt.Fprintf(out, "not written: sectors %d-%d, %d bytes\n", off>>9, (off+n)>>9-1, n)
	})
	fmt.Fprintf(out, "%s: %s written to %s, %d bytes were not\n", r.Path(), ondisk.Unwritten(left.data, left.zeros), dev.Path(), left.total.Bytes())
	wasDirty := left.data+left.zeros+left.total.Bytes() > 0
	if wasDirty {
		if o.saved.Record = record.report(r.Path(), dev.Path()); o.saved.Record != "" {
			fmt.Fprintln(out, o.saved.Record)
		}
	}
	switch {
	case err != nil:
		return fmt.Errorf("%s: not everything was written: %w (what was not stays there, so this can be repeated)", r.Path(), err)
	case left.total.Bytes() > 0:
		return fmt.Errorf("%s: not everything was written: %w", r.Path(), engine.ErrDamaged)
	case rep.LostLog:
		return exitWith(exitDamaged, fmt.Errorf("%s: all that is intact was written, but the log was damaged, and what it held there is lost", r.Path()))
	}
	if wasDirty {
		fmt.Fprintf(out, "%s still has it as dirty data, which an add writes again (to start anew: ublk-pcache format --force %s)\n", r.Path(), r.Path())
	}
	return nil
}

// mayWrite refuses a backing device that is not the one, as add does.
func (o *writebackOptions) mayWrite(r *pmem.Region, rep *ondisk.Repaired, l *ondisk.Layout, dev *backing.Device) error {
	if rep.Unbound && !o.force {
		return exitWith(exitRefused, fmt.Errorf("cache %s: its identity record is damaged, so nothing tells that %s is its backing device (if it is: --force)", r.Path(), dev.Path()))
	}
	if l.Identity == nil {
		return nil
	}
	return misfit(r.Path(), l, dev.Path(), identityOf(dev), o.force)
}

// forgetFingerprint lets the engine find nothing to compare the disk with.
func forgetFingerprint(rep *ondisk.Repaired, l *ondisk.Layout) error {
	var buf [ondisk.FingerprintSize]byte
	off := ondisk.EncodeFingerprint(buf[:], l.FingerprintCopies.Newest.Next(), &ondisk.Fingerprint{})
	_, err := rep.WriteAt(buf[:], off)
	return err
}

// unwritten is what was written, in bytes, and what was not.
type unwritten struct {
	data, zeros int64
	total       ondisk.Ranges
}

// flushTries is how often a flush is asked for that gets no further: write-back halves
// the part that cannot be written each time, and 512 KiB is a sector after the tenth.
const flushTries = 12

// flushAll writes what it can.
func flushAll(cache *engine.Cache) (left unwritten, err error) {
	before := cache.Status()
	done := make(chan error, 1)
	go func() {
		var err error
		// A flush fails with the first round of which nothing is taken. The log behind
		// that has not been tried then.
		for left, tried := flushTries, uint64(0); left > 0; left-- {
			if err = cache.Flush(context.Background()); err == nil {
				break
			}
			// Ksets that write-back itself logs are nothing new.
			if now := min(cache.Status().Tried, before.Ksets); now > tried {
				left, tried = flushTries, now
			}
		}
		done <- err
	}()
	err = showProgress(done, func() (int64, error) {
		st := cache.Status()
		return st.DirtyBytes - st.RoundBytes, nil
	})
	after := cache.Status()
	left.data, left.zeros = before.DirtyBytes-after.DirtyBytes, before.ZeroBytes-after.ZeroBytes
	cache.Dirty(left.total.Add)
	return left, err
}

// offline is a cache as the engine sees it: all that it stores stays in memory, but
// for what is recorded.
type offline struct {
	*ondisk.Overlay
	durable bool // as the region below, whose log the engine is to judge
	record  *record
}

func (o offline) Durable() bool { return o.durable }

func (o offline) WriteAt(p []byte, off int64) (int, error) {
	if f, ok := ondisk.FingerprintAt(p, off); ok {
		o.record.store(f)
	}
	return o.Overlay.WriteAt(p, off)
}

func (o offline) Fence() { o.record.fence() }

func (o offline) Sync() error {
	o.record.sync()
	return nil
}

// record is the fingerprint of the backing device on the region (see
// engine/fingerprint.go). The engine stores it before it writes to where a
// fingerprint is taken from, and afterwards, so it is right whenever this is cut
// off. Here it is stored for the dirty_tail that the region has, and which stays.
type record struct {
	region *pmem.Region       // nil if it is not to be stored
	tails  [2]ondisk.Position // that it is for
	mu     struct {
		sync.Mutex
		at      ondisk.Replica
		changed bool  // the device was written without the cache, so what is clean there is out of date
		err     error // why it is not stored any more
	}
}

func newRecord(r *pmem.Region, l *ondisk.Layout, overwrite bool) *record {
	f, at, tail := ondisk.ReadFingerprint(r, r.Size())
	// Where dirty_tail is, if that can be read, and where a repair puts it.
	rec := &record{region: r, tails: [2]ondisk.Position{l.DirtyTail, l.DirtyTail}}
	if tail != nil {
		rec.tails[0] = *tail
	}
	rec.mu.at, rec.mu.changed = at, overwrite || f.State == ondisk.FingerprintChanged
	return rec
}

// store does not persist, like the engine's.
func (rec *record) store(f ondisk.Fingerprint) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if rec.region == nil || rec.mu.err != nil {
		return
	}
	// The engine makes an outdated cache good by emptying it. This one stays.
	rec.mu.changed = rec.mu.changed || f.State == ondisk.FingerprintChanged
	if f.DirtyTail = rec.tails; rec.mu.changed {
		f = ondisk.Fingerprint{State: ondisk.FingerprintChanged}
	}
	var buf [ondisk.FingerprintSize]byte
	at := rec.mu.at.Next()
	off := ondisk.EncodeFingerprint(buf[:], at, &f)
	_, err := rec.region.WriteAt(buf[:], off)
	if err == nil {
		_, err = rec.region.ReadAt(make([]byte, len(buf)), off)
	}
	if rec.mu.err = err; err == nil {
		rec.mu.at = at
	}
}

func (rec *record) fence() {
	if rec.region != nil {
		rec.region.Fence()
	}
}

// sync has no error to return: data is saved also where the region is failing.
func (rec *record) sync() {
	if rec.region == nil {
		return
	}
	if err := rec.region.Sync(); err != nil {
		rec.mu.Lock()
		defer rec.mu.Unlock()
		rec.mu.err = err
	}
}

// report says what the next add will find.
func (rec *record) report(path, backing string) string {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	switch {
	case rec.mu.err != nil:
		return fmt.Sprintf("%s could not take the record of what %s looks like now (%s): an add will say that it was written without its cache, and --changed=overwrite is right then, unless somebody else writes to it", path, backing, oneLine(rec.mu.err))
	case rec.mu.changed && rec.region != nil:
		return fmt.Sprintf("%s was written without its cache, so what %s holds of it is out of date: an add has to be given --changed=overwrite, too", backing, path)
	}
	return ""
}

// stderrLog shows what goes wrong.
type stderrLog struct{}

func (stderrLog) Info(engine.Event, string, error) {}

func (stderrLog) Error(_ engine.Event, msg string, err error) {
	if err != nil {
		msg += ": " + oneLine(err)
	}
	fmt.Fprintln(os.Stderr, msg)
}
