//go:build vm

package guest

import (
	"flag"
	"math"
	"testing"

	"ublk-pcache/tests/stamp"
)

// What TestPowerCut of package tests wants of this boot.
var (
	cutSide    = flag.String("cut.side", "", "who has the cache: kernel or server")
	cutDataCRC = flag.Bool("cut.data-crc", false, "the cache is one with data crc")
	cutBefore  = flag.String("cut.before", "", "`folder` of the journal of the boot before; nothing for a new cache")
	cutPromise = flag.String("cut.promise", "", "what the power cut may not have undone: acknowledged or flushed requests")
	cutJournal = flag.String("cut.journal", "", "`folder` of the journal of this boot")
	cutLast    = flag.Bool("cut.last", false, "clean the cache and stop, instead of working until the power goes")
)

// TestAroundPowerCuts is what happens in one boot of TestPowerCut, which runs it; by itself it is nothing. Everything
// that was promised before the power went is there. Then requests of all kinds are made until the power goes again.
func TestAroundPowerCuts(t *testing.T) {
	calm := quietKernel(t)
	namespaceMode(t, "devdax")
	if *cutBefore == "" {
		newKernelCache(t, *cutDataCRC)
	}
	promise := stamp.OnceAcknowledged
	if *cutPromise == "flushed" {
		promise = stamp.OnceFlushed
	}
	load := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed, Flush: true}
	var f stamp.ReadWriterAt
	var stop func()
	// Garbage collection begins early, so that there is some.
	if *cutSide == "kernel" {
		k := openKernel(t, *cutDataCRC)
		must(t, "dmsetup", "message", kernelName, "0", "gc_percent", "10")
		f, stop = k, func() { k.close(t) }
	} else {
		d := add(t, "-p", dax, "-b", disk, "-q", "2")
		pcache(t, "set", d.id, "gc_percent=10")
		dev := direct(t, d.path)
		load.Zero = zeroer(dev)
		f, stop = dev, func() {
			dev.Close()
			pcache(t, "flush", d.id)
			d.del(t)
		}
	}
	want, what, err := stamp.Recover(f, turnsBase, turnsSize, *cutBefore, *cutJournal, promise)
	t.Logf("%s: %s", *cutSide, what)
	if err != nil {
		t.Fatalf("in the %s after a power cut: %v", *cutSide, err)
	}
	if !*cutLast {
		_, err := load.Run(want, math.MaxInt64, nil)
		t.Fatalf("the load ended: %v", err)
	}
	stop()
	if err := want.On(direct(t, disk)).Verify(buffer(t)); err != nil {
		t.Fatalf("cleaned by the %s, on the disk alone: %v", *cutSide, err)
	}
	calm()
}
