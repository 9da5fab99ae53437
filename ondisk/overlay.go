package ondisk

import (
	"fmt"
	"io"
	"iter"
	"sync"
)

// Overlay is a device in memory on top of one that is only read: stores go to
// the overlay, and cover what lies below, readable or not. A repair is tried
// there before anything is changed, and a cache can be opened on one as if it
// had been repaired.
//
// It is a [Medium]. All methods may be called from any goroutine.
type Overlay struct {
	base io.ReaderAt
	size int64
	mu   struct {
		sync.RWMutex
		pages map[int64]*overlayPage
	}
}

// overlayPageSize is in bytes. It is small, since repairs are small and far
// apart.
const overlayPageSize = 4 << 10

// overlayPage covers those words of a page that were stored to; set has a bit
// for each. A word is eight bytes, which memory keeps or loses as one.
type overlayPage struct {
	data [overlayPageSize]byte
	set  [overlayPageSize / 8 / 64]uint64
}

func (g *overlayPage) has(word int64) bool { return g.set[word/64]>>(word%64)&1 != 0 }

// NewOverlay returns an overlay on size bytes of base with nothing stored yet.
func NewOverlay(base io.ReaderAt, size int64) *Overlay {
	o := &Overlay{base: base, size: size}
	o.mu.pages = map[int64]*overlayPage{}
	return o
}

// Size is in bytes.
func (o *Overlay) Size() int64 { return o.size }

// Fence has nothing to do: what is stored is there.
func (o *Overlay) Fence() {}

// Sync has nothing to do either.
func (o *Overlay) Sync() error { return nil }

// Settle has nothing to do, since no Sync fails.
func (o *Overlay) Settle(iter.Seq2[int64, int64]) error { return nil }

// ReadAt fails where the base fails and nothing was stored.
func (o *Overlay) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > o.size {
		return 0, fmt.Errorf("%w: %d bytes at %d of %d", ErrOutside, len(p), off, o.size)
	}
	if int64(len(p)) > o.size-off {
		p, err = p[:o.size-off], io.EOF
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	for n < len(p) {
		at := off + int64(n)
		page, end := o.runLocked(at, off+int64(len(p)))
		part := p[n : n+int(end-at)]
		if page == nil {
			if err := readFull(o.base, part, at); err != nil {
				return n, err
			}
		} else if err := page.read(o.base, part, at); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, err
}

// runLocked returns the page that holds at and where it ends, or nil and where
// the next page begins; never beyond end.
func (o *Overlay) runLocked(at, end int64) (*overlayPage, int64) {
	i := at / overlayPageSize
	if page := o.mu.pages[i]; page != nil || len(o.mu.pages) == 0 {
		if page != nil {
			end = min(end, (i+1)*overlayPageSize)
		}
		return page, end
	}
	for i++; i*overlayPageSize < end && o.mu.pages[i] == nil; i++ {
	}
	return nil, min(end, i*overlayPageSize)
}

// read fills p, which lies in the page, from the base and over that from the
// page. The base need not be readable where the page covers it.
func (g *overlayPage) read(base io.ReaderAt, p []byte, off int64) error {
	readable := readFull(base, p, off) == nil
	for n := 0; n < len(p); {
		at := off + int64(n)
		in := at % overlayPageSize
		part := p[n:min(len(p), n+8-int(at%8))]
		if g.has(in / 8) {
			copy(part, g.data[in:])
		} else if !readable {
			if err := readFull(base, part, at); err != nil {
				return err
			}
		}
		n += len(part)
	}
	return nil
}

// WriteAt stores p. off and len(p) are multiples of 8.
func (o *Overlay) WriteAt(p []byte, off int64) (n int, err error) {
	if (off|int64(len(p)))%8 != 0 || off < 0 || int64(len(p)) > o.size-off {
		return 0, fmt.Errorf("%w: %d bytes at %d of %d", ErrOutside, len(p), off, o.size)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for n < len(p) {
		at := off + int64(n)
		page := o.mu.pages[at/overlayPageSize]
		if page == nil {
			page = &overlayPage{}
			o.mu.pages[at/overlayPageSize] = page
		}
		in := at % overlayPageSize
		stored := copy(page.data[in:], p[n:])
		for word := in / 8; word < (in+int64(stored))/8; word++ {
			page.set[word/64] |= 1 << (word % 64)
		}
		n += stored
	}
	return n, nil
}

// Zero stores n zero bytes, like WriteAt.
func (o *Overlay) Zero(off, n int64) error {
	for end := off + n; off < end; {
		p := zeros[:min(int64(len(zeros)), end-off)]
		if _, err := o.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// copyChunk is how many bytes Copy reads at a time.
const copyChunk = 1 << 20

// Copy writes everything that is not zero to w, which is a new, sparse file of
// the same size, and syncs it. The superblock comes last, so that a copy that
// was not finished is no cache. Bytes that cannot be read are zero in the
// copy.
func (o *Overlay) Copy(w interface {
	io.WriterAt
	Sync() error
}) error {
	buf := make([]byte, copyChunk)
	for off := int64(0); off < o.size; off += copyChunk {
		p := buf[:min(copyChunk, o.size-off)]
		if readFull(o, p, off) != nil {
			readAround(o, p, off, 8)
		}
		if off == 0 {
			clear(p[SuperblockOff:][:SuperblockSize])
		}
		if err := writeSparse(w, p, off); err != nil {
			return err
		}
	}
	if err := w.Sync(); err != nil {
		return err
	}
	super := buf[:SuperblockSize]
	readAround(o, super, SuperblockOff, 8)
	if _, err := w.WriteAt(super, SuperblockOff); err != nil {
		return err
	}
	return w.Sync()
}

// writeSparse leaves out the blocks that are zero.
func writeSparse(w io.WriterAt, p []byte, off int64) error {
	const block = 4 << 10
	for len(p) > 0 {
		n := 0
		for n < len(p) && !isZero(p[n:min(n+block, len(p))]) {
			n = min(n+block, len(p))
		}
		if n > 0 {
			if _, err := w.WriteAt(p[:n], off); err != nil {
				return err
			}
		} else {
			n = min(block, len(p))
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
