// Package backing is the slow device behind the cache: a block device, or a
// plain file in its place. Reads, writes, zeroing and flushes are asynchronous
// and end in a callback; see lane for how. A thread with a ring of its own reads
// there, see Reader, so no read that somebody waits for is queued behind
// write-back.
//
// The device is opened exclusively and, where it can be, without the page cache:
// the cache in front of it is persistent memory, and a second one in DRAM would
// only make flushes slow and errors late.
package backing

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/filelock"
)

// fileBlock is the block size of a plain file in bytes, that of the disks it
// stands for.
const fileBlock = 512

// Device is an open backing device. Its methods may be called from any
// goroutine.
//
// The four operations return at once and do not allocate. done is called
// exactly once, on a thread of this package that has other work to do: it must
// not block, and may submit. Its error is nil when the whole operation was done,
// and otherwise wraps a syscall.Errno. After a failed write or zeroing the
// content of its range is unknown; after a failed flush, the content of
// everything that was changed since the last good one. Operations in flight have
// no order among each other.
//
// Offsets, lengths and the addresses of buffers are multiples of BlockSize.
// Buffers come from uring.AlignedBuffer or another mapping, never from the Go
// heap, since the kernel uses them after the call.
type Device struct {
	path      string
	fd        int
	size      int64
	blockSize int
	serial    string
	cheap     bool // see ZeroesCheaply
	inherited bool // fd came from another process, open and with its flags
	block     bool // a block device, not a file
	claimed   bool // it had a Claim, which Open has taken back

	lock *filelock.Lock // of a file

	lane    *lane
	readers struct {
		sync.Mutex
		all []*Reader
	}
}

// Open opens a block device or a regular file for exclusive use. It changes
// nothing on it. Errors name the path and what can be done.
func Open(path string) (*Device, error) {
	d := &Device{path: path, fd: -1}
	if err := d.open(); err != nil {
		d.release()
		d.claimAgain()
		return nil, fmt.Errorf("open backing device %s: %w", path, err)
	}
	return d, nil
}

// Inherit opens a device by a descriptor of another process that has it
// open, and shares that process's claim to it.
func Inherit(f *os.File) (*Device, error) {
	d := &Device{path: f.Name(), fd: -1, inherited: true}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		d.fd = fd
		err = d.open()
	}
	if err != nil {
		d.release()
		return nil, fmt.Errorf("open backing device %s: %w", d.path, err)
	}
	return d, nil
}

// File returns a copy of the device's descriptor, for a process that is to
// Inherit it. The caller closes it.
func (d *Device) File() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of %s: %w", d.path, err)
	}
	return os.NewFile(uintptr(fd), d.path), nil
}

func (d *Device) open() error {
	mode, err := d.kind()
	if err != nil {
		return err
	}
	switch mode {
	case unix.S_IFBLK:
		err = d.openBlock()
	case unix.S_IFREG:
		err = d.openFile()
	default:
		return ErrKind
	}
	if err != nil {
		return err
	}
	if d.size == 0 || d.size%int64(d.blockSize) != 0 {
		return fmt.Errorf("%w: %d bytes are not a positive multiple of its %d-byte blocks", ErrSize, d.size, d.blockSize)
	}
	d.block = mode == unix.S_IFBLK
	d.lane, err = startLane(d.newFlight(inFlight))
	return err
}

// kind returns the type of the file, in stat's bits.
func (d *Device) kind() (uint32, error) {
	var st unix.Stat_t
	var err error
	if d.inherited {
		err = unix.Fstat(d.fd, &st)
	} else {
		err = unix.Stat(d.path, &st)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return 0, ErrMissing
	}
	return st.Mode & unix.S_IFMT, err
}

const openFlags = unix.O_RDWR | unix.O_CLOEXEC

func (d *Device) openDescriptor(flags int) (err error) {
	if d.inherited {
		return nil
	}
	for {
		d.fd, err = unix.Open(d.path, openFlags|flags, 0)
		if err != unix.EINTR {
			break
		}
	}
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (%w)", ErrReadOnly, err)
	}
	return err
}

// stillHeld is how long the kernel may take to let go of a file that was closed.
// A request of a ring that a worker of the kernel has carried out (fallocate,
// say) holds its file until that worker is done with it, and if the ring was
// closed meanwhile, until the kernel has cleaned that up: some time after the
// answer (io_uring/io_uring.c, io_wq_free_work and io_ring_exit_work, 7.3).
const stillHeld = time.Second

// onceFree calls claim until it returns something else than busy, for stillHeld
// at most.
func onceFree(busy error, claim func() error) error {
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if err := claim(); !errors.Is(err, busy) || time.Since(begin) > stillHeld {
			return err
		}
	}
}

func (d *Device) openBlock() error {
	// O_EXCL without O_CREAT claims a block device against mounts, swap, device
	// mapper and everybody else who claims (block/bdev.c, bd_prepare_to_claim).
	err := onceFree(unix.EBUSY, func() error {
		err := d.openDescriptor(unix.O_DIRECT | unix.O_EXCL)
		if errors.Is(err, unix.EBUSY) && unclaim(d.path) {
			d.claimed = true
		}
		return err
	})
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %s", ErrInUse, blockHolder(d.path))
	} else if err != nil {
		return err
	}
	readOnly, err := unix.IoctlGetInt(d.fd, unix.BLKROGET)
	if err != nil {
		return fmt.Errorf("ask whether it is read-only: %w", err)
	}
	if readOnly != 0 {
		return ErrReadOnly
	}
	if d.size, err = ioctlGetInt64(d.fd, unix.BLKGETSIZE64); err != nil {
		return fmt.Errorf("ask for its size: %w", err)
	}
	if d.blockSize, err = unix.IoctlGetInt(d.fd, unix.BLKSSZGET); err != nil {
		return fmt.Errorf("ask for its block size: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return err
	}
	disk := findDisk(st.Rdev)
	d.serial = disk.serial()
	d.cheap = disk.zeroesCheaply()
	if disk.zoned() {
		return ErrZoned
	}
	return nil
}

func (d *Device) openFile() error {
	if err := d.openDescriptor(0); err != nil {
		return err
	}
	take := filelock.Take
	if d.inherited {
		take = filelock.Inherit
	}
	err := onceFree(filelock.ErrHeld, func() (err error) {
		d.lock, err = take(d.fd, filelock.Exclusive)
		return err
	})
	if errors.Is(err, filelock.ErrHeld) {
		return fmt.Errorf("%w: %w", ErrInUse, err)
	} else if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return err
	}
	d.size = st.Size
	d.blockSize = fileBlock
	d.cheap = punches(d.fd, d.size)
	return d.chooseDirect()
}

// chooseDirect switches the file to O_DIRECT if it can do that in units of
// fileBlock, and otherwise away from it. Buffers lie on its multiples, too. A
// larger unit must not become the block size: a cache may hold writes of
// fileBlock bytes for this file.
//
// Only the kernel knows (statx(2), STATX_DIOALIGN, since 6.1), and not on all
// file systems. A read proves nothing: a read of a hole does not reach the disk,
// and a read of data only reaches the one disk that it is on. So a file system
// that does not say goes through the page cache, which takes every unit.
//
// An inherited descriptor has the flags that another version chose.
func (d *Device) chooseDirect() error {
	var st unix.Statx_t
	fits := func(unit uint32) bool { return unit > 0 && fileBlock%unit == 0 }
	if err := unix.Statx(d.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err == nil &&
		st.Mask&unix.STATX_DIOALIGN != 0 && fits(st.Dio_offset_align) && fits(st.Dio_mem_align) {
		if _, err := unix.FcntlInt(uintptr(d.fd), unix.F_SETFL, openFlags|unix.O_DIRECT); err == nil {
			return nil
		}
	}
	_, err := unix.FcntlInt(uintptr(d.fd), unix.F_SETFL, openFlags)
	return err
}

// Path is the path that was given to Open.
func (d *Device) Path() string { return d.path }

// Size is in bytes, a multiple of BlockSize.
func (d *Device) Size() int64 { return d.size }

// BlockSize is the logical block size in bytes, the unit of all transfers: 512
// or 4096 on common devices, 512 for a file.
func (d *Device) BlockSize() int { return d.blockSize }

// Serial is the world-wide name or serial number that the device has from its
// maker, with "-partN" for a partition. It is empty for a device without one,
// and for a file.
func (d *Device) Serial() string { return d.serial }

// ZeroesCheaply tells whether Zero is done by the device or the file system,
// without transferring the zeros to it or having them written to the medium.
func (d *Device) ZeroesCheaply() bool { return d.cheap }

// Read fills buf from byte off on.
func (d *Device) Read(buf []byte, off int64, done func(error)) {
	d.lane.submit(op{kind: OpRead, buf: buf, off: off, done: done})
}

// Write writes buf at byte off. It is durable only after a Flush.
func (d *Device) Write(buf []byte, off int64, done func(error)) {
	d.lane.submit(op{kind: OpWrite, buf: buf, off: off, done: done})
}

// Flush makes durable the writes and zeroing that had finished when it was
// called.
func (d *Device) Flush(done func(error)) {
	d.lane.submit(op{kind: OpFlush, done: done})
}

// Zero makes n bytes at off read as zeros, and take no space where the device
// can do that. It works on every device, and is durable only after a Flush.
func (d *Device) Zero(off, n int64, done func(error)) {
	d.lane.submit(op{kind: OpZero, off: off, n: n, done: done})
}

// Waiting is the age of the oldest operation that the device was given and has
// not answered, 0 if there is none.
func (d *Device) Waiting() time.Duration {
	longest := d.lane.waiting()
	d.readers.Lock()
	defer d.readers.Unlock()
	for _, r := range d.readers.all {
		longest = max(longest, r.waiting())
	}
	return longest
}

// Close waits for all operations but those of Readers, whose threads may have
// gone, and gives the device back. If operations of Readers are under way, as
// Waiting tells, the kernel holds the device until they end. Nothing may be
// submitted any more.
func (d *Device) Close() error {
	d.lane.close()
	if err := d.release(); err != nil {
		return fmt.Errorf("close backing device %s: %w", d.path, err)
	}
	return nil
}

// PutBack is Close for a device whose cache still has dirty data: if the
// device was claimed before Open, it is claimed again.
func (d *Device) PutBack() error {
	return errors.Join(d.Close(), d.claimAgain())
}

func (d *Device) claimAgain() error {
	if !d.claimed {
		return nil
	}
	if err := onceFree(unix.EBUSY, func() error { return claim(d.path) }); err != nil {
		return fmt.Errorf("claim %s: %w", d.path, err)
	}
	return nil
}

// release gives back all that was taken so far.
func (d *Device) release() error {
	if d.lock != nil {
		d.lock.Close()
	}
	if d.fd < 0 {
		return nil
	}
	return unix.Close(d.fd)
}

func ioctlGetInt64(fd int, request uint) (int64, error) {
	var v int64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&v)))
	if errno != 0 {
		return 0, errno
	}
	return v, nil
}
