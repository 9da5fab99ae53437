package engine

import (
	"fmt"

	"ublk-pcache/ondisk"
)

// Write-back and garbage collection learn from the log what is dirty and what
// is named. A kset that cannot be read, or is not what was stored there, hides
// all that lies behind it, and the next Open would refuse the cache.
//
// But as long as the cache is open the index knows where the newest data of
// every sector is. So neither reads the log there any more:
//
//  1. Write-back notes where the head is, and writes all of the index that is
//     dirty, shard by shard. Data that is written twice or comes later does no harm.
//     After that everything in front of that head is on the disk: dirty_tail
//     moves there, in one step.
//  2. Garbage collection forgets all clean data, since it cannot tell which of
//     it the hidden keys name. Then key_tail moves to dirty_tail, and the
//     hidden references are dropped: those that are accounted for, less those
//     of the keys that can be read from dirty_tail on.
//
// If the log cannot be read from dirty_tail on either, write-back comes to that
// place, and the head that it notes then is behind it. So both tails pass any
// number of such places. A crash before that finds a damaged log and says so;
// hence it is done at once, whether or not anybody needs the room.

// logDamage is the part of the log that cannot be read.
type logDamage struct {
	ksets uint64 // in front of it, as journal counts them, or fewer
	err   error
}

// noteLogDamage takes note of a place that walk did not get past, with so many ksets
// in front.
func (c *Cache) noteLogDamage(d *ondisk.Damage, ksets uint64) {
	h := &logDamage{ksets, fmt.Errorf("the log cannot be read at %v, so everything is written back and it begins anew behind that: %w", d.At, d.Cause)}
	if !c.logDamage.CompareAndSwap(nil, h) {
		// Both are passed when the later one is.
		if old := c.logDamage.Load(); old == nil || old.ksets >= ksets || !c.logDamage.CompareAndSwap(old, h) {
			return
		}
	}
	c.bad(BadPlace{What: "log", Off: c.offset(d.At), Len: ondisk.KsetHeaderSize, Segment: int(d.At.Seg)}, d.Cause)
	c.log.Error(LogDamaged, "a part of the log is gone", h.err)
}

// clearLogDamage is called when key_tail has come to dirty_tail, which has passed so
// many ksets.
func (c *Cache) clearLogDamage(passed uint64) {
	if h := c.logDamage.Load(); h != nil && passed > h.ksets && c.logDamage.CompareAndSwap(h, nil) {
		c.log.Info(LogMended, "the part of the log that was gone is needed no more", nil)
	}
}

// sweep is step 1, which takes some rounds.
type sweep struct {
	on   bool
	to   logPoint // the head when it began
	next int      // the shard to go on with
	then int      // the same after this round, which begins with it at next
}

// pickIndex is pick for step 1.
func (c *Cache) pickIndex() (end logPoint) {
	w := &c.writeback
	s := &w.sweep
	if !s.on {
		*s = sweep{on: true, to: c.journal.point()}
		w.demand(s.to.ksets)
	}
	// The index may have newer data now than the parts that are to be tried
	// again, so these get a round of their own.
	if len(w.parts) > 0 {
		return w.at
	}
	known := w.known()
	bytes := 0
	for ; s.then < shardCount && bytes < roundBytes && len(w.parts) < roundParts; s.then++ {
		for stripe, off := range c.index.stripes(s.then) {
			for _, e := range c.dirtyIn(stripe, func(extent) bool { return true }) {
				s, p := stripe.sub(e), stripe.place(e.seg, e.pos-e.off)
				bytes += c.pickParts(s, off+int64(e.off)<<sectorShift, p, w.at, []extent{e}, known)
			}
		}
	}
	if s.then < shardCount {
		return w.at
	}
	return s.to
}

// swept is called when the round of a sweep has succeeded.
func (s *sweep) swept() {
	if s.next = s.then; s.next == shardCount {
		*s = sweep{}
	}
}

// forgetHidden is step 2: it returns the hidden references.
func (c *Cache) forgetHidden(to ondisk.Position) (dropped []references, damage *ondisk.Damage) {
	// Of clean data some is named behind to.
	_, written := c.journal.head()
	c.direct.lose(everywhere, written)
	c.index.forgetClean()
	_, written = c.journal.head() // of what has come meanwhile some is forgotten, too
	c.direct.lose(everywhere, written)
	head, hidden := c.journal.account()
	damage = c.walk(&c.gc.walker, to, head, func(k *ondisk.Kset, _ ondisk.Position) bool {
		for i := range k.Keys {
			if key := &k.Keys[i]; !c.dead(key) {
				hidden[key.Seg]--
			}
		}
		return true
	})
	if damage != nil {
		return nil, damage
	}
	for seg, n := range hidden {
		if n > 0 {
			dropped = append(dropped, references{uint32(seg), n})
		}
	}
	return dropped, nil
}
