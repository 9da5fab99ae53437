package engine

import (
	"math/rand/v2"
	"runtime"
	"testing"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestSteadyLoad writes and reads the same blocks over and over while what was written is
// written back and the log collected, all on the same processors. None of it may
// give the Go runtime anything to collect but what a segment costs to begin.
func TestSteadyLoad(t *testing.T) {
	const (
		size  = 512 << 20
		block = 4 << 10
		hot   = 64 << 20
		most  = 4 << 10 // bytes for each segment that is begun
	)
	m := benchMemory{pmem.Heap(size)}
	if err := ondisk.Format(m, ondisk.FormatOptions{GCPercent: 70}); err != nil {
		t.Fatal(err)
	}
	c, err := Open(m, &benchDisk{size: 1 << 30}, Options{Queues: 1, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	q := c.Queue(0)
	wake := make(chan struct{}, 1)
	q.OnWake(func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	reqs := make([]Request, 16)
	for i := range reqs {
		reqs[i].Buf = make([]byte, block)
	}
	run := func(bytes int) {
		for ; bytes > 0; bytes -= len(reqs) * block {
			for i := range reqs {
				reqs[i].Op = Write
				if i%4 == 0 {
					reqs[i].Op = Read
				}
				reqs[i].Off = rand.Int64N(hot/block) * block
				q.Submit(&reqs[i])
			}
			for left := len(reqs); left > 0; {
				done := q.Turn()
				if left -= len(done); len(done) == 0 {
					<-wake
				}
			}
		}
	}
	run(size)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	run(4 * size)
	runtime.ReadMemStats(&after)
	segments := uint64(4 * size / ondisk.SegmentSize)
	each := (after.TotalAlloc - before.TotalAlloc) / segments
	t.Logf("%d bytes for each of %d segments, in %d pieces of all", each, segments, after.Mallocs-before.Mallocs)
	if each > most {
		t.Errorf("%d bytes for a segment that is begun, more than %d", each, most)
	}
}
