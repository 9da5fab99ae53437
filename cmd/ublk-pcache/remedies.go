package main

import (
	"errors"
	"strings"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
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
	{pmem.ErrInUse, "ublk-pcache list shows the running caches"},
}

// oneLine is an error, joined from several or not, on one line and with the remedy.
func oneLine(err error) string {
	line := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	for _, r := range remedies {
		if errors.Is(err, r.err) {
			return line + " (" + r.do + ")"
		}
	}
	if faults := (ondisk.Faults)(nil); errors.As(err, &faults) && len(faults) > 1 {
		return line + " (ublk-pcache check shows all)"
	}
	return line
}
