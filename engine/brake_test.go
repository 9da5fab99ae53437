package engine

import (
	"testing"
	"time"

	"ublk-pcache/backing"
)

// TestCostAt: nothing before the point from which writers are slowed, and then more with each segment, up to what
// stops nearly anybody.
func TestCostAt(t *testing.T) {
	for _, zone := range []int{0, 1, brakeZone - 1} {
		if got := costAt(zone, zone); got != 0 {
			t.Errorf("%d segments: %d", zone, got)
		}
	}
	for _, zone := range []int{brakeZone, 20, 1000} {
		last := int64(0)
		for beyond := -1; beyond <= zone+2; beyond++ {
			got := costAt(beyond, zone)
			if beyond <= 0 && got != 0 || beyond > 0 && (got < last || got < leastCost) {
				t.Errorf("%d of %d segments: %d after %d", beyond, zone, got, last)
			}
			last = got
		}
		if last != leastCost<<costDoubles {
			t.Errorf("%d segments: %d at the end", zone, last)
		}
	}
}

// TestWritersAreSlowed writes faster than the disk takes it, in fake time: once the cache is filling
// up, the longest that a write takes is not many times what one takes at the disk's speed, and
// that speed is reached.
func TestWritersAreSlowed(t *testing.T) {
	steered(t, func(s *Settings) { s.GCPercent = 40 }, func(t *testing.T, c *Cache, w *diskWatch) {
		const rate = 64 << 20 // bytes a second
		disk := c.disk.(fakeDisk)
		disk.Script(func(op backing.Op) (f backing.Fault) {
			if op.Kind == backing.OpWrite {
				f.Delay = time.Duration(op.Len) * DefaultWritebackDepth * time.Second / rate
			}
			return f
		})
		woken := make(chan struct{}, 1)
		q := c.Queue(0)
		q.OnWake(func() {
			select {
			case woken <- struct{}{}:
			default:
			}
		})
		const warm, all = 500, 1500
		var longest time.Duration
		began := time.Now()
		for i := range int64(all) {
			if i == warm {
				began = time.Now()
			}
			submitted := time.Now()
			q.Submit(&Request{Op: Write, Off: i << 20 % c.size, Buf: make([]byte, 1<<20)})
			for len(q.Turn()) == 0 {
				<-woken
			}
			if took := time.Since(submitted); i >= warm {
				longest = max(longest, took)
			}
		}
		mean := time.Since(began) / (all - warm)
		if longest > 8*mean {
			t.Errorf("a write took %v, and on average one took %v", longest, mean)
		}
		if least := time.Second * (1 << 20) / rate; mean > least*5/4 {
			t.Errorf("a write takes %v, and the disk writes as much in %v", mean, least)
		}
	})
}
