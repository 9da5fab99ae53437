package main

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"time"

	"ublk-pcache/internal/uring"
	"ublk-pcache/ublk"
)

const (
	hddSize  = 4 << 30
	hddDepth = 32 // what native command queuing has

	// A disk of 7200 turns a minute: what lies a little ahead comes by under the head; everything else takes a seek, which
	// grows with the root of the distance, and half a turn.
	trackBytes = 1 << 20
	mediaRate  = 160e6 // bytes a second
	shortest   = time.Millisecond
	fullStroke = 15 * time.Millisecond
	halfATurn  = 4170 * time.Microsecond
)

// access returns how long a disk whose head is at from takes for n bytes at to.
func access(from, to int64, n int) time.Duration {
	passing := func(n int64) time.Duration { return time.Duration(float64(n) / mediaRate * 1e9) }
	far := math.Sqrt(math.Abs(float64(to-from)) / hddSize)
	wait := shortest + time.Duration(far*float64(fullStroke-shortest)) + halfATurn
	if ahead := to - from; ahead >= 0 && ahead < trackBytes {
		wait = min(wait, passing(ahead))
	}
	return wait + passing(int64(n))
}

// hdd is a hard disk without a write cache. Of the requests it has it does the next one in the direction of the head, as
// disks do, and goes back to the first when there is none.
type hdd struct {
	queue   *ublk.Queue
	content []byte
	kicked  chan struct{}
	mu      struct {
		sync.Mutex
		waiting []*queued
		done    []ublk.Completion
	}
}

type queued struct {
	*ublk.Request
	since time.Time
}

func newHDD(q *ublk.Queue) *hdd {
	content, err := uring.AlignedBuffer(hddSize) // takes what is written
	if err != nil {
		panic(err)
	}
	d := &hdd{queue: q, content: content, kicked: make(chan struct{}, 1)}
	go d.work()
	return d
}

func (d *hdd) Submit(r *ublk.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.Op == ublk.Flush {
		d.mu.done = append(d.mu.done, ublk.Completion{Tag: r.Tag})
		return
	}
	d.mu.waiting = append(d.mu.waiting, &queued{r, time.Now()})
	select {
	case d.kicked <- struct{}{}:
	default:
	}
}

func (d *hdd) Turn(done []ublk.Completion) []ublk.Completion {
	d.mu.Lock()
	defer d.mu.Unlock()
	done = append(done, d.mu.done...)
	d.mu.done = d.mu.done[:0]
	return done
}

// work does one request after the other. Its clock is that of the disk, so that a sleep which takes too long makes the
// next ones shorter.
func (d *hdd) work() {
	var head int64
	var clock time.Time
	for {
		r := d.next(head)
		if r == nil {
			<-d.kicked
			continue
		}
		if clock.Before(r.since) {
			clock = r.since
		}
		clock = clock.Add(access(head, r.Offset, r.Len))
		head = r.Offset + int64(r.Len)
		time.Sleep(time.Until(clock))
		d.carryOut(r.Request)
		d.mu.Lock()
		d.mu.done = append(d.mu.done, ublk.Completion{Tag: r.Tag})
		d.mu.Unlock()
		d.queue.Wake()
	}
}

// next takes the request that the head comes to next, nil for none.
func (d *hdd) next(head int64) *queued {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.mu.waiting) == 0 {
		return nil
	}
	way := func(r *queued) int64 { return (r.Offset - head + hddSize) % hddSize }
	next := slices.MinFunc(d.mu.waiting, func(a, b *queued) int { return cmp.Compare(way(a), way(b)) })
	d.mu.waiting = slices.DeleteFunc(d.mu.waiting, func(r *queued) bool { return r == next })
	return next
}

func (d *hdd) carryOut(r *ublk.Request) {
	content := d.content[r.Offset:][:r.Len]
	if r.Op == ublk.Read {
		copy(r.Buf, content)
	} else {
		copy(content, r.Buf)
	}
}

// serveHDD serves such a disk as serveNull does its device.
func serveHDD() {
	serve(ublk.Config{ID: hddID, Queues: 1, Depth: hddDepth, Size: hddSize, BlockSize: 512},
		func(q *ublk.Queue) ublk.Handler { return newHDD(q) })
}

// hddID leaves the low numbers to what is measured.
const hddID = 9
