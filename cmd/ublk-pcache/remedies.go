package main

import (
	"errors"
	"fmt"
	"strings"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// remedies are what a user of this program does about what the packages find wrong.
var remedies = []struct {
	err error
	do  string
}{
	{ondisk.ErrNotFormatted, "ublk-pcache check shows whether parts of a cache are left; to make one: ublk-pcache format"},
	{ondisk.ErrSuperblock, "to mend it: ublk-pcache repair"},
	{ondisk.ErrSuperblockLost, "to mend it: ublk-pcache repair"},
	{ondisk.ErrLost, "ublk-pcache check shows what else is lost, and repair mends it"},
	{ondisk.ErrLogStart, "to give them up: --give-up-log-damage"},

	{pmem.ErrMissing, "a new one needs its size: PATH,size=1G"},
	{pmem.ErrNoDevice, "daxctl list shows those that there are"},
	{pmem.ErrDangling, "give what it should lead to"},
	{pmem.ErrNoDriver, "daxctl reconfigure-device --mode=devdax"},
	{pmem.ErrBlockDevice, "for a pmem namespace: ndctl create-namespace -f -e NAMESPACE -m devdax --map=MAP, with the map that ndctl list shows for it, then give /dev/daxN.N"},
	{pmem.ErrInUse, "ublk-pcache list shows the running caches"},
	{pmem.ErrOtherSize, "leave out size= to use it, or remove it"},
	{pmem.ErrNoSpace, "make room, or give another file"},
	{pmem.ErrAppeared, "try again"},
	{pmem.ErrUnfinished, "if it was cut off, remove that"},

	{backing.ErrMissing, "check the path"},
	{backing.ErrKind, "give one of those"},
	{backing.ErrReadOnly, "make it writable, a device with 'blockdev --setrw', or choose another"},
	{backing.ErrZoned, "choose another, or put dm-zoned on it"},
	{backing.ErrNameless, "give its path"},
	{backing.ErrNoLoop, "modprobe loop"},

	{ublk.ErrNotRoot, "run this as root"},
	{ublk.ErrNoDriver, "load it with 'modprobe ublk_drv'"},
	{ublk.ErrNoPreemption, "unset it"},
	{ublk.ErrInUse, "unmount it and close what has it open, or take it away all the same: ublk-pcache del --force"},
	{ublk.ErrExists, "choose another, or none for the first free one"},
	{ublk.ErrNotRecoverable, "remove it with ublk-pcache del, and add it again"},

	{engine.ErrSync, "make sure that its file can be written to, then end the server and start it again"},
}

// remedied is an error that has its remedy, which depends on more than what is wrong.
type remedied struct {
	err error
	do  string
}

func (r *remedied) Error() string { return fmt.Sprintf("%v (%s)", r.err, r.do) }

func (r *remedied) Unwrap() error { return r.err }

// oneLine is an error, joined from several or not, on one line and with the remedy.
func oneLine(err error) string {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		var texts, lines []string
		for _, one := range all.Unwrap() {
			texts, lines = append(texts, one.Error()), append(lines, oneLine(one))
		}
		if strings.Join(texts, "\n") == err.Error() { // joined, and not part of a sentence
			return strings.Join(lines, "; ")
		}
	}
	line := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	if do := remedy(err); do != "" {
		line += " (" + do + ")"
	}
	return line
}

// remedy is for what is wrong, and of several faults of a cache for the one that is named.
// It is empty if there is none, or if the error has one.
func remedy(err error) string {
	var has *remedied
	var volatile *pmem.VolatileError
	var unreserved *pmem.UnreservedError
	switch {
	case errors.As(err, &has):
		return ""
	case errors.As(err, &volatile):
		return fmt.Sprintf("give a file that is on a disk, or if it may be lost: %v", volatile.Said)
	case errors.As(err, &unreserved) && unreserved.Holes > 0:
		return fmt.Sprintf("fill them: cp --sparse=never %s COPY, and give that", unreserved.Path)
	case errors.As(err, &unreserved):
		return fmt.Sprintf("write all of it: dd if=/dev/zero of=%s bs=1M count=%d, and leave out size=", unreserved.Path, unreserved.Size>>20)
	}
	more := false
	if faults := (ondisk.Faults)(nil); errors.As(err, &faults) {
		err, more = faults[0], len(faults) > 1
	}
	for _, r := range remedies {
		if errors.Is(err, r.err) {
			return r.do
		}
	}
	if more {
		return "ublk-pcache check shows all"
	}
	return ""
}
