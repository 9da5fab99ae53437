package engine

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func TestGoldenImages(t *testing.T) {
	for name, want := range map[string]string{
		"small-crc":   "62a81938d76b6e6374f160aa65ce823c30fb7a9107a97c2db0ca7fb7759d9803",
		"small-nocrc": "6a7695aa6137be5d99053f8c7953a0d2dbe02b01534093d77dec956d7232e384",
	} {
		t.Run(name, func(t *testing.T) {
			mem := pmem.Heap(551550976)
			unpack(t, name+".pmem", func(p []byte, off int64) { store(t, mem, p, off) })
			disk := backing.NewFake(16<<20, 512, 1)
			defer func() { disk.Close() }()
			unpack(t, name+".backing", func(p []byte, off int64) { disk.WriteAt(p, off) })

			// As the kernel left it, and again after our own restart and flush.
			for range 2 {
				r := newRig(t, mem, disk, 2)
				sum := sha256.New()
				for off := int64(0); off < disk.Size(); off += 1 << 20 {
					sum.Write(r.read(t, off, 1<<20))
				}
				if got := hex.EncodeToString(sum.Sum(nil)); got != want {
					t.Fatalf("device has sha256 %s, want %s", got, want)
				}
				if err := r.Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
				if err := r.kill(); err != nil {
					t.Fatal(err)
				}
			}
			all := make([]byte, disk.Size())
			disk.ReadAt(all, 0)
			if got := sha256.Sum256(all); hex.EncodeToString(got[:]) != want {
				t.Fatalf("after a flush the disk alone has sha256 %x, want %s", got, want)
			}
		})
	}
}

// unpack reads a file of a golden archive of the ondisk package, skipping
// zeroes.
func unpack(t *testing.T, name string, put func(p []byte, off int64)) {
	t.Helper()
	base, _, _ := strings.Cut(name, ".")
	f, err := os.Open("../ondisk/testdata/" + base + ".tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := tar.NewReader(z)
	for {
		h, err := files.Next()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if h.Name == name {
			break
		}
	}
	zero, buf := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(buf)) {
		n, err := io.ReadFull(files, buf)
		if !bytes.Equal(buf[:n], zero[:n]) {
			put(buf[:n], off)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

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

// TestMissesShareOneRead holds the disk's answer to one miss while others ask
// for the same sectors, and while one of them is overwritten.
func TestMissesShareOneRead(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	old := make([]byte, 64<<10)
	fillStamp(old, 0, 1)
	disk.WriteAt(old, 0)
	var reads atomic.Int32
	var answering atomic.Bool
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpRead && op.Len < sampleBytes { // not for the fingerprint
			reads.Add(1)
			f.Hold = !answering.Load()
		}
		return f
	})
	r := newRig(t, mem, disk, 2)

	var readers sync.WaitGroup
	bufs := make([][]byte, 8)
	for i := range bufs {
		bufs[i] = make([]byte, 64<<10)
		readers.Go(func() {
			if err := r.do(i%2, &Request{Op: Read, Off: 0, Buf: bufs[i]}); err != nil {
				t.Error(err)
			}
		})
	}
	for disk.Held() == 0 {
		time.Sleep(time.Millisecond)
	}
	fresh := make([]byte, 4096)
	fillStamp(fresh, 16, 2)
	r.write(t, 16*sectorSize, fresh)
	answering.Store(true)
	disk.Release()
	readers.Wait()
	for i, buf := range bufs {
		for lba := range int64(len(buf) / sectorSize) {
			v, err := stamp(buf[lba*sectorSize:][:sectorSize], lba)
			if err != nil || v != 1 && (v != 2 || lba < 16 || lba >= 24) {
				t.Fatalf("reader %d, sector %d: version %d, %v", i, lba, v, err)
			}
		}
	}
	if n := reads.Load(); n != 1 {
		t.Errorf("%d reads of the disk for %d misses of the same sectors", n, len(bufs))
	}
	got := r.read(t, 0, 64<<10)
	copy(old[16*sectorSize:], fresh)
	if !bytes.Equal(got, old) {
		t.Error("the fill has undone a write that came in between")
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	r = newRig(t, mem, disk, 1)
	if got := r.read(t, 0, 64<<10); !bytes.Equal(got, old) {
		t.Error("after a restart the fill has undone a write that came in between")
	}
	r.kill()
}

// TestReadErrorIsNotCached: the error goes to the reader, and the next read
// asks the disk again.
func TestReadErrorIsNotCached(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	var bad atomic.Bool
	bad.Store(true)
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if bad.Load() {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	buf := make([]byte, 4096)
	if err := r.do(0, &Request{Op: Read, Off: 4096, Buf: buf}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("read of a failing disk: %v", err)
	}
	bad.Store(false)
	r.read(t, 4096, 4096)
	r.kill()
}

// TestFailedFlushKeepsDirtyTail: what was written before a flush that failed is
// written again, and only then counts as written.
func TestFailedFlushKeepsDirtyTail(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	var failing atomic.Bool
	failing.Store(true)
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == backing.OpFlush && failing.Load() {
			f.Err = syscall.EIO
		}
		return f
	})
	r := newRig(t, mem, disk, 1)
	data := make([]byte, 1<<20)
	fillStamp(data, 0, 1)
	r.write(t, 0, data)
	before, _ := r.tails.dirtyTail()
	if err := r.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("flush over a failing flush of the disk: %v", err)
	}
	if after, _ := r.tails.dirtyTail(); after != before {
		t.Fatalf("dirty_tail moved from %v to %v", before, after)
	}
	if s := r.Status(); s.State != Degraded {
		t.Errorf("state %q after a failed flush", s.State)
	}
	failing.Store(false)
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := r.Status(); s.State != Healthy || s.DirtyBytes != 0 {
		t.Errorf("state %q with %d dirty bytes after the disk healed", s.State, s.DirtyBytes)
	}
	r.kill()
	got := make([]byte, len(data))
	crashed := disk.Crash()
	defer crashed.Close()
	crashed.ReadAt(got, 0)
	if !bytes.Equal(got, data) {
		t.Error("the disk does not have what the second flush confirmed")
	}
}

// TestFullCache fills a cache whose disk does not answer: writers wait, reads
// go on, and with the disk everything goes on in order.
func TestFullCache(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 90)
	disk, heal := stuckDisk(256 << 20)
	defer disk.Close()
	r := newRig(t, mem, disk, 2)
	var writers sync.WaitGroup
	const count, size = 200, 1 << 20
	var finished atomic.Int32
	for i := range int64(count) {
		writers.Go(func() {
			p := make([]byte, size)
			fillStamp(p, i*size/sectorSize, 1)
			if err := r.do(int(i%2), &Request{Op: Write, Off: i * size, Buf: p}); err != nil {
				t.Error(err)
			}
			finished.Add(1)
		})
	}
	for r.Status().Waiting == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := r.do(0, &Request{Op: Read, Off: 255 << 20, Buf: make([]byte, 4096)}); err != nil {
		t.Errorf("a read while the cache is full: %v", err)
	}
	if n := finished.Load(); n == count {
		t.Errorf("%d MiB were written to a cache of 80 MiB over a disk that takes nothing", n)
	}
	waited := r.Status().LongestWait
	if waited <= 0 {
		t.Error("requests wait, and the longest wait is nothing")
	}
	heal()
	writers.Wait()
	if after := r.Status().LongestWait; after < waited {
		t.Errorf("the longest wait went from %v to %v", waited, after)
	}
	for i := range int64(count) {
		p := r.read(t, i*size, size)
		for j := range int64(size / sectorSize) {
			lba := i*size/sectorSize + j
			if v, err := stamp(p[j*sectorSize:][:sectorSize], lba); v != 1 || err != nil {
				t.Fatalf("sector %d: version %d, %v", lba, v, err)
			}
		}
	}
	if err := r.kill(); err != nil {
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

// TestSyncs: where a fence is not enough, FLUSH and FUA sync, and a failed
// sync is the last word; where it is, they do not.
func TestSyncs(t *testing.T) {
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	requests := func() []*Request {
		return []*Request{
			{Op: Write, Buf: make([]byte, 4096)},
			{Op: Write, Buf: make([]byte, 4096), FUA: true},
			{Op: Flush},
		}
	}
	for _, durable := range []bool{true, false} {
		m := &countingMemory{Region: pmem.Heap(ondisk.MinSize), durable: durable}
		formatSmall(t, m.Region, 8, false, 70)
		r := newRig(t, m, disk, 1)
		r.mustRest(t) // rounds sync as well
		for i, req := range requests() {
			before := m.syncs.Load()
			if err := r.do(0, req); err != nil {
				t.Fatal(err)
			}
			want := int32(0)
			if !durable && i > 0 {
				want = 1
			}
			if n := m.syncs.Load() - before; n != want {
				t.Errorf("durable %t, request %d: %d syncs, want %d", durable, i, n, want)
			}
		}
		if !durable {
			m.fail.Store(true)
			for i, req := range append(requests()[2:], requests()[0]) {
				if err := r.do(0, req); !errors.Is(err, syscall.EIO) {
					t.Errorf("request %d after a failed sync: %v", i, err)
				}
			}
			m.fail.Store(false)
			if err := r.do(0, &Request{Op: Flush}); !errors.Is(err, syscall.EIO) {
				t.Errorf("flush after a failed sync: %v", err)
			}
			r.read(t, 0, 4096)
		}
		r.kill()
	}
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

// TestOpenRefuses: what replay must not accept.
func TestOpenRefuses(t *testing.T) {
	build := func() (*pmem.Region, *backing.Fake) {
		mem := pmem.Heap(ondisk.MinSize)
		formatSmall(t, mem, 8, false, 70)
		disk := backing.NewFake(8<<20, 512, 1)
		c := open(t, mem, disk)
		turn(t, c.Queue(0), &Request{Op: Write, Off: 6 << 20, Buf: make([]byte, 4096)})
		c.Close()
		return mem, disk
	}
	refuse := func(name string, mem *pmem.Region, disk *backing.Fake, want error) {
		t.Helper()
		if _, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, Log: &testLog{}}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		disk.Close()
	}
	mem, disk := build()
	disk.Close()
	refuse("smaller disk", mem, backing.NewFake(4<<20, 512, 1), ErrDiskTooSmall)

	// rekey writes the first kset again with one key changed.
	rekey := func(mem *pmem.Region, change func(*ondisk.Key)) {
		l, err := ondisk.ReadLayout(mem, mem.Size())
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, ondisk.MaxKsetSize)
		mem.ReadAt(buf, l.Offset(0, 0))
		var k ondisk.Kset
		if err := ondisk.DecodeKset(buf, &k); err != nil {
			t.Fatal(err)
		}
		change(&k.Keys[0])
		store(t, mem, ondisk.EncodeKset(buf, k.Seq, k.Keys), l.Offset(0, 0))
	}
	mem, disk = build()
	rekey(mem, func(k *ondisk.Key) { k.Gen++ })
	refuse("generation of the future", mem, disk, ErrKeyGeneration)

	mem, disk = build()
	rekey(mem, func(k *ondisk.Key) { k.Seg, k.Gen = 0, 0 })
	refuse("data in the log", mem, disk, ErrKeyInLog)

}

// TestRefusesRequests: what a queue does not do.
func TestRefusesRequests(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	defer r.kill()
	for _, req := range []*Request{
		{Op: Read, Off: 100, Buf: make([]byte, 512)},
		{Op: Write, Off: 512, Buf: make([]byte, 100)},
		{Op: Write, Off: 0, Buf: nil},
		{Op: Read, Off: 8 << 20, Buf: make([]byte, 512)},
		{Op: Read, Off: -512, Buf: make([]byte, 512)},
		{Op: Write, Off: 4<<20 - 512, Buf: make([]byte, 1024)},
	} {
		if err := r.do(0, req); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes at %d: %v", len(req.Buf), req.Off, err)
		}
	}
}

// TestFillAndWriteInOneTurn: the disk's answer to a miss and a write of the
// same sectors are committed together, and the write is the newer one.
func TestFillAndWriteInOneTurn(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, true, 70)
	disk, hangs := hangingDisk(8 << 20)
	defer disk.Close()
	old, fresh := make([]byte, 32<<10), make([]byte, 4096)
	fillStamp(old, 0, 1)
	fillStamp(fresh, 8, 2)
	disk.WriteAt(old, 0)
	c := open(t, mem, disk)
	q := c.Queue(0)
	back := make(chan struct{}, 1)
	q.OnWake(func() { back <- struct{}{} })

	hangs.Store(true)
	q.Submit(&Request{Op: Read, Buf: make([]byte, len(old))})
	if n := len(q.Turn()); n != 0 {
		t.Fatalf("%d requests finished before the disk answered", n)
	}
	awaitHeld(disk, 1)
	hangs.Store(false)
	disk.Release()
	<-back
	q.Submit(&Request{Op: Write, Off: 8 * sectorSize, Buf: fresh})
	if n := len(q.Turn()); n != 2 {
		t.Fatalf("%d requests finished, want the read and the write", n)
	}
	copy(old[8*sectorSize:], fresh)
	for range 2 {
		got := make([]byte, len(old))
		turn(t, c.Queue(0), &Request{Op: Read, Buf: got})
		if !bytes.Equal(got, old) {
			t.Fatal("the write has been undone by the fill")
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		c = open(t, mem, disk)
	}
	c.Close()
}

// slowMemory stops one read, half way, until it is told to go on.
type slowMemory struct {
	*pmem.Region
	armed   atomic.Bool
	reached chan struct{}
	goOn    chan struct{}
}

func (m *slowMemory) ReadAt(p []byte, off int64) (int, error) {
	if off >= ondisk.SegmentsOff && m.armed.CompareAndSwap(true, false) {
		n := len(p) / 2
		m.Region.ReadAt(p[:n], off)
		close(m.reached)
		<-m.goOn
		_, err := m.Region.ReadAt(p[n:], off+int64(n))
		return len(p), err
	}
	return m.Region.ReadAt(p, off)
}

func (m *slowMemory) ReadEach(bufs [][]byte, offs []int64) (int, error) {
	return readEach(m, bufs, offs)
}

// TestReaderPinsSegment: while one queue is in the middle of a copy, the other
// writes the whole cache several times over.
func TestReaderPinsSegment(t *testing.T) {
	m := &slowMemory{Region: pmem.Heap(ondisk.MinSize), reached: make(chan struct{}), goOn: make(chan struct{})}
	const segments = 6
	formatSmall(t, m.Region, segments, false, 70)
	disk := backing.NewFake(256<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, m, disk, 2)
	data := make([]byte, 1<<20)
	fillStamp(data, 0, 1)
	r.write(t, 0, data)
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	m.armed.Store(true)
	read := make(chan error, 1)
	go func() { read <- r.do(1, &Request{Op: Read, Buf: got}) }()
	<-m.reached
	other := make([]byte, 1<<20)
	for i := range int64(4 * segments * 16) {
		off := (1 + i%200) << 20
		fillStamp(other, off/sectorSize, 2)
		r.write(t, off, other)
	}
	close(m.goOn)
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Error("a segment was used again under its reader")
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
	// Every time round, each data segment gets a new generation first.
	l, err := ondisk.ReadLayout(m.Region, m.Region.Size())
	if err != nil {
		t.Fatal(err)
	}
	reused := 0
	for _, gen := range l.Gens {
		reused += int(gen)
	}
	if reused < 2*segments {
		t.Errorf("after 4 times the cache the generations are %v", l.Gens)
	}
}

// TestKeyLongerThanTransfer: the kernel makes keys of up to 4 MiB.
func TestKeyLongerThanTransfer(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	data := stamped(0, 4<<20/sectorSize, 1)
	r.write(t, 0, data)
	within(t, "a flush", func() {
		if err := r.Flush(context.Background()); err != nil {
			t.Error(err)
		}
	})
	r.kill()
	got := make([]byte, len(data))
	disk.ReadAt(got, 0)
	if !bytes.Equal(got, data) {
		t.Error("the disk does not have what was flushed")
	}
}

// stuckDisk returns a disk that fails all writes until it is told not to.
func stuckDisk(size int64) (disk *backing.Fake, heal func()) {
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

// TestLogFull: a log that cannot go on, in a cache without any free segment as
// the kernel may leave one, stops writers but not readers, and goes on by
// itself once there is room.
func TestLogFull(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 20, false, 70)
	disk, heal := stuckDisk(64 << 20)
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

// TestTooManyQueues: each queue holds a segment open.
func TestTooManyQueues(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 31, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	most := 0
	for n := 1; n < 40; n++ {
		c, err := Open(mem, fakeDisk{disk}, Options{Queues: n, Log: &testLog{}})
		if err == nil {
			c.Close()
			most = n
		} else if !errors.Is(err, ErrOptions) {
			t.Fatal(err)
		}
	}
	if most != MaxQueues(31) || most == 0 {
		t.Errorf("%d queues can be opened, MaxQueues says %d", most, MaxQueues(31))
	}
	for n, want := range []int{0, 0, 0, 0, 0, 1, 2} {
		if got := MaxQueues(n); got != want {
			t.Errorf("MaxQueues(%d) = %d, want %d", n, got, want)
		}
	}
	r := newRig(t, mem, disk, most)
	for q := range most {
		within(t, "a first write", func() {
			if err := r.do(q, &Request{Op: Write, Off: int64(q) << 20, Buf: make([]byte, 512)}); err != nil {
				t.Error(err)
			}
		})
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}
