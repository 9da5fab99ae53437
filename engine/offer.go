package engine

import (
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// A kset costs its fence, which takes longer than all else that is done under the
// journal's lock, and one that names a single block costs as much as one of a hundred.
// With one request under way at a time on each of many queues that is the limit: they
// wait for each other's fences.
//
// So a queue that finds the journal locked offers its keys. The queue that commits next,
// which may be the same, takes all keys that are offered, as far as one kset has room, puts
// them into it behind its own, and enters them with these. Then the ksets are as large as
// the queues are many, and a fence is for all who have waited.
//
// The queue that has offered its keys waits all the while, for the lock or for the word
// that it needs the lock no more, which it hears at once only while it spins. Its data is
// durable before it offers, as before a kset of its own, and it is told once the kset is
// durable and the shards of its keys are locked: a write that it acknowledges then can be
// found, or is waited for, as after a kset of its own.
//
// Fills are not offered: their queue sees under the lock which of them still count. And
// offers are left alone where the log has no room for all of them together.

// offer is the keys that a queue has for the holder of the journal's lock.
type offer struct {
	keys []ondisk.Key
	next *offer
	err  error // of the commit, once that is done
	done atomic.Bool
}

// offers is the stack of offers that have not been taken, or found no room. While the
// lock is free, the offer of each queue that waits in lockFor is there, or done.
type offers struct{ first atomic.Pointer[offer] }

func (l *offers) push(o *offer) {
	for {
		o.next = l.first.Load()
		if l.first.CompareAndSwap(o.next, o) {
			return
		}
	}
}

func (l *offers) pushAll(list *offer) {
	for list != nil {
		o := list
		list = o.next
		l.push(o)
	}
}

// lockFor locks the journal for a commit of the queue, or reports that another queue has
// done that commit: the error is in the queue's offer.
func (j *journal) lockFor(q *Queue) (locked bool) {
	switch {
	case len(q.filled) > 0:
		j.mu.Lock()
		return true
	case j.mu.TryLock():
		return true
	}
	o := &q.offer
	o.keys = q.keys[:min(len(q.keys), ondisk.MaxKeys)]
	o.done.Store(false)
	j.offers.push(o)
	return j.mu.lockUnless(&o.done)
}

// takeOffersLocked returns the offers for which a kset has room beside the keys of the
// queue, whose own it drops, and the keys of all.
func (j *journal) takeOffersLocked(q *Queue, keys []ondisk.Key) (all []ondisk.Key, taken *offer) {
	all = keys
	for o := j.offers.first.Swap(nil); o != nil; {
		next := o.next
		switch {
		case o == &q.offer:
		case len(all)+len(o.keys) > ondisk.MaxKeys:
			j.offers.push(o)
		default:
			if taken == nil {
				q.together = append(q.together[:0], keys...)
			}
			q.together = append(q.together, o.keys...)
			all = q.together
			o.next, taken = taken, o
		}
		o = next
	}
	return all, taken
}

// finish tells all of the list how their commit went. Each may be made anew at once.
func (o *offer) finish(err error) {
	for o != nil {
		next := o.next
		o.err = err
		o.done.Store(true)
		o = next
	}
}
