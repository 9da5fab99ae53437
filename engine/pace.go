package engine

import "time"

// pace spreads what is written back over time, as writeback_rate says: after a transfer the
// next one waits for as long as the rate gives it. So a second has no more than the rate and
// one transfer.
//
// It is for the sake of those who use the disk for something else, and gives way to those who
// wait for the cache: a flush, a writer without room, a write that is answered from the disk. They kick write-back, which ends a
// pause; what it does then is decided anew, and once nobody waits any more the rate counts
// again from there on.
type pace struct {
	next time.Time // when the next transfer may go
}

// awaitPace waits until a transfer may go, and reports whether it is still to go. Zeros go at
// once: the disk is sent none.
func (c *Cache) awaitPace(t *transfer) bool {
	w := &c.writeback
	for t.n > 0 && !t.parts[0].zero() {
		rate, now := c.settings.now.Load().WritebackRate, time.Now()
		if rate == 0 || c.hurried() {
			w.pace.next = now
			break
		}
		if wait := w.pace.next.Sub(now); wait > 0 {
			select {
			case <-time.After(wait):
			case <-w.kicked:
			case <-c.workers.stop:
				return false
			case <-c.aborted:
				return false
			}
			continue
		}
		w.pace.next = now.Add(time.Duration(float64(t.n) / float64(rate) * float64(time.Second)))
		break
	}
	return true
}

// hurried reports whether somebody waits for write-back.
func (c *Cache) hurried() bool {
	w := &c.writeback
	w.mu.Lock()
	flushing := len(w.mu.waiters) > 0
	w.mu.Unlock()
	return flushing || c.through.waits.Load() > 0 || c.pressed()
}
