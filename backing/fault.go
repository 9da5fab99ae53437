package backing

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Fake is a disk in the Go heap, with the methods of Device, for tests of
// code that uses one: the race detector sees its memory, and it can be told
// to misbehave. It behaves as badly as a real disk may:
//
//   - Operations in flight finish in any order, on a goroutine of its own.
//   - Writes and zeroing go to a volatile cache. Reads see them, but only a flush makes
//     them stable. Crash keeps the stable blocks, and of each block written
//     since, any version or none.
//   - A write that fails has written some of its blocks, as has a zeroing.
//   - A flush that fails has made some blocks stable and has forgotten that
//     the others were not: the next flush succeeds without them, as it does on
//     Linux after fsync has reported an error once. Reads still see them.
//
// All methods may be called from any goroutine.
type Fake struct {
	size      int64
	blockSize int
	ended     chan struct{}

	mu struct {
		sync.Mutex
		changed  *sync.Cond
		rng      *rand.Rand
		script   func(Op) Fault
		current  content
		stable   content
		unstable []extent // in the order in which they were carried out
		ready    []*fakeOp
		held     []*fakeOp
		delayed  map[*fakeOp]struct{}
		counters Counters
		closed   bool
	}
}

// Op is an operation, as a script sees it.
type Op struct {
	Kind Kind
	Off  int64 // bytes
	Len  int64 // bytes; 0 for a flush
}

// Fault is what happens to one operation; the zero value is no fault.
type Fault struct {
	Err   error // fails with this; should wrap a syscall.Errno
	Delay time.Duration
	Hold  bool // until Release; then Delay does not apply
}

// Counters count finished operations, failed ones included, and the bytes of
// those that succeeded.
type Counters struct {
	Reads, Writes, Zeros, Flushes, Failed int
	BytesRead, BytesWritten, BytesZeroed  int64
}

type extent struct {
	off  int64
	data []byte
}

type fakeOp struct {
	op
	fault Fault
}

// NewFake makes a disk of zeroes. size is in bytes, a multiple of blockSize.
// The seed decides all that is random, except for the scheduling of
// goroutines.
func NewFake(size int64, blockSize int, seed uint64) *Fake {
	f := &Fake{size: size, blockSize: blockSize, ended: make(chan struct{})}
	f.mu.changed = sync.NewCond(&f.mu)
	f.mu.rng = rand.New(rand.NewPCG(seed, 0))
	f.mu.current = newContent(size)
	f.mu.stable = newContent(size)
	f.mu.delayed = map[*fakeOp]struct{}{}
	go f.work()
	return f
}

// Size is in bytes.
func (f *Fake) Size() int64 { return f.size }

// BlockSize is in bytes.
func (f *Fake) BlockSize() int { return f.blockSize }

// Script sets the function that decides on the fate of each operation when it
// is submitted; nil lets all succeed. It is called with the Fake's lock held
// and must not use the Fake.
func (f *Fake) Script(script func(Op) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.script = script
}

// Read is Device.Read.
func (f *Fake) Read(buf []byte, off int64, done func(error)) {
	f.submit(op{kind: OpRead, buf: buf, off: off, n: int64(len(buf)), done: done})
}

// Write is Device.Write.
func (f *Fake) Write(buf []byte, off int64, done func(error)) {
	f.submit(op{kind: OpWrite, buf: buf, off: off, n: int64(len(buf)), done: done})
}

// Flush is Device.Flush.
func (f *Fake) Flush(done func(error)) {
	f.submit(op{kind: OpFlush, done: done})
}

// Zero is Device.Zero.
func (f *Fake) Zero(off, n int64, done func(error)) {
	f.submit(op{kind: OpZero, buf: make([]byte, n), off: off, n: n, done: done})
}

func (f *Fake) submit(o op) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.closed {
		panic("backing: " + o.kind.String() + " submitted to a closed disk")
	}
	p := &fakeOp{op: o}
	if b := int64(f.blockSize); o.off < 0 || o.off%b != 0 || o.n%b != 0 || o.off+o.n > f.size {
		p.fault.Err = fmt.Errorf("%s of %d bytes at %d of %d: %w", o.kind, o.n, o.off, f.size, syscall.EINVAL)
		p.n = 0 // nothing of it happens
	} else if f.mu.script != nil {
		p.fault = f.mu.script(Op{o.kind, o.off, o.n})
	}
	switch {
	case p.fault.Hold:
		f.mu.held = append(f.mu.held, p)
	case p.fault.Delay > 0:
		f.mu.delayed[p] = struct{}{}
		time.AfterFunc(p.fault.Delay, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			delete(f.mu.delayed, p)
			f.readyLocked(p)
		})
	default:
		f.readyLocked(p)
	}
}

func (f *Fake) readyLocked(p ...*fakeOp) {
	f.mu.ready = append(f.mu.ready, p...)
	f.mu.changed.Signal()
}

// Held is how many operations wait for Release.
func (f *Fake) Held() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.mu.held)
}

// Release lets all held operations finish, each as its Fault says.
func (f *Fake) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readyLocked(f.mu.held...)
	f.mu.held = nil
}

// Counters returns the counts so far.
func (f *Fake) Counters() Counters {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.counters
}

// Close releases all held operations and waits for all operations. Nothing
// may be submitted any more.
func (f *Fake) Close() error {
	f.Release()
	f.mu.Lock()
	f.mu.closed = true
	f.mu.changed.Signal()
	f.mu.Unlock()
	<-f.ended
	return nil
}

// ReadAt reads the content that a Read sees, without being an operation.
func (f *Fake) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := int(max(0, min(int64(len(p)), f.size-off)))
	f.mu.current.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt sets the disk's content and makes it stable, without being an
// operation.
func (f *Fake) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := int(max(0, min(int64(len(p)), f.size-off)))
	f.mu.current.write(p[:n], off)
	f.mu.stable.write(p[:n], off)
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// Crash returns the disk as it could be found after a power cut at this
// moment. The original goes on as if nothing had happened. Each block of writes
// and zeroing in flight may be there, too.
func (f *Fake) Crash() *Fake {
	f.mu.Lock()
	defer f.mu.Unlock()
	after := NewFake(f.size, f.blockSize, f.mu.rng.Uint64())
	after.mu.Lock()
	defer after.mu.Unlock()
	after.mu.stable = f.mu.stable.clone()
	f.crashLocked(0, f.size, after.mu.stable.write)
	after.mu.current = after.mu.stable.clone()
	return after
}

// CrashAt reads blocks as Crash might leave them.
func (f *Fake) CrashAt(p []byte, off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.stable.read(p, off)
	f.crashLocked(off, int64(len(p)), func(data []byte, at int64) { copy(p[at-off:], data) })
}

// crashLocked writes some of the blocks, among the n bytes at off, that a power cut
// may take or leave.
func (f *Fake) crashLocked(off, n int64, write func(data []byte, off int64)) {
	lost := slices.Clone(f.mu.unstable)
	inFlight := append(append([]*fakeOp{}, f.mu.ready...), f.mu.held...)
	for p := range f.mu.delayed {
		inFlight = append(inFlight, p)
	}
	for _, o := range inFlight {
		if (o.kind == OpWrite || o.kind == OpZero) && o.n > 0 {
			lost = append(lost, extent{o.off, o.buf})
		}
	}
	for i, e := range lost {
		from := max(e.off, off)
		to := max(from, min(e.off+int64(len(e.data)), off+n))
		lost[i] = extent{from, e.data[min(from-e.off, int64(len(e.data))):][:to-from]}
	}
	f.someBlocksLocked(lost, write)
}

// someBlocksLocked writes some of the blocks of each extent, chosen at random.
func (f *Fake) someBlocksLocked(from []extent, write func(data []byte, off int64)) {
	for _, e := range from {
		for at := 0; at < len(e.data); at += f.blockSize {
			if f.mu.rng.IntN(2) == 0 {
				write(e.data[at:at+f.blockSize], e.off+int64(at))
			}
		}
	}
}

func (f *Fake) work() {
	defer close(f.ended)
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		for len(f.mu.ready) == 0 {
			if f.mu.closed && len(f.mu.delayed) == 0 {
				return
			}
			f.mu.changed.Wait()
		}
		last := len(f.mu.ready) - 1
		i := f.mu.rng.IntN(last + 1)
		p := f.mu.ready[i]
		f.mu.ready[i] = f.mu.ready[last]
		f.mu.ready = f.mu.ready[:last]
		f.carryOutLocked(p)

		f.mu.Unlock()
		p.done(p.fault.Err)
		f.mu.Lock()
	}
}

func (f *Fake) carryOutLocked(p *fakeOp) {
	failed := p.fault.Err != nil
	c := &f.mu.counters
	if failed {
		c.Failed++
	}
	switch p.kind {
	case OpRead:
		c.Reads++
		if !failed {
			c.BytesRead += p.n
			f.mu.current.read(p.buf[:p.n], p.off)
		}
	case OpWrite:
		c.Writes++
		if !failed {
			c.BytesWritten += p.n
		}
		f.changeLocked(p.off, p.buf[:p.n], failed)
	case OpZero:
		c.Zeros++
		if !failed {
			c.BytesZeroed += p.n
		}
		f.changeLocked(p.off, p.buf[:p.n], failed)
	case OpFlush:
		c.Flushes++
		if failed {
			f.someBlocksLocked(f.mu.unstable, f.mu.stable.write)
		} else {
			for _, e := range f.mu.unstable {
				f.mu.stable.write(e.data, e.off)
			}
		}
		f.mu.unstable = nil
	}
}

// changeLocked writes data, or some of its blocks, to the volatile cache.
func (f *Fake) changeLocked(off int64, data []byte, onlySome bool) {
	if onlySome {
		f.someBlocksLocked([]extent{{off, data}}, f.mu.current.write)
	} else {
		f.mu.current.write(data, off)
	}
	now := make([]byte, len(data))
	f.mu.current.read(now, off)
	f.mu.unstable = append(f.mu.unstable, extent{off, now})
}
