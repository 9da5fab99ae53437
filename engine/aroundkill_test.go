package engine

import (
	"bytes"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
)

// TestKilledBeforeFlush: what the next server reads of a write that went around the
// cache, and that the disk had not flushed when the server was killed, no power cut takes.
func TestKilledBeforeFlush(t *testing.T) {
	mem := newMedium(true)
	formatSmall(t, mem, 6, false, 70)
	disk, fate := heldDisk(16 << 20)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	set(t, r.Cache, func(s *Settings) { s.Mode = ondisk.WriteAround })
	fate.hold(backing.OpWrite, false)
	fate.hold(backing.OpFlush, true)
	select {
	case <-fate.held:
	default:
	}
	const off, n = ondisk.StripeSize, 64
	r.begin(0, &Request{Op: Write, Off: off, Buf: stamped(off/sectorSize, n, 1)})
	<-fate.held
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	fate.heal()
	again := newRig(t, mem, disk, 1)
	read := again.read(t, off, n*sectorSize)
	after := make([]byte, len(read))
	disk.CrashAt(after, off)
	if !bytes.Equal(read, after) {
		t.Error("the disk alone has not what was read")
	}
	if err := again.kill(); err != nil {
		t.Fatal(err)
	}
}
