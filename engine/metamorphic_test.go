package engine

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

var metaCases = flag.Int("meta.cases", 30, "cases of the metamorphic test; -rapid.seed is their seed")

// step is a request of a sequence. Its place in it is the version it writes.
type step struct {
	Op    Op
	Lba   int64
	N     int // sectors
	Times int // how often it is made
}

func (s step) request(version int) *Request {
	r := &Request{Op: s.Op, Off: s.Lba * sectorSize}
	switch s.Op {
	case Zero:
		r.Len = s.N * sectorSize
	case Read:
		r.Buf = make([]byte, s.N*sectorSize)
	case Write:
		r.Buf = stamped(s.Lba, s.N, uint64(version))
	}
	return r
}

// setting is everything about a run that must not show in what the device
// holds.
type setting struct {
	Memory    string // what the region is made of
	Segments  uint32
	CRC       bool
	GCPercent int
	Queues    int
	Depth     int // of write-back
	Batch     int // requests in a turn, at most
	Restart   int // batches between two restarts, 0 for none
	Kill      bool
	Flush     int // batches between two write-backs of everything, 0 for none
	Log       relogging
	Modes     []ondisk.Mode // one after the other, a batch each
}

func drawSetting(t *rapid.T) setting {
	return setting{
		Memory:    rapid.SampledFrom([]string{"durable", "durable", "durable", "page cache", "page cache", "page cache", "file"}).Draw(t, "memory"),
		Segments:  rapid.Uint32Range(modelSegments, 12).Draw(t, "segments"),
		CRC:       rapid.Bool().Draw(t, "crc"),
		GCPercent: rapid.IntRange(0, 90).Draw(t, "percent"),
		Queues:    rapid.IntRange(1, modelQueues).Draw(t, "queues"),
		Depth:     rapid.SampledFrom([]int{0, 1, 3}).Draw(t, "depth"),
		Batch:     rapid.IntRange(1, 40).Draw(t, "batch"),
		Restart:   rapid.IntRange(0, 8).Draw(t, "restart"),
		Kill:      rapid.Bool().Draw(t, "kill"),
		Flush:     rapid.IntRange(0, 8).Draw(t, "flush"),
		Log: relogging{
			PerKset:  rapid.IntRange(1, ondisk.MaxKeys).Draw(t, "keys per kset"),
			Room:     rapid.Uint32Range(0, maxRoom).Draw(t, "room"),
			Numbered: rapid.SampledFrom([]int{0, 0, 3, 1 << 20}).Draw(t, "numbered"),
		},
		Modes: rapid.SliceOfN(rapid.Custom(drawMode), 1, 3).Draw(t, "modes"),
	}
}

// outcome is all that a run can be told by.
type outcome struct {
	reads  [][]byte // of the steps that read
	device []byte   // read at the end
	disk   []byte   // and without the cache, after everything was written back
}

// TestMetamorphic makes the same requests under two settings that have nothing
// in common. What can be read must be the same.
func TestMetamorphic(t *testing.T) {
	dir := t.TempDir()
	checkCases(t, *metaCases, func(t *rapid.T) {
		steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
			s := step{Op: rapid.SampledFrom([]Op{Write, Write, Write, Read, Flush, Zero}).Draw(t, "op"), Times: 1}
			if s.Op != Flush {
				s.Lba, s.N = drawRange(t)
			}
			switch {
			case s.Op == Write && s.N > 4096:
				s.Times = rapid.IntRange(1, 12).Draw(t, "times")
			case s.Op == Zero && s.N > 64:
				s.N = rapid.IntRange(1, int(modelSectors-s.Lba)).Draw(t, "sectors")
			}
			return s
		}), 1, 80).Draw(t, "steps")
		one := drawSetting(t).run(t, dir, steps)
		two := drawSetting(t).run(t, dir, steps)
		for i := range one.reads {
			differ(t, fmt.Sprintf("read %d", i), one.reads[i], two.reads[i])
		}
		differ(t, "the device", one.device, two.device)
		differ(t, "the disk alone", one.disk, two.disk)
		differ(t, "the device, which the disk should be like,", one.device, one.disk)
	})
}

func differ(t *rapid.T, what string, one, two []byte) {
	for i := 0; i < len(one); i += sectorSize {
		if a, b := one[i:i+sectorSize], two[i:i+sectorSize]; !bytes.Equal(a, b) {
			t.Fatalf("%s differs in sector %d: begins with %x under one setting, with %x under the other", what, i/sectorSize, a[:16], b[:16])
		}
	}
}

// run makes the requests in their order: what overlaps is never in one turn.
func (s setting) run(t *rapid.T, dir string, steps []step) (o outcome) {
	var mem Memory
	if s.Memory == "file" {
		region, err := pmem.Open(fmt.Sprintf("%s,size=%d,volatile", filepath.Join(dir, "region"), ondisk.MinSize), pmem.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		defer region.Close()
		mem = region
	} else {
		mem = newMedium(s.Memory == "durable")
	}
	formatSmall(t, mem, s.Segments, s.CRC, s.GCPercent)
	disk := backing.NewFake(modelSectors*sectorSize, sectorSize, 1)
	defer func() { disk.Close() }()
	c := s.open(t, mem, disk)
	defer func() {
		if c != nil {
			c.Close()
		}
	}()

	var batch []*Request
	batches := 0
	setMode := func() {
		mode := s.Modes[batches%len(s.Modes)]
		if err := c.Set(context.Background(), func(now *Settings) error { now.Mode = mode; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	setMode()
	end := func() {
		if err := c.do(batch...); err != nil {
			t.Fatal(err)
		}
		batch = batch[:0]
		batches++
		setMode()
		if s.Flush > 0 && batches%s.Flush == 0 {
			if err := c.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		if s.Restart > 0 && batches%s.Restart == 0 {
			m, fake := mem.(*medium)
			next := disk
			if fake && s.Kill {
				m.crash(nil, func() { next = disk.Crash() })
			}
			err := c.Close()
			if c = nil; err != nil {
				t.Fatal(err)
			}
			if fake {
				mem = m.restarted()
			}
			if next != disk {
				disk.Close()
				disk = next
			}
			c = s.open(t, mem, disk)
		}
	}
	for i, step := range steps {
		for range step.Times {
			r := step.request(i + 1)
			for _, other := range batch {
				if r.Off < other.Off+int64(other.size()) && other.Off < r.Off+int64(r.size()) {
					end()
					break
				}
			}
			batch = append(batch, r)
			if r.Op == Read {
				o.reads = append(o.reads, r.Buf)
			}
			if len(batch) == s.Batch {
				end()
			}
		}
	}
	end()
	for off := int64(0); off < disk.Size(); off += ondisk.StripeSize {
		r := &Request{Op: Read, Off: off, Buf: make([]byte, min(ondisk.StripeSize, disk.Size()-off))}
		if err := c.do(r); err != nil {
			t.Fatal(err)
		}
		o.device = append(o.device, r.Buf...)
	}
	if err := c.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	o.disk = make([]byte, disk.Size())
	crashed := disk.Crash()
	defer crashed.Close()
	crashed.ReadAt(o.disk, 0)
	return o
}

func (s setting) open(t *rapid.T, mem Memory, disk *backing.Fake) *driver {
	if err := relog(mem, s.Log); err != nil {
		t.Fatal(err)
	}
	c, err := newDriver(mem, disk, Options{Queues: s.Queues, WritebackDepth: s.Depth})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return c
}
