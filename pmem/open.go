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

// MinSize is the least size of a region in bytes. No cache is smaller, and a
// size with a typing error often is.
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

// Open is Spec.Open of what ParseSpec reads.
func Open(spec string, mode Mode) (*Region, error) {
	s, err := ParseSpec(spec)
	if err != nil {
		return nil, err
	}
	return s.Open(mode)
}

// Open maps what s names: a device-dax device, a file on a DAX file system, or
// any other file. With a Size and ReadWrite a file that is missing is made, with
// all of its space reserved; if the call fails it is removed again.
//
// The region is locked against other processes until Close, see package filelock.
func (s Spec) Open(mode Mode) (*Region, error) {
	r, err := s.open(mode)
	if err != nil {
		return nil, fmt.Errorf("pmem %s: %w", s.Path, err)
	}
	return r, nil
}

func (s Spec) open(mode Mode) (*Region, error) {
	f, created, err := s.openFile(mode)
	if err != nil {
		return nil, err
	}
	r, err := mapFile(f, s.Size, mode, filelock.Take)
	if err != nil {
		if created {
			os.Remove(s.Path)
		}
		f.Close()
		return nil, err
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

// openFile opens the file, or creates it where that is wanted.
func (s Spec) openFile(mode Mode) (f *os.File, created bool, err error) {
	info, err := os.Stat(s.Path)
	switch {
	case err == nil && info.Mode()&fs.ModeType == fs.ModeDevice:
		return nil, false, ErrBlockDevice
	case err == nil:
		f, err = s.openExisting(mode)
		return f, false, err
	case !errors.Is(err, fs.ErrNotExist):
		return nil, false, plain(err)
	case isLink(s.Path):
		return nil, false, ErrDangling
	case isInDev(s.Path):
		return nil, false, ErrNoDevice
	case s.Size == 0 || mode == ReadOnly:
		return nil, false, ErrMissing
	}
	if err := s.refuseVolatile(); err != nil {
		return nil, false, err
	}
	f, err = create(s.Path, s.Size)
	return f, err == nil, err
}

func (s Spec) openExisting(mode Mode) (*os.File, error) {
	f, err := os.OpenFile(s.Path, mode.openFlags()|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) && isInDev(s.Path) {
		return nil, ErrNoDriver // a dax device that is used as system RAM has none
	}
	if err != nil {
		return nil, plain(err)
	}
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && mode == ReadWrite {
		if err := s.refuseVolatile(); err != nil {
			f.Close()
			return nil, err
		}
	}
	return theKernelsNode(f, mode)
}

func isLink(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&fs.ModeSymlink != 0
}

// isInDev reports whether a path is where the kernel makes nodes, and nobody
// means to make a file.
func isInDev(path string) bool {
	var dev, its unix.Stat_t
	path, err := filepath.Abs(path)
	if err != nil || unix.Stat("/dev", &dev) != nil {
		return false
	}
	for strings.HasPrefix(path, "/dev/") {
		path = filepath.Dir(path)
		if unix.Stat(path, &its) == nil {
			return its.Dev == dev.Dev // /dev/shm is not
		}
	}
	return false
}

// RefuseVolatile refuses a file, existing or to be made, that a power cut
// or a reboot takes, unless s.Volatile allows that. Open does so, too, but
// its caller may not see what is below an overlay or a loop device.
func (s Spec) RefuseVolatile() error {
	if err := s.refuseVolatile(); err != nil {
		return fmt.Errorf("pmem %s: %w", s.Path, err)
	}
	return nil
}

func (s Spec) refuseVolatile() error {
	info, err := os.Stat(s.Path)
	path := s.Path
	switch {
	case s.Volatile, err == nil && !info.Mode().IsRegular(), err != nil && (s.Size == 0 || isInDev(path)):
		return nil // there is nothing to refuse, or not for this
	case err != nil:
		path = filepath.Dir(path)
	}
	if p, why := PersistenceOf(path); p == Volatile {
		s.Volatile = true
		return &VolatileError{Why: why, Said: s}
	}
	return nil
}

// theKernelsNode returns f, or in its place the node in /dev that the kernel
// made, if f is a device-dax device. A device can have any number of nodes,
// each of them an inode with a lock of its own, and only the kernel's is the
// same for everybody.
func theKernelsNode(f *os.File, mode Mode) (*os.File, error) {
	dir, ok := daxDir(f)
	if !ok {
		return f, nil
	}
	known := filepath.Join("/dev", readUevent(dir)["DEVNAME"])
	if other, err := isOtherNode(f, known); !other {
		return f, err
	}
	// A process that uses f itself may hold the lock of f's node.
	l, err := lock(f, mode, filelock.Take)
	if err == nil {
		l.Close()
		var fd int
		if fd, err = unix.Open(known, mode.openFlags()|unix.O_NONBLOCK, 0); err == nil {
			f.Close()
			return os.NewFile(uintptr(fd), f.Name()), nil // the name that the user knows
		}
	}
	f.Close()
	return nil, err
}

// isOtherNode reports whether a path leads to another node of f's device.
func isOtherNode(f *os.File, path string) (bool, error) {
	var mine, its unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &mine); err != nil {
		return false, fmt.Errorf("stat: %w", err)
	}
	if err := unix.Stat(path, &its); err != nil {
		return false, nil
	}
	return its.Mode&unix.S_IFMT == unix.S_IFCHR && its.Rdev == mine.Rdev && (its.Dev != mine.Dev || its.Ino != mine.Ino), nil
}

// claim is filelock.Take or filelock.Inherit.
type claim func(fd int, mode filelock.Mode) (*filelock.Lock, error)

// lock claims f.
func lock(f *os.File, mode Mode, claim claim) (*filelock.Lock, error) {
	l, err := claim(int(f.Fd()), mode.lock())
	if errors.Is(err, filelock.ErrHeld) {
		return nil, ErrInUse
	}
	return l, err
}

// plain strips what os adds to an error: Open names the path already.
func plain(err error) error {
	var wrapped *fs.PathError
	if errors.As(err, &wrapped) {
		return fmt.Errorf("%s: %w", wrapped.Op, wrapped.Err)
	}
	return err
}

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
	lock, err := lock(f, mode, claim)
	if err != nil {
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
		// own memory, not the page cache of the whole file.
		if err := unix.Munlock(r.mem); err != nil {
			return nil, fmt.Errorf("unlock the mapping: %w", err)
		}
	}
	r.findPersistence()
	return r, nil
}

// sizeOf returns the size of f in bytes, and whether it is a device-dax
// device. Such a device has its size in sysfs, and also the page size of
// its mappings (drivers/dax/bus.c, 6.12 and 7.3). The size is a multiple of
// that.
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
	sys, ok := daxDir(f)
	if !ok {
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

// daxDir returns the folder of a device-dax device in sysfs.
func daxDir(f *os.File) (dir string, ok bool) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil || stat.Mode&unix.S_IFMT != unix.S_IFCHR {
		return "", false
	}
	dir = deviceDir("char", stat.Rdev)
	subsystem, err := os.Readlink(dir + "/subsystem")
	return dir, err == nil && filepath.Base(subsystem) == "dax"
}

func readNumber(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
