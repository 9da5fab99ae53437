package engine

import (
	"sync"
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
	if l.TryLock() {
		return
	}
	for begin := time.Now(); time.Since(begin) < spinFor; {
		for range spinTries {
			if l.TryLock() {
				return
			}
		}
	}
	l.Mutex.Lock()
}
