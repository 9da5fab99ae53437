package engine

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"io"
	"runtime"
	"slices"
	"sync"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// windowSegments is enough that writers find some also where the log has all that it may have.
const windowSegments = 16

// diskPlaces is how many places of 64 KiB the disk has: half as many again as the region.
const diskPlaces = windowSegments * perSegment * 3 / 2

// windowRig is a cache with one queue, whose thread is the test, in front of a disk that is
// larger, all of it stamped with version 1.
type windowRig struct {
	*Cache
	mem  Memory
	disk *backing.Fake
	wake chan struct{}

	resting bool
}

func newWindowRig(t *testing.T, mem Memory, crc bool) *windowRig {
	t.Helper()
	formatSmall(t, mem, windowSegments, crc, 70)
	disk := backing.NewFake(diskPlaces<<16, sectorSize, 1)
	t.Cleanup(func() { disk.Close() })
	const some = 1 << 20
	for off := int64(0); off < disk.Size(); off += some {
		disk.WriteAt(stamped(off/sectorSize, some/sectorSize, 1), off)
	}
	w := &windowRig{mem: mem, disk: disk}
	w.open(t)
	set(t, w.Cache, func(s *Settings) { s.SeqCutoff = 0 }) // these tests read in order
	t.Cleanup(func() { w.Close() })
	return w
}

func (w *windowRig) open(t *testing.T) {
	t.Helper()
	w.Cache, w.wake = open(t, w.mem, w.disk), make(chan struct{}, 1)
	w.Queue(0).OnWake(func() {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	})
}

// do carries out a request, and waits until the cache has done all that it was given reason for,
// unless it rests.
func (w *windowRig) do(t *testing.T, r *Request) {
	t.Helper()
	w.Queue(0).Submit(r)
	for len(w.Queue(0).Turn()) == 0 {
		<-w.wake
	}
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	for !w.resting && !w.Quiet() {
		runtime.Gosched()
	}
}

func (w *windowRig) rest(t *testing.T) {
	t.Helper()
	if _, err := w.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.resting = true
}

// write writes a version to n places of 64 KiB.
func (w *windowRig) write(t *testing.T, from, n int64, version uint64) {
	t.Helper()
	for i := from; i < from+n; i++ {
		w.do(t, &Request{Op: Write, Off: i << 16, Buf: stamped(i<<7, 128, version)})
	}
}

// holds reads n places and looks at what comes.
func (w *windowRig) holds(t *testing.T, from, n int64, version uint64) {
	t.Helper()
	for i := from; i < from+n; i++ {
		got := make([]byte, 64<<10)
		w.do(t, &Request{Op: Read, Off: i << 16, Buf: got})
		if want := stamped(i<<7, 128, version); !bytes.Equal(got, want) {
			t.Fatalf("what is read at %d is not version %d", i<<16, version)
		}
	}
}

// cached returns how many of n places are in the cache.
func (w *windowRig) cached(from, n int64) (cached int64) {
	for i := from; i < from+n; i++ {
		if w.Cached(i<<16, 64<<10) {
			cached++
		}
	}
	return cached
}

// perSegment is how many places fill a segment.
const perSegment = ondisk.SegmentSize >> 16

// TestMissesLeaveNothing: reads that only miss leave all that the region has but free segments
// as it was, byte for byte, and what they bring is cached all the same, in all segments but few.
func TestMissesLeaveNothing(t *testing.T) {
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("crc=%t", crc), func(t *testing.T) {
			mem := pmem.Heap(ondisk.MinSize)
			w := newWindowRig(t, mem, crc)
			w.write(t, 0, 1, 1)
			if err := w.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			taken := map[uint32]bool{}
			for i := range w.segments.all {
				taken[uint32(i)] = w.segments.all[i].refs.Load() > 0
			}
			seed := maphash.MakeSeed()
			// sum is of all that the region has, but for the data of free segments.
			sum := func() uint64 {
				var h maphash.Hash
				h.SetSeed(seed)
				from := int64(0)
				for seg := range uint32(windowSegments) {
					if !taken[seg] {
						free := w.layout.Offset(seg, 0)
						io.Copy(&h, io.NewSectionReader(mem, from, free-from))
						from = free + ondisk.SegmentData
					}
				}
				io.Copy(&h, io.NewSectionReader(mem, from, mem.Size()-from))
				return h.Sum64()
			}
			before := sum()
			w.holds(t, 1, windowSegments*perSegment, 1)
			if sum() != before {
				t.Error("misses have stored something outside of free segments")
			}
			s := w.Status()
			if s.Promoted != 0 || s.Ksets != 1 {
				t.Errorf("%d bytes promoted, %d ksets", s.Promoted, s.Ksets)
			}
			if empty := s.Segments - s.UsedSegments; empty > w.window.keep {
				t.Errorf("%d of %d segments are empty, %d are to be", empty, s.Segments, w.window.keep)
			}
			// It has what was read last.
			full := int64(s.WindowSegments-1) * (perSegment - 1)
			if n := w.cached(1+windowSegments*perSegment-full, full); n != full {
				t.Errorf("%d of the last %d places are cached", n, full)
			}
		})
	}
}

// TestHitIsKept: what is hit in the window is in the log when its segment has been given away, and
// there after a restart; what is not is gone.
func TestHitIsKept(t *testing.T) {
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("crc=%t", crc), func(t *testing.T) {
			w := newWindowRig(t, pmem.Heap(ondisk.MinSize), crc)
			const hot = 100
			w.holds(t, 0, 2*hot, 1)
			w.holds(t, 0, hot, 1)
			w.holds(t, 500, windowSegments*perSegment*3/4, 1)
			if n := w.cached(0, hot); n != hot {
				t.Errorf("%d of %d places that were hit are cached", n, hot)
			}
			if n := w.cached(hot, hot); n != 0 {
				t.Errorf("%d places that were not hit are cached", n)
			}
			if s := w.Status(); s.Promoted != hot<<16 || s.WindowHits != hot {
				t.Errorf("%d bytes promoted, %d hits in the window", s.Promoted, s.WindowHits)
			}
			// A block that has left the window unhit is logged at once when it comes back.
			w.holds(t, hot, hot, 1)
			back := int64(w.Status().GhostHits)
			if back < hot*9/10 { // a bucket may have had too many
				t.Errorf("%d ghost hits", back)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			w.open(t)
			if n := w.cached(0, 2*hot); n != hot+back {
				t.Errorf("%d of %d places that were logged are there after a restart", n, hot+back)
			}
			w.holds(t, 0, 2*hot, 1)
		})
	}
}

// TestScanLeavesHotSet: a read of the whole disk costs nothing of what is hit meanwhile.
func TestScanLeavesHotSet(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	const hot = windowSegments * perSegment / 4
	for range 2 {
		w.holds(t, 0, hot, 1)
	}
	missed := int64(0)
	for i := int64(hot); i < diskPlaces; i++ {
		w.holds(t, i, 1, 1)
		if at := i % hot; !w.Cached(at<<16, 64<<10) {
			missed++
		}
		w.holds(t, i%hot, 1, 1)
	}
	if most := int64(diskPlaces) / 50; missed > most {
		t.Errorf("%d hits were lost to a scan, of %d", missed, diskPlaces-hot)
	}
}

// TestHitsOutlastABusyQueue: a queue that waits for each segment, and takes it as soon as it has been emptied, leaves the
// promoter room for all that was hit.
func TestHitsOutlastABusyQueue(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	const hot = 4 * perSegment
	w.rest(t) // the collector is here
	w.holds(t, 0, hot, 1)
	w.holds(t, 0, hot, 1)
	for i := int64(hot); i < diskPlaces; i++ {
		w.holds(t, i, 1, 1)
		for refills := 0; !w.Cached(i<<16, 64<<10); refills++ { // the queue has nowhere to store it
			if refills == windowSegments {
				t.Fatal("the window gets no segment")
			}
			w.window.wanted.Store(true)
			w.refill(true, true)
			w.holds(t, i, 1, 1)
		}
	}
	if n := w.cached(0, hot); n < hot {
		t.Errorf("%d of %d places that were hit are cached", n, hot)
	}
	w.Resume()
}

// TestSecondRound: what is hit in the log is logged again when key_tail comes to it, and what was
// not is not.
func TestSecondRound(t *testing.T) {
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("crc=%t", crc), func(t *testing.T) {
			w := newWindowRig(t, pmem.Heap(ondisk.MinSize), crc)
			const hot = 50
			w.write(t, 0, 4*hot, 2)
			for lap := range uint64(3) {
				w.holds(t, 0, hot, 2)
				// Less than the log can have: key_tail comes to what was hit once.
				w.write(t, 500, windowSegments*perSegment/2, 3+lap)
				if n := w.cached(0, hot); n < hot*9/10 {
					t.Errorf("lap %d: %d of %d places that were hit are cached", lap, n, hot)
				}
			}
			if n := w.cached(hot, 3*hot); n != 0 {
				t.Errorf("%d places that were not hit are cached", n)
			}
			w.holds(t, 0, 4*hot, 2)
		})
	}
}

// TestWritersTakeTheWindow: with all memory in the window, and nobody to empty it, writers find
// segments without waiting, down to the last that they ever have.
func TestWritersTakeTheWindow(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	w.holds(t, diskPlaces-windowSegments*perSegment, windowSegments*perSegment, 1)
	w.rest(t)
	s := w.Status()
	if s.WindowSegments < windowSegments/2 {
		t.Fatalf("the window has %d segments", s.WindowSegments)
	}
	// The queue still fills one of the window, and the reserve is not for data.
	n := (int64(s.WindowSegments-1) + int64(w.window.keep-w.segments.reserve)) * (perSegment - 1)
	w.write(t, 0, n, 2) // elsewhere
	if s := w.Status(); s.LongestWait != 0 || s.Waiting != 0 {
		t.Errorf("writers waited for %v, %d still do", s.LongestWait, s.Waiting)
	}
	w.Resume()
}

// TestNoRoomToPromote: what is hit in the window and finds no room in the log is forgotten before
// its segment is somebody else's.
func TestNoRoomToPromote(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	w.holds(t, 0, perSegment, 1)
	w.holds(t, 0, perSegment, 1)
	w.rest(t)
	old := w.window.oldest()
	if old == nil {
		t.Fatal("no segment of the window is full")
	}
	for { // as if writers had taken all
		if _, ok := w.segments.take(w.segments.reserve); !ok {
			break
		}
	}
	var to promoter
	w.empty(old, &to)
	for _, e := range w.index.all() {
		if e.seg == old.seg {
			t.Fatalf("the index still leads to %+v", e)
		}
	}
}

// TestPinnedInWindow: a segment of the window is not used again while somebody reads it.
func TestPinnedInWindow(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	w.holds(t, 0, 1, 1)
	v := w.pinWhole(w.index.span(0, 128))
	if v == 0 {
		t.Fatal("what was read is not cached")
	}
	for i := int64(1); i <= windowSegments*perSegment; i++ {
		w.holds(t, i, 1, 1)
		w.segments.mu.Lock()
		free := slices.Contains(w.segments.mu.freeList, v.seg())
		w.segments.mu.Unlock()
		if free {
			t.Fatal("a segment is free that somebody reads")
		}
	}
	w.window.mu.Lock()
	if !slices.Equal(w.window.mu.pinned, []uint32{v.seg()}) {
		t.Errorf("segments %d wait for their readers, not %d", w.window.mu.pinned, v.seg())
	}
	w.window.mu.Unlock()
	got := make([]byte, 64<<10)
	if err := w.readExtent(got, w.index.span(0, 128).extent(v), new([]byte)); err != nil || !bytes.Equal(got, stamped(0, 128, 1)) {
		t.Fatalf("what is pinned has changed, %v", err)
	}
	w.unpin(v.seg())
	w.holds(t, 0, 1, 1)
	w.window.mu.Lock()
	defer w.window.mu.Unlock()
	if n := len(w.window.mu.pinned); n != 0 {
		t.Errorf("%d segments still wait for their readers", n)
	}
}

// TestBadMemoryInWindow is clean damage: what is lost there comes from the disk.
func TestBadMemoryInWindow(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	w := newWindowRig(t, mem, false)
	w.holds(t, 0, 8, 1)
	v := w.pinWhole(w.index.span(0, 128))
	w.unpin(v.seg())
	mem.Poison(w.layout.Offset(v.seg(), uint32(v.pos())<<sectorShift), 4096)
	w.holds(t, 0, 8, 1)
	if s := w.Status(); s.State != Degraded || len(s.BadSegments) != 1 {
		t.Errorf("the cache is %s, bad segments %v", s.State, s.BadSegments)
	}
	w.holds(t, 8, windowSegments*perSegment, 1)
	w.write(t, 0, 64, 2)
	w.holds(t, 0, 64, 2)
}

// TestOpenWindowsAreGivenBack: segments that idle queues fill for the window are no loss to
// writers that have nothing else.
func TestOpenWindowsAreGivenBack(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, uint32(segmentsFor(4)), false, 70)
	disk := backing.NewFake(1<<30, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 4)
	for q := range 4 {
		if err := r.do(q, &Request{Op: Read, Off: int64(q) << 22, Buf: make([]byte, 64<<10)}); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "writers have room", func() {
		for q := range 4 {
			for i := range int64(4 * perSegment) {
				if err := r.do(q, &Request{Op: Write, Off: (int64(q)<<12 + i) << 16 % (1 << 30), Buf: make([]byte, 64<<10)}); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// atOnce has the queue's misses answered at once, in the same turn.
func atOnce(q *Queue, disk *backing.Fake) {
	q.ReadBy(func(buf []byte, off int64, done func(error)) {
		_, err := disk.ReadAt(buf, off)
		done(err)
	})
}

// TestClosedBeforeEntered: a segment of the window that becomes full in the middle of a turn is
// nobody else's before its last fills are in the index.
func TestClosedBeforeEntered(t *testing.T) {
	for _, crc := range []bool{false, true} {
		const lba0, far = 0, 96 << 11
		mem := pmem.NewFake(ondisk.MinSize)
		formatSmall(t, mem, 8, crc, 90)
		disk := backing.NewFake(256<<20, sectorSize, 1)
		disk.WriteAt(stamped(0, 32<<11, 7), 0)
		disk.WriteAt(stamped(200<<11, 8, 7), 200<<20)
		c := open(t, mem, disk)
		q := c.Queue(0)
		atOnce(q, disk)
		if _, err := c.Rest(context.Background()); err != nil { // no collector: only this thread
			t.Fatal(err)
		}
		read := func(lba int64, n int) *Request {
			return &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, n*sectorSize)}
		}
		// The window gets one segment, filled but for 4 KiB.
		const last = 8
		lba := int64(lba0)
		for left := int64(segmentSectors) - last - (segmentSectors - ondisk.SegmentData>>sectorShift); left > 0; {
			n := min(left, 2048, stripeSectors-lba%stripeSectors)
			turn(t, q, read(lba, int(n)))
			lba, left = lba+n, left-n
		}
		if c.window.taken.Load() != 1 {
			t.Fatal(c.window.taken.Load())
		}
		// Writers take the rest.
		w := int64(far)
		write := func(n int) {
			if left := int(stripeSectors - w%stripeSectors); left < n {
				n = left
			}
			turn(t, q, &Request{Op: Write, Off: w * sectorSize, Buf: stamped(w, n, 3)})
			w += int64(n)
		}
		for c.segments.free() > c.segments.reserve {
			write(64)
		}
		for q.head.off < ondisk.SegmentData {
			write(int(min(64, (ondisk.SegmentData-q.head.off)>>sectorShift)))
		}
		lba = (lba + 7) / 8 * 8
		r1, r2, r3 := read(lba, last), read(lba+last, last), read(200<<11, last)
		c.missedBefore(200<<20, last*sectorSize) // r3 goes to the log
		turn(t, q, r1, r2, r3)
		for q.head.off < ondisk.SegmentData {
			write(int(min(64, (ondisk.SegmentData-q.head.off)>>sectorShift)))
		}
		again := read(lba, last)
		turn(t, q, again)
		for i := range int64(last) {
			if v, err := stamp(again.Buf[i*sectorSize:][:sectorSize], lba+i); v != 7 || err != nil {
				t.Errorf("crc %v: sector %d of version 7 on the disk, never written, reads as %d, %v", crc, lba+i, v, err)
			}
		}
		c.Abort()
		c.Close()
		disk.Close()
	}
}

// TestRefillBesideQueue: a segment that the collector empties has one owner afterwards, whoever begins
// another meanwhile.
func TestRefillBesideQueue(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 12, false, 90)
	disk := backing.NewFake(64<<20, sectorSize, 1)
	defer disk.Close()
	c := open(t, mem, disk)
	defer c.Close()
	if _, err := c.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	q := c.Queue(0)
	total := c.segments.free()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { // the collector's thread
		for {
			select {
			case <-stop:
				return
			default:
			}
			c.window.wanted.Store(true) // as queues that ask for more do
			c.refill(true, true)
		}
	})
	for range 200000 {
		if q.openWindow() {
			q.closeWindow()
			q.handIn()
		}
	}
	close(stop)
	wg.Wait()
	all := append(slices.Clone(c.window.mu.emptied), c.segments.mu.freeList...)
	for _, old := range c.window.mu.full {
		all = append(all, old.seg)
	}
	slices.Sort(all)
	if n := len(slices.Compact(slices.Clone(all))); len(all) != n || n != total {
		t.Errorf("the lists have segments %d, which are not %d", all, total)
	}
}

// TestStaleBitsOfWindow: to overwrite what a segment of the window had last sets no stale bits of
// what somebody else has there now, which would never be written back.
func TestStaleBitsOfWindow(t *testing.T) {
	const far = 96 << 11
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 90)
	disk := backing.NewFake(256<<20, sectorSize, 1)
	defer disk.Close()
	disk.WriteAt(stamped(0, 32<<11, 7), 0)
	c := open(t, mem, disk)
	set(t, c, func(s *Settings) { s.SeqCutoff = 0 })
	q := c.Queue(0)
	atOnce(q, disk)
	if _, err := c.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	read := func(lba int64, n int) *Request {
		return &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, n*sectorSize)}
	}
	lba := int64(0)
	for left := int64(ondisk.SegmentData>>sectorShift) - 24; left > 0; {
		n := min(left, 2048, stripeSectors-lba%stripeSectors)
		turn(t, q, read(lba, int(n)))
		lba, left = lba+n, left-n
	}
	w := int64(far)
	write := func(n int) {
		n = min(n, int(stripeSectors-w%stripeSectors))
		turn(t, q, &Request{Op: Write, Off: w * sectorSize, Buf: stamped(w, n, 3)})
		w += int64(n)
	}
	fillUpTo := func(pos uint32) {
		for q.head.off>>sectorShift < pos {
			write(int(min(8, pos-q.head.off>>sectorShift)))
		}
	}
	for c.segments.free() > c.segments.reserve {
		write(64)
	}
	end := uint32(ondisk.SegmentData >> sectorShift)
	fillUpTo(end)
	c.missedBefore(200<<20, 8*sectorSize)
	turn(t, q, read(lba, 8), read(lba+8, 16), read(lba+24, 8), read(200<<11, 8))
	fillUpTo(end - 24) // a segment that was the window's; the next write is where the window had lba
	victim := w
	write(8)
	write(8)
	turn(t, q, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, 8, 9)})
	c.Resume()
	if err := c.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, at := range []struct {
		lba     int64
		version uint64
	}{{lba, 9}, {victim - 8, 3}, {victim, 3}, {victim + 8, 3}} {
		p := make([]byte, sectorSize)
		disk.ReadAt(p, at.lba*sectorSize)
		if v, err := stamp(p, at.lba); v != at.version || err != nil {
			t.Errorf("after a Flush that succeeded sector %d is of version %d on the disk, want %d: %v", at.lba, v, at.version, err)
		}
	}
	c.Abort()
	c.Close()
}

// TestPromoterGivesWay: the segment that the collector promotes to is no loss to a writer, in a
// cache of as few segments as its queue needs, in front of a disk that refuses one sector.
func TestPromoterGivesWay(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, uint32(segmentsFor(1)), false, 30)
	disk := backing.NewFake(256<<20, sectorSize, 1)
	const bad = 1 << 11
	badBlocks(disk, bad, 1)
	r := newRig(t, mem, disk, 1)
	r.mustRest(t) // or it may be collected before it is hit
	r.write(t, 0, stamped(0, 128, 1))
	r.read(t, 0, 128*sectorSize) // a hit
	r.Resume()
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	within(t, "what was hit is promoted", func() {
		for r.Status().Again == 0 {
			runtime.Gosched()
		}
	})
	r.write(t, bad*sectorSize, stamped(bad, 1, 2))
	within(t, "four segments are written", func() {
		for i := int64(16); i < 16+64; i++ {
			if err := r.do(0, &Request{Op: Write, Off: i << 20, Buf: make([]byte, 1<<20)}); err != nil {
				t.Error(err)
			}
		}
	})
	r.Abort()
	r.kill()
	disk.Close()
}

// TestBadSegmentLeavesWindow: a segment of the window whose memory has failed is not filled again.
func TestBadSegmentLeavesWindow(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 90)
	disk := backing.NewFake(256<<20, sectorSize, 1)
	defer disk.Close()
	c := open(t, mem, disk)
	q := c.Queue(0)
	atOnce(q, disk)
	if _, err := c.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	miss := func(at int64) { turn(t, q, &Request{Op: Read, Off: at, Buf: make([]byte, 4096)}) }
	miss(0)
	bad := q.window.seg
	mem.Punch(c.layout.Offset(bad, 64<<10), 4096)
	for i := int64(1); i < 32; i++ {
		miss(i << 20)
	}
	if !c.segments.all[bad].bad.Load() {
		t.Fatal("not bad")
	}
	for range 8 { // the collector, asked for more
		c.window.wanted.Store(true)
		c.refill(true, false)
		miss(100<<20 + c.index.usage().extents<<20)
	}
	for i, seg := range c.window.mu.emptied {
		if seg == bad {
			t.Errorf("bad segment %d is at %d of those to be filled", bad, i)
		}
	}
	if q.window.windowSegment != nil && q.window.seg == bad {
		t.Errorf("bad segment %d is filled again", bad)
	}
	c.Abort()
	c.Close()
}

// TestWantedInVain: a window that had nothing to empty when the next segment was asked for gets one
// when it has.
func TestWantedInVain(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	w.write(t, 0, windowSegments*perSegment*7/10, 2) // the log has all that it may have
	if err := w.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	const last = windowSegments * perSegment / 4
	w.holds(t, windowSegments*perSegment*7/10, diskPlaces-last-windowSegments*perSegment*7/10, 1)
	for i := range int64(last) {
		at := diskPlaces - 1 - i
		w.holds(t, at, 1, 1)
		if !w.Cached(at<<16, 64<<10) {
			t.Fatalf("the window has not kept what was read %d reads after it was full", i)
		}
	}
}

// TestWindowBesideRefusedSector: where dirty_tail cannot come to the head, and the log is to
// shrink for ever, the window goes on.
func TestWindowBesideRefusedSector(t *testing.T) {
	w := newWindowRig(t, pmem.Heap(ondisk.MinSize), false)
	const bad = 1 << 11
	badBlocks(w.disk, bad, 1)
	w.do(t, &Request{Op: Write, Off: bad * sectorSize, Buf: stamped(bad, 1, 2)})
	if err := w.Flush(context.Background()); err == nil {
		t.Fatal("the disk took what it should refuse")
	}
	if err := w.setGC(0); err != nil {
		t.Fatal(err)
	}
	for i := range int64(diskPlaces) {
		if at := diskPlaces - 1 - i; at != bad>>7 {
			w.holds(t, at, 1, 1)
			if !w.Cached(at<<16, 64<<10) {
				t.Fatalf("what was read is not cached after %d reads", i)
			}
		}
	}
}

// TestPromoteMeetsBadMemory: what the collector cannot read is named, and its segment used no more.
func TestPromoteMeetsBadMemory(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	w := newWindowRig(t, mem, false)
	w.holds(t, 0, perSegment, 1)
	w.holds(t, 0, perSegment, 1)
	w.rest(t)
	old := w.window.oldest()
	mem.Poison(w.layout.Offset(old.seg, 1<<20), 4096)
	w.empty(old, &promoter{})
	if seg, ok := w.leave(old); ok {
		t.Errorf("segment %d, whose memory has failed, is given to whoever comes", seg)
	}
	if s := w.Status(); s.State != Degraded || len(s.BadPlaces) != 1 {
		t.Errorf("the cache is %s, bad places %v", s.State, s.BadPlaces)
	}
}
