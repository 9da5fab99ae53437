package pmem

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A file with holes gets its blocks when they are stored to, in a fault; if there
// are none, the store is a fault like one of bad memory. So the blocks are
// reserved before anything is stored, as Open does for a file that it makes.
//
// That promises nothing on a file system that stores new data elsewhere than the
// data it replaces: btrfs (unless the file is NOCOW), ZFS, bcachefs, and on XFS a
// file that shares blocks with a copy of it.

// Reserve gives the holes of a file their blocks; what the region holds stays as
// it is. If there are too few, nothing has changed.
func (r *Region) Reserve() error {
	if r.kind != File && r.kind != DAXFile {
		return nil
	}
	if err := r.reserve(); err != nil {
		return fmt.Errorf("pmem %s: %w", r.Path(), err)
	}
	return nil
}

func (r *Region) reserve() error {
	fd, size := int(r.file.Fd()), r.Size()
	var stat unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(fd, &stat), unix.Fstatfs(fd, &fs)); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	// A compressed file has fewer blocks, and a reserved one has blocks under
	// its holes.
	holes := r.holes()
	missing := int64(0)
	for _, h := range holes {
		missing += h.to - h.from
	}
	unallocated := size - stat.Blocks*512
	missing = min(missing, unallocated)
	// A fallocate that fails may keep the blocks it has got, which can be all
	// there are.
	if free := int64(fs.Bfree) * fs.Bsize; missing > free {
		return fmt.Errorf("%w: %d bytes of it are holes, and its file system has %d to spare", ErrNoSpace, missing, free)
	}
	err := unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, size)
	switch {
	case err == nil, errors.Is(err, unix.EOPNOTSUPP) && unallocated <= 0:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return &UnreservedError{r.Path(), size, unallocated}
	}
	for _, h := range holes {
		unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, h.from, h.to-h.from)
	}
	return fmt.Errorf("%w: fallocate of %d bytes: %w", ErrNoSpace, missing, err)
}

type hole struct{ from, to int64 }

// holes returns those of the file, as far as its file system knows them.
func (r *Region) holes() (all []hole) {
	fd, size := int(r.file.Fd()), r.Size()
	for off := int64(0); off < size; {
		from, err := unix.Seek(fd, off, unix.SEEK_HOLE)
		if err != nil || from >= size {
			return all
		}
		to, err := unix.Seek(fd, from, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // no data behind it
			to = size
		} else if err != nil {
			return all
		}
		all = append(all, hole{from, to})
		off = to
	}
	return all
}
