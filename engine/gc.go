package engine

import (
	"runtime"
	"sync"

	"ublk-pcache/ondisk"
)

// Garbage collection drops the oldest ksets from the log, which are on the
// disk by then, and frees the segments that nothing names any more.
//
// The obvious way, to count a segment's references down as keys are passed
// and to reuse it at zero, loses data in a crash between the steps: a
// reference is dropped that replay will count again, or a segment is reused
// while keys that a replay still sees name it. So a step is made of changes
// that are harmless in any combination, and nothing is reused before all of
// them are durable:
//
//  1. raise the generation of the segments that lost their last reference in
//     an earlier step, if they are without pins;
//  2. forget what the index still has of the keys;
//  3. store the key_tail behind them;
//  4. make all of it durable;
//  5. only now hand out the segments of 1, and drop the keys' references.
//
// If 3 is lost, replay sees keys again that are before dirty_tail, hence
// clean, and still backed by their data. All of them are, since 1 waits for the
// next step: to the kernel's replay a dead key supersedes nothing, and an older
// key of another segment would come back in its place. If 1 is lost, no key in
// the log names the segment, and replay raises its generation before its first
// use. A key is only counted, here as in replay, if its generation is the
// segment's current one, so no reference is dropped twice.
//
// The kernel does count dead keys when it collects, though not when it replays
// (cache_gc.c and cache_key.c in drivers/md/dm-pcache, Linux 7.3), and would
// free the segment's next use a key early. For it, too, no key from key_tail
// on may ever be dead.

const (
	// gcKsets is how many ksets a step takes: at most 1024 keys, or some
	// hundreds of microseconds, so that those who wait for space soon get some.
	gcKsets = 8
	// gcKsetsSync is the same where a step ends in a sync, which costs as much
	// as many thousand keys: about what single writes of a full segment make.
	gcKsetsSync = 4096
)

type collector struct {
	kicked  chan struct{}
	errands errands
	mu      struct {
		sync.Mutex
		dying []uint32
	}

	// The goroutine's own, kept so that it does not allocate while writers write.
	scratch  []extent // of forget
	dropped  []references
	walker   ondisk.Walker
	promoter promoter
	lost     []int64 // stripes where it has forgotten more than it has collected, of this step
	tail     uint64  // ksets that key_tail has passed
	passed   int64   // bytes of collected keys, less somewhat more than those that got another round
}

func (g *collector) init() { g.kicked = make(chan struct{}, 1) }

// kick wakes the collector to look whether there is work. Any goroutine.
func (g *collector) kick() {
	g.errands.given.Add(1)
	select {
	case g.kicked <- struct{}{}:
	default:
	}
}

// bury takes a segment that lost its last reference.
func (g *collector) bury(seg uint32) {
	g.mu.Lock()
	g.mu.dying = append(g.mu.dying, seg)
	g.mu.Unlock()
	g.kick()
}

// gcNeeded reports whether the cache is fuller than it should be, or writers find no
// segment. Requests that still wait are no reason: those that may have the free
// segments are on their way to them.
func (c *Cache) gcNeeded() bool {
	return c.inLog()*100 >= c.segments.good()*c.settings.now.Load().GCPercent || c.available() <= c.segments.reserve
}

// gcLoop also looks after the requests that wait: all that may end their wait kicks
// it, and so do they themselves once they are in line.
func (c *Cache) gcLoop() {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	for {
		select {
		case <-c.gc.kicked:
		case <-c.workers.stop:
			return
		}
		given := c.gc.errands.given.Load()
		for more := true; more && !c.stopping(); {
			more = false
			// A cache that has failed still has its tails pass what cannot be
			// read, or it would not open again.
			if c.failure() == nil || c.logDamage.Load() != nil {
				var err error
				if more, err = c.gcStep(); err != nil {
					c.fail(err)
				}
			}
			c.unpinned()
			c.askForHeads()
			c.wakeWaiting()
		}
		c.gc.errands.done.Store(given)
	}
}

// wakeWaiting lets those try again that have reason to: first the queues that have keys
// to commit and wait for the log to have room, then the requests in line.
func (c *Cache) wakeWaiting() {
	failed := c.failure() != nil
	if failed || c.segments.free() > relogReserve {
		for _, q := range c.queues {
			if q.stalled.Load() {
				q.wake()
			}
		}
	}
	if failed {
		c.wakeWriters()
	} else {
		c.serve()
	}
}

// gcStep does one step and reports whether it has changed anything: then there may
// be reason for another. Where only write-back can make room, gcStep tells it so,
// once all that has been collected is free.
func (c *Cache) gcStep() (changed bool, err error) {
	from := c.tails.keyTail()
	to, cleaned := c.tails.dirtyTail()
	if from == to {
		c.clearLogDamage(cleaned)
	}
	if goesAround(c.settings.mode()) && !c.direct.isSure() {
		sure, err := c.makeSure()
		if err != nil {
			return false, err
		}
		c.direct.set(&c.direct.mu.sure, sure)
	}
	needed := c.gcNeeded() || c.logDamage.Load() != nil
	raised := c.raiseDying()
	if c.pressed() {
		c.closePromoted(&c.gc.promoter) // it may be the last segment that can become free
	}
	// Where the log is to shrink first, what is hit in the window waits for that, as long as it
	// will come about.
	_, written := c.journal.head()
	refilled := c.refill(!needed || from == to && (written == cleaned || c.pressed() || c.writeback.hindrance() != nil), !needed)
	if needed && from == to && len(raised) == 0 {
		c.pressWriteback(cleaned)
	}
	var freed []uint32
	var dropped []references
	if needed && from != to {
		var end ondisk.Position
		var ksets uint64
		c.direct.set(&c.direct.mu.collecting, true)
		if end, ksets, dropped = c.collectKsets(from, to, cleaned); end != from {
			changed = true
			if err := c.moveKeyTail(end); err != nil {
				return false, err
			}
			freed = c.journal.passed(end, dropped)
			c.gc.tail += ksets
		} else {
			c.direct.set(&c.direct.mu.collecting, false)
			c.pressWriteback(cleaned) // it gets past the damage, too, and behind that
		}
	}
	if !changed && len(raised) == 0 {
		return refilled, nil
	}
	if err := c.persist(); err != nil {
		return false, err
	}
	if changed {
		sure, err := c.makeSure()
		if err != nil {
			return false, err
		}
		c.direct.passed(c.gc.tail, sure)
	}
	for _, seg := range append(freed, raised...) {
		c.segments.addFree(seg)
	}
	for _, r := range dropped {
		c.dropAll(r)
	}
	c.setBrake()
	return true, nil
}

// collectKsets forgets what the index has of the ksets from key_tail on, as many as
// a step is to have. Up to to there are cleaned, as dirty_tail counts them. It returns where
// they end, how many they are, and the segment of each key that holds a reference.
func (c *Cache) collectKsets(from, to ondisk.Position, cleaned uint64) (end ondisk.Position, ksets uint64, dropped []references) {
	end = from
	most := uint64(gcKsets)
	dropped = c.gc.dropped[:0]
	defer func() { c.gc.dropped = dropped }()
	if !c.mem.Durable() {
		most = gcKsetsSync
	}
	damage := c.walk(&c.gc.walker, from, to, func(k *ondisk.Kset, after ondisk.Position) bool {
		c.prefetchKeys(k.Keys, 0)
		for i := range k.Keys {
			if c.forgetKey(&k.Keys[i]) {
				dropped = append(dropped, references{k.Keys[i].Seg, 1})
			}
		}
		end = after
		ksets++
		return ksets < most
	})
	c.endPromotion(&c.gc.promoter)
	_, written := c.journal.head()
	for _, stripe := range c.gc.lost {
		c.direct.lose(stripe, written)
	}
	c.gc.lost = c.gc.lost[:0]
	if damage == nil || end != from {
		return end, ksets, dropped
	}
	c.noteLogDamage(damage, 0)
	if dropped, damage = c.forgetHidden(to); damage != nil {
		return from, 0, nil
	}
	return to, cleaned - c.gc.tail, dropped
}

// forgetKey removes what the index still has of a key, but for what gets another round,
// and reports whether the key is one that holds a reference.
func (c *Cache) forgetKey(k *ondisk.Key) bool {
	if c.dead(k) {
		return false
	}
	g := &c.gc
	g.passed = min(g.passed+int64(k.Len), ondisk.StripeSize)
	if c.stale.has(k) {
		return true
	}
	s, p := c.keySpan(k)
	hit := g.scratch[:0]
	s.sh.Lock()
	g.scratch = s.partsLocked(g.scratch[:0], func(e extent) bool { return p.holds(e) && e.flags&extDirty == 0 })
	for _, e := range g.scratch {
		if e.flags&(extHit|extZero) == extHit && g.passed >= 0 {
			g.passed -= int64(e.n) << sectorShift * 16 / 15
			hit = append(hit, e) // over what has been looked at
			continue
		}
		s.sub(e).cutLocked(nil)
	}
	s.sh.Unlock()
	if k.Flags&ondisk.KeyZero != 0 || c.stale.of[k.Seg].Load() == nil {
		// A younger key may name the same place: zeros, or what was logged again before
		// Open. What was clean of that is gone, too.
		if stripe := int64(k.Off / ondisk.StripeSize); len(g.lost) == 0 || g.lost[len(g.lost)-1] != stripe {
			g.lost = append(g.lost, stripe)
		}
	}
	for _, e := range hit {
		if c.promote(&g.promoter, s, int64(k.Off), e) {
			c.counts.again.Add(uint64(e.n) << sectorShift)
		}
	}
	return true
}

// raiseDying raises the generation of the dying segments that nobody reads any
// more and returns them. The others stay for the kick of their last reader, and
// bad ones are not asked for a store.
func (c *Cache) raiseDying() (raised []uint32) {
	c.gc.mu.Lock()
	dying := c.gc.mu.dying
	c.gc.mu.dying = nil
	c.gc.mu.Unlock()
	var read []uint32
	for _, seg := range dying {
		switch s := &c.segments.all[seg]; {
		case s.pins.Load() > 0:
			read = append(read, seg)
		case !s.bad.Load():
			c.raiseGeneration(seg)
			raised = append(raised, seg)
		}
	}
	c.gc.mu.Lock()
	c.gc.mu.dying = append(c.gc.mu.dying, read...)
	c.gc.mu.Unlock()
	return raised
}
