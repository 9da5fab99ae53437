//go:build vm

package ublk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/uring"
)

// fill stamps each sector so that any other sector, and any other version of
// the same one, differs from it everywhere.
func fill(buf []byte, offset int64, version uint64) {
	for i := 0; i < len(buf); i += 8 {
		at := uint64(offset) + uint64(i)
		x := (at+1)*0x9e3779b97f4a7c15 ^ (version+1)*0xbf58476d1ce4e5b9
		binary.LittleEndian.PutUint64(buf[i:], x^x>>29)
	}
}

func open(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func aligned(t *testing.T, n int) []byte {
	t.Helper()
	b, err := uring.AlignedBuffer(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { uring.FreeBuffer(b) })
	return b
}

// onCPU ties the goroutine to a CPU, for good, and with that to one of two queues.
func onCPU(t *testing.T, cpu int) {
	runtime.LockOSThread()
	var cpus unix.CPUSet
	cpus.Set(cpu)
	if err := unix.SchedSetaffinity(0, &cpus); err != nil {
		t.Error(err)
	}
}

// client writes and reads back random pieces of its own part of the disk, and
// remembers which version each sector has.
type client struct {
	fd        int
	base      int64
	versions  []uint64 // by sector
	buf, want []byte
	rng       *rand.Rand
	writes    atomic.Int64
}

func newClient(t *testing.T, fd, i int, size int64) *client {
	return &client{fd: fd, base: int64(i) * size, versions: make([]uint64, size/512),
		buf: aligned(t, MaxIO), want: make([]byte, MaxIO), rng: rand.New(rand.NewPCG(1, uint64(i)))}
}

func (c *client) write() error {
	first, n := c.piece()
	version := uint64(c.writes.Load()) + 1
	offset := c.base + int64(first)*512
	fill(c.buf[:n*512], offset, version)
	if got, err := unix.Pwrite(c.fd, c.buf[:n*512], offset); err != nil || got != n*512 {
		return fmt.Errorf("write of %d sectors at %d: %d, %w", n, offset, got, err)
	}
	for i := range n {
		c.versions[first+i] = version
	}
	c.writes.Add(1)
	return nil
}

// work has clients make n requests each, half of the clients on each CPU, and
// then verify all that they have.
func work(t *testing.T, clients []*client, n int, request func(c *client) error) {
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			onCPU(t, i%2)
			for range n {
				if err := request(c); err != nil {
					t.Error(err)
					return
				}
			}
			if err := c.verify(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func (c *client) piece() (first, n int) {
	n = 1 + c.rng.IntN(16)
	if c.rng.IntN(8) == 0 {
		n = 1 + c.rng.IntN(MaxIO/512)
	}
	n = min(n, len(c.versions))
	return c.rng.IntN(len(c.versions) - n + 1), n
}

func (c *client) read(first, n int) error {
	offset := c.base + int64(first)*512
	if got, err := unix.Pread(c.fd, c.buf[:n*512], offset); err != nil || got != n*512 {
		return fmt.Errorf("read of %d sectors at %d: %d, %w", n, offset, got, err)
	}
	return c.compare(c.buf[:n*512], first)
}

func (c *client) compare(got []byte, first int) error {
	for i := range len(got) / 512 {
		want := c.want[:512]
		clear(want)
		if v := c.versions[first+i]; v != 0 {
			fill(want, c.base+int64(first+i)*512, v)
		}
		if !bytes.Equal(got[i*512:(i+1)*512], want) {
			return fmt.Errorf("sector %d of the disk is not version %d", c.base/512+int64(first+i), c.versions[first+i])
		}
	}
	return nil
}

func (c *client) verify() error {
	for first := 0; first < len(c.versions); first += MaxIO / 512 {
		if err := c.read(first, min(MaxIO/512, len(c.versions)-first)); err != nil {
			return err
		}
	}
	return nil
}
