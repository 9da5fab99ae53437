package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// A server detaches what is mounted and not on the way to its files (see
// launch.go), so a name may lead elsewhere for it than for whoever gave the name:
// a symbolic link to a file on another mount then leads to a file below that
// mount, or to none, and one would be made. So names are resolved by the command
// that starts the server, before anything is detached, and the server compares
// what it has opened with what the command saw.

// seen is a file as the command that starts a server sees it.
type seen struct {
	Path string      `json:"path"` // without symbolic links
	Type fs.FileMode `json:"type"`
	Dev  uint64      `json:"dev"` // of a device node its own number, else that of the file system
	Ino  uint64      `json:"ino"` // 0 of a device node, and of a file that is still to be made
}

// see looks at what path leads to. A file that is still to be made may be named by
// a link, too; its folder is resolved.
func see(path string) (seen, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		if to, err := os.Readlink(path); err == nil {
			if !filepath.IsAbs(to) {
				to = filepath.Join(filepath.Dir(path), to)
			}
			return see(to)
		}
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return seen{Path: path}, nil // whoever opens it says what is missing
		}
		return seen{Path: filepath.Join(dir, filepath.Base(path))}, nil
	}
	if err != nil {
		return seen{}, err
	}
	info, err := os.Stat(real)
	if err != nil {
		return seen{}, err
	}
	return identify(real, info), nil
}

// see looks at the files of a device, unless that has been done.
func (o *serveOptions) see(spec pmem.Spec) (err error) {
	if o.PMEM.Path != "" {
		return nil
	}
	if o.PMEM, err = see(spec.Path); err == nil {
		o.Backing, err = see(o.Device.Backing)
	}
	return err
}

func identify(path string, info fs.FileInfo) seen {
	st := info.Sys().(*syscall.Stat_t)
	s := seen{Path: path, Type: info.Mode().Type(), Dev: st.Dev, Ino: st.Ino}
	if s.Type&fs.ModeDevice != 0 {
		s.Dev, s.Ino = st.Rdev, 0
	}
	return s
}

// same refuses an open file that is not the one that was seen.
func (s seen) same(f *os.File) error {
	if s.Dev == 0 {
		return nil // it was to be made
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if identify(s.Path, info) != s {
		return fmt.Errorf("%s leads to another file for the server than for you (it was exchanged meanwhile, or is covered by a mount; give a path that is the same in the mount namespace of both)", s.Path)
	}
	return nil
}

// openFiles opens pmem and backing device.
func (s *server) openFiles(o *serveOptions, spec pmem.Spec) (err error) {
	spec.Path = o.PMEM.Path
	_, statErr := os.Stat(spec.Path)
	s.made = errors.Is(statErr, fs.ErrNotExist)
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if s.region, err = whenFree(o.Recover, pmem.ErrInUse, func() (*pmem.Region, error) {
		return spec.Open(pmem.ReadWrite)
	}); err != nil {
		return err
	}
	if err := o.PMEM.same(s.region.File()); err != nil {
		return err
	}
	if o.Recover && !o.Chosen {
		err = s.openOwnDisk(o)
	} else {
		s.disk, err = openDisk(o.Backing.Path, o.Recover)
	}
	if err != nil {
		return err
	}
	f, err := s.disk.File()
	if err != nil {
		return err
	}
	defer f.Close()
	return o.Backing.same(f)
}

func openDisk(path string, recover bool) (*backing.Device, error) {
	return whenFree(recover, backing.ErrInUse, func() (*backing.Device, error) { return backing.Open(path) })
}

// openOwnDisk opens the disk that the cache belongs to. It may have another name
// than the one that its device began with: it was pulled out and put back, or the
// machine counts its disks differently.
func (s *server) openOwnDisk(o *serveOptions) (err error) {
	layout, _ := ondisk.ReadLayout(s.region, s.region.Size()) // plan says what is wrong with it
	recorded := ""
	if layout != nil && layout.Identity != nil {
		recorded, _, _ = strings.Cut(layout.Identity.Serial, proof)
	}
	s.disk, err = openDisk(o.Backing.Path, true)
	// A device has users, so a disk that nothing tells apart from its own is not taken
	// for that, unless there has never been anything to tell it by.
	possible := false
	if err == nil {
		present := s.disk.Identity()
		if recorded == "" || recorded == present || present != "" && layout.Identity.Matches(present) {
			return nil
		}
		possible = sameDevice(layout, present)
	}
	path, missing := "", backing.ErrNameless
	if recorded != "" && !backing.IsFile(recorded) { // of which there is no list to search
		path, missing = backing.Find(recorded)
	}
	switch {
	case possible && backing.OnDevice(recorded) && errors.Is(missing, backing.ErrNotFound):
		return nil // users of the device have made another table, and no disk has the old one
	case possible && (backing.OnDevice(recorded) || missing != nil):
		return fmt.Errorf("nothing tells that %s is the backing device of device %s, which is known by %s (say which it is: ublk-pcache recover %d -b BACKING)", s.dev.Backing, s.dev.title(), known(recorded), s.dev.ID)
	case missing == nil:
	default:
		if err != nil {
			err = &remedied{fmt.Errorf("%w; and %w", err, missing), fmt.Sprintf("if it has another name now: ublk-pcache recover %d -b BACKING", s.dev.ID)}
		}
		return err // what is there is refused as any other that does not fit
	}
	if s.disk != nil {
		s.disk.PutBack()
	}
	s.log.Warn("the backing device has another name now", zap.String("was", s.dev.Backing), zap.String("is", path))
	s.dev.Backing, o.Backing = path, seen{Path: path}
	s.disk, err = openDisk(path, true)
	return err
}

// closeFiles closes them again, and removes what was made.
func (s *server) closeFiles() error {
	var err error
	if s.disk != nil {
		err = s.disk.PutBack()
	}
	if s.region == nil {
		return err
	}
	if s.made {
		os.Remove(s.region.Path())
	}
	return errors.Join(err, s.region.Close())
}

const (
	// deathPatience is how long a killed process may take to let go of what it
	// had open: its memory is given back first, which may be a lot.
	deathPatience = 30 * time.Second
	deathStep     = 10 * time.Millisecond
)

// whenFree opens something that a server which has just died may still hold.
func whenFree[T any](recover bool, inUse error, open func() (T, error)) (T, error) {
	for begin := time.Now(); ; time.Sleep(deathStep) {
		v, err := open()
		if !recover || !errors.Is(err, inUse) || time.Since(begin) > deathPatience {
			return v, err
		}
	}
}
