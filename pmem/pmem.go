// Package pmem maps persistent memory, or a file that stands in for it, and
// is the only place that touches the mapping. It knows nothing of what is
// stored there.
//
// A store is made in two steps. WriteAt and Zero put bytes into the memory
// with stores that bypass the cache; Fence waits until all stores that this
// thread made before have arrived. On DAX that makes them durable; on a
// plain file it takes Sync as well, since the mapping is the page cache.
//
// # Why stores that bypass the cache
//
// The obvious way is to copy and then write back each cache line that was
// touched. It costs three times as much (4 KiB with fence on a DRAM-backed
// region: 380 ns against 1280 ns), fills the cache with data that nobody is
// about to read, and needs one of three instructions depending on the CPU.
// Non-temporal stores are part of SSE2, which every amd64 CPU has. They come
// in 4, 8 and 16 bytes, and in 32 with AVX, so an odd byte at an edge would need
// a write-back after all. Nothing stored here is smaller than 8 bytes or off the
// 8-byte grid; hence offsets and lengths must be multiples of 8, and anything else
// is an error. Each aligned 8 bytes arrive whole or not at all. On arm64, which
// has no store that reaches persistence by itself, lines are copied and then
// cleaned.
//
// # Why every access is guarded
//
// Memory that lost its content answers with a signal: SIGBUS, in whatever
// instruction touched it. The same happens in a file that was truncated, or
// has a hole for which its file system finds no space. Such a fault must
// cost the request and not the server, so accesses go through ReadAt,
// WriteAt and Zero, which turn the signal into a *FaultError. The price is
// 15 ns.
//
// A store to a page that is not there faults at once, non-temporal or not. A
// store to poisoned memory may not fault: it mends the line or is lost, as
// the hardware likes, and only a read tells which.
//
// # Mapping
//
// Nothing is populated in advance: a device of a terabyte would take minutes,
// and device-dax needs one fault per 2 MiB anyway. The kernel places DAX
// mappings on 2 MiB boundaries by itself, so huge pages need no help.
//
// Any number of goroutines may use a Region at a time, but not while one
// calls Close. A read of bytes that another goroutine is storing gets old
// or new ones.
package pmem

import (
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/filelock"
)

// Kind is what a region is made of.
type Kind int

const (
	// DevDax is a device-dax character device.
	DevDax Kind = iota
	// DAXFile is a file on a DAX file system, mapped with MAP_SYNC.
	DAXFile
	// File is any other file: the mapping is the page cache.
	File
	// HeapMemory comes from the Go heap and is lost with the process.
	HeapMemory
)

func (k Kind) String() string {
	return [...]string{"device-dax", "dax file", "file", "heap"}[k]
}

// Region is a mapped piece of memory.
type Region struct {
	mem  []byte
	kind Kind
	mode Mode
	file *os.File // nil for HeapMemory
	lock *filelock.Lock

	persistence Persistence
	doubt       string
}

// Heap returns a region of size bytes, a multiple of 8, on the Go heap. The
// race detector follows accesses to it, which it does not do for a mapping;
// otherwise the two are the same. A large region is on huge pages, if there
// are any, as a device-dax device is.
func Heap(size int64) *Region {
	mem := make([]byte, size)
	if size >= hugeHeap {
		unix.Madvise(mem, unix.MADV_HUGEPAGE)
	}
	return &Region{mem: mem, kind: HeapMemory, persistence: Volatile, doubt: "it is on the heap"}
}

// hugeHeap is the least size in bytes of a region on the heap that is on huge pages. A
// smaller one is a test's, which touches little of it.
const hugeHeap = 1 << 30

// Size returns the usable size in bytes.
func (r *Region) Size() int64 { return int64(len(r.mem)) }

// Kind returns what the region is made of.
func (r *Region) Kind() Kind { return r.kind }

// Durable reports whether a Fence, without a Sync, makes stores survive a
// power cut.
func (r *Region) Durable() bool { return r.kind == DevDax || r.kind == DAXFile }

// Path returns the name the region was opened by, empty for HeapMemory.
func (r *Region) Path() string {
	if r.file == nil {
		return ""
	}
	return r.file.Name()
}

// File is the file that the region is mapped from, for a process that is to
// Inherit it.
func (r *Region) File() *os.File { return r.file }

// ReadAt copies from the region; any offset and length, in bytes. It is an
// [io.ReaderAt]. Bytes that cannot be read give a *FaultError, and then p may
// be partly overwritten.
func (r *Region) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > r.Size() {
		return 0, r.outside(off, len(p))
	}
	defer r.guard(armGuard(), &err)
	n = copy(p, r.mem[off:])
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// ReadEach fills each of the buffers in order, from its own offset, as ReadAt does, with
// one guard for all of them. It returns how many of them it has filled: if there is an
// error, it is about the next one.
func (r *Region) ReadEach(bufs [][]byte, offs []int64) (n int, err error) {
	defer r.guard(armGuard(), &err)
	for i, p := range bufs {
		off := offs[i]
		if off < 0 || off > r.Size()-int64(len(p)) {
			return n, r.outside(off, len(p))
		}
		copy(p, r.mem[off:])
		n++
	}
	return n, nil
}

// WriteAt copies p into the region. off and len(p) are multiples of 8. The
// bytes are in order with other stores, and durable, only after Fence (and
// Sync). After a *FaultError any part of p may have been written.
func (r *Region) WriteAt(p []byte, off int64) (n int, err error) {
	if err := r.writable(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	defer r.guard(armGuard(), &err)
	if raceDetector && r.kind == HeapMemory {
		copy(r.mem[off:], p)
	} else {
		store(unsafe.Pointer(&r.mem[off]), unsafe.Pointer(&p[0]), uintptr(len(p)))
	}
	return len(p), nil
}

// Zero clears n bytes at off, both multiples of 8, like WriteAt.
func (r *Region) Zero(off, n int64) (err error) {
	if err := r.writable(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	defer r.guard(armGuard(), &err)
	if raceDetector && r.kind == HeapMemory {
		clear(r.mem[off:][:n])
	} else {
		storeZero(unsafe.Pointer(&r.mem[off]), uintptr(n))
	}
	return nil
}

// Fence returns when all stores that the calling thread made before have
// left the CPU. If the region is Durable, they are durable then.
func (r *Region) Fence() { fence() }

// Sync makes all stores before it durable. For a File it takes as long as
// the disk does; for others it has nothing to do.
func (r *Region) Sync() error {
	if r.kind != File {
		return nil
	}
	if err := unix.Fdatasync(int(r.file.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", r.Path(), err)
	}
	return nil
}

// Close unmaps the region and gives up its lock. Nothing may use it any more.
func (r *Region) Close() error {
	if r.file == nil {
		r.mem = nil
		return nil
	}
	err := unix.Munmap(r.mem)
	r.mem = nil
	r.lock.Close()
	if closed := r.file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("close %s: %w", r.Path(), err)
	}
	return nil
}

func (r *Region) writable(off, n int64) error {
	if r.mode == ReadOnly {
		return ErrReadOnly
	}
	if (off|n)%8 != 0 {
		return fmt.Errorf("%w: %d bytes at %d", ErrUnaligned, n, off)
	}
	if off < 0 || n < 0 || off > r.Size()-n {
		return r.outside(off, int(n))
	}
	return nil
}

func (r *Region) outside(off int64, n int) error {
	return fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, n, off, r.Size())
}
