package engine

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"ublk-pcache/backing"
)

// TestRenewFingerprint: a cache that is closed although the disk has refused some of
// its data knows the disk all the same, when it was told to renew the fingerprint.
func TestRenewFingerprint(t *testing.T) {
	for _, renew := range []bool{false, true} {
		mem, disk := cached(t, true)
		disk.Script(func(op backing.Op) (f backing.Fault) {
			if op.Kind == backing.OpWrite && op.Off < sampleBytes {
				f.Err = syscall.ENOSPC
			}
			return f
		})
		r := mustOpen(t, mem, disk, Refuse, false)
		// The second one finds nothing but what was refused.
		for range 2 {
			if err := r.Flush(context.Background()); !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}
		r.mustRest(t)
		if renew {
			if err := r.RenewFingerprint(); err != nil {
				t.Fatal(err)
			}
		}
		r.mustEnd(t)
		disk.Script(nil)
		mustOpen(t, mem.Clone(), disk, Refuse, false).mustEnd(t)
		disk.WriteAt(filled(9), backupTable)
		r, empty, err := openChanged(mem, disk, Refuse)
		if seen := errors.Is(err, ErrChanged); seen != renew || empty {
			t.Errorf("renewed %t: a change is seen: %t (%v)", renew, seen, err)
		}
		if err == nil {
			r.mustEnd(t)
		}
		disk.Close()
	}
}
