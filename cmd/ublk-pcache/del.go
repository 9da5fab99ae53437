package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

func newDelCmd() *cobra.Command {
	var force, flush bool
	cmd := onDevices(&cobra.Command{
		Use:     "del ID",
		Aliases: []string{"rm", "stop"},
		Short:   "Remove a device; its dirty data stays in the cache",
		Long: `Remove a device and end its server. Dirty data stays in the cache, and a line
says how much; with --flush it is on the backing device before. A device that is
open is not removed. A backing device that does not answer is waited for by
--flush alone.`,
		Example: `  ublk-pcache del 0
  ublk-pcache del data --flush
  ublk-pcache del --all`,
	}, func(id int, _ bool) (told, error) {
		if flush {
			if err := askShowing(context.Background(), id, command{Do: "flush"}); err != nil {
				return nil, fmt.Errorf("nothing is removed: %w", err)
			}
		}
		r, err := del(id, force)
		if r == nil {
			return nil, err
		}
		for _, left := range r.Left {
			fmt.Fprintln(os.Stderr, "ublk-pcache:", left)
		}
		return r, err
	})
	cmd.Flags().BoolVar(&force, "force", false, "even if the device is open")
	cmd.Flags().BoolVar(&flush, "flush", false, "write all dirty data to the backing device first, and remove nothing if that fails")
	return cmd
}

// removed is what del tells: what there was, and what of it BACKING does not have.
type removed struct {
	ID         int      `json:"id"`
	Name       string   `json:"name"`
	Device     string   `json:"device"`
	PMEM       string   `json:"pmem"`
	Backing    string   `json:"backing"`
	DirtyBytes int64    `json:"dirty_bytes"`
	ZeroBytes  int64    `json:"zero_bytes"`
	Known      bool     `json:"dirty_known"` // the two before; else nothing tells, and they are 0
	AtMost     bool     `json:"at_most"`     // there was no server, and what is overwritten counts, too
	Left       []string `json:"left"`        // what is not quite gone

	dev *device
}

func (d *device) removed(left []string) *removed {
	return &removed{
		ID: d.ID, Name: d.Name, Device: d.Device, PMEM: d.PMEM, Backing: d.Backing,
		Left: append([]string{}, left...), dev: d,
	}
}

func (r *removed) print(out io.Writer) error {
	about := ""
	if r.AtMost {
		about = "up to "
	}
	_, err := fmt.Fprint(out, r.dev.leftDirty(about, r.DirtyBytes, r.ZeroBytes))
	return err
}

// del removes a device. Nothing is removed where it returns no more than an error.
func del(id int, force bool) (*removed, error) {
	d, err := readState(id)
	foreign := errors.Is(err, errForeign)
	if errors.Is(err, errDamaged) || foreign && force {
		d, err = deviceOfDriver(id, force)
	}
	if err != nil {
		return nil, err
	}
	if d.alive() {
		r, err := ask(id, command{Do: "del", Force: force})
		if err == nil {
			if len(r.Left) == 0 { // else what is left may keep it
				d.awaitEnd()
			}
			gone := d.removed(r.Left)
			gone.DirtyBytes, gone.ZeroBytes, gone.Known = r.Status.DirtyBytes, r.Status.ZeroBytes, true
			return gone, nil
		}
		if !errors.Is(err, errDamaged) && !errors.Is(err, errForeign) {
			return nil, err
		}
		// There is nothing to ask its server by.
	}
	// Everything acknowledged is in the cache; all that is left to
	// remove is the device.
	left, err := d.removeByDriver(force)
	if err != nil && !errors.Is(err, ublk.ErrNoDevice) {
		return nil, d.removalError(err)
	}
	if !foreign {
		d.awaitEnd()
	}
	gone := d.removed(left)
	return gone, errors.Join(d.remove(), gone.lookAtMedia())
}

// removeByDriver removes a device without asking its server. If there is one, it
// finds that out and ends. It returns what is not quite gone.
func (d *device) removeByDriver(force bool) (left []string, err error) {
	if d.alive() && halted(d.PID) {
		return nil, unansweredError(d.ID, d.PID)
	}
	if _, err := d.lookup(); err != nil {
		return nil, err
	}
	removed := make(chan error, 1)
	go func() { removed <- ublk.Remove(d.ID, force) }()
	for {
		select {
		case err := <-removed:
			return nil, err
		case <-time.After(lifeSign + statusPatience):
			if d.alive() {
				return nil, fmt.Errorf("device %s does not go, since process %d holds it (end that with 'kill -KILL %d', and repeat)", d.title(), d.PID, d.PID)
			}
			if info, err := d.lookup(); errors.Is(err, ublk.ErrNoDevice) || err == nil && info.State == ublk.Dead {
				return []string{d.numberHeld()}, nil
			}
		}
	}
}

// numberHeld is said of a device that is stopped and cannot be deleted yet.
func (d *device) numberHeld() string {
	return d.Device + " is gone, its number is free when the last who has it open closes it"
}

// awaitEnd waits until a server whose device is gone has ended, unless that takes
// long: who comes next for the cache, the disk or the driver finds nobody there.
func (d *device) awaitEnd() {
	for begin := time.Now(); d.alive() && time.Since(begin) < statusPatience; {
		time.Sleep(deathStep)
	}
}

// removalError says what to do about a device that cannot be removed.
func (d *device) removalError(err error) error {
	if !errors.Is(err, ublk.ErrInUse) {
		return err
	}
	users := ublk.Users(d.ID)
	if more := len(users) - shownUsers; more > 0 {
		users = append(users[:shownUsers], fmt.Sprintf("and %d more", more))
	}
	if len(users) == 0 {
		users = []string{"by whom cannot be seen from here"}
	}
	return exitWith(exitRefused, fmt.Errorf("%s is in use: %s (unmount it and close what has it open, or remove it from under them: ublk-pcache del --force %d)", d.Device, strings.Join(users, ", "), d.ID))
}

// shownUsers is how many of those who use a device a line has room for.
const shownUsers = 5

// leftDirty says what the backing device of a removed device does not have.
func (d *device) leftDirty(about string, data, zeros int64) string {
	if data+zeros <= 0 {
		return ""
	}
	cache, backing := "cache "+d.PMEM, d.Backing
	if d.PMEM == "" { // its state file was of no use
		cache, backing = "its cache", "its backing device"
	}
	return fmt.Sprintf("%s%s stay in %s, %s does not have them (to have them there: add again, then flush)\n", about, ondisk.Unwritten(data, zeros), cache, backing)
}

// lookAtMedia finds out what a device leaves whose server cannot be asked.
func (r *removed) lookAtMedia() error {
	r.AtMost = true
	if r.PMEM == "" {
		return nil // its state file was damaged
	}
	mem, err := pmem.Spec{Path: r.PMEM}.Open(pmem.ReadOnly)
	if err != nil {
		return fmt.Errorf("device %s is removed, but how much of cache %s is dirty cannot be told: %w", r.dev.title(), r.PMEM, err)
	}
	defer mem.Close()
	// Data that is overwritten by zeros counts as data.
	rep := ondisk.Check(mem, mem.Size(), false)
	r.DirtyBytes, r.ZeroBytes, r.Known = rep.DirtyBytes, rep.ZeroBytes, true
	return nil
}
