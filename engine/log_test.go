package engine

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"

	"golang.org/x/sys/unix"
)

// TestLogCrossesSegments writes single sectors, each in a turn of its own,
// until the log has gone on in other segments, reopening now and then.
func TestLogCrossesSegments(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 31, false, 70)
	disk := backing.NewFake(4<<20, 512, 1)
	defer disk.Close()
	sectors := disk.Size() / sectorSize
	newest := make([]uint64, sectors)
	c := open(t, mem, disk)
	first := c.journal.mu.head.Seg
	r := &Request{Op: Write, Buf: make([]byte, sectorSize)}
	crossed := map[uint32]bool{}
	for i := range uint64(600_000) {
		lba := int64(i*7919) % sectors
		newest[lba] = i + 1
		fillStamp(r.Buf, lba, i+1)
		r.Off = lba * sectorSize
		c.Queue(0).Submit(r)
		for len(c.Queue(0).Turn()) == 0 {
			time.Sleep(time.Millisecond) // the cache is full: wait for the collector
		}
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		crossed[c.journal.mu.head.Seg] = true
		if i%150_000 == 149_999 {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			c = open(t, mem, disk)
		}
	}
	if len(crossed) < 3 {
		t.Fatalf("the log was in segments %v only, first %d", crossed, first)
	}
	buf := make([]byte, 1<<20)
	for lba := int64(0); lba < sectors; lba += int64(len(buf)) / sectorSize {
		turn(t, c.Queue(0), &Request{Op: Read, Off: lba * sectorSize, Buf: buf})
		for i := range int64(len(buf)) / sectorSize {
			if v, err := stamp(buf[i*sectorSize:][:sectorSize], lba+i); err != nil || v != newest[lba+i] {
				t.Fatalf("sector %d: version %d, %v, want %d", lba+i, v, err, newest[lba+i])
			}
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// countingMemory counts syncs and fences, and fails syncs on request.
type countingMemory struct {
	*pmem.Region
	durable       bool
	syncs, fences atomic.Int32
	thread        int // whose fences count; 0 for all
	fail          atomic.Bool
}

func (m *countingMemory) Durable() bool { return m.durable }

func (m *countingMemory) Fence() {
	if m.thread == 0 || m.thread == unix.Gettid() {
		m.fences.Add(1)
	}
	m.Region.Fence()
}

func (m *countingMemory) Sync() error {
	m.syncs.Add(1)
	if m.fail.Load() {
		return syscall.EIO
	}
	return m.Region.Sync()
}

// TestTwoFencesPerTurn: a batch of writes costs one kset and two fences, and one more
// where the log leaves a segment or has just come to another.
func TestTwoFencesPerTurn(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := &countingMemory{Region: pmem.Heap(ondisk.MinSize), durable: true, thread: unix.Gettid()}
	formatSmall(t, m.Region, 24, false, 90)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	c := open(t, m, disk)
	defer c.Close()
	var batch []*Request
	for i := range int64(16) {
		batch = append(batch, &Request{Op: Write, Off: i * 8192, Buf: make([]byte, 512)})
	}
	turn(t, c.Queue(0), batch...)
	// Long enough for the log to leave its segment.
	left, fresh := 0, false
	for head, _ := c.journal.head(); left == 0 || fresh; {
		fences, ksets := m.fences.Load(), c.journal.mu.written
		turn(t, c.Queue(0), batch...)
		was := head
		head, _ = c.journal.head()
		want, records := int32(2), uint64(1)
		if fresh {
			want = 3
		}
		if fresh = head.Seg != was.Seg; fresh {
			left++
			want, records = 3, 2
		}
		if n := m.fences.Load() - fences; n != want {
			t.Fatalf("%d fences for a turn of %d writes at %v, not %d", n, len(batch), was, want)
		}
		if n := c.journal.mu.written - ksets; n != records {
			t.Fatalf("%d ksets for a turn of %d writes at %v", n, len(batch), was)
		}
	}
}

// TestEndMarks: of memory that is full of something else, what lies behind the log is
// zero after each kset, in all segments that it comes to.
func TestEndMarks(t *testing.T) {
	const segments, size = 8, 64 << 20
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, segments, false, 50)
	layout, err := ondisk.ReadLayout(mem, mem.Size())
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Repeat([]byte{0xa5}, ondisk.SegmentData)
	first := ondisk.Position{Seg: layout.Chain[0]}
	for _, seg := range layout.Chain[1:] {
		store(t, mem, other, layout.Offset(seg, 0))
	}
	store(t, mem, other[:ondisk.SegmentData-ondisk.KsetHeaderSize], layout.Offset(first.Seg, ondisk.KsetHeaderSize))
	disk := backing.NewFake(size, sectorSize, 1)
	defer disk.Close()
	d, err := newDriver(mem, disk, Options{Queues: 1})
	if err != nil {
		t.Fatal(err)
	}
	dice := rand.New(rand.NewPCG(1, 1))
	seen := map[uint32]bool{}
	for more := 100; more > 0; {
		rs := make([]*Request, 1+dice.IntN(ondisk.MaxKeys))
		for i := range rs {
			rs[i] = &Request{Op: Zero, Off: dice.Int64N(size/sectorSize) * sectorSize, Len: sectorSize}
		}
		if err := d.do(rs...); err != nil {
			t.Fatal(err)
		}
		head, _ := d.journal.head()
		if seen[head.Seg] = true; len(seen) > 1 {
			more--
		}
		var mark, zero [ondisk.KsetHeaderSize]byte
		if _, err := mem.ReadAt(mark[:], layout.Offset(head.Seg, head.Off)); err != nil || mark != zero {
			t.Fatalf("behind the head at %v is %x, %v", head, mark, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestMoreKeysThanAKset: what does not fit comes with the next turns, each of
// two fences, and each write is answered with its last key.
func TestMoreKeysThanAKset(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := &countingMemory{Region: pmem.Heap(ondisk.MinSize), durable: true, thread: unix.Gettid()}
	formatSmall(t, m.Region, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	c := open(t, m, disk)
	defer c.Close()
	q, woken := c.Queue(0), false
	q.OnWake(func() { woken = true })
	const writes = 2*ondisk.MaxKeys + 10
	for i := range int64(writes) {
		q.Submit(&Request{Op: Write, Off: i * 4096, Buf: make([]byte, 512)})
	}
	fences := m.fences.Load() + 1 // the log has just begun
	for _, want := range []int{ondisk.MaxKeys, ondisk.MaxKeys, 10} {
		if got := len(q.Turn()); got != want {
			t.Fatalf("%d writes are answered, want %d", got, want)
		}
		if n := m.fences.Load() - fences; n != 2 {
			t.Errorf("%d fences for a turn", n)
		}
		fences = m.fences.Load()
		if woken != (want == ondisk.MaxKeys) {
			t.Errorf("woken: %t, after %d", woken, want)
		}
		woken = false
	}
}

// TestLogFull: a log that cannot go on, in a cache without any free segment as
// the kernel may leave one, stops writers but not readers, and goes on by
// itself once there is room.
func TestLogFull(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 70)
	disk, heal := refusingDisk(64 << 20)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	data := stamped(0, 1, 1)
	for {
		r.write(t, 0, data)
		if head, _ := r.journal.head(); roomAt(head) < ondisk.MaxKsetSize+1000 {
			break
		}
	}
	var taken []uint32
	for {
		seg, ok := r.segments.take(0)
		if !ok {
			break
		}
		taken = append(taken, seg)
	}
	written := make(chan struct{})
	go func() {
		defer close(written)
		for range 100 {
			if err := r.do(0, &Request{Op: Write, Off: 0, Buf: data}); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for !r.queues[0].stalled.Load() {
		time.Sleep(time.Millisecond)
	}
	within(t, "a miss while the log is full", func() { r.read(t, 32<<20, 4096) })
	within(t, "a hit while the log is full", func() { r.read(t, 0, sectorSize) })
	for _, seg := range taken {
		r.segments.addFree(seg)
	}
	heal()
	r.gc.kick()
	within(t, "a write after the log found room", func() { <-written })
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
