package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// done is what a block device has done so far (Documentation/block/stat.rst, the numbers 1, 3, 5 and 7).
type done struct{ reads, bytesRead, writes, bytesWritten int64 }

func doneBy(device string) (d done, err error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return d, err
	}
	stat := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	text, err := os.ReadFile(stat)
	if err != nil {
		return d, err
	}
	f := strings.Fields(string(text))
	for i, to := range []*int64{&d.reads, &d.bytesRead, &d.writes, &d.bytesWritten} {
		if len(f) <= 2*i {
			return d, fmt.Errorf("%s has %q", stat, text)
		}
		if *to, err = strconv.ParseInt(f[2*i], 10, 64); err != nil {
			return d, err
		}
	}
	d.bytesRead, d.bytesWritten = d.bytesRead*512, d.bytesWritten*512
	return d, nil
}

// doneDuring is what a block device does while f runs.
func doneDuring(device string, f func() error) (d done, err error) {
	before, err := doneBy(device)
	if err != nil {
		return d, err
	}
	if err := f(); err != nil {
		return d, err
	}
	after, err := doneBy(device)
	return done{after.reads - before.reads, after.bytesRead - before.bytesRead, after.writes - before.writes, after.bytesWritten - before.bytesWritten}, err
}
