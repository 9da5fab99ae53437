package engine

import (
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

// Write-back copies dirty data to the disk, in rounds (round.go), each in transfers
// (transfer.go). Here is when.
//
// Rounds are made when somebody waits for them (a flush, or garbage
// collection that needs room), and when the writers have been idle. While they
// write, the youngest part of the log stays dirty, since that is what they are
// most likely to overwrite: when it has more segments than dirty_high says, all but
// the youngest of them, as many as dirty_low says, are written; and what is older
// than dirty_max_age. The obvious
// way, to write all that there is once it is that much, writes a block that is
// overwritten all the time once for each segment that the writers fill.
//
// All of that is for the settings to say. While nobody waits, they may also say how
// fast, or that nothing is written at all.

const (
	// roundBytes bounds a round, so that dirty_tail moves while a disk of
	// 100 MB/s works through a long log, and roundParts its memory.
	roundBytes = 64 << 20
	roundParts = 64 << 10

	// roundTime is how long a round is written as it was picked. A disk that has
	// not done with it by then gets no more than about as much again, so that
	// dirty_tail moves every few seconds, however slow it is.
	roundTime = 2 * time.Second

	// DefaultWritebackDepth is how many writes to the disk are under way at once:
	// as many as a hard disk takes to choose the next one from. transferBytes is
	// the size of one at most, so that a read that comes in between finds no more
	// than 16 MiB in front of it; what is longer goes on with the next.
	transferBytes         = 512 << 10
	DefaultWritebackDepth = 32

	// idleLooks is how often write-back looks whether writers are still idle in the time
	// that they are to be: writes do not note when they came, so the time is longer by up
	// to that part of it.
	idleLooks = 8

	// The delay after a failure, doubled with each up to the longest: soon
	// enough after a cable was put back.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// backoff returns the delay that follows d.
func backoff(d time.Duration) time.Duration { return min(max(firstRetry, 2*d), lastRetry) }

type writeback struct {
	kicked  chan struct{}
	errands errands
	asleep  atomic.Bool   // there was nothing dirty to write
	want    atomic.Uint64 // ksets that should be written now
	pressed atomic.Bool   // garbage collection has nothing to collect, but should
	tail    atomic.Uint64 // how many ksets dirty_tail had passed then, plus 1

	// The goroutine's own. Everything before at is on the disk, but for the deferred
	// parts and what was passed by. end is where the round under way will bring it.
	at        logPoint
	end       logPoint
	deferred  []deferred
	skipped   skipped
	parts     []part
	order     []onDisk // scratch of sortParts
	sweep     sweep
	publisher publisher
	age       expiry
	pace      pace
	step      time.Duration // roundTime
	zeroes    int           // bytes of a transfer of zeros
	scratch   []extent      // of dirtyIn and clean
	whole     []byte
	walker    ondisk.Walker
	depth     int
	most      int // maxDeferred
	free      chan *transfer

	backlog backlog

	mu struct {
		sync.Mutex
		waiters []flushWaiter
		again   bool   // the deferred parts should be tried now
		turn    uint64 // of the loop
		err     error  // why not everything is well, nil if it is
	}
	written atomic.Uint64 // bytes, since Open
	tried   atomic.Uint64 // the furthest that at has been, in ksets
	inRound atomic.Int64  // bytes, of the round under way
}

// logPoint is a place in the log, with the numbers of ksets and of keys before it as
// journal counts them.
type logPoint struct {
	pos         ondisk.Position
	ksets, keys uint64
}

type flushWaiter struct {
	until uint64
	turn  uint64 // the first that can fail it: one that was under way may have met a disk that has healed since
	done  chan error
}

func (w *writeback) init(c *Cache, depth int) {
	if depth == 0 {
		depth = DefaultWritebackDepth
	}
	w.depth, w.most = depth, maxDeferred
	w.step = roundTime
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
	w.errands.given.Add(1)
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

// pressWriteback asks for room that only write-back can make: by the ksets that
// are demanded already or, if none are, a round of all there are. It is in vain
// when dirty_tail has meanwhile passed more ksets than the caller knows of.
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
// how long it was so many segments ago.
func (b *backlog) took(ksets uint64, high, low int) (begin, until uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(b.mu.ksets)
	b.mu.ksets[b.mu.next] = ksets
	begin, until = b.mu.ksets[(b.mu.next-high+n)%n], b.mu.ksets[(b.mu.next-low+n)%n]
	b.mu.next = (b.mu.next + 1) % n
	return begin, until
}

// expiry knows which part of the log is old. It looks twice in the time that data may
// become old in: what was there at one look is old at the next but one, when it is
// between half as old and as old as it may become.
type expiry struct {
	since     time.Time // the last look
	last, old uint64    // ksets in the log then, and at the look before that
}

// expired returns how many ksets of the log are old, if it has so many now, and when that
// may change. most is how old they may become.
func (x *expiry) expired(now time.Time, written uint64, most time.Duration) (old uint64, next time.Time) {
	if now.Sub(x.since) >= most/2 {
		x.since, x.old, x.last = now, x.last, written
	}
	return x.old, x.since.Add(most / 2)
}

// Flush writes all data back that is dirty now, and returns when the disk has confirmed
// its flush. It returns the error of the first round that fails from now on, or, when
// everything has been tried, that of a part that could not be written. The part stays
// dirty, and write-back goes on trying. It returns ErrStopped where the cache is closed,
// and ctx's error where that ends first. Any goroutine, any number at a time.
func (c *Cache) Flush(ctx context.Context) error {
	w := flushWaiter{done: make(chan error, 1)}
	select {
	case <-c.stop: // the cache may be another's by now
		return ErrStopped
	default:
	}
	c.writeback.mu.Lock()
	// In this order: deferred parts are logged again before dirty_tail passes its
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

// answerFlushes tells those who wait for a flush how the last round went, and keeps
// the reason if not everything is well.
func (c *Cache) answerFlushes(err error) {
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
			// Not with an error, since dirty_tail may have passed deferred
			// parts, which are logged again behind it.
			f.done <- nil
		default:
			return false
		}
		return true
	})
}

// hindrance returns what keeps data from the disk, nil if nothing does.
func (w *writeback) hindrance() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.err
}

// failed is called when the disk has failed outside a round.
func (w *writeback) failed(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.err = err
}

// nextTurn counts a turn of the loop, and reports whether somebody waits for a
// flush, and whether the deferred parts are to be tried in it. For those who came since
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
// that have stopped coming, or a deferred part that is due.
func (c *Cache) writebackLoop() {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	w := &c.writeback
	timer := time.NewTimer(time.Hour) // it is set before anybody waits for it
	var writers activity
	var delay time.Duration // after the last round, which has failed
	for !c.stopping() {
		given := w.errands.given.Load()
		_, written := c.journal.head()
		flushing, again, flushes := w.nextTurn()
		c.relogPressed()
		if again {
			w.retryNow()
		}
		o := c.outlook(written, &writers, flushing, flushes)
		if round, wake, ever := o.plan(); !round {
			if ever {
				timer.Reset(wake.Sub(o.now))
			}
			w.errands.done.Store(given)
			c.sleepUnlessWritten(o, timer, ever)
			continue
		}
		held := w.holds()
		err := c.round(o.until)
		if err == errRest {
			return
		}
		c.answerFlushes(err)
		c.through.roundEnded(w.at.ksets, err)
		if c.failure() == ErrAborted {
			return // the transfers under way still have their parts of the round
		}
		delay = c.reportRound(err, held, delay)
		c.gc.kick() // with an error, too: what was passed by may be logged again, for those who wait for room
		if err != nil {
			select {
			case <-time.After(delay):
			case <-c.workers.stop:
			}
		}
	}
}

// activity knows since when nobody has written.
type activity struct {
	ksets uint64 // in the log, unchanged
	since time.Time
}

// quietSince is told how many ksets are in the log.
func (a *activity) quietSince(now time.Time, ksets uint64) time.Time {
	if a.since.IsZero() || a.ksets != ksets {
		a.ksets, a.since = ksets, now
	}
	return a.since
}

// relogPressed logs again what was not written where garbage collection waits for that.
func (c *Cache) relogPressed() {
	w := &c.writeback
	if !w.pressed.Swap(false) || !w.holds() || c.failure() != nil {
		return
	}
	passed, err := c.relogDeferred()
	if err == nil && !passed {
		passed, err = c.relogSkipped()
	}
	if err == nil && !passed {
		passed, err = c.relogForRoom()
	}
	if err != nil {
		c.fail(err)
	}
	// A collector that pressed for nothing is not told to press again.
	if passed {
		c.gc.kick()
	}
}

// outlook is what the loop knows when it decides what to do. Places in the log are numbers
// of ksets.
type outlook struct {
	now      time.Time
	lookAt   time.Time // when writers have been idle for long enough, or some data is too old
	look     bool      // if that will ever be
	retryAt  time.Time // when a deferred part is due, or what was passed by
	retry    bool      // if there is any that will be
	written  uint64    // the head
	at       uint64    // where the next round begins
	until    uint64    // up to where there is reason to write
	cleaned  uint64    // dirty_tail
	holds    bool      // something was tried and not written, and dirty_tail may have to stay
	flushing bool      // somebody waits for a flush
}

// outlook is told what nextTurn has said, and where the head was before that.
func (c *Cache) outlook(written uint64, writers *activity, flushing bool, flushes uint64) outlook {
	w := &c.writeback
	s := c.settings.now.Load()
	o := outlook{now: time.Now(), written: written, flushing: flushing}
	_, o.cleaned = c.tails.dirtyTail()
	pressed := w.tail.Load() == o.cleaned+1 && (s.Writeback || c.pressed())
	quiet := writers.quietSince(o.now, o.written)
	if s.Writeback || flushing || pressed || promisesClean(c.settings.mode()) || c.through.waits.Load() > 0 {
		o.until = w.want.Load()
		o.retryAt, o.retry = w.nextRetry()
		if s := &w.skipped; s.on && (!o.retry || s.next.Before(o.retryAt)) {
			o.retryAt, o.retry = s.next, true
		}
	}
	if s.Writeback && s.DirtyMaxAge > 0 {
		var old uint64
		old, o.lookAt = w.age.expired(o.now, o.written, s.DirtyMaxAge)
		o.until, o.look = max(o.until, old), true
	}
	idle := false
	if s.Writeback && s.IdleAfter > 0 {
		at := quiet.Add(s.IdleAfter)
		idle = !o.now.Before(at)
		if soon := o.now.Add(s.IdleAfter / idleLooks); !idle && soon.Before(at) {
			at = soon
		}
		if !o.look || at.Before(o.lookAt) {
			o.lookAt, o.look = at, true
		}
	}
	if flushing || pressed && o.until <= w.at.ksets || idle {
		o.until = o.written
	}
	o.until = w.rewind(flushes, o.until)
	o.at, o.holds = w.at.ksets, w.holds()
	return o
}

func (o *outlook) dirty() bool { return o.at < o.written }

// plan says whether to make a round. If not, it says when to look again, if time alone will
// be a reason ever.
func (o *outlook) plan() (round bool, wake time.Time, ever bool) {
	switch {
	case o.dirty() && o.at < o.until:
		return true, wake, false
	case !o.holds && (o.cleaned < o.at || o.flushing && !o.dirty()):
		// All is done but for dirty_tail: the deferred parts have been overwritten, or the last
		// try to store it has failed. Or it has been moved just now, and those who wait
		// for a flush are still to be told.
		return true, wake, false
	case o.retry && !o.now.Before(o.retryAt):
		return true, wake, false
	case o.dirty() && o.look && (!o.retry || o.lookAt.Before(o.retryAt)):
		return false, o.lookAt, true
	}
	return false, o.retryAt, o.retry
}

// sleepUnlessWritten waits for a kick, or the timer if it is set. Where there was nothing dirty
// the next write kicks; one that has come meanwhile did not.
func (c *Cache) sleepUnlessWritten(o outlook, timer *time.Timer, set bool) {
	w := &c.writeback
	defer w.asleep.Store(false)
	if !o.dirty() {
		w.asleep.Store(true)
		if _, now := c.journal.head(); now != o.written {
			return
		}
	}
	var expired <-chan time.Time
	if set {
		expired = timer.C
	}
	select {
	case <-c.workers.stop:
	case <-w.kicked:
	case <-expired:
	}
}

// reportRound says how a round has gone, if that is news, and returns how long to wait before
// the next. held is what holds returned before it, and delay what was returned
// for the one before.
func (c *Cache) reportRound(err error, held bool, delay time.Duration) time.Duration {
	w := &c.writeback
	switch {
	case err != nil:
		delay = backoff(delay)
		c.log.Error(WritebackFails, fmt.Sprintf("write-back failed, its data stays in the cache, next try in %v", delay), err)
		return delay
	case w.holds() && !held:
		more := ""
		if w.skipped.on {
			more = " and more"
		}
		c.log.Error(WritebackDefers, fmt.Sprintf("%d pieces of data%s cannot be written back and stay in the cache, the rest goes on", len(w.deferred), more), w.refusal())
	case delay > 0, held && !w.holds():
		c.log.Info(WritebackWorks, "write-back works again", nil)
	}
	return 0
}
