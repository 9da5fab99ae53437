package engine

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-pcache/ondisk"
)

// Write-back copies dirty data to the disk, in rounds. A round takes the
// oldest ksets behind dirty_tail, writes what the index still has of their
// keys, sorted by address and joined into large writes, flushes the disk once,
// and only then moves dirty_tail.
//
// What a later key has superseded is not written: that key is dirty too and
// further on in the log, so dirty_tail cannot pass it unwritten, and until
// then every read is answered by it. The parts of one round are therefore
// disjoint, and nothing of them can be overtaken by an older write.
//
// A round that failed, in a write or in the flush, has moved nothing: the next
// one begins at the same place and writes everything again, which is the only
// safe reading of a failed flush.
//
// Rounds are made when somebody waits for them (a flush, or garbage
// collection that needs room), when the cache is half full of what the
// collector is allowed, and when the writers have been idle.

const (
	// roundBytes bounds a round, so that dirty_tail moves while a disk of
	// 100 MB/s works through a long log, and roundParts its memory.
	roundBytes = 64 << 20
	roundParts = 64 << 10

	// transferBytes by transfers: what is under way to the disk at once.
	transferBytes = 1 << 20
	transfers     = 16

	// idleAfter is how long no write came before the dirty data is written
	// without being asked for: long enough to let a burst overwrite itself.
	idleAfter = time.Second

	// The delay after a failed round, doubled with each failure up to the
	// longest: soon enough after a cable was put back.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 10 * time.Second
)

type writeback struct {
	kicked chan struct{}
	asleep atomic.Bool   // there was nothing dirty to write
	want   atomic.Uint64 // ksets that should be clean now

	parts []part
	key   []extent
	whole []byte
	free  chan *transfer

	mu struct {
		sync.Mutex
		waiters []flushWaiter
		err     error // of the last round, nil if it succeeded
	}
	written atomic.Uint64 // bytes, since Open
	inRound atomic.Int64  // bytes, of the round under way
}

type flushWaiter struct {
	until uint64
	done  chan error
}

// part is one run of dirty sectors of a round.
type part struct {
	s   span
	e   extent
	off int64 // bytes on the disk
}

func (p *part) len() int { return int(p.e.n) << sectorShift }

func (p *part) zero() bool { return p.e.flags&extZero != 0 }

// transfer is one write to the disk.
type transfer struct {
	buf  []byte
	n    int
	off  int64
	err  error
	done func(error)
}

func (w *writeback) init(c *Cache) {
	w.kicked = make(chan struct{}, 1)
	w.free = make(chan *transfer, transfers)
	for range transfers {
		t := &transfer{buf: c.disk.Buffer(transferBytes)}
		t.done = func(err error) {
			t.err = err
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

// pressWriteback asks for a round now, whatever the policy.
func (c *Cache) pressWriteback() {
	_, cleaned := c.tails.dirtyTail()
	c.writeback.demand(cleaned + 1)
}

// demand asks for everything up to the given kset, counted as journal.written.
func (w *writeback) demand(until uint64) {
	for old := w.want.Load(); old < until && !w.want.CompareAndSwap(old, until); {
		old = w.want.Load()
	}
	w.kick()
}

// Flush writes all data back that is dirty now, and returns when the disk has
// confirmed its flush. It returns the error of the first round that fails;
// the data stays dirty, and write-back goes on trying.
func (c *Cache) Flush(ctx context.Context) error {
	_, written := c.journal.head()
	w := flushWaiter{until: written, done: make(chan error, 1)}
	c.writeback.mu.Lock()
	if _, cleaned := c.tails.dirtyTail(); cleaned >= written {
		c.writeback.mu.Unlock()
		return nil
	}
	c.writeback.mu.waiters = append(c.writeback.mu.waiters, w)
	c.writeback.mu.Unlock()
	c.writeback.demand(written)
	select {
	case err := <-w.done:
		return err
	case <-c.stop:
		return ErrStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// settle tells those who wait for a flush how the last round went.
func (c *Cache) settle(err error) {
	_, cleaned := c.tails.dirtyTail()
	w := &c.writeback
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.err = err
	w.mu.waiters = slices.DeleteFunc(w.mu.waiters, func(f flushWaiter) bool {
		if err == nil && cleaned < f.until {
			return false
		}
		f.done <- err
		return true
	})
}

// writebackLoop sleeps until there is a reason to write: a demand, or writers
// that have stopped coming.
func (c *Cache) writebackLoop() {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	w := &c.writeback
	timer := time.NewTimer(idleAfter)
	var delay time.Duration
	idle := false
	for {
		_, cleaned := c.tails.dirtyTail()
		_, written := c.journal.head()
		switch {
		case c.stopping():
			return
		case cleaned == written:
			w.asleep.Store(true)
			if _, now := c.journal.head(); now == written {
				c.awaitKick(nil)
			}
			w.asleep.Store(false)
			idle = false
			continue
		case !idle && cleaned >= w.want.Load():
			timer.Reset(idleAfter)
			if timedOut := c.awaitKick(timer); timedOut {
				_, now := c.journal.head()
				idle = now == written
			}
			continue
		}
		err := c.round()
		c.settle(err)
		if err != nil {
			delay = min(max(firstRetry, 2*delay), lastRetry)
			c.errs.rounds.Add(1)
			c.log.Error(fmt.Sprintf("write-back failed, its data stays in the cache, next try in %v", delay), err)
			select {
			case <-time.After(delay):
			case <-c.stop:
			}
			continue
		}
		if delay > 0 {
			delay = 0
			c.log.Info("write-back works again", nil)
		}
		_, now := c.journal.head()
		idle = idle && now == written
		c.gc.kick()
	}
}

// awaitKick waits for a kick, the cache's end, or the timer if there is one.
func (c *Cache) awaitKick(timer *time.Timer) (timedOut bool) {
	var expired <-chan time.Time
	if timer != nil {
		expired = timer.C
	}
	select {
	case <-c.stop:
	case <-c.writeback.kicked:
	case <-expired:
		return true
	}
	return false
}

// round writes the oldest dirty ksets back and moves dirty_tail behind them.
func (c *Cache) round() error {
	w := &c.writeback
	defer w.inRound.Store(0)
	end, ksets, err := c.collect()
	if err != nil {
		return fmt.Errorf("read the log for write-back: %w", err)
	}
	slices.SortFunc(w.parts, func(a, b part) int { return cmp.Compare(a.off, b.off) })
	if len(w.parts) > 0 {
		if err := c.transferParts(); err != nil {
			return err
		}
		if err := c.flushDisk(); err != nil {
			return fmt.Errorf("flush the backing device: %w", err)
		}
	}
	// Before dirty_tail moves: after that a part's place may soon be another's.
	for _, p := range w.parts {
		w.key = c.index.clean(p.s, p.s.place(p.e.seg, p.e.pos), w.key)
	}
	if err := c.moveDirtyTail(end, ksets); err != nil {
		c.fail(err)
		return err
	}
	return nil
}

// collect gathers the parts of a round. Their segments need no pins: keys
// behind dirty_tail keep their references.
func (c *Cache) collect() (end ondisk.Position, ksets uint64, err error) {
	w := &c.writeback
	from, _ := c.tails.dirtyTail()
	to, _ := c.journal.head()
	end = from
	w.parts = w.parts[:0]
	bytes := 0
	err = c.walk(from, to, func(k *ondisk.Kset, after ondisk.Position) bool {
		for i := range k.Keys {
			if key := &k.Keys[i]; key.Flags&ondisk.KeyClean == 0 {
				bytes += c.collectKey(key)
			}
		}
		end = after
		ksets++
		return bytes < roundBytes && len(w.parts) < roundParts
	})
	return end, ksets, err
}

// collectKey adds what the index still has of a key, and returns its size.
func (c *Cache) collectKey(k *ondisk.Key) (bytes int) {
	if k.Gen != c.segments.all[k.Seg].gen.Load() {
		return 0
	}
	w := &c.writeback
	s, p := c.keySpan(k)
	s.sh.Lock()
	w.key = s.partsLocked(w.key[:0], func(e extent) bool { return p.holds(e) && e.flags&extDirty != 0 })
	s.sh.Unlock()
	for _, e := range w.key {
		if e.flags&extZero != 0 {
			// What a transfer of zeros costs has little to do with their number.
			bytes += ondisk.SectorSize
			w.parts = append(w.parts, part{s: s.sub(e), e: e, off: int64(k.Off) + int64(e.off-s.off)<<sectorShift})
			continue
		}
		bytes += int(e.n) << sectorShift
		for rest := e; rest.n > 0; {
			// A key may be as long as a stripe.
			e, rest = rest, rest.from(min(rest.end(), rest.off+transferBytes>>sectorShift))
			e.n -= rest.n
			w.parts = append(w.parts, part{s: s.sub(e), e: e, off: int64(k.Off) + int64(e.off-s.off)<<sectorShift})
		}
	}
	return bytes
}

// transferParts writes the sorted parts, neighbours joined, and returns the
// first error once nothing is under way any more. What is not in error is
// written all the same.
func (c *Cache) transferParts() error {
	w := &c.writeback
	var first error
	fault := func(err error) {
		if first == nil {
			first = err
		}
	}
	take := func() *transfer {
		t := <-w.free
		if t.err != nil {
			fault(fmt.Errorf("write %d bytes at %d of the backing device: %w", t.n, t.off, t.err))
		} else {
			w.inRound.Add(int64(t.n))
		}
		t.err, t.n = nil, 0
		return t
	}
	for i := 0; i < len(w.parts); {
		t := take()
		t.off = w.parts[i].off
		if w.parts[i].zero() {
			for ; i < len(w.parts) && w.parts[i].zero() && w.parts[i].off == t.off+int64(t.n) && t.n < MaxZero; i++ {
				t.n += w.parts[i].len()
			}
			c.disk.Zero(t.off, int64(t.n), t.done)
			continue
		}
		for ; i < len(w.parts) && !w.parts[i].zero() && w.parts[i].off == t.off+int64(t.n) && t.n+w.parts[i].len() <= len(t.buf); i++ {
			p := &w.parts[i]
			if err := c.load(t.buf[t.n:t.n+p.len()], p); err != nil {
				// What lies before it goes; behind it a new transfer begins.
				fault(err)
				i++
				break
			}
			t.n += p.len()
		}
		b := int64(c.disk.BlockSize())
		if t.off%b != 0 || int64(t.n)%b != 0 {
			fault(fmt.Errorf("%w: %d bytes at %d, blocks of %d", ErrUnaligned, t.n, t.off, b))
			t.n = 0
		}
		if t.n == 0 {
			w.free <- t
			continue
		}
		w.written.Add(uint64(t.n))
		c.disk.Write(t.buf[:t.n], t.off, t.done)
	}
	all := make([]*transfer, transfers)
	for i := range all {
		all[i] = take()
	}
	for _, t := range all {
		w.free <- t
	}
	return first
}

// load copies a part out of the region and verifies it.
func (c *Cache) load(buf []byte, p *part) error {
	if err := c.readExtent(buf, p.e, &c.writeback.whole); err != nil {
		c.errs.memory.Add(1)
		return fmt.Errorf("read dirty data at %d: %w", p.off, err)
	}
	return nil
}

func (c *Cache) flushDisk() error {
	done := make(chan error, 1)
	c.disk.Flush(func(err error) { done <- err })
	return <-done
}
