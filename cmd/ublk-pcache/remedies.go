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

// oneLine is an error, joined from several or not, on one line and with the remedy, unless it
// names one of our commands already.
func oneLine(err error) string {
	line := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	if do := remedy(err); do != "" && !strings.Contains(line, "'ublk-pcache ") {
		line += " (" + do + ")"
	}
	return line
}

// remedy is for what is wrong, and of several faults of a cache for the one that is named.
func remedy(err error) string {
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
