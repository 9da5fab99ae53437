package engine

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestFullCache fills a cache whose disk does not answer: writers wait, reads
// go on, and with the disk everything goes on in order.
func TestFullCache(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 90)
	disk, heal := refusingDisk(256 << 20)
	defer disk.Close()
	r := newRig(t, mem, disk, 2)
	var writers sync.WaitGroup
	const count, size = 200, 1 << 20
	var finished atomic.Int32
	for i := range int64(count) {
		writers.Go(func() {
			p := make([]byte, size)
			fillStamp(p, i*size/sectorSize, 1)
			if err := r.do(int(i%2), &Request{Op: Write, Off: i * size, Buf: p}); err != nil {
				t.Error(err)
			}
			finished.Add(1)
		})
	}
	for r.Status().Waiting == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := r.do(0, &Request{Op: Read, Off: 255 << 20, Buf: make([]byte, 4096)}); err != nil {
		t.Errorf("a read while the cache is full: %v", err)
	}
	if n := finished.Load(); n == count {
		t.Errorf("%d MiB were written to a cache of 80 MiB over a disk that takes nothing", n)
	}
	waited := r.Status().LongestWait
	if waited <= 0 {
		t.Error("requests wait, and the longest wait is nothing")
	}
	heal()
	writers.Wait()
	if after := r.Status().LongestWait; after < waited {
		t.Errorf("the longest wait went from %v to %v", waited, after)
	}
	for i := range int64(count) {
		p := r.read(t, i*size, size)
		for j := range int64(size / sectorSize) {
			lba := i*size/sectorSize + j
			if v, err := stamp(p[j*sectorSize:][:sectorSize], lba); v != 1 || err != nil {
				t.Fatalf("sector %d: version %d, %v", lba, v, err)
			}
		}
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
