package engine

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ublk-pcache/ondisk"
)

// brake slows writers down that are faster than the disk, before there is no room left.
//
// Without it they go on at full speed until the last segment is taken, then all stand still
// until write-back has made the next one, which they fill at once. So from gc_percent on
// each byte that is written costs some time, and the more the fuller the cache is. Where
// the time that it costs is what the disk takes for it, it becomes no fuller. Nobody needs to know how fast
// the disk is: the cost doubles so many times on the way that there is such a place
// for any. While write-back is held there is not, so nobody is slowed.
//
// A write is held when it is in the log, and before it is answered: it holds nothing that others
// need. What a few writes cost is too short to be waited for, so it adds up
// until it is worth it, and is forgotten where writers are slower by themselves.
type brake struct {
	cost   atomic.Int64 // picoseconds a byte, 0 for none
	kicked chan struct{}
	mu     struct {
		sync.Mutex
		paid time.Duration // since start, until when all is paid that was written
		held []heldWrite   // in the order in which they are due
	}
}

// heldWrite is a write that is answered at some time since start.
type heldWrite struct {
	r   *Request
	due time.Duration
}

const (
	// leastCost is for 16 GB a second, more than writers reach, and costDoubles how often
	// it doubles until there is no room left: then it is for 250 KB a second.
	leastCost   = 60 // picoseconds a byte
	costDoubles = 16
	// brakeZone is the least number of segments between gc_percent and the end in which
	// anything can be slowed gradually.
	brakeZone = 4

	// leastHold is the shortest time that is worth waiting for, mostHold the longest that one
	// write waits: the disk may have stopped.
	leastHold = time.Millisecond
	mostHold  = time.Second
)

func (b *brake) init() { b.kicked = make(chan struct{}, 1) }

func (b *brake) kick() {
	select {
	case b.kicked <- struct{}{}:
	default:
	}
}

// costAt returns the cost of a byte, in picoseconds, where the log has come some segments beyond the
// point from which writers are slowed, of zone that it has from there on.
func costAt(beyond, zone int) int64 {
	if beyond <= 0 || zone < brakeZone {
		return 0
	}
	full := min(1, float64(beyond)/float64(zone))
	return int64(leastCost * math.Exp2(costDoubles*full))
}

// setBrake is called when a segment has been taken or become free.
func (c *Cache) setBrake() {
	b, s := &c.brake, c.settings.now.Load()
	b.mu.Lock() // or an older cost might come last
	defer b.mu.Unlock()
	from := s.GCPercent * c.segments.good() / 100
	cost := costAt(c.inLog()-from, c.segments.good()-c.segments.reserve-from)
	if !s.Writeback {
		cost = 0
	}
	if b.cost.Swap(cost) != cost && cost == 0 {
		b.kick()
	}
}

// holds keeps a write that could be answered, if it has to be waited for.
func (b *brake) holds(r *Request, cost int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Duration(sinceStart())
	b.mu.paid = max(b.mu.paid, now) + time.Duration(int64(len(r.Buf))*cost/1000)
	b.mu.paid = min(b.mu.paid, now+mostHold)
	if b.mu.paid < now+leastHold {
		return false
	}
	b.mu.held = append(b.mu.held, heldWrite{r, b.mu.paid})
	if len(b.mu.held) == 1 {
		b.kick()
	}
	return true
}

// brakeLoop answers the writes that are held when they are due, and all of them when there is room.
func (c *Cache) brakeLoop() {
	b := &c.brake
	timer := time.NewTimer(mostHold)
	for {
		select {
		case <-b.kicked:
		case <-timer.C:
		case <-c.stop:
			return
		}
		if next, ok := c.answerHeld(); ok {
			timer.Reset(next)
		}
	}
}

// answerHeld does so, and returns how long the next one is to wait, if there is one.
func (c *Cache) answerHeld() (next time.Duration, ok bool) {
	b := &c.brake
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Duration(sinceStart())
	all := b.cost.Load() == 0 || c.failure() != nil
	n := 0
	for ; n < len(b.mu.held) && (all || b.mu.held[n].due <= now); n++ {
		r := b.mu.held[n].r
		r.stage = stageAnswered
		r.q.post(r)
	}
	if b.mu.held = slices.Delete(b.mu.held, 0, n); len(b.mu.held) == 0 {
		return 0, false
	}
	return b.mu.held[0].due - now, true
}

// writeLimit returns how many bytes a second writers are held to, 0 for no limit.
func (b *brake) writeLimit() int64 {
	if cost := b.cost.Load(); cost > 0 {
		return int64(time.Second) * 1000 / cost / ondisk.SectorSize * ondisk.SectorSize
	}
	return 0
}
