//go:build vm

package guest

import (
	"testing"

	"ublk-pcache/tests/stamp"
)

// Four times as much as the cache holds goes through it, in requests of all sizes at once, and every sector is right:
// through the device, and on the disk alone once the cache was flushed and stopped.
func TestFourTimesTheCache(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	f := direct(t, d.path)
	want := stamp.New(f, 0, 1<<30)
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	load := stamp.Load{Depth: 16, BlockSize: 512, Seed: *seed}
	written, err := load.Run(want, 4*cacheSize, nil)
	if err != nil {
		t.Fatalf("seed %d, after %d MiB: %v", *seed, written>>20, err)
	}
	if err := want.Verify(buf); err != nil {
		t.Fatalf("seed %d, through the device: %v", *seed, err)
	}
	f.Close()
	pcache(t, "flush", d.id)
	d.del(t)
	if err := want.On(direct(t, disk)).Verify(buf); err != nil {
		t.Fatalf("seed %d, on the disk alone: %v", *seed, err)
	}
	quiet()
}

// A disk with blocks of 4096 bytes gives a device with such blocks, and the same promise.
func TestLargeBlocks(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk4K)
	d := add(t, "-p", dax, "-b", disk4K)
	if got := must(t, "blockdev", "--getss", d.path); got != "4096\n" {
		t.Errorf("the device's blocks have %q bytes, want 4096", got)
	}
	f := direct(t, d.path)
	want := stamp.New(f, 0, 1<<30)
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (stamp.Load{Depth: 16, BlockSize: 4096, Seed: *seed}).Run(want, cacheSize/2, nil); err != nil {
		t.Fatalf("seed %d: %v", *seed, err)
	}
	f.Close()
	pcache(t, "flush", d.id)
	d.del(t)
	if err := want.On(direct(t, disk4K)).Verify(buf); err != nil {
		t.Fatalf("seed %d, on the disk alone: %v", *seed, err)
	}
	quiet()
}
