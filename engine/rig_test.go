package engine

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
)

// fakeDisk is a backing.Fake as the engine wants it.
type fakeDisk struct{ *backing.Fake }

func (fakeDisk) Buffer(n int) []byte { return make([]byte, n) }

// readEach is a region's ReadEach where its ReadAt is watched.
func readEach(m io.ReaderAt, bufs [][]byte, offs []int64) (n int, err error) {
	for n < len(bufs) && err == nil {
		if _, err = m.ReadAt(bufs[n], offs[n]); err == nil {
			n++
		}
	}
	return n, err
}

// testLog keeps what the engine reports.
type testLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *testLog) Info(e Event, msg string, err error) { l.Error(e, msg, err) }
func (l *testLog) Error(_ Event, msg string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf("%s: %v", msg, err))
}

// formatSmall makes a cache of the given number of segments, fewer than the
// region could hold, so that it is soon full.
func formatSmall(t rapid.TB, mem Memory, segments uint32, crc bool, gcPercent int) {
	t.Helper()
	if err := ondisk.Format(mem, ondisk.FormatOptions{DataCRC: crc, GCPercent: gcPercent}); err != nil {
		t.Fatal(err)
	}
	var info [ondisk.InfoSize]byte
	for slot := range uint8(2) {
		off := ondisk.EncodeInfo(info[:], ondisk.Replica{Slot: slot, Seq: slot}, ondisk.Info{
			Segments: segments, Flags: ondisk.NewInfoFlags(crc, gcPercent),
		})
		store(t, mem, info[:], off)
		// The last segment's info, without a successor: type 1 (cache data).
		var last [16]byte
		last[4] = slot
		binary.LittleEndian.PutUint32(last[8:], 1<<1)
		binary.LittleEndian.PutUint32(last[:], ondisk.Checksum(last[4:]))
		store(t, mem, last[:], ondisk.SegmentsOff+int64(segments-1)*ondisk.SegmentSize+int64(slot)*4096)
	}
}

func store(t rapid.TB, mem Memory, p []byte, off int64) {
	t.Helper()
	if _, err := mem.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// beginLog lets the empty log of a new cache begin elsewhere.
func beginLog(t rapid.TB, mem Memory, at ondisk.Position) {
	t.Helper()
	var buf [ondisk.PositionSize]byte
	for _, tail := range []ondisk.Tail{ondisk.KeyTail, ondisk.DirtyTail} {
		off := ondisk.EncodePosition(buf[:], tail, ondisk.Replica{Slot: 1, Seq: 2}, at)
		store(t, mem, buf[:], off)
	}
}

// rig is an open cache with a thread for each queue.
type rig struct {
	*Cache
	loops []*loop
}

// loop stands for the thread of a ublk queue.
type loop struct {
	q       *Queue
	in      chan *pending
	answers chan func() // of the disk, for this thread to hear
	wake    chan struct{}
	quit    chan struct{}
	ended   chan struct{}
}

// pending is a request and who waits for it.
type pending struct {
	*Request
	done chan error
}

func newRig(t testing.TB, mem Memory, disk *backing.Fake, queues int) *rig {
	t.Helper()
	r, err := openRig(mem, disk, queues)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func openRig(mem Memory, disk *backing.Fake, queues int) (*rig, error) {
	c, err := Open(mem, fakeDisk{disk}, Options{Queues: queues, Log: &testLog{}})
	if err != nil {
		return nil, err
	}
	return startRig(c), nil
}

// startRig gives an open cache its threads.
func startRig(c *Cache) *rig {
	r := &rig{Cache: c}
	for i := range c.queues {
		l := &loop{
			q: c.Queue(i), in: make(chan *pending, 64), answers: make(chan func()), wake: make(chan struct{}, 1),
			quit: make(chan struct{}), ended: make(chan struct{}),
		}
		if i%2 == 0 { // the others are answered by any goroutine
			l.q.ReadBy(l.readBy(c.disk))
		}
		l.q.OnWake(func() {
			select {
			case l.wake <- struct{}{}:
			default:
			}
		})
		r.loops = append(r.loops, l)
		go l.run()
	}
	return r
}

// readBy reads a disk like a backing.Reader: the loop's own thread hears of it, if
// it has not ended.
func (l *loop) readBy(disk Disk) func(buf []byte, off int64, done func(error)) {
	return func(buf []byte, off int64, done func(error)) {
		disk.Read(buf, off, func(err error) {
			select {
			case l.answers <- func() { done(err) }:
			case <-l.ended:
			}
		})
	}
}

func (l *loop) run() {
	defer close(l.ended)
	waiting := map[*Request]*pending{}
	dice := rand.New(rand.NewPCG(rand.Uint64(), 0))
	for {
		select {
		case p := <-l.in:
			waiting[p.Request] = p
			l.q.Submit(p.Request)
			for more := true; more; {
				select {
				case p := <-l.in:
					waiting[p.Request] = p
					l.q.Submit(p.Request)
				default:
					more = false
				}
			}
		case answer := <-l.answers:
			answer()
		case <-l.wake:
		case <-l.quit:
			return
		}
		l.q.c.toggleSome(dice)
		l.q.c.jam(dice)
		for _, r := range l.q.Turn() {
			p := waiting[r]
			delete(waiting, r)
			p.done <- r.Err
		}
	}
}

// setGC makes garbage collection keep the cache at most n percent full.
func (c *Cache) setGC(n int) error {
	return c.Set(context.Background(), func(s *Settings) error {
		s.GCPercent = n
		return nil
	})
}

// neverWait has writers be idle as soon as none comes.
func (c *Cache) neverWait() {
	s := c.Settings()
	s.IdleAfter = idleLooks // one nanosecond between two looks
	c.settings.now.Store(&s)
}

// all returns all extents, stripe by stripe, by whichever means they are kept.
func (x *index) all() (all []extent) {
	for shard := range shardCount {
		for s := range x.stripes(shard) {
			s.sh.Lock()
			all = s.partsLocked(all, func(extent) bool { return true })
			s.sh.Unlock()
		}
	}
	return all
}

// logged returns all extents that the log has, in order, hit or not, and as a table would have
// them: joined.
func (x *index) logged() (logged []extent) {
	for _, e := range x.all() {
		if e.flags&extWindow != 0 {
			continue
		}
		e.flags &^= extHit
		if n := len(logged) - 1; n >= 0 && logged[n].end() == e.off && logged[n].seg == e.seg && logged[n].flags == e.flags && logged[n].pos+logged[n].n == e.pos {
			logged[n].n += e.n
			continue
		}
		logged = append(logged, e)
	}
	return logged
}

// toggleSome makes a table of the tree of a stripe, or a tree of its table, now and then.
func (c *Cache) toggleSome(dice *rand.Rand) {
	if dice.IntN(4) == 0 {
		c.index.span(dice.Int64N(c.size>>sectorShift), 1).toggle()
	}
}

// toggle makes a table of the tree of the stripe, if it has whole blocks only, or a tree
// of its table.
func (s span) toggle() {
	s.sh.Lock()
	defer s.sh.Unlock()
	switch id := s.sh.slab.roots[s.root]; {
	case classOf(id) == tableClass:
		s.makeTreeLocked()
	case id != 0:
		s.makeTableLocked(1)
	}
}

// do carries out one request on a queue.
func (r *rig) do(queue int, req *Request) error { return r.begin(queue, req)() }

// begin hands a request to a queue and returns what waits for it.
func (r *rig) begin(queue int, req *Request) (wait func() error) {
	p := &pending{Request: req, done: make(chan error, 1)}
	l := r.loops[queue]
	select {
	case l.in <- p:
	case <-l.ended:
	}
	return func() error {
		select {
		case err := <-p.done:
			return err
		case <-l.ended:
			return errKilled
		}
	}
}

var errKilled = fmt.Errorf("the server is gone")

// kill ends the threads wherever they are, then the cache. No request that is
// under way is answered.
func (r *rig) kill() error {
	r.leave()
	return r.Close()
}

// mustRest stops what the cache does by itself.
func (r *rig) mustRest(t testing.TB) {
	t.Helper()
	if _, err := r.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// narrow lets write-back defer no more than most, and cut a round short after
// step.
func (c *Cache) narrow(t rapid.TB, most int, step time.Duration) {
	t.Helper()
	if _, err := c.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	c.writeback.most, c.writeback.step = most, step
	c.Resume()
}

// leave ends the threads.
func (r *rig) leave() {
	for _, l := range r.loops {
		close(l.quit)
		<-l.ended
	}
}

// extents returns what the index has of some sectors of one stripe.
func (r *rig) extents(lba int64, sectors int) []extent {
	s := r.index.span(lba, sectors)
	s.sh.Lock()
	defer s.sh.Unlock()
	return s.partsLocked(nil, func(extent) bool { return true })
}

func (r *rig) write(t testing.TB, off int64, p []byte) {
	t.Helper()
	if err := r.do(0, &Request{Op: Write, Off: off, Buf: p}); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) read(t testing.TB, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := r.do(0, &Request{Op: Read, Off: off, Buf: p}); err != nil {
		t.Fatal(err)
	}
	return p
}

// missedBefore has the next miss of each block of a range go to the log, as that of a block does
// which has just left the window.
func (c *Cache) missedBefore(off int64, n int) { c.ghost.add(off>>sectorShift, uint16(n>>sectorShift)) }

// turn submits requests as one turn and fails unless all of them finish in it.
func turn(t *testing.T, q *Queue, rs ...*Request) {
	t.Helper()
	for _, r := range rs {
		q.Submit(r)
	}
	done := q.Turn()
	if len(done) != len(rs) {
		t.Fatalf("%d of %d requests finished", len(done), len(rs))
	}
	for _, r := range done {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

// open opens a cache without threads, for tests that are the thread.
func open(t *testing.T, mem Memory, disk *backing.Fake) *Cache {
	t.Helper()
	c, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, Log: &testLog{}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// refusingDisk returns a disk that fails all writes until it is told not to.
func refusingDisk(size int64) (disk *backing.Fake, heal func()) {
	disk = backing.NewFake(size, 512, 1)
	var healed atomic.Bool
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpWrite && !healed.Load() {
			f.Err = syscall.EIO
		}
		return f
	})
	return disk, func() { healed.Store(true) }
}
