package engine

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

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
	c.missedBefore(0, len(old))
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
