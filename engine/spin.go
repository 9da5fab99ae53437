package engine

import (
	"sync"
	"sync/atomic"
	"time"
)

// spinning is a mutex for what is held for a few microseconds by threads that
// serve queues. A [sync.Mutex] spins for less than that; then the goroutine is
// parked and, since it is bound to its thread, so is the thread, and to wake it
// takes two system calls and some 50 µs until it runs. Two queues that write
// spent more than half of their time so.
type spinning struct{ sync.Mutex }

const (
	// spinFor is how long a thread tries before it sleeps: longer than any
	// holder needs that has a processor, but for the few that make a tree of a
	// table (table.go).
	spinFor = 10 * time.Microsecond
	// spinTries are made between two looks at the clock.
	spinTries = 50
)

func (l *spinning) Lock() {
	if !l.TryLock() && !l.spin(nil) {
		l.Mutex.Lock()
	}
}

// lockUnless locks, or reports false if done has been set. Only the holder of the lock
// may set it, so the answer holds as long as the lock does.
func (l *spinning) lockUnless(done *atomic.Bool) (locked bool) {
	if !l.spin(done) {
		if done.Load() {
			return false
		}
		l.Mutex.Lock()
	}
	// It may have been set when it had just been looked at.
	if done.Load() {
		l.Unlock()
		return false
	}
	return true
}

// spin tries to lock for a while, unless there is a done and that is set, and reports
// whether it has.
func (l *spinning) spin(done *atomic.Bool) (locked bool) {
	for begin := time.Now(); time.Since(begin) < spinFor; {
		for range spinTries {
			if done != nil && done.Load() {
				return false
			}
			if l.TryLock() {
				return true
			}
		}
	}
	return false
}
