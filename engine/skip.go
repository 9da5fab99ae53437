package engine

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"ublk-pcache/ondisk"
)

// Parts that the disk refuses are deferred piece by piece (deferred.go), up to maxDeferred of
// them. A disk may refuse any number, and take the rest: a thin pool that is full
// takes what overwrites. To remember all of it would cost many times the memory of
// the index. To stop there would keep the rest from the disk.
//
// So a part that is refused beyond that is passed by. The index knows that it is
// dirty, and the log where it is named; all that is kept is the first place in the
// log behind which there is any. dirty_tail stays in front of that. When write-back
// has come to the end of what it is to write, it begins there once more, after a
// while or for a flush that waits, and finds what has not been written. When garbage
// collection has nothing left, the log from there on is logged again without what
// has been written, batch by batch.
//
// Pieces that are passed by are as large as they came. One that is refused takes
// its neighbours in a transfer with it, so after a transfer that failed each part of
// it is tried alone, in the same round.
//
// A round of which the disk has taken nothing is still a failed one, and followed by
// a delay. The next one begins behind it.

const (
	// probes is how many parts are tried alone at first in a round of which the disk
	// has taken nothing, about as many as there were transfers.
	probes = 128
	// relogBatch is how many keys are logged again under one lock, about.
	relogBatch = 4096
	// mostZeros is how many runs of zeros are known to have been found.
	mostZeros = 64 << 10
)

// skipped is what was passed by.
type skipped struct {
	on   bool
	from logPoint // all of it is named there or behind; never behind writeback.at
	err  error
	next time.Time // when to begin there once more
	pass uint64    // the turn of the loop in which that was done last
}

// skip passes a part by.
func (w *writeback) skip(p *part) {
	s := &w.skipped
	if !s.on || p.key.ksets < s.from.ksets {
		s.from = p.key
	}
	if !s.on {
		s.next = time.Now().Add(lastRetry)
	}
	s.on, s.err = true, p.err
}

// rewind begins once more with what was passed by: when all has been tried that
// there was when the last flush came which waits for that, or when it is time and
// what was to be written up to now has been tried. It returns up to where the log is
// to be written then.
func (w *writeback) rewind(flushes, until uint64) uint64 {
	s := &w.skipped
	asked := flushes > 0 && w.at.ksets >= flushes
	if !s.on || w.sweep.on || !asked && (w.at.ksets < until || time.Now().Before(s.next)) {
		return until
	}
	until = w.at.ksets
	w.demand(until)
	w.at, s.on = s.from, false
	w.mu.Lock()
	defer w.mu.Unlock()
	s.pass = w.mu.turn
	return until
}

// transferAlone tries each part once more by itself that has failed, after a round
// in which not all can be deferred. Where all have failed it begins with some of
// them, whichever, and goes on if the disk takes one.
func (c *Cache) transferAlone(parts []part) error {
	var failed []int
	for i := range parts {
		if p := &parts[i]; p.refused() && p.wait == 0 {
			failed = append(failed, i)
		}
	}
	probing := len(failed) == len(parts) && len(failed) > probes
	if probing {
		rand.Shuffle(len(failed), func(i, j int) { failed[i], failed[j] = failed[j], failed[i] })
	}
	for len(failed) > 0 {
		n := len(failed)
		if probing {
			n = probes
		}
		taken, err := c.transferEach(parts, failed[:n])
		if err != nil || probing && taken == 0 {
			return err
		}
		failed, probing = failed[n:], false
	}
	return nil
}

// transferEach tries the parts with the given numbers one by one, and returns how
// many the disk has taken.
func (c *Cache) transferEach(parts []part, numbers []int) (taken int, err error) {
	alone := make([]part, 0, len(numbers))
	for _, i := range numbers {
		p := parts[i]
		p.wait = firstRetry // such go alone
		alone = append(alone, p)
	}
	if err := c.transferParts(alone, nil); err != nil {
		return 0, err
	}
	for j, i := range numbers {
		parts[i].err, parts[i].lost = alone[j].err, alone[j].lost
		if alone[j].err == nil {
			taken++
		}
	}
	return taken, nil
}

// flushOn makes those who wait for a flush wait for what has been logged again, too,
// before dirty_tail passes the place where they have seen the end of the log.
func (c *Cache) flushOn() {
	w := &c.writeback
	_, until := c.journal.head()
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.mu.waiters {
		w.mu.waiters[i].until = max(w.mu.waiters[i].until, until)
	}
}

// relogSkipped lets dirty_tail pass what was passed by, by logging it again, if that
// makes the log shorter, and reports whether it has passed any.
func (c *Cache) relogSkipped() (passed bool, err error) {
	w := &c.writeback
	if !w.skipped.on || w.sweep.on {
		return false, nil
	}
	// Deferred parts there stay, and dirty_tail in front of them.
	n := uint64(0)
	for i := range w.deferred {
		if k := w.deferred[i].key.ksets; k >= w.skipped.from.ksets && k < w.at.ksets {
			n++
		}
	}
	left := c.newUnwritten()
	damage := left.walk(w.skipped.from, func(logPoint) bool {
		n += uint64(left.keys())
		left.parts = left.parts[:0]
		return true
	})
	if damage != nil || n >= w.at.keys-w.skipped.from.keys {
		return false, nil
	}
	return c.relogUnwritten()
}

// relogUnwritten logs what was passed by again, batch by batch as far as there is room, and
// reports whether dirty_tail has passed any.
func (c *Cache) relogUnwritten() (passed bool, err error) {
	w := &c.writeback
	left := c.newUnwritten()
	for end := w.skipped.from; w.skipped.on && end.ksets < w.at.ksets && !c.stopping(); {
		damage := left.walk(end, func(after logPoint) bool {
			end = after
			return left.keys() < relogBatch && !c.stopping()
		})
		if damage != nil {
			return passed, nil
		}
		var keys []ondisk.Key
		for i := range left.parts {
			keys = c.keysOf(keys, &left.parts[i])
		}
		left.parts = left.parts[:0]
		if err := c.relogAll(keys); err == errLogFull || err == errOvertaken {
			return passed, nil
		} else if err != nil {
			return passed, err
		}
		if err := c.persist(); err != nil {
			return passed, fmt.Errorf("sync what was logged again: %w", err)
		}
		c.flushOn()
		w.skipped.from, w.skipped.on = end, end.ksets < w.at.ksets
		_, before := c.tails.dirtyTail()
		if err := c.advance(); err != nil {
			return passed, err
		}
		_, after := c.tails.dirtyTail()
		passed = passed || after > before
	}
	return passed, nil
}

// unwritten is what has not been written of a part of the log that write-back has
// tried, without the deferred parts.
type unwritten struct {
	c     *Cache
	known map[where][]extent
	zeros map[int64]int // how much was found where, which many keys may name
	parts []part
}

func (c *Cache) newUnwritten() *unwritten {
	w := &c.writeback
	w.parts = w.parts[:0] // of the last round: what it has not written is to be found
	return &unwritten{c: c, known: w.known(), zeros: map[int64]int{}}
}

// walk adds what the ksets name from a place on, until visit, which is told where each
// has ended, returns false.
func (x *unwritten) walk(from logPoint, visit func(after logPoint) bool) *ondisk.Damage {
	c, w := x.c, &x.c.writeback
	return c.walk(&w.walker, from.pos, w.at.pos, func(k *ondisk.Kset, after ondisk.Position) bool {
		for i := range k.Keys {
			if key := &k.Keys[i]; key.Flags&ondisk.KeyClean == 0 {
				c.pickKey(key, logPoint{}, x.known)
			}
		}
		for i := range w.parts {
			p := &w.parts[i]
			if p.zero() {
				if x.zeros[p.off] == p.len() {
					continue
				}
				if len(x.zeros) >= mostZeros {
					clear(x.zeros) // some are found once more then
				}
				x.zeros[p.off] = p.len()
			}
			// Parts that were divided for the transfers were one key, mostly.
			if n := len(x.parts); n == 0 || !x.parts[n-1].extend(p) {
				x.parts = append(x.parts, *p)
			}
		}
		w.parts = w.parts[:0]
		from = logPoint{after, from.ksets + 1, from.keys + uint64(len(k.Keys))}
		return visit(from) && from.ksets < w.at.ksets
	})
}

// keys is how many there are in the parts, about.
func (x *unwritten) keys() (n int) {
	for i := range x.parts {
		n += x.c.keysIn(&x.parts[i])
	}
	return n
}

// errOvertaken: a part was overwritten before it was logged again.
var errOvertaken = errors.New("overwritten meanwhile")

// relogAll appends all of the keys, if the index has all that they name, and leaves
// alone what is kept for deferred parts.
func (c *Cache) relogAll(keys []ondisk.Key) error {
	j := &c.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	if !c.holds(keys) {
		return errOvertaken
	}
	return c.appendAgainLocked(keys, relogReserve)
}
