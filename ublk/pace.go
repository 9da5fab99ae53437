package ublk

import (
	"time"

	"golang.org/x/sys/unix"
)

// pace is how a queue's thread waits for requests, by what it has seen of its
// clients.
//
// A client that waits for each request before it makes the next pays for two
// sleeps with each request: its own and the server's. Each costs an interrupt
// of another processor, and the time that this one needs to wake up if it
// saves power. If the next request comes within pollFor, the thread looks for
// it instead of sleeping.
//
// A client with many requests under way makes them one by one, and the first
// wakes the thread. If the thread went to work at once, it would serve this
// one, beside or instead of the client, sleep, and be woken for the next. So it
// yields the processor for a moment, and takes all requests that have come by
// then. On two processors with two clients that is worth a half of the
// throughput and more.
//
// Both are given up, but for a try now and then, unless two of three do well.
// Polls that find nothing take time from others. And the processor may go to
// others than the client, who may keep it for long.
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
	// rarely bounds how many times in a row a trial that does badly is
	// skipped, as a power of two.
	rarely = 10
)

// turned is told how many completions a turn has brought. A turn without any was
// asked for by another thread, or by a kernel that has announced more than there
// was. Then only a sleep tells, so such a turn does not lead to a poll.
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

// poll looks until there is something, for pollFor at most, and reports whether
// there is. It looks at least once, and others get the processor between two
// looks.
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

// gather lets others have the processor for a moment.
func (p *pace) gather() {
	begin := time.Now()
	yield()
	p.gathering.went(time.Since(begin) < gatherFor)
}

func yield() { unix.RawSyscallNoError(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// trial decides whether something that may do well or badly is tried again.
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
