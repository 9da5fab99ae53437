package engine

import (
	"bytes"
	"context"
	"sync/atomic"
	"testing"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

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
