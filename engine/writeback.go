package engine

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-pcache/ondisk"
)

// Write-back copies dirty data to the disk, in rounds. A round takes the next
// ksets behind the place where the one before ended, writes what the index
// still has of their keys, sorted by address and joined into large writes,
// flushes the disk once, and only then moves dirty_tail.
//
// What a later key has superseded is not written: that key is dirty too and
// further on in the log, so dirty_tail cannot pass it unwritten, and until
// then every read is answered by it. The parts of one round are therefore
// disjoint, and nothing of them can be overtaken by an older write.
//
// A round whose flush failed has moved nothing: the next one begins at the same
// place and writes everything again, which is the only safe reading of a failed
// flush. So does the one after a round that was told to rest, which starts no
// transfer any more: what is under way must end, or it might come to the disk
// behind what somebody else writes there later. Parts that could not be written are put aside (stuck.go), so that the
// rest goes on, up to a number at which the disk is taken for dead.
//
// Rounds are made when somebody waits for them (a flush, or garbage
// collection that needs room), and when the writers have been idle. While they
// write, the youngest part of the log stays dirty, since that is what they are
// most likely to overwrite: as many segments as are three quarters of what the
// collector is allowed, but nothing that is older than expireAfter. The obvious
// way, to write all that there is once it is that much, writes a block that is
// overwritten all the time once for each segment that the writers fill.

const (
	// roundBytes bounds a round, so that dirty_tail moves while a disk of
	// 100 MB/s works through a long log, and roundParts its memory.
	roundBytes = 64 << 20
	roundParts = 64 << 10

	// roundTime is how long a round is written as it was collected. A disk that has
	// not done with it by then gets no more than about as much again, so that
	// dirty_tail moves every few seconds, however slow it is.
	roundTime = 2 * time.Second

	// DefaultWritebackDepth is how many writes to the disk are under way at once:
	// as many as a hard disk takes to choose the next one from. transferBytes is
	// the size of one at most, so that a read that comes in between finds no more
	// than 16 MiB in front of it; what is longer goes on with the next.
	transferBytes         = 512 << 10
	DefaultWritebackDepth = 32

	// idleAfter is how long no write came before the dirty data is written
	// without being asked for: long enough to let a burst overwrite itself.
	idleAfter = time.Second

	// expireAfter is how long writers that are never idle may keep data from the
	// disk, where there is room; up to twice as long, since it is counted in
	// whole ones.
	expireAfter = 15 * time.Second

	// The delay after a failure, doubled with each up to the longest: soon
	// enough after a cable was put back.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// backoff returns the delay that follows d.
func backoff(d time.Duration) time.Duration { return min(max(firstRetry, 2*d), lastRetry) }

type writeback struct {
	kicked  chan struct{}
	asleep  atomic.Bool   // there was nothing dirty to write
	want    atomic.Uint64 // ksets that should be written now
	pressed atomic.Bool   // garbage collection has nothing to collect, but should
	tail    atomic.Uint64 // how many ksets dirty_tail had passed then, plus 1

	// The goroutine's own. Everything before at is on the disk, but for what
	// is stuck. end is where the round under way will bring it.
	at       mark
	end      mark
	stuck    []stuck
	skipped  skipped
	parts    []part
	order    []onDisk // scratch of sortParts
	sweep    sweep
	entering entering
	age      expiry
	idle     time.Duration // idleAfter
	step     time.Duration // roundTime
	zeroes   int           // bytes of a transfer of zeros
	key      []extent
	whole    []byte
	walker   ondisk.Walker
	depth    int
	most     int // maxStuck
	free     chan *transfer

	backlog backlog

	mu struct {
		sync.Mutex
		waiters []flushWaiter
		again   bool   // what is stuck should be tried now
		turn    uint64 // of the loop
		err     error  // why not everything is well, nil if it is
	}
	written atomic.Uint64 // bytes, since Open
	tried   atomic.Uint64 // the furthest that at has been, in ksets
	inRound atomic.Int64  // bytes, of the round under way
}

// mark is a place in the log, with the numbers of ksets and of keys before it as
// journal counts them.
type mark struct {
	pos         ondisk.Position
	ksets, keys uint64
}

type flushWaiter struct {
	until uint64
	turn  uint64 // the first that can fail it: one that was under way may have met a disk that has healed since
	done  chan error
}

// part is one run of dirty sectors of a round.
type part struct {
	s    span
	e    extent
	off  int64         // bytes on the disk
	key  mark          // its key lies there or behind
	wait time.Duration // how long it was put aside before this round, 0 if it was not
	err  error         // why it is not written
	lost bool          // that is because it cannot be read
}

// onDisk says where a part, by its index, goes on the disk.
type onDisk struct {
	off int64 // bytes
	i   int
}

// sortParts sorts the parts of the round by where they go. A part is too large to be
// moved more than once, so the order is found first, and then one hole after the
// other filled.
func (w *writeback) sortParts() {
	w.order = w.order[:0]
	for i := range w.parts {
		w.order = append(w.order, onDisk{w.parts[i].off, i})
	}
	slices.SortFunc(w.order, func(a, b onDisk) int { return cmp.Compare(a.off, b.off) })
	for first := range w.order {
		hole, out := first, w.parts[first]
		for w.order[hole].i != first {
			from := w.order[hole].i
			w.parts[hole] = w.parts[from]
			w.order[hole].i = hole
			hole = from
		}
		w.parts[hole] = out
		w.order[hole].i = hole
	}
}

func (p *part) len() int { return int(p.e.n) << sectorShift }

func (p *part) zero() bool { return p.e.flags&extZero != 0 }

// refused reports whether it is the disk that did not take it.
func (p *part) refused() bool { return p.err != nil && !p.lost }

// sub returns the part of p that begins at sector off of its stripe and is n
// sectors long.
func (p *part) sub(off, n uint16) part {
	q := *p
	q.e = p.e.from(off).to(off + n)
	q.s = p.s.sub(q.e)
	q.off += int64(off-p.e.off) << sectorShift
	return q
}

// extend makes p the longer by q, which lies behind it on the disk and in the cache,
// and reports whether it could: what is damaged stays apart, and zeros have no place.
func (p *part) extend(q *part) bool {
	if p.s.sh != q.s.sh || p.s.root != q.s.root || p.key != q.key || q.zero() || p.lost || q.lost || !p.e.abuts(q.e) {
		return false
	}
	p.e.n += q.e.n
	p.s.n += q.e.n
	return true
}

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

func (w *writeback) init(c *Cache, depth int) {
	if depth == 0 {
		depth = DefaultWritebackDepth
	}
	w.depth, w.most = depth, maxStuck
	w.idle, w.step, w.age.after = idleAfter, roundTime, expireAfter
	w.zeroes = ondisk.StripeSize
	w.kicked = make(chan struct{}, 1)
	w.free = make(chan *transfer, depth)
	for range depth {
		t := &transfer{buf: c.disk.Buffer(transferBytes)}
		t.done = func(err error) {
			t.err, t.took = err, time.Since(t.begun)
			w.free <- t
		}
		w.free <- t
	}
}

func (w *writeback) kick() {
	select {
	case w.kicked <- struct{}{}:
	default:
	}
}

// wrote is called by a queue that has committed something.
func (w *writeback) wrote() {
	if w.asleep.Load() && w.asleep.CompareAndSwap(true, false) {
		w.kick()
	}
}

// pressWriteback asks for room that only write-back can make: what is demanded
// already, or if nothing is, a round of what there is. It is in vain when
// dirty_tail has meanwhile passed more ksets than the caller knows of.
func (c *Cache) pressWriteback(cleaned uint64) {
	c.writeback.tail.Store(cleaned + 1)
	c.writeback.pressed.Store(true)
	c.writeback.kick()
}

// demand asks for everything up to the given kset, counted as journal.written.
func (w *writeback) demand(until uint64) {
	for old := w.want.Load(); old < until && !w.want.CompareAndSwap(old, until); {
		old = w.want.Load()
	}
	w.kick()
}

// backlog knows how long the log was when the last segments were taken, and so
// which part of it may stay dirty.
type backlog struct {
	mu struct {
		sync.Mutex
		ksets []uint64 // a ring, as journal.written counts
		next  int
	}
}

// init is told how many segments there are, and how many ksets came before all
// that will be taken.
func (b *backlog) init(segments int, ksets uint64) {
	b.mu.ksets = slices.Repeat([]uint64{ksets}, segments+1)
}

// took is told how long the log is now that a segment has been taken, and returns
// how long it was that many segments ago.
func (b *backlog) took(ksets uint64, ago int) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(b.mu.ksets)
	b.mu.ksets[b.mu.next] = ksets
	was := b.mu.ksets[(b.mu.next-ago+n)%n]
	b.mu.next = (b.mu.next + 1) % n
	return was
}

// expiry knows which part of the log is old.
type expiry struct {
	after     time.Duration
	since     time.Time
	last, old uint64 // ksets in the log then, and a time of after before that
}

// expired returns how many ksets of the log are old, if it has so many now.
func (x *expiry) expired(now time.Time, written uint64) uint64 {
	if now.Sub(x.since) >= x.after {
		x.since, x.old, x.last = now, x.last, written
	}
	return x.old
}

// Flush writes all data back that is dirty now, and returns when the disk has
// confirmed its flush. It returns the error of the first round that fails from
// now on, or, when everything has been tried, that of what could not be written.
// It stays dirty, and write-back goes on trying.
func (c *Cache) Flush(ctx context.Context) error {
	w := flushWaiter{done: make(chan error, 1)}
	select {
	case <-c.stop: // the cache may be another's by now
		return ErrStopped
	default:
	}
	c.writeback.mu.Lock()
	// In this order: what is stuck is logged again before dirty_tail passes its
	// old keys, so a head that was read first might lie before the new ones.
	_, cleaned := c.tails.dirtyTail()
	_, w.until = c.journal.head()
	if cleaned >= w.until {
		c.writeback.mu.Unlock()
		return nil
	}
	w.turn = c.writeback.mu.turn + 1
	c.writeback.mu.waiters = append(c.writeback.mu.waiters, w)
	c.writeback.mu.again = true
	c.writeback.mu.Unlock()
	c.writeback.demand(w.until)
	select {
	case err := <-w.done:
		return err
	case <-c.stop:
		return ErrStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// settle tells those who wait for a flush how the last round went, and keeps
// why not everything is well.
func (c *Cache) settle(err error) {
	w := &c.writeback
	tried := w.at.ksets
	if err != nil {
		tried = math.MaxUint64
	} else {
		err = w.refusal()
	}
	_, cleaned := c.tails.dirtyTail()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.err = err
	w.mu.waiters = slices.DeleteFunc(w.mu.waiters, func(f flushWaiter) bool {
		switch {
		case err != nil && tried >= f.until && w.mu.turn >= f.turn && !(w.skipped.on && w.skipped.pass < f.turn && tried != math.MaxUint64):
			f.done <- err
		case err == nil && cleaned >= f.until:
			// Not with an error, since dirty_tail may have passed what is
			// stuck, which is logged again behind it.
			f.done <- nil
		default:
			return false
		}
		return true
	})
}

// failed is called when the disk has failed outside a round.
func (w *writeback) failed(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.err = err
}

// nextTurn counts a turn of the loop, and reports whether somebody waits for a
// flush, and whether what is stuck is to be tried in it. For those who came since
// what was passed by was begun with once more, flushes is the last kset that they
// wait for, or 0.
func (w *writeback) nextTurn() (flushing, again bool, flushes uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.turn++
	again, w.mu.again = w.mu.again, false
	for i := range w.mu.waiters {
		if f := &w.mu.waiters[i]; f.turn > w.skipped.pass {
			flushes = max(flushes, f.until)
		}
	}
	return len(w.mu.waiters) > 0, again, flushes
}

// writebackLoop sleeps until there is a reason to write: a demand, writers
// that have stopped coming, or something stuck whose time has come.
func (c *Cache) writebackLoop() {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	w := &c.writeback
	timer := time.NewTimer(w.idle)
	var delay time.Duration
	var seen uint64 // ksets in the log, unchanged
	since := time.Now()
	for !c.stopping() {
		_, written := c.journal.head()
		now := time.Now()
		if written != seen {
			seen, since = written, now
		}
		flushing, again, flushes := w.nextTurn()
		if w.pressed.Swap(false) && w.holds() && c.failure() == nil {
			passed, err := c.relogStuck()
			if err == nil && !passed {
				passed, err = c.relogSkipped()
			}
			if err != nil {
				c.fail(err)
			}
			// Who pressed for nothing is not told to press again.
			if passed {
				c.gc.kick()
			}
		}
		if again {
			w.retryNow()
		}
		idleAt := since.Add(w.idle)
		_, cleaned := c.tails.dirtyTail()
		until := max(w.want.Load(), w.age.expired(now, written))
		pressed := w.tail.Load() == cleaned+1
		if flushing || pressed && until <= w.at.ksets || !now.Before(idleAt) {
			until = written
		}
		until = w.rewind(flushes, until)
		dirty := w.at.ksets < written
		collect := dirty && w.at.ksets < until
		retryAt, retry := w.nextRetry()
		if s := &w.skipped; s.on && (!retry || s.next.Before(retryAt)) {
			retryAt, retry = s.next, true
		}
		// All may be done but for dirty_tail: what was stuck has been overwritten,
		// or the last try to store it has failed. Or it has been moved just now, and
		// those who wait for a flush are still to be told.
		behind := !w.holds() && (cleaned < w.at.ksets || flushing && !dirty)
		if !behind && !collect && !(retry && !now.Before(retryAt)) {
			var wake *time.Timer
			switch {
			case dirty && (!retry || idleAt.Before(retryAt)):
				timer.Reset(idleAt.Sub(now))
				wake = timer
			case retry:
				timer.Reset(retryAt.Sub(now))
				wake = timer
			}
			if !dirty {
				w.asleep.Store(true)
				if _, now := c.journal.head(); now != written {
					w.asleep.Store(false)
					continue
				}
			}
			c.awaitKick(wake)
			w.asleep.Store(false)
			continue
		}
		held := w.holds()
		err := c.round(until)
		if err == errRest {
			return
		}
		c.settle(err)
		switch {
		case c.failure() == ErrAborted:
			return // the transfers under way still have their parts of the round
		case err != nil:
			delay = backoff(delay)
			c.log.Error(fmt.Sprintf("write-back failed, its data stays in the cache, next try in %v", delay), err)
			c.gc.kick() // what was passed by may be logged again, for those who wait for room
			select {
			case <-time.After(delay):
			case <-c.workers.stop:
			}
			continue
		case w.holds() && !held:
			more := ""
			if w.skipped.on {
				more = " and more"
			}
			c.log.Error(fmt.Sprintf("%d pieces of data%s cannot be written back and stay in the cache, the rest goes on", len(w.stuck), more), w.refusal())
		case delay > 0, held && !w.holds():
			c.log.Info("write-back works again", nil)
		}
		delay = 0
		c.gc.kick()
	}
}

// awaitKick waits for a kick, the end of the work, or the timer if there is one.
func (c *Cache) awaitKick(timer *time.Timer) {
	var expired <-chan time.Time
	if timer != nil {
		expired = timer.C
	}
	select {
	case <-c.workers.stop:
	case <-c.writeback.kicked:
	case <-expired:
	}
}

// round writes the next dirty ksets back, up to a number of them, and what is
// stuck and due, and moves dirty_tail as far as that allows.
func (c *Cache) round(until uint64) error {
	w := &c.writeback
	defer w.inRound.Store(0)
	w.sweep.then = w.sweep.next // where a round that failed has left it
	// In this order: what is taken up again was not overwritten by any key before
	// to, so nothing that is collected up to there is newer and in its place.
	to, _ := c.journal.head()
	w.parts = c.takeDue(w.parts[:0])
	w.end = w.at
	if w.end.ksets < until {
		w.end = c.collect(to, until)
	}
	c.voidFingerprint(w.parts)
	// The disk must not be ahead of the log: a key that a power cut takes would
	// leave its data there, under an older clean copy. And dirty_tail will lean
	// on what lies behind it: a key before it may not be written because a later
	// one superseded it.
	if err := c.persist(); err != nil {
		err = fmt.Errorf("sync the log for write-back: %w", err)
		c.fail(err)
		w.putBack(w.parts, err)
		return err
	}
	w.sortParts()
	if err := c.writeParts(); err != nil {
		w.putBack(w.parts, err)
		return err
	}
	refused, fresh, room := 0, 0, w.most-w.refused()
	var first error
	for i := range w.parts {
		switch p := &w.parts[i]; {
		case !p.refused():
			continue
		case p.wait > 0:
			room-- // it was put aside before, and its place is kept
		default:
			fresh++
		}
		refused++
		first = cmp.Or(first, w.parts[i].err)
	}
	none := refused == len(w.parts) && fresh > max(0, room)
	// Before dirty_tail moves: after that a part's place may soon be another's.
	for i := range w.parts {
		switch p := &w.parts[i]; {
		case p.err == nil:
			w.key = c.index.clean(p.s, p.s.place(p.e.seg, p.e.pos), w.key)
		case p.lost:
			c.setAside(p, true)
		case p.wait > 0 || room > 0 && !none:
			was := len(w.stuck)
			c.setAside(p, room > 0)
			if room -= len(w.stuck) - was; p.wait > 0 {
				room++
			}
		case w.sweep.on || p.key.ksets < w.end.ksets:
			w.skip(p)
		default: // it lies behind the end of a round that was cut short, and comes again
		}
	}
	w.at = w.end
	w.tried.Store(max(w.tried.Load(), w.at.ksets))
	w.sweep.swept()
	if err := c.advance(); err != nil {
		c.fail(err)
		return err
	}
	if none {
		return first
	}
	return nil
}

// writeParts writes the parts of the round and flushes the disk. What could
// not be written says so itself.
func (c *Cache) writeParts() error {
	w := &c.writeback
	if len(w.parts) == 0 {
		return nil
	}
	if err := c.transferParts(w.parts, w.shorten); err != nil {
		return err
	}
	refused := w.refused()
	for i := range w.parts {
		if w.parts[i].refused() {
			refused++
		}
	}
	if refused > w.most {
		if err := c.transferAlone(w.parts); err != nil {
			return err
		}
	}
	failed := 0
	for i := range w.parts {
		if w.parts[i].err != nil {
			failed++
		}
	}
	if failed > 0 {
		c.errs.rounds.Add(1)
	}
	if failed == len(w.parts) {
		return nil
	}
	if err := c.flushDisk(c.workers.stop); err == errRest || err == ErrAborted {
		return err
	} else if err != nil {
		c.errs.rounds.Add(1)
		return fmt.Errorf("flush the backing device: %w", err)
	}
	c.takeFingerprint()
	return nil
}

// advance moves dirty_tail to where everything before is on the disk.
func (c *Cache) advance() error {
	to := c.writeback.at
	for i := range c.writeback.stuck {
		if m := c.writeback.stuck[i].key; m.ksets < to.ksets {
			to = m
		}
	}
	if s := &c.writeback.skipped; s.on && s.from.ksets < to.ksets {
		to = s.from
	}
	if _, cleaned := c.tails.dirtyTail(); to.ksets > cleaned {
		return c.moveDirtyTail(to.pos, to.ksets-cleaned)
	}
	return nil
}

// collect gathers the parts of a round from the log up to a place, or up to a
// number of ksets, and returns where dirty_tail may move after it. Their segments
// need no pins: keys behind dirty_tail keep their references.
func (c *Cache) collect(to ondisk.Position, until uint64) (end mark) {
	w := &c.writeback
	if w.sweep.on {
		return c.collectIndex()
	}
	end = w.at
	known := w.known()
	bytes, first := 0, len(w.parts)
	damage := c.walk(&w.walker, w.at.pos, to, func(k *ondisk.Kset, after ondisk.Position) bool {
		c.lookAheadKeys(k.Keys, ondisk.KeyClean)
		for i := range k.Keys {
			if key := &k.Keys[i]; key.Flags&ondisk.KeyClean == 0 {
				bytes += c.collectKey(key, end, known)
			}
		}
		end = mark{after, end.ksets + 1, end.keys + uint64(len(k.Keys))}
		return !c.stopping() && end.ksets < until && bytes < roundBytes && len(w.parts)-first < roundParts
	})
	if damage != nil && end == w.at {
		c.logHurt(damage, end.ksets)
		return c.collectIndex()
	}
	return end
}

// collectKey adds what the index still has of a key, whose kset is at a place of the
// log, and returns its size. It leaves out what is known to be stuck.
func (c *Cache) collectKey(k *ondisk.Key, at mark, known map[where][]extent) (bytes int) {
	if c.dead(k) || c.overwritten.has(k) {
		return 0
	}
	s, p := c.keySpan(k)
	return c.collectParts(s, int64(k.Off), p, at, c.dirtyParts(s, p), known)
}

// collectParts adds the parts of a place that is at off of the device. Their keys lie
// at a place of the log, or behind.
func (c *Cache) collectParts(s span, off int64, p place, at mark, parts []extent, known map[where][]extent) (bytes int) {
	w := &c.writeback
	for _, e := range known[where{s.sh, s.root, p}] {
		parts = without(parts, e)
	}
	for _, e := range parts {
		whole := part{s: s.sub(e), e: e, off: off + int64(e.off-s.off)<<sectorShift, key: at}
		if whole.zero() {
			// What a transfer of zeros costs has little to do with their number.
			bytes += ondisk.SectorSize
			w.parts = append(w.parts, whole)
			continue
		}
		bytes += whole.len()
		// A key may be as long as a stripe.
		for off := e.off; off < e.end(); off += transferBytes >> sectorShift {
			w.parts = append(w.parts, whole.sub(off, min(transferBytes>>sectorShift, e.end()-off)))
		}
	}
	return bytes
}

// dirtyParts returns what the index still has of a place, and is dirty. The
// slice is valid until the next call.
func (c *Cache) dirtyParts(s span, p place) []extent {
	return c.dirtyIn(s, p.holds)
}

// dirtyIn returns what is dirty in a span and in the places that holds is for.
// The slice is valid until the next call.
func (c *Cache) dirtyIn(s span, holds func(extent) bool) []extent {
	w := &c.writeback
	s.sh.Lock()
	defer s.sh.Unlock()
	w.key = s.partsLocked(w.key[:0], func(e extent) bool { return e.flags&extDirty != 0 && holds(e) })
	return w.key
}

// transferParts writes parts in order, neighbours joined, and returns once
// nothing is under way any more, or everything was given up. What was put aside
// before goes alone, so that only what is really wrong fails again. From time to
// time shorten, if there is one, says how many parts are left, of which i have gone.
func (c *Cache) transferParts(parts []part, shorten func(i int) []part) error {
	w := &c.writeback
	take := func() *transfer {
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
	late := time.Now().Add(w.step)
	for i := 0; i < len(parts); {
		t, from := take(), i
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
		t.off = parts[i].off
		zero, unread := parts[i].zero(), 0
		for ; unread == 0 && i < len(parts) && t.joins(parts[from:i], &parts[i], w.zeroes); i++ {
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
		t.parts, t.begun = parts[from:i-unread], time.Now()
		switch b := int64(c.disk.BlockSize()); {
		case t.n == 0:
			w.free <- t
		case t.off%b != 0 || int64(t.n)%b != 0:
			t.done(fmt.Errorf("%w: blocks of %d", ErrUnaligned, b))
		case zero:
			c.disk.Zero(t.off, int64(t.n), t.done)
		default:
			w.written.Add(uint64(t.n))
			c.disk.Write(t.buf[:t.n], t.off, t.done)
		}
	}
	all := make([]*transfer, w.depth)
	for i := range all {
		if all[i] = take(); all[i] == nil {
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

// shorten lets a round that takes too long end with an earlier kset: of the parts from
// i on, no more are left than have been written, the oldest. Those that were written
// and lie behind that end are clean by then, and no more to write.
func (w *writeback) shorten(i int) []part {
	rest := w.parts[i:]
	if w.sweep.on {
		return w.parts
	}
	byAge := slices.DeleteFunc(slices.Clone(rest), func(p part) bool { return p.wait > 0 })
	slices.SortFunc(byAge, func(a, b part) int { return cmp.Compare(a.key.ksets, b.key.ksets) })
	// The first kset of the round is written in any case.
	first := slices.IndexFunc(byAge, func(p part) bool { return p.key.ksets > w.at.ksets })
	if first < 0 || len(byAge) <= i {
		return w.parts
	}
	w.end = byAge[max(i, first)].key
	rest = slices.DeleteFunc(rest, func(p part) bool { return p.wait == 0 && p.key.ksets >= w.end.ksets })
	w.parts = w.parts[:i+len(rest)]
	return w.parts
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

// flushDisk flushes the disk, or does not wait for that any longer when nobody
// relies on it: a closed channel says so.
func (c *Cache) flushDisk(rest <-chan struct{}) error {
	done := make(chan error, 1)
	c.disk.Flush(func(err error) { done <- err })
	select {
	case err := <-done:
		return err
	case <-rest:
		return errRest
	case <-c.aborted:
		return ErrAborted
	}
}
