package stamp

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Load is a mixed workload on a Device.
type Load struct {
	Depth     int    // requests in flight, each from a goroutine of its own
	BlockSize int64  // bytes; sizes and offsets are multiples of it
	Seed      uint64 // the same seed gives each goroutine the same requests
	Flush     bool   // flush after one write in 16

	// Durable, if there is one, is a way to the device that makes writes durable; one write in 16 takes it.
	Durable ReadWriterAt

	// Zero, if there is one, makes a range read as zeros; one request in 16 does then. kind is random: there are
	// several ways.
	Zero func(off, n int64, kind int) error
}

// The largest requests; sizes are spread so that each power of two up to them is as likely as another. One without data
// may be much larger than one with. At this size, zeroing and writing keep each other's balance.
const (
	maxRequest = 1 << 20
	maxZero    = 16 << 20
)

// Run makes requests until they have written the given number of bytes or stop is closed, whichever is first; it returns
// the bytes written and all errors. Three requests of four write, zeroing aside; half of all go to a sixteenth of the device, so that
// overwriting, reading what was just written and reading what was long evicted all happen.
func (l Load) Run(d *Device, bytes int64, stop <-chan struct{}) (int64, error) {
	var written atomic.Int64
	var wait sync.WaitGroup
	failed := make([]error, l.Depth)
	for i := range l.Depth {
		wait.Add(1)
		go func() {
			defer wait.Done()
			failed[i] = l.one(d, rand.New(rand.NewPCG(l.Seed, uint64(i))), bytes, &written, stop)
		}()
	}
	wait.Wait()
	return written.Load(), errors.Join(failed...)
}

func (l Load) one(d *Device, rnd *rand.Rand, bytes int64, written *atomic.Int64, stop <-chan struct{}) error {
	buf, err := Buffer(maxRequest)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for written.Load() < bytes {
		select {
		case <-stop:
			return nil
		default:
		}
		zero := l.Zero != nil && rnd.IntN(16) == 0
		most, area := int64(maxRequest), d.Size()
		if zero {
			most = maxZero
		}
		size := int64(sectorSize * math.Pow(float64(most/sectorSize), rnd.Float64()))
		if rnd.IntN(2) == 0 {
			area /= 16
		}
		size = max(min(size, area)/l.BlockSize, 1) * l.BlockSize
		off := rnd.Int64N((area-size)/l.BlockSize+1) * l.BlockSize
		switch {
		case zero:
			kind := rnd.Int()
			err = d.Zero(off, size, func(off, n int64) error { return l.Zero(off, n, kind) })
		case rnd.IntN(4) == 0:
			err = d.Read(buf[:size], off)
		default:
			if l.Durable != nil && rnd.IntN(16) == 0 {
				err = d.WriteDurable(l.Durable, buf[:size], off)
			} else {
				err = d.Write(buf[:size], off)
			}
			if err == nil {
				written.Add(size)
			}
			if err == nil && l.Flush && rnd.IntN(16) == 0 {
				err = d.Flush()
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Buffer returns page-aligned memory, as O_DIRECT wants it.
func Buffer(size int) ([]byte, error) {
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map a buffer of %d bytes: %w", size, err)
	}
	return buf, nil
}
