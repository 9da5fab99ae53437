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
// request comes within pollFor, the thread looks for it instead of sleeping.
//
// A client with many requests under way makes them one by one, and the first
// wakes the thread. If that went to work at once it would do so for this one,
// beside or instead of the client, sleep, and be woken for the next. So it lets
// whoever else wants the processor have it for a moment, and takes all that
// have come by then. On two processors with two clients that is worth a half of
// the throughput and more.
//
// Both are given up, but for a try now and then, unless two of three do well:
// polls that find nothing are time taken from others, and whoever else wants the
// processor may not be the client, and not give it back soon.
type pace struct {
	alone              int // turns with one request in a row
	polling, gathering trial
}

const (
	// pollFor is about what a sleep costs both sides on a virtual machine, and
	// several times that of real hardware.
	pollFor = 100 * time.Microsecond
	// pollAlone is how many turns with one request make a client that waits.
	pollAlone = 4
	// gatherFor is how long a client may take to make its requests: some
	// dozens of them, on a slow machine.
	gatherFor = time.Millisecond
	// rarely is how rarely, as a power of two, is tried what does not do well.
	rarely = 10
)

// turned is told how many completions a turn has brought. One that has brought
// none was asked for by another thread, or by a kernel that has said more than is
// true: then only sleeping tells, so it does not lead to a poll.
func (p *pace) turned(came int) {
	switch came {
	case 0:
		p.alone = min(p.alone, pollAlone-1)
	case 1:
		p.alone++
	default:
		p.alone = 0
	}
}

// polls reports whether to poll this time.
func (p *pace) polls() bool { return p.alone >= pollAlone && p.polling.due() }

// poll returns whether there is something, as soon as there is. It looks at least
// once, however long others have had the processor, and they get it between looks.
func (p *pace) poll(something func() bool) bool {
	begin := time.Now()
	found := something()
	for !found && time.Since(begin) < pollFor {
		yield()
		found = something()
	}
	p.polling.went(found)
	return found
}

// gathers reports whether a thread that was woken lets others go on first.
func (p *pace) gathers() bool { return p.alone == 0 && p.gathering.due() }

// gather does so.
func (p *pace) gather() {
	begin := time.Now()
	yield()
	p.gathering.went(time.Since(begin) < gatherFor)
}

func yield() { unix.RawSyscallNoError(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// trial is something that is done as long as it does well.
type trial struct {
	failed int // two for each that went badly, one off for each other
	skip   int // times not to try
}

func (t *trial) due() bool {
	if t.skip > 0 {
		t.skip--
		return false
	}
	return true
}

func (t *trial) went(well bool) {
	if well {
		t.failed = max(0, t.failed-1)
		return
	}
	t.failed = min(t.failed+2, rarely)
	t.skip = 1 << t.failed
}
