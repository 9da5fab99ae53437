package pmem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A new file gets its name when it has its size and its space. So if the
// process is killed before that, the same command works again: a file without a
// name goes with the process. Some file systems cannot make one (NFS, FAT;
// fs/namei.c, vfs_tmpfile, says EOPNOTSUPP). There the file has a name of
// another kind first, which is never taken for a cache.

// unfinished is the end of that first name.
const unfinished = ".unfinished"

// create makes a file of size bytes, all of its space reserved, for this
// process to map.
func create(path string, size int64) (*os.File, error) {
	dir := filepath.Dir(path)
	const flags = unix.O_RDWR | unix.O_CLOEXEC
	temporary := ""
	fd, err := unix.Open(dir, flags|unix.O_TMPFILE, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) {
		temporary = path + unfinished
		fd, err = unix.Open(temporary, flags|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
	}
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil, fmt.Errorf("%w: there is %s", ErrUnfinished, temporary)
	case err != nil:
		return nil, fmt.Errorf("make a file in %s: %w", dir, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err = reserveNew(f, size); err == nil {
		err = name(f, temporary)
	}
	if temporary != "" {
		os.Remove(temporary) // it has the other name now, or making the file failed
	}
	if err == nil {
		if err = syncDir(dir); err != nil {
			os.Remove(path)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// reserveNew gives a new file its size and its blocks, for good.
func reserveNew(f *os.File, size int64) error {
	err := unix.Fallocate(int(f.Fd()), 0, 0, size)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return &UnreservedError{Path: f.Name(), Size: size}
	case err != nil:
		return fmt.Errorf("%w: fallocate of %d bytes: %w", ErrNoSpace, size, err)
	}
	return plain(f.Sync())
}

// name links a file that is finished to its name, which nobody may have taken
// meanwhile.
func name(f *os.File, temporary string) error {
	var err error
	if temporary == "" {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, f.Name(), unix.AT_SYMLINK_FOLLOW)
	} else {
		// Some file systems have no links, and some that have them cannot rename
		// without replacing.
		err = unix.Renameat2(unix.AT_FDCWD, temporary, unix.AT_FDCWD, f.Name(), unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) {
			err = unix.Link(temporary, f.Name())
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return ErrAppeared
	}
	if err != nil {
		return fmt.Errorf("name the file: %w", err)
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return plain(err)
	}
	defer dir.Close()
	return plain(dir.Sync())
}
