package pmem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/filelock"
)

// MinSize is the least size in bytes that is opened: no cache is smaller, and
// a typing error often is.
const MinSize = 512 << 20

// pageSize is the grid that the size of a file must be on, in bytes.
const pageSize = 4096

// Mode says what a region is opened for.
type Mode int

const (
	// ReadWrite takes the region for this process alone.
	ReadWrite Mode = iota
	// ReadOnly shares it with other readers. Stores are errors.
	ReadOnly
)

func (m Mode) openFlags() int {
	return [...]int{unix.O_RDWR, unix.O_RDONLY}[m] | unix.O_CLOEXEC
}

func (m Mode) protection() int {
	return [...]int{unix.PROT_READ | unix.PROT_WRITE, unix.PROT_READ}[m]
}

func (m Mode) lock() filelock.Mode {
	return [...]filelock.Mode{filelock.Exclusive, filelock.Shared}[m]
}

// Open maps what spec names: a device-dax device, a file on a DAX file system,
// or any other file. "PATH,size=1G" makes the file if there is none (with
// ReadWrite), with all of its space reserved so that a store cannot fail for
// lack of it, and otherwise asks for just that size. A file made by a call
// that fails is removed again.
//
// The region is locked against other processes until Close, see package filelock.
func Open(spec string, mode Mode) (*Region, error) {
	path, size, err := parseSpec(spec)
	if err != nil {
		return nil, err
	}
	f, created, err := openFile(path, size, mode)
	if err != nil {
		return nil, fmt.Errorf("pmem %s: %w", path, err)
	}
	r, err := mapFile(f, size, mode, filelock.Take)
	if err != nil {
		if created {
			os.Remove(path)
		}
		f.Close()
		return nil, fmt.Errorf("pmem %s: %w", path, err)
	}
	return r, nil
}

// Inherit maps a region that is open already, for another process that has it
// locked: f shares its lock. Path tells the name that f was made with.
func Inherit(f *os.File) (*Region, error) {
	r, err := mapFile(f, 0, ReadWrite, filelock.Inherit)
	if err != nil {
		return nil, fmt.Errorf("pmem %s: %w", f.Name(), err)
	}
	return r, nil
}

// parseSpec splits PATH[,size=N]; without a size it returns 0.
func parseSpec(spec string) (path string, size int64, err error) {
	i := strings.LastIndex(spec, ",size=")
	if i < 0 {
		return spec, 0, nil
	}
	path, text := spec[:i], spec[i+len(",size="):]
	digits, shift := text, 0
	if n := len(text); n > 0 {
		if unit := strings.IndexByte("KMGT", text[n-1]&^0x20); unit >= 0 {
			digits, shift = text[:n-1], 10*(unit+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > 1<<(62-shift) {
		return "", 0, fmt.Errorf("pmem %s: %w, not %q", path, ErrBadSize, text)
	}
	size = int64(n) << shift
	if err := checkSize(size); err != nil {
		return "", 0, fmt.Errorf("pmem %s: %w", path, err)
	}
	return path, size, nil
}

func checkSize(size int64) error {
	switch {
	case size < MinSize:
		return fmt.Errorf("%w: %d bytes", ErrTooSmall, size)
	case size%pageSize != 0:
		return fmt.Errorf("%w: %d bytes, not a multiple of %d", ErrMisaligned, size, pageSize)
	}
	return nil
}

// openFile opens path, or creates it where that is wanted; size is 0 when none
// was given.
func openFile(path string, size int64, mode Mode) (f *os.File, created bool, err error) {
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Mode()&fs.ModeType == fs.ModeDevice:
		return nil, false, ErrBlockDevice
	case err == nil:
		if f, err = os.OpenFile(path, mode.openFlags()|unix.O_NONBLOCK, 0); err != nil {
			return nil, false, plain(err)
		}
		return f, false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, false, plain(err)
	case isLink(path):
		return nil, false, ErrDangling
	case size == 0 || mode == ReadOnly:
		return nil, false, ErrMissing
	}
	f, err = create(path, size)
	return f, err == nil, err
}

func isLink(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&fs.ModeSymlink != 0
}

// plain strips what os adds to an error: Open names the path already.
func plain(err error) error {
	var wrapped *fs.PathError
	if errors.As(err, &wrapped) {
		return fmt.Errorf("%s: %w", wrapped.Op, wrapped.Err)
	}
	return err
}

// claim takes or goes on with the lock of an open file.
type claim func(fd int, mode filelock.Mode) (*filelock.Lock, error)

// mapFile maps f, which must have the size want unless that is 0.
func mapFile(f *os.File, want int64, mode Mode, claim claim) (_ *Region, err error) {
	size, device, err := sizeOf(f)
	if err != nil {
		return nil, err
	}
	if want != 0 && size != want {
		return nil, fmt.Errorf("%w: %d bytes, not %d", ErrOtherSize, size, want)
	}
	if err := checkSize(size); err != nil {
		return nil, err
	}
	lock, err := claim(int(f.Fd()), mode.lock())
	if errors.Is(err, filelock.ErrHeld) {
		return nil, ErrInUse
	} else if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	r := &Region{file: f, kind: File, mode: mode, lock: lock}
	if device {
		r.kind = DevDax
		r.mem, err = unix.Mmap(int(f.Fd()), 0, int(size), mode.protection(), unix.MAP_SHARED)
	} else {
		r.mem, err = unix.Mmap(int(f.Fd()), 0, int(size), mode.protection(), unix.MAP_SHARED_VALIDATE|unix.MAP_SYNC)
		if err == nil {
			r.kind = DAXFile
		} else if errors.Is(err, unix.EOPNOTSUPP) {
			r.mem, err = unix.Mmap(int(f.Fd()), 0, int(size), mode.protection(), unix.MAP_SHARED)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("mmap of %d bytes: %w", size, err)
	}
	if r.kind == File {
		// A process that locks its memory (mlockall with MCL_FUTURE) means its
		// own, not as much page cache as the file is large.
		if err := unix.Munlock(r.mem); err != nil {
			return nil, fmt.Errorf("unlock the mapping: %w", err)
		}
	}
	return r, nil
}

// sizeOf returns the size of f in bytes, and whether it is a device-dax
// device. The size of one is in sysfs (drivers/dax/bus.c, 6.12 and 7.3), as
// is the page size of its mappings, of which it is a multiple.
func sizeOf(f *os.File) (size int64, device bool, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, false, plain(err)
	}
	switch info.Mode() & fs.ModeType {
	case 0:
		return info.Size(), false, nil
	case fs.ModeDevice | fs.ModeCharDevice:
	default:
		return 0, false, ErrNotMappable
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
		return 0, false, fmt.Errorf("stat: %w", err)
	}
	sys := fmt.Sprintf("/sys/dev/char/%d:%d", unix.Major(stat.Rdev), unix.Minor(stat.Rdev))
	if subsystem, err := os.Readlink(sys + "/subsystem"); err != nil || filepath.Base(subsystem) != "dax" {
		return 0, false, ErrNotMappable
	}
	if size, err = readNumber(sys + "/size"); err != nil {
		return 0, false, err
	}
	align, err := readNumber(sys + "/align")
	if err != nil {
		return 0, false, err
	}
	if align <= 0 || size%align != 0 {
		return 0, false, fmt.Errorf("%w: %d bytes in pages of %d", ErrMisaligned, size, align)
	}
	return size, true, nil
}

func readNumber(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
