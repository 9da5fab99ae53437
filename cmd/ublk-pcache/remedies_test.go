package main

import (
	"errors"
	"fmt"
	"testing"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestRemedies: a line has the remedy for what it names, once, and no other.
func TestRemedies(t *testing.T) {
	lost := fmt.Errorf("key_tail: %w", ondisk.ErrLost)
	for name, c := range map[string]struct {
		err  error
		line string
	}{
		"none":                     {errors.New("it is raining"), "it is raining"},
		"joined":                   {errors.Join(errors.New("a"), errors.New("b")), "a; b"},
		"one fault":                {fmt.Errorf("cache x: %w", ondisk.Faults{lost}), "cache x: key_tail: both copies are lost (ublk-pcache check shows what else is lost, and repair mends it)"},
		"hidden fault":             {ondisk.Faults{ondisk.ErrChain, lost}, "the chain of segments is broken (and 1 more) (ublk-pcache check shows all)"},
		"shown fault of several":   {ondisk.Faults{ondisk.ErrSuperblock, lost}, "superblock at byte 4096 is damaged: its crc does not match (and 1 more) (to mend it: ublk-pcache repair)"},
		"a remedy is there":        {fmt.Errorf("%w (look with 'ublk-pcache check x')", ondisk.ErrSuperblock), "superblock at byte 4096 is damaged: its crc does not match (look with 'ublk-pcache check x')"},
		"another process has pmem": {fmt.Errorf("open x: %w", pmem.ErrInUse), "open x: in use by another process (ublk-pcache list shows the running caches)"},
	} {
		if got := oneLine(c.err); got != c.line {
			t.Errorf("%s: %q, want %q", name, got, c.line)
		}
	}
}
