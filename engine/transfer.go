package engine

import (
	"fmt"
	"sync/atomic"
	"time"

	"ublk-pcache/ondisk"
)

// A round goes to the disk in transfers, several at a time: neighbours in one, parts that were
// deferred alone, so that only what is really wrong fails again.

// transfer is one write to the disk.
type transfer struct {
	buf   []byte
	n     int // bytes, 0 while nothing is under way
	off   int64
	parts []part // what it writes
	err   error
	done  func(error)
	begun time.Time
	took  time.Duration
}

// transferParts writes parts in order, neighbours joined, and returns once
// nothing is under way any more, or everything was given up. Parts that were
// deferred go alone, so that only what is really wrong fails again. From time to
// time shorten, if there is one, says how many parts are left, of which i have gone.
func (c *Cache) transferParts(parts []part, shorten func(i int) []part) error {
	w := &c.writeback
	late := time.Now().Add(w.step)
	for i := 0; i < len(parts); {
		t := c.takeTransfer()
		if t == nil {
			return ErrAborted
		}
		if c.stopping() {
			w.free <- t
			break
		}
		if now := time.Now(); shorten != nil && now.After(late) {
			parts, late = shorten(i), now.Add(w.step)
			if i == len(parts) {
				w.free <- t
				break
			}
		}
		i = c.fillTransfer(t, parts, i)
		if !c.awaitPace(t) {
			t.n, t.parts = 0, nil
			w.free <- t
			break
		}
		c.startTransfer(t)
	}
	return c.awaitTransfers()
}

// takeTransfer waits for a transfer that is not under way, and takes note of how it went,
// if it was. It returns nil once everything has been given up.
func (c *Cache) takeTransfer() *transfer {
	w := &c.writeback
	var t *transfer
	select {
	case t = <-w.free:
	case <-c.aborted:
		return nil
	}
	if t.err != nil {
		err := fmt.Errorf("write %d bytes at %d of the backing device: %w", t.n, t.off, t.err)
		for i := range t.parts {
			t.parts[i].err = err
		}
	} else if len(t.parts) > 0 {
		if t.parts[0].zero() {
			w.zeroesTook(t.n, t.took)
		} else {
			w.inRound.Add(int64(t.n))
		}
	}
	t.err, t.n, t.parts = nil, 0, nil
	return t
}

// fillTransfer puts parts from i on into a transfer, as many as can go together, and returns
// where the next one begins. It leaves out a part that cannot be read.
func (c *Cache) fillTransfer(t *transfer, parts []part, i int) (next int) {
	from, zero, unread := i, parts[i].zero(), 0
	t.off = parts[i].off
	for ; unread == 0 && i < len(parts) && t.joins(parts[from:i], &parts[i], c.writeback.zeroes); i++ {
		p := &parts[i]
		p.err, p.lost = nil, false // of the round before
		if !zero {
			p.err = c.load(t.buf[t.n:t.n+p.len()], p)
		}
		if p.err != nil {
			unread = 1 // what lies before it goes; behind it a new transfer begins
		} else {
			t.n += p.len()
		}
	}
	t.parts = parts[from : i-unread]
	return i
}

// startTransfer gives a transfer to the disk, or back if it has nothing.
func (c *Cache) startTransfer(t *transfer) {
	w := &c.writeback
	t.begun = time.Now()
	switch b := int64(c.disk.BlockSize()); {
	case t.n == 0:
		w.free <- t
	case t.off%b != 0 || int64(t.n)%b != 0:
		t.done(fmt.Errorf("%w: blocks of %d", ErrUnaligned, b))
	case t.parts[0].zero():
		c.disk.Zero(t.off, int64(t.n), t.done)
	default:
		w.written.Add(uint64(t.n))
		c.disk.Write(t.buf[:t.n], t.off, t.done)
	}
}

// awaitTransfers returns once nothing is under way any more, with ErrAborted if everything was
// given up, and errRest if the workers are to rest.
func (c *Cache) awaitTransfers() error {
	w := &c.writeback
	all := make([]*transfer, w.depth)
	for i := range all {
		if all[i] = c.takeTransfer(); all[i] == nil {
			return ErrAborted
		}
	}
	for _, t := range all {
		w.free <- t
	}
	if c.stopping() {
		return errRest
	}
	return nil
}

// zeroesTook adapts the size of transfers of zeros to how long one of n bytes took. Many disks
// make any number of zeros at once, and some have to write them.
func (w *writeback) zeroesTook(n int, d time.Duration) {
	switch {
	case d > w.step/4:
		w.zeroes = max(w.zeroes/2, ondisk.StripeSize)
	case d < w.step/40 && n >= w.zeroes:
		w.zeroes = min(w.zeroes*2, MaxZero)
	}
}

// joins reports whether p can go with what the transfer has. zeroes is how many of
// those may go together.
func (t *transfer) joins(has []part, p *part, zeroes int) bool {
	switch {
	case len(has) == 0:
		return true
	case p.off != t.off+int64(t.n) || p.wait > 0 || has[0].wait > 0 || p.zero() != has[0].zero():
		return false
	case p.zero():
		return t.n < zeroes
	default:
		return t.n+p.len() <= len(t.buf)
	}
}

// load copies a part out of the region and verifies it.
func (c *Cache) load(buf []byte, p *part) error {
	if err := c.readExtent(buf, p.e, &c.writeback.whole); err != nil {
		p.lost = true
		c.badData(p.e, p.off, err, &c.writeback.whole)
		return fmt.Errorf("dirty data of offset %d, length %d cannot be read: %w", p.off, p.len(), err)
	}
	return nil
}

// flushes are those of the disk. Two use it, write-back and what goes around the cache, and a
// disk tells of a failure once: the next flush succeeds without what was lost. So they go one
// after the other, and who has written since one failed is told of that one.
type flushes struct {
	turn   chan struct{} // has room while none is under way
	failed atomic.Uint64 // how many have
	last   atomic.Pointer[failure]
	unsure atomic.Bool // one has failed that was for writes around the cache, and none succeeded since
}

func (f *flushes) init() { f.turn = make(chan struct{}, 1) }

// flushDisk flushes the disk for what was written since flushes.failed was since, or does not
// wait for that any longer when nobody relies on it: a closed channel says so.
func (c *Cache) flushDisk(since uint64, rest <-chan struct{}) error {
	f := &c.flushes
	select {
	case f.turn <- struct{}{}:
	case <-rest:
		return errRest
	case <-c.aborted:
		return ErrAborted
	}
	done := make(chan error, 1)
	c.disk.Flush(func(err error) {
		if err == nil {
			f.unsure.Store(false)
		}
		switch {
		case err != nil:
			f.last.Store(&failure{err})
			f.failed.Add(1)
		case f.failed.Load() != since:
			err = fmt.Errorf("one has failed before: %w", f.last.Load().err)
		}
		<-f.turn
		done <- err
	})
	select {
	case err := <-done:
		return err
	case <-rest:
		return errRest
	case <-c.aborted:
		return ErrAborted
	}
}
