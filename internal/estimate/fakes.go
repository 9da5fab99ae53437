package estimate

import (
	"bytes"
	"fmt"
	"io"
	"iter"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// All data that is played is zeros. So a region and a disk need not keep it: the disk has
// zeros everywhere, and the region only keeps pages in which something else is, which are
// the log's and those of the segments' headers. That is little, however large the region.

// region is an engine.Memory.
type region struct {
	size   int64
	stored atomic.Int64 // bytes, ever
	mu     struct {
		sync.RWMutex
		pages map[int64]*page
	}
}

const pageSize = 4 << 10

type page [pageSize]byte

var zeros page

func newRegion(size int64) *region {
	r := &region{size: size}
	r.mu.pages = map[int64]*page{}
	return r
}

func (r *region) Size() int64                          { return r.size }
func (r *region) Durable() bool                        { return true }
func (r *region) Fence()                               {}
func (r *region) Sync() error                          { return nil }
func (r *region) Settle(iter.Seq2[int64, int64]) error { return nil }
func (r *region) Zero(off, n int64) error              { return r.store(off, n, nil) }
func (r *region) WriteAt(p []byte, off int64) (int, error) {
	if err := r.store(off, int64(len(p)), p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (r *region) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > r.size {
		return 0, outside(off, int64(len(p)))
	}
	if left := r.size - off; int64(len(p)) > left {
		p, err = p[:left], io.EOF
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	for n < len(p) {
		from, to := within(off+int64(n), int64(len(p)-n))
		part := p[n:][:to-from]
		if kept := r.mu.pages[(off+int64(n))/pageSize]; kept != nil {
			copy(part, kept[from:to])
		} else {
			clear(part)
		}
		n += len(part)
	}
	return n, err
}

// store puts n bytes at off: p, or zeros if that is nil.
func (r *region) store(off, n int64, p []byte) error {
	if off < 0 || n < 0 || off > r.size-n {
		return outside(off, n)
	}
	r.stored.Add(n)
	r.mu.Lock()
	defer r.mu.Unlock()
	for end := off + n; off < end; {
		from, to := within(off, end-off)
		part := zeros[from:to]
		if p != nil {
			part, p = p[:to-from], p[to-from:]
		}
		r.storeLocked(off/pageSize, from, part)
		off += to - from
	}
	return nil
}

// storeLocked puts bytes into a page.
func (r *region) storeLocked(number, from int64, part []byte) {
	kept := r.mu.pages[number]
	nothing := bytes.Equal(part, zeros[:len(part)])
	if kept == nil {
		if nothing {
			return
		}
		kept = new(page)
		r.mu.pages[number] = kept
	}
	copy(kept[from:], part)
	if nothing && *kept == zeros {
		delete(r.mu.pages, number)
	}
}

// within returns which bytes of the page at off are the first of n from off on.
func within(off, n int64) (from, to int64) {
	from = off % pageSize
	return from, min(from+n, pageSize)
}

func outside(off, n int64) error { return fmt.Errorf("%d bytes at %d are outside the region", n, off) }

// disk is an engine.Disk that answers at once.
type disk struct{ size int64 }

func (d disk) Read(buf []byte, _ int64, done func(error)) {
	clear(buf)
	done(nil)
}
func (d disk) Write(_ []byte, _ int64, done func(error)) { done(nil) }
func (d disk) Zero(_, _ int64, done func(error))         { done(nil) }
func (d disk) Flush(done func(error))                    { done(nil) }
func (d disk) Size() int64                               { return d.size }
func (d disk) BlockSize() int                            { return ondisk.SectorSize }
func (d disk) Buffer(n int) []byte                       { return make([]byte, n) }
