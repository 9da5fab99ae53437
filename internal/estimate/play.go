package estimate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

// Result is what became of a trace in a cache of some size. Counts are of accesses, each of
// one block. Whether it is read or written, a block is missed that is not in the cache as a
// whole.
type Result struct {
	Segments   int  // of the cache, 16 MiB each
	Scale      int  // how many times as large as the trace's each block was
	Raised     bool // they are the least that a cache has, which is more than was asked for
	Missed     int64
	ReadBlocks int64
	ReadMissed int64 // those of Missed that were read
	Stored     int64 // bytes, into the region: data, log and records
	// What textbook algorithms miss in as many blocks as all segments would have room
	// for.
	FIFO, LRU, S3FIFO int64
}

// CacheBytes returns how large the cache was, in bytes of the trace.
func (r *Result) CacheBytes() int64 {
	return int64(r.Segments) * ondisk.SegmentSize / int64(r.Scale)
}

// What bounds a request: the largest that the server takes, and the stripe, both in bytes.
const (
	longest = 1 << 20
	stripe  = ondisk.StripeSize
)

// mostDisk is how large a disk may be, in bytes, after scaling. Each TiB takes a MiB of
// memory.
const mostDisk = 1 << 50

var errTooFar = errors.New("goes up to places that are further than 1 PiB from the start of the disk")

// Play plays a trace to a new cache, one access after the other, as fast as it goes. So what
// is written back because it has waited long is written back later than it would be; what is
// kept does not depend on that. Each block becomes one of
// scaled bytes, a power of 2 from 4 KiB to 1 MiB, so that a small trace is not too small for
// the engine, which counts in segments; so does the length from which on a stream is not
// kept. For a size in bytes both stay as they are.
func (t *Trace) Play(size Size, scaled int) (Result, error) {
	if scaled < blockSize || scaled > longest || scaled&(scaled-1) != 0 {
		return Result{}, fmt.Errorf("a block of %d bytes: give a power of 2 from %d to %d", scaled, blockSize, longest)
	}
	if size.Bytes != 0 {
		scaled = blockSize
	}
	segments, raised := t.segments(size, scaled)
	if t.end > mostDisk/int64(scaled) {
		return Result{}, fmt.Errorf("%s %w", t.Name, errTooFar)
	}
	r := newRegion(max(ondisk.MinSize, ondisk.SegmentsOff+int64(segments)*ondisk.SegmentSize))
	if err := ondisk.Format(r, ondisk.FormatOptions{GCPercent: ondisk.DefaultGCPercent}); err != nil {
		return Result{}, err
	}
	r.stored.Store(0)
	c, err := engine.Open(r, disk{t.end * int64(scaled)}, engine.Options{Queues: 1, Log: silent{}})
	if err != nil {
		return Result{}, err
	}
	if scaled != blockSize {
		if err := c.Set(context.Background(), func(s *engine.Settings) error {
			s.SeqCutoff *= int64(scaled / blockSize)
			return nil
		}); err != nil {
			return Result{}, errors.Join(err, c.Close())
		}
	}
	p := player{
		trace: t, cache: c, queue: c.Queue(0), wake: make(chan struct{}, 1),
		scaled: int64(scaled), buf: make([]byte, longest),
		result: Result{Segments: segments, Scale: scaled / blockSize, Raised: raised},
	}
	capacity := segments * (ondisk.SegmentSize / scaled)
	p.fifo, p.lru, p.s3fifo = newFIFO(capacity, t.Touched), newLRU(capacity, t.Touched), newS3FIFO(capacity, t.Touched)
	p.queue.OnWake(func() {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	})
	for _, a := range t.runs {
		if err = p.play(a); err != nil {
			break
		}
	}
	p.result.Stored = r.stored.Load()
	return p.result, errors.Join(err, c.Close())
}

// Scaled returns to how many bytes a block has to be scaled so that a cache has segments enough
// for what it keeps not to depend on where they end: as few as that takes, up to 64 KiB.
func (t *Trace) Scaled(size Size) int {
	const enough, most = 128, 64 << 10
	scaled := blockSize
	for n, _ := t.segments(size, scaled); n < enough && scaled < most; n, _ = t.segments(size, scaled) {
		scaled *= 2
	}
	return scaled
}

// segments returns how many a cache of some size has.
func (t *Trace) segments(size Size, scaled int) (n int, raised bool) {
	n = int(ondisk.SegmentsIn(size.Bytes))
	if size.Bytes == 0 {
		n = int(math.Ceil(float64(t.Touched) * float64(scaled) * size.Percent / 100 / ondisk.SegmentSize))
	}
	least := int(ondisk.SegmentsIn(ondisk.MinSize))
	return max(n, least), n < least
}

// silent is an engine.Logger.
type silent struct{}

func (silent) Info(engine.Event, string, error)  {}
func (silent) Error(engine.Event, string, error) {}

// player plays a trace to the engine and to the textbook algorithms.
type player struct {
	trace  *Trace
	cache  *engine.Cache
	queue  *engine.Queue
	wake   chan struct{}
	scaled int64
	buf    []byte // zeros
	result Result

	fifo, lru, s3fifo policy
}

// play makes requests of an access as they would come to a server, whose requests have an
// end.
func (p *player) play(a run) error {
	for off, end := a.first*p.scaled, (a.first+int64(a.n))*p.scaled; off < end; {
		n := min(end-off, longest, stripe-off%stripe)
		for at := off; at < off+n; at += p.scaled {
			p.count(at, a.write)
		}
		r := engine.Request{Op: engine.Read, Off: off, Buf: p.buf[:n]}
		if a.write {
			r.Op = engine.Write
		}
		if err := p.request(&r); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// count counts an access of the block at off, which is still to come for the engine.
func (p *player) count(off int64, write bool) {
	missed := !p.cache.Cached(off, int(p.scaled))
	add(&p.result.Missed, missed)
	add(&p.result.ReadBlocks, !write)
	add(&p.result.ReadMissed, missed && !write)
	block := p.trace.numbers[off/p.scaled]
	add(&p.result.FIFO, !p.fifo.access(block))
	add(&p.result.LRU, !p.lru.access(block))
	add(&p.result.S3FIFO, !p.s3fifo.access(block))
}

func add(n *int64, one bool) {
	if one {
		*n++
	}
}

// request makes a request, and waits for it and for what the cache does on account of it: so
// the outcome does not depend on who was faster.
func (p *player) request(r *engine.Request) error {
	p.queue.Submit(r)
	for len(p.queue.Turn()) == 0 {
		<-p.wake
	}
	for !p.cache.Quiet() {
		runtime.Gosched()
	}
	return r.Err
}
