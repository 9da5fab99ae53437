package ublk

import (
	"time"

	"golang.org/x/sys/unix"
)

// pace is how a queue's thread waits for requests, by what it has seen of its
// clients.
//
// A client that waits for each request before it makes the next pays for two
// sleeps of a request: its own and the server's, with an interrupt of another
// processor each, and whatever that processor does to save power. If the next
// request comes within pollFor, the thread looks for it instead of sleeping. A
// look that was in vain is time taken from others, so unless two of three find
// something it soon is hardly ever made.
//
// A client with many requests under way makes them one by one, and the first
// wakes the thread. If that went to work at once it would do so for this one,
// beside or instead of the client, sleep, and be woken for the next. So it lets
// whoever else wants the processor have it for a moment, and takes all that
// have come by then. On two processors with two clients that is worth a half of
// the throughput and more.
type pace struct {
	alone  int // turns in a row with one request at most
	failed int // polls: two for each that was in vain, one off for each other
	skip   int // how many times not to poll
}

const (
	// pollFor is about what a sleep costs both sides on a virtual machine, and
	// several times that of real hardware.
	pollFor = 100 * time.Microsecond
	// pollAlone is how many turns with one request make a client that waits.
	pollAlone = 4
	// pollRarely is how rarely, as a power of two, it is tried at last.
	pollRarely = 10
)

// turned is told how many completions a turn has brought.
func (p *pace) turned(came int) {
	p.alone++
	if came > 1 {
		p.alone = 0
	}
}

// polls reports whether to poll this time.
func (p *pace) polls() bool {
	if p.alone < pollAlone {
		return false
	}
	if p.skip > 0 {
		p.skip--
		return false
	}
	return true
}

// poll returns whether there is something, as soon as there is. Whoever else wants
// the processor gets it meanwhile.
func (p *pace) poll(something func() bool) bool {
	for begin := time.Now(); time.Since(begin) < pollFor; yield() {
		if something() {
			p.failed = max(0, p.failed-1)
			return true
		}
	}
	p.failed = min(p.failed+2, pollRarely)
	p.skip = 1 << p.failed
	return false
}

// gathers reports whether a thread that was woken lets others go on first.
func (p *pace) gathers() bool { return p.alone == 0 }

func yield() { unix.RawSyscallNoError(unix.SYS_SCHED_YIELD, 0, 0, 0) }
