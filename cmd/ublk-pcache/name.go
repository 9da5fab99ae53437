package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ublk-pcache/ublk"
)

// A device has a number, by which the driver knows it and which is another's some time after
// it has gone, and may have a name, by which its owner knows it: that of a service's file, or
// what add --name says. One device at a time has a name. It stands in the state file, so it is
// known for as long as the device is there, with a server or without, and udev makes a link of it
// (systemd/61-ublk-pcache.rules).
//
// Commands take either, and the device's node. No name looks like a number or a node, so what an
// argument means does not depend on what there is.

// Where udev makes nodes, and those of them that lead to devices by their names.
const (
	nodeDir = "/dev/"
	node    = "ublkb"
	linkDir = "/dev/ublk-pcache/"
)

// longestName is in bytes. More than a hostname has in a label, and short enough for a table.
const longestName = 64

// anyName is what a name is made of: it goes into the name of a link, and a partition's.
var anyName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)

// aPartition is how the links end that lead to partitions.
var aPartition = regexp.MustCompile(`-part[0-9]+$`)

// checkName refuses what cannot be the name of a device.
func checkName(name string) error {
	switch {
	case !anyName.MatchString(name):
		return errors.New("a name begins with a letter or _, and has letters, digits and any of _ . - in it")
	case len(name) > longestName:
		return fmt.Errorf("a name has up to %d characters", longestName)
	case aPartition.MatchString(name):
		return errors.New("a name does not end as the links of partitions do")
	case strings.HasPrefix(name, node):
		return fmt.Errorf("a name does not begin with %s, as nodes do", node)
	}
	return nil
}

// errNameTaken: another device has it.
var errNameTaken = errors.New("already has the name")

// title is the device's number, and its name if it has one, for messages.
func (d *device) title() string {
	if d.Name == "" {
		return strconv.Itoa(d.ID)
	}
	return fmt.Sprintf("%d (%s)", d.ID, d.Name)
}

// titleOf is that of a device of which only the number is at hand.
func titleOf(id int) string {
	if d, err := readState(id); err == nil {
		return d.title()
	}
	return strconv.Itoa(id)
}

// refuseNamesakeLocked refuses the name of d if another device has it. One that never came to
// be does not count (see create). The caller has locked the states.
func (d *device) refuseNamesakeLocked() error {
	if d.Name == "" {
		return nil
	}
	others, err := readStates()
	if err != nil {
		return err
	}
	for _, o := range others {
		if o.Name != d.Name || o.ID == d.ID {
			continue
		}
		if !o.alive() {
			if _, err := o.lookup(); errors.Is(err, ublk.ErrNoDevice) {
				o.removeLocked()
				continue
			}
		}
		return exitWith(exitRefused, fmt.Errorf("device %d %w %s (choose another, or remove that first: ublk-pcache del %d)", o.ID, errNameTaken, o.Name, o.ID))
	}
	return nil
}

// takeName gives a name to a device that has none, which an older version began, unless another
// has it.
func (d *device) takeName(name string) error {
	if d.Name != "" || name == "" {
		return nil
	}
	unlock, err := lockStates()
	if err != nil {
		return err
	}
	defer unlock()
	d.Name = name
	if err := d.refuseNamesakeLocked(); err != nil {
		d.Name = ""
		return err
	}
	return nil
}

// deviceID finds the device that an argument means.
func deviceID(arg string) (int, error) {
	file, isPath := strings.CutPrefix(arg, nodeDir)
	number, isNode := strings.CutPrefix(file, node)
	id, err := strconv.Atoi(number)
	switch {
	case err == nil && strconv.Itoa(id) == number && (isNode || !isPath): // or it might be another's number, written otherwise
		if id < 0 || id > ublk.MaxID {
			return 0, usagef("%q is not a device: they have numbers from 0 to %d", arg, ublk.MaxID)
		}
		return id, nil
	case checkName(strings.TrimPrefix(arg, linkDir)) != nil:
		return 0, usagef("%q is not a device: give its number or its name, as in 'ublk-pcache list'", arg)
	}
	return idOfName(strings.TrimPrefix(arg, linkDir))
}

// idOfName finds the device of that name.
func idOfName(name string) (int, error) {
	all, err := readStates()
	if err != nil {
		return 0, err
	}
	var has []string
	var id int
	var damage error
	for _, d := range all {
		switch {
		case d.Name == name:
			has, id = append(has, strconv.Itoa(d.ID)), d.ID
		case d.damage != nil:
			damage = d.damage
		}
	}
	switch {
	case len(has) == 1:
		return id, nil
	case len(has) > 1: // a server may have named its own when it recovered it
		return 0, fmt.Errorf("devices %s all have the name %s: give the number", strings.Join(has, ", "), name)
	case damage != nil:
		return 0, fmt.Errorf("no device %q, unless a state file has it that cannot be read: %w", name, damage)
	}
	return 0, fmt.Errorf("%w %q (see 'ublk-pcache list')", errNoDevice, name)
}

// tellUdev leaves the name of d where the udev rule reads it when the disk appears: in a file, which every event of the
// disk costs less than a program.
func (d *device) tellUdev() error {
	unlock, err := lockStates() // somebody may be about to forget the name of another device
	if err != nil {
		return err
	}
	defer unlock()
	return d.tellUdevLocked()
}

func (d *device) tellUdevLocked() error {
	path := statePath(d.ID, udevExt)
	if d.Name == "" {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text := "UBLK_PCACHE_NAME=" + d.Name + "\n"
	if now, err := os.ReadFile(path); err == nil && string(now) == text { // there may be no room to write it again
		return nil
	}
	return os.WriteFile(path, []byte(text), 0o600)
}

// noLink is logged where a device is served all the same.
const noLink = "the device may have no link by its name"

// udevExt is of the file that has a name for udev.
const udevExt = ".udev"

// newDiskGoneCmd is for the udev rule. Another program may have taken a device away, and the number is
// any program's from then on.
func newDiskGoneCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "disk-gone NUMBER",
		Short:  "Forget the name of a device that is not there any more",
		Hidden: true,
		Args:   takes(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			id, err := deviceID(args[0])
			if err != nil {
				return err
			}
			return forgetName(id)
		},
	}
}

// forgetName takes the name away from udev, unless the device is there, or another one that has its number.
func forgetName(id int) error {
	unlock, err := lockStates() // which keeps out who is about to tell another
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	if d, err := readState(id); err == nil {
		if _, err := d.lookup(); !errors.Is(err, ublk.ErrNoDevice) {
			return err
		}
	}
	return (&device{ID: id}).tellUdevLocked()
}
