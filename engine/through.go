package engine

import (
	"slices"
	"sync"
	"sync/atomic"
)

// through has the writes of a mode that promises a clean cache: those that are
// answered when write-back has brought them to the disk and flushed it.
//
// A round answers all that are logged in front of where it ends. One of which the disk, or
// the memory, has refused a part is answered with that error, as by a disk alone; its data stays
// dirty, and write-back goes on trying. So it is known before any of it is committed,
// or a round might come and go before it begins to wait. After a round that failed, all that
// are committed are answered with its error: rounds may begin at the same place for long.
//
// A write that was overwritten is not written back: the later one is. So it waits until those are
// answered that may have overwritten it when the disk had all in front of it, and if one of them has
// failed, it has failed, too.
//
// All writes of a turn obey one mode, the one at its begin, and who changes the mode waits for the
// turns that have begun with the old one.
//
// A cache at rest leaves them waiting. After an upgrade the next server is given them again.
type through struct {
	waits atomic.Int64 // how many wait
	mu    struct {
		sync.Mutex
		list []*Request
		done uint64 // ksets that the disk has, or of which it has refused parts
		last uint64 // the number of the last that has come
		err  error  // of the last that has failed
		fail uint64 // how many have

		// Somebody waits for all up to a number to be answered.
		drain   uint64
		drained chan struct{} // nil if nobody does
	}
}

// register takes note of the writes of a queue of which all or a part is about to be committed.
func (c *Cache) register(q *Queue) {
	_, from := c.journal.head()
	t := &c.through
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, batch := range [...][]*Request{q.turn, q.line} {
		for _, r := range batch {
			if (r.Op == Write || r.Op == Zero) && r.done > 0 && !r.through {
				t.mu.last++
				r.through, r.number, r.from, r.until, r.refused = true, t.mu.last, from, 0, nil
				r.triedAt, r.overBy = 0, 0
				t.mu.list = append(t.mu.list, r)
			}
		}
	}
	t.waits.Store(int64(len(t.mu.list)))
}

// forget is called for a write that is answered otherwise, with an error if it has one.
func (t *through) forget(r *Request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r.through = false
	t.takeOutLocked(func(x *Request) bool { return x == r })
	t.failedLocked(r, t.mu.list)
}

// awaitDisk has a write wait that is logged in front of the kset until. It may be answered
// before awaitDisk returns.
func (c *Cache) awaitDisk(r *Request, until uint64) {
	t := &c.through
	t.mu.Lock()
	r.until = until
	if c.failure() == ErrAborted {
		t.answerLocked(ErrAborted, func(x *Request) bool { return x == r })
	} else {
		t.answerDoneLocked()
	}
	t.mu.Unlock()
	c.writeback.demand(until)
}

// refuse takes note of a part that a round could not write, whose key lies at ksets or behind.
func (t *through) refuse(p *part, ksets uint64) {
	if t.waits.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.mu.list {
		if ksets >= r.from && r.overlaps(p.off, int64(p.len())) {
			r.refused = p.err
		}
	}
}

func (r *Request) overlaps(off, n int64) bool { return r.Off < off+n && off < r.Off+int64(r.size()) }

// failedLocked is called for a write that leaves the list. If it has failed, so have those of the list
// that it may have overwritten.
func (t *through) failedLocked(r *Request, list []*Request) {
	if r.Err == nil {
		return
	}
	t.mu.err = r.Err
	t.mu.fail++
	for _, x := range list {
		if x.through && (r.until == 0 || x.from < r.until) && x.refused == nil && x.overlaps(r.Off, int64(r.size())) {
			x.refused = r.Err
		}
	}
}

// roundEnded is told how a round has gone: everything in front of at has been tried.
func (t *through) roundEnded(at uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.done = max(t.mu.done, at)
	t.answerDoneLocked()
	if err != nil {
		t.answerLocked(err, committed)
	}
}

// abort answers all of them.
func (t *through) abort() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answerLocked(ErrAborted, committed)
}

// release answers those that a mode need not have waiting any more.
func (t *through) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answerLocked(nil, committed)
}

// registered returns what is closed when all that are known now have been answered, nil if none
// is. It is for one at a time.
func (t *through) registered() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.mu.list) == 0 {
		return nil
	}
	t.mu.drain, t.mu.drained = t.mu.last, make(chan struct{})
	return t.mu.drained
}

// failures returns how many writes have failed, and the error of the last.
func (t *through) failures() (n uint64, last error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.fail, t.mu.err
}

func committed(r *Request) bool { return r.until != 0 }

// answerDoneLocked answers those that the disk has, or what has overwritten them.
func (t *through) answerDoneLocked() {
	for more := true; more; {
		n := len(t.mu.list)
		list := slices.Clone(t.mu.list)
		t.answerLocked(nil, func(r *Request) bool {
			if r.until > t.mu.done {
				return false
			}
			if r.overBy == 0 {
				r.triedAt, r.overBy = t.mu.done, t.mu.last
			}
			return !slices.ContainsFunc(list, func(x *Request) bool {
				return x.through && x != r && x.number <= r.overBy && (x.until == 0 || x.until > r.triedAt) && x.overlaps(r.Off, int64(r.size()))
			})
		})
		more = len(t.mu.list) < n // another may have waited for one of these
	}
}

// answerLocked answers the writes that which is for, if they are committed.
func (t *through) answerLocked(err error, which func(*Request) bool) {
	list := slices.Clone(t.mu.list)
	t.takeOutLocked(func(r *Request) bool {
		if r.until == 0 || !which(r) {
			return false
		}
		r.through = false
		if r.Err = r.refused; r.Err == nil {
			r.Err = err
		}
		t.failedLocked(r, list)
		if c := r.q.c; r.Err == nil && r.FUA && !promisesClean(c.settings.mode()) && !c.mem.Durable() {
			c.syncer.add(r)
			return true
		}
		r.stage = stageAnswered
		r.q.post(r)
		return true
	})
}

func (t *through) takeOutLocked(which func(*Request) bool) {
	t.mu.list = slices.DeleteFunc(t.mu.list, which)
	t.waits.Store(int64(len(t.mu.list)))
	if t.mu.drained != nil && !slices.ContainsFunc(t.mu.list, func(r *Request) bool { return r.number <= t.mu.drain }) {
		close(t.mu.drained)
		t.mu.drained = nil
	}
}
