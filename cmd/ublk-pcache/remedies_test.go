package main

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
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
		"a remedy is there":        {fmt.Errorf("cache x: %w", &remedied{ondisk.ErrSuperblock, "do nothing"}), "cache x: superblock at byte 4096 is damaged: its crc does not match (do nothing)"},
		"another process has pmem": {fmt.Errorf("open x: %w", pmem.ErrInUse), "open x: in use by another process (ublk-pcache list shows the running caches)"},
		"no driver":                {ublk.ErrNoDriver, "no /dev/ublk-control, so no ublk driver (CONFIG_BLK_DEV_UBLK, Linux 6.5 or later) (load it with 'modprobe ublk_drv')"},
		"a disk in use":            {fmt.Errorf("stop: %w (x)", ublk.ErrInUse), "stop: the disk is in use (x) (unmount it and close what has it open, or take it away all the same: ublk-pcache del --force)"},
		"read-only":                {fmt.Errorf("open x: %w", backing.ErrReadOnly), "open x: it is read-only (make it writable, a device with 'blockdev --setrw', or choose another)"},
		"no pmem":                  {fmt.Errorf("open x: %w", pmem.ErrMissing), "open x: no such file (a new one needs its size: PATH,size=1G)"},
		"a sync that failed":       {fmt.Errorf("%w: %w", engine.ErrSync, syscall.EIO), "sync the cache: input/output error (make sure that its file can be written to, then end the server and start it again)"},
		"volatile": {&pmem.VolatileError{Why: "it is in tmpfs", Said: pmem.Spec{Path: "x", Size: 1 << 30, Volatile: true}},
			"it would be lost in a power cut or a reboot: it is in tmpfs (give a file that is on a disk, or if it may be lost: x,size=1073741824,volatile)"},
		"holes": {&pmem.UnreservedError{Path: "x", Size: 1 << 30, Holes: 7},
			"its file system cannot reserve space for it: 7 bytes of it are holes (fill them: cp --sparse=never x COPY, and give that)"},
		"not to be reserved": {&pmem.UnreservedError{Path: "x", Size: 1 << 30},
			"its file system cannot reserve space for it (write all of it: dd if=/dev/zero of=x bs=1M count=1024, and leave out size=)"},
	} {
		if got := oneLine(c.err); got != c.line {
			t.Errorf("%s: %q, want %q", name, got, c.line)
		}
	}
}
