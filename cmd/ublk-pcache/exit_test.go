package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"github.com/spf13/cobra"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestExitStatus: a script can tell of what kind a failure was, also where a server has found it; check and repair end as fsck
// does, and what systemd runs as it did.
func TestExitStatus(t *testing.T) {
	why := errors.New("why")
	for _, c := range []struct {
		err        error
		want, fsck int
	}{
		{why, 1, 8},
		{usagef("what"), 2, 16},
		{fmt.Errorf("%w 7", errNoDevice), 3, 8},
		{&fs.PathError{Op: "open", Path: "x", Err: fs.ErrNotExist}, 1, 8}, // which may be any
		{fmt.Errorf("pmem x: %w", pmem.ErrMissing), 3, 8},
		{fmt.Errorf("backing x: %w", backing.ErrMissing), 3, 8},
		{fmt.Errorf("it %w: %w", errNoAnswer, why), 4, 8},
		{unansweredError(7, 0), 4, 8},
		{fmt.Errorf("x: %w", backing.ErrInUse), 5, 8},
		{fmt.Errorf("x: %w", &pmem.VolatileError{}), 5, 8},
		{fmt.Errorf("x: %w", engine.ErrChanged), 5, 8},
		{fmt.Errorf("x: %w", &ondisk.Damage{Cause: why}), 6, 4},
		{ondisk.Faults{ondisk.ErrLost}, 6, 4},
		{fmt.Errorf("x: %w", exitWith(exitDamaged, why)), 6, 4},
		{&remedied{exitWith(exitRefused, why), "do"}, 5, 8},
		{exitWith(0, why), 1, 8}, // of a server that does not tell
		{exitWith(200, why), 1, 8},
		{errors.Join(why, exitWith(exitNoServer, why)), 4, 8},
	} {
		for name, want := range map[string]int{"flush": c.want, "check": c.fsck, "repair": c.fsck, "serve": c.want} {
			if got := statusAfter(&cobra.Command{Use: name}, c.err); got != want {
				t.Errorf("%v: %s ends with %d, want %d", c.err, name, got, want)
			}
		}
		t.Setenv("NOTIFY_SOCKET", "x")
		for name, want := range map[string]int{"flush": c.want, "serve": 1, "unit": 1, "run": 1} {
			if got := statusAfter(&cobra.Command{Use: name}, c.err); got != want {
				t.Errorf("%v: %s ends with %d, want %d", c.err, name, got, want)
			}
		}
		os.Unsetenv("NOTIFY_SOCKET")
		if answered := refusal((&serveOptions{Exit: true}).refusal(c.err)); exitStatus(answered) != c.want || answered.Error() != oneLine(c.err) {
			t.Errorf("%v: what the server answers is %v, %d", c.err, answered, exitStatus(answered))
		}
	}
	if got := statusAfter(newRepairCmd(), errMended); got != 1 {
		t.Errorf("a repair that has mended all ends with %d", got)
	}
	if got := (&serveOptions{}).refusal(exitWith(exitRefused, why)); got != "why" {
		t.Errorf("a caller that knows no status is answered %q", got)
	}
	if got := refusal("not today"); got.Error() != "not today" || exitStatus(got) != 1 {
		t.Errorf("what another program answers is %v, %d", got, exitStatus(got))
	}
}

// TestExitStatusOfAServer: what a server refuses is of the kind that it has found.
func TestExitStatusOfAServer(t *testing.T) {
	ownStateDir(t)
	served(t, func(context.Context, command) (reply, error) {
		return reply{}, fmt.Errorf("no: %w", exitWith(exitRefused, errors.New("somebody has to decide")))
	})
	if _, err := ask(3, command{Do: "flush"}); exitStatus(err) != exitRefused {
		t.Errorf("%v, which ends with %d", err, exitStatus(err))
	}
}
