package pmem

import (
	"fmt"
	"io"
	"iter"
	"math"
	"sync"
	"sync/atomic"
)

// Fake is a region in the Go heap, with the methods of Region, for testing
// what is built on one. It takes memory only for the pages that were stored
// to, can be copied at the price of what changes afterwards, and can be given
// media errors.
//
// A store off the 8-byte grid or outside the region panics: its caller has
// taken an image at its word. Reads outside give ErrRange or io.EOF, as a
// Region does.
//
// All methods may be called from any goroutine. The lock inside orders stores
// with Clone and Poison only, never with each other, so the race detector sees
// accesses to the same bytes that nothing else orders.
type Fake struct {
	size  int64
	alloc sync.Mutex // held to give a chunk or a page to the Fake
	mu    struct {
		sync.RWMutex
		id     uint64 // of the chunks that are not shared with a clone
		chunks []atomic.Pointer[fakeChunk]
		bad    []badRange
		gone   []badRange // likewise for stores
	}
}

const (
	// fakePageSize is the least memory that a store takes, in bytes, and what the
	// first store to a page costs to copy after Clone.
	fakePageSize = 4 << 10
	// fakeChunkPages keeps both the table that Clone copies and the one that
	// the first store to a chunk copies after it small: for a region of
	// 512 MiB they are 8 and 2 KiB.
	fakeChunkPages = 128
	fakeChunkSize  = fakePageSize * fakeChunkPages
)

type fakePage [fakePageSize]byte

// fakeChunk is a table of pages. Its owner stores to the pages in own; those
// in shared are never stored to again, and count where own has none.
type fakeChunk struct {
	owner  uint64
	shared [fakeChunkPages]*fakePage
	own    [fakeChunkPages]atomic.Pointer[fakePage]
}

// page returns a page for reading, nil for one of zeros.
func (c *fakeChunk) page(i int64) *fakePage {
	if c == nil {
		return nil
	}
	if p := c.own[i].Load(); p != nil {
		return p
	}
	return c.shared[i]
}

type badRange struct{ from, to int64 }

// fakeID makes the owners of chunks different.
var fakeID atomic.Uint64

// NewFake makes a region of size bytes, a multiple of 8, all of them zero.
func NewFake(size int64) *Fake {
	f := &Fake{size: size}
	f.mu.id = fakeID.Add(1)
	f.mu.chunks = make([]atomic.Pointer[fakeChunk], (size+fakeChunkSize-1)/fakeChunkSize)
	return f
}

// Clone returns a copy with the content and the media errors of this moment.
func (f *Fake) Clone() *Fake {
	c := NewFake(f.size)
	f.mu.Lock()
	defer f.mu.Unlock()
	// From now on all chunks belong to neither of the two.
	f.mu.id = fakeID.Add(1)
	for i := range f.mu.chunks {
		if chunk := f.mu.chunks[i].Load(); chunk != nil {
			c.mu.chunks[i].Store(chunk)
		}
	}
	c.mu.bad = append([]badRange{}, f.mu.bad...)
	c.mu.gone = append([]badRange{}, f.mu.gone...)
	return c
}

// Poison makes every read that touches one of n bytes at off a media error.
// Stores there succeed, and the bytes stay unreadable.
func (f *Fake) Poison(off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.bad = append(f.mu.bad, badRange{off, off + n})
}

// Punch takes n bytes at off away, both multiples of 8: reads are media errors,
// and so are stores, which store the bytes in front of that place. The pages of
// a mapped file that was truncated are like that.
func (f *Fake) Punch(off, n int64) {
	f.Poison(off, n)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.gone = append(f.mu.gone, badRange{off, off + n})
}

// Mend ends all media errors.
func (f *Fake) Mend() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.bad, f.mu.gone = nil, nil
}

// Size is in bytes.
func (f *Fake) Size() int64 { return f.size }

// Durable is true: a Fake is like DAX.
func (f *Fake) Durable() bool { return true }

// Fence does nothing: every store is there at once.
func (f *Fake) Fence() {}

// Sync does nothing.
func (f *Fake) Sync() error { return nil }

// Settle does nothing, since no Sync fails.
func (f *Fake) Settle(iter.Seq2[int64, int64]) error { return nil }

// ReadAt is Region.ReadAt.
func (f *Fake) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > f.size {
		return 0, fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, len(p), off, f.size)
	}
	if int64(len(p)) > f.size-off {
		p, err = p[:f.size-off], io.EOF
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if at := first(f.mu.bad, off, int64(len(p))); at >= 0 {
		return 0, &FaultError{Path: "a fake region", Off: at}
	}
	f.eachPage(off, int64(len(p)), func(i, begin, end int64) {
		to := p[n : n+int(end-begin)]
		if page := f.mu.chunks[i/fakeChunkPages].Load().page(i % fakeChunkPages); page != nil {
			copy(to, page[begin:end])
		} else {
			clear(to)
		}
		n += len(to)
	})
	return n, err
}

// first returns the first byte of a range that is in one of the bad ones, -1 for
// none.
func first(bad []badRange, off, n int64) int64 {
	first := int64(math.MaxInt64)
	for _, b := range bad {
		if at := max(off, b.from); at < min(off+n, b.to) {
			first = min(first, at)
		}
	}
	if first == math.MaxInt64 {
		return -1
	}
	return first
}

// WriteAt is Region.WriteAt.
func (f *Fake) WriteAt(p []byte, off int64) (n int, err error) {
	f.checkStore(off, int64(len(p)))
	f.mu.RLock()
	defer f.mu.RUnlock()
	if at := first(f.mu.gone, off, int64(len(p))); at >= 0 {
		p, err = p[:at-off], &FaultError{Path: "a fake region", Off: at}
	}
	f.eachPage(off, int64(len(p)), func(i, begin, end int64) {
		n += copy(f.ownLocked(i)[begin:end], p[n:])
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

// Zero is Region.Zero. Pages that hold zeros anyway take no memory.
func (f *Fake) Zero(off, n int64) (err error) {
	f.checkStore(off, n)
	f.mu.RLock()
	defer f.mu.RUnlock()
	if at := first(f.mu.gone, off, n); at >= 0 {
		n, err = at-off, &FaultError{Path: "a fake region", Off: at}
	}
	f.eachPage(off, n, func(i, begin, end int64) {
		if f.mu.chunks[i/fakeChunkPages].Load().page(i%fakeChunkPages) != nil {
			clear(f.ownLocked(i)[begin:end])
		}
	})
	return err
}

func (f *Fake) checkStore(off, n int64) {
	if (off|n)%8 != 0 || off < 0 || n < 0 || off > f.size-n {
		panic(fmt.Sprintf("pmem: store of %d bytes at %d of a region of %d", n, off, f.size))
	}
}

// eachPage calls do for each page of a range, with its number and the bytes
// of it that belong to the range.
func (f *Fake) eachPage(off, n int64, do func(i, begin, end int64)) {
	for n > 0 {
		begin := off % fakePageSize
		end := min(begin+n, fakePageSize)
		do(off/fakePageSize, begin, end)
		off += end - begin
		n -= end - begin
	}
}

// ownLocked returns page i for storing.
func (f *Fake) ownLocked(i int64) *fakePage {
	chunk := &f.mu.chunks[i/fakeChunkPages]
	i %= fakeChunkPages
	c := chunk.Load()
	if c != nil && c.owner == f.mu.id {
		if p := c.own[i].Load(); p != nil {
			return p
		}
	}
	f.alloc.Lock()
	defer f.alloc.Unlock()
	if c = chunk.Load(); c == nil || c.owner != f.mu.id {
		mine := &fakeChunk{owner: f.mu.id}
		for i := range mine.shared {
			mine.shared[i] = c.page(int64(i))
		}
		chunk.Store(mine)
		c = mine
	}
	p := c.own[i].Load()
	if p == nil {
		p = new(fakePage)
		if s := c.shared[i]; s != nil {
			*p = *s
		}
		c.own[i].Store(p)
	}
	return p
}
