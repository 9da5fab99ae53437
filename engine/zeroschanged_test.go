package engine

import (
	"errors"
	"strings"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestZerosOfAChangedDisk: zeros that the disk does not have are no less dirty than
// data, when somebody else has written to it.
func TestZerosOfAChangedDisk(t *testing.T) {
	for _, choice := range []Choice{Overwrite, Discard} {
		mem := pmem.NewFake(ondisk.MinSize)
		formatSmall(t, mem, 6, false, 70)
		disk := backing.NewFake(64<<20, 512, 1)
		disk.WriteAt(stamped(8<<11, 8, 1), 8<<20)
		newRig(t, mem, disk, 1).kill() // which takes a fingerprint
		r := newRig(t, mem, disk, 1)
		r.mustRest(t)
		r.zero(t, 8<<20, 4096)
		r.kill()
		disk.WriteAt(stamped(0, 8, 9), 0)
		if again, err := openRig(mem, disk, 1); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "4096 bytes to be zeroed") {
			if err == nil {
				again.kill()
			}
			t.Errorf("opened with zeros that are dirty: %v", err)
		}
		c, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, Log: &testLog{}, Changed: choice})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		p := make([]byte, 4096)
		disk.ReadAt(p, 8<<20)
		if v, err := stamp(p[:sectorSize], 8<<11); err != nil || v == 0 != (choice == Overwrite) {
			t.Errorf("%s: the disk has version %d, %v", choice, v, err)
		}
		disk.Close()
	}
}
