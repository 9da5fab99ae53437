package engine

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// direct has the writes that go to the disk alone, of a mode that goes around the cache.
//
// Such a write claims its sectors as the read of a miss does (fill.go), until the disk has been
// flushed, when it is answered. So readers wait for it, and nobody fills what the disk had before, or
// what a power cut may take. One flush is for all that landed while the one before
// was under way.
//
// What could go wrong, and why it does not:
//
//   - The cache has older data there, or is about to: a write goes to the disk alone only
//     where the index has nothing, not even a claim. The write that finds something
//     goes through the log.
//   - A write that is logged meanwhile takes the place of the claim, and write-back brings it
//     to the disk before this one arrives there: a round waits for those that overlap
//     its parts. None can begin there afterwards, since the index has something.
//   - The log has a key there of which the index has lost the extent. After a crash replay
//     would bring that back, over this write. So a stripe of which something is lost is noted
//     until key_tail has passed what was in the log then; and while the collector forgets,
//     which it does before its key_tail is durable, nothing goes around. Both copies of key_tail
//     are to be behind what it has forgotten: one may be damaged when the cache is opened.
//   - The fingerprint of the disk changes: what lies in its areas goes through the log.
//   - The cache is handed over: the next server answers this write again, and maybe a later one,
//     before the disk has carried out the first. So a cache at rest begins none, and is at
//     rest only when none is under way.
//   - It fails half way: then nothing is cached of it, and whoever reads asks the disk, which is
//     flushed before that, or nothing of what is read then is kept.
type direct struct {
	kicked chan struct{}
	areas  []area // of the fingerprint
	writes atomic.Uint64
	errors atomic.Uint64

	mu struct {
		sync.Mutex
		resting    bool // none may begin
		collecting bool // likewise: what the index has forgotten may come back
		sure       bool // both copies of key_tail are the same, or none may begin
		flights    []*fill
		ended      chan struct{}    // closed when the next of them ends, if somebody waits for that
		lost       map[int64]uint64 // by stripe, how many ksets key_tail is to pass
		losses     []loss           // one for each of them, or with fewer ksets; oldest first
		unflushed  []*fill          // on the disk, or refused, and not flushed since
	}
}

// loss is a stripe where the index has lost what keys in front of a kset name.
type loss struct {
	stripe int64
	ksets  uint64
}

func (d *direct) init(size int64) {
	d.kicked = make(chan struct{}, 1)
	d.areas = sampledAreas(size)
	d.mu.lost = map[int64]uint64{}
}

// writeDirect gives a write to the disk, or does nothing where it has to go through
// the log.
func (q *Queue) writeDirect(r *Request) bool {
	c := q.c
	d := &c.direct
	n := int64(len(r.Buf))
	if b := int64(c.disk.BlockSize()); r.ticket != 0 || r.Off%b != 0 || n%b != 0 || c.logDamage.Load() != nil {
		return false
	}
	if slices.ContainsFunc(d.areas, func(a area) bool { return a.overlaps(r.Off, n) }) {
		return false
	}
	s := c.index.spanOf(r)
	s.sh.Lock()
	q.pieces = s.partsLocked(q.pieces[:0], func(extent) bool { return true })
	f := (*fill)(nil)
	if len(q.pieces) == 0 {
		f = q.beginDirectLocked(r, s)
	}
	s.sh.Unlock()
	if f == nil {
		return false
	}
	d.writes.Add(1)
	r.lacks.Store(1)
	r.stage = stageDirect
	f.since = c.flushes.failed.Load()
	c.disk.Write(r.Buf, r.Off, f.done)
	return true
}

// beginDirectLocked claims the sectors of a write if it may go around the cache.
func (q *Queue) beginDirectLocked(r *Request, s span) *fill {
	d := &q.c.direct
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.mayBeginLocked(r.Off / ondisk.StripeSize) {
		return nil
	}
	q.claimLocked(s, r, s.off, s.end())
	f := r.fills
	f.direct = true
	d.mu.flights = append(d.mu.flights, f)
	return f
}

// landed is called when the disk has carried a write out, or refused it. Any goroutine.
func (d *direct) landed(f *fill) {
	d.mu.Lock()
	i := slices.Index(d.mu.flights, f)
	d.mu.flights = slices.Delete(d.mu.flights, i, i+1)
	if d.mu.ended != nil {
		close(d.mu.ended)
		d.mu.ended = nil
	}
	d.mu.unflushed = append(d.mu.unflushed, f)
	d.mu.Unlock()
	select {
	case d.kicked <- struct{}{}:
	default:
	}
}

// flushLoop flushes the disk for the writes that have landed, and gives them back to their queues.
// One that was refused is flushed, too: whatever the disk has of it is not to go back again once
// somebody has read it. Where the flush fails, what is read is not kept until one has succeeded.
func (c *Cache) flushLoop() {
	d := &c.direct
	for {
		select {
		case <-d.kicked:
		case <-c.stop:
			return
		}
		d.mu.Lock()
		list := d.mu.unflushed
		d.mu.unflushed = nil
		d.mu.Unlock()
		if len(list) == 0 {
			continue
		}
		since := list[0].since
		for _, f := range list {
			since = min(since, f.since)
		}
		err := c.flushDisk(since, c.stop)
		switch {
		case err == errRest:
			return
		case err != nil && err != ErrAborted:
			c.flushes.unsure.Store(true)
			err = fmt.Errorf("flush the backing device: %w", err)
		}
		for _, f := range list {
			if f.err == nil {
				f.err = err
			} else {
				f.err = fmt.Errorf("write %d bytes at %d of the backing device: %w", len(f.buf), f.off, f.err)
			}
			f.answer()
		}
	}
}

// endDirect is called by the queue that has a write back. Its claim goes only now.
func (q *Queue) endDirect(r *Request) {
	f := r.fills
	r.fills = nil
	if r.Err = f.err; r.Err != nil {
		q.c.direct.errors.Add(1)
	}
	q.endFill(f)
	q.finished = append(q.finished, r)
}

// mayBeginLocked reports whether a write may go around the cache in a stripe, of which the caller
// holds the lock, too.
func (d *direct) mayBeginLocked(stripe int64) bool {
	_, lost := d.mu.lost[stripe]
	_, all := d.mu.lost[everywhere]
	return !lost && !all && d.mu.sure && !d.mu.resting && !d.mu.collecting
}

func (d *direct) isSure() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.sure
}

// makeSure is the collector's: it stores key_tail over its older copy, if a mode that goes around the
// cache is obeyed, and reports whether both are the same.
func (c *Cache) makeSure() (sure bool, err error) {
	if !goesAround(c.settings.mode()) {
		return false, nil
	}
	if err := c.moveKeyTail(c.tails.keyTail()); err != nil {
		return false, err
	}
	return true, c.persist()
}

// underWay returns what is closed when the next of the writes ends, if any of which is so.
func (d *direct) underWay(which func(*fill) bool) (ended <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.ContainsFunc(d.mu.flights, which) {
		return nil
	}
	if d.mu.ended == nil {
		d.mu.ended = make(chan struct{})
	}
	return d.mu.ended
}

// awaitDirect waits until no write that overlaps one of the parts, which are sorted, is
// under way to the disk. Its error is errRest or ErrAborted.
func (c *Cache) awaitDirect(parts []part) error {
	overlaps := func(f *fill) bool {
		end := f.off + int64(len(f.buf))
		for i := range parts { // zeros may be there twice, so where they end is in no order
			if p := &parts[i]; p.off >= end {
				break
			} else if p.off+int64(p.len()) > f.off {
				return true
			}
		}
		return false
	}
	for ended := c.direct.underWay(overlaps); ended != nil; ended = c.direct.underWay(overlaps) {
		select {
		case <-ended:
		case <-c.workers.stop:
			return errRest
		case <-c.aborted:
			return ErrAborted
		}
	}
	return nil
}

// restDirect lets no write go around any more, and returns when none is under way.
func (c *Cache) restDirect() {
	d := &c.direct
	d.set(&d.mu.resting, true)
	all := func(*fill) bool { return true }
	for ended := d.underWay(all); ended != nil; ended = d.underWay(all) {
		select {
		case <-ended:
		case <-c.aborted:
			return
		}
	}
}

// set sets one of resting, collecting and sure.
func (d *direct) set(flag *bool, to bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*flag = to
}

// everywhere is the stripe of a loss in all of them.
const everywhere = -1

// lose takes note that the index is about to lose what keys in front of a kset name, in
// a stripe. It is called before that, or by the collector before anything may go around again, so
// whoever finds nothing there finds this.
func (d *direct) lose(stripe int64, ksets uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, known := d.mu.lost[stripe]; !known {
		d.mu.losses = append(d.mu.losses, loss{stripe, ksets})
	}
	d.mu.lost[stripe] = max(d.mu.lost[stripe], ksets)
}

// passed is called when key_tail has durably passed so many ksets. sure is whether both of its
// copies have.
func (d *direct) passed(ksets uint64, sure bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.collecting, d.mu.sure = false, sure
	for len(d.mu.losses) > 0 && d.mu.losses[0].ksets <= ksets {
		l := d.mu.losses[0]
		d.mu.losses = d.mu.losses[1:]
		if until := d.mu.lost[l.stripe]; until > ksets {
			d.mu.losses = append(d.mu.losses, loss{l.stripe, until})
		} else {
			delete(d.mu.lost, l.stripe)
		}
	}
}
