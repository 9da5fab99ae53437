package ublk

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel makes a node in /dev for each device, unless something is there
// already (drivers/base/devtmpfs.c, handle_create, leaves that in place): a file,
// for instance, that somebody wrote to while there was no device. Users of the
// disk would then be users of that file, which is in memory. So a name is only
// called the disk's if it leads to the kernel's number for the disk.

// nodePatience is how long a node may take to appear where udev makes it, and
// not the kernel.
const nodePatience = 5 * time.Second

// CheckNames refuses a number for a new device if one of its names is taken by
// something that is no device.
func CheckNames(id int) error {
	if err := checkID(id); err != nil {
		return err
	}
	for _, path := range []string{diskPath(uint32(id)), charPath(uint32(id))} {
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode()&fs.ModeDevice != 0 {
			continue
		}
		if err != nil {
			return err
		}
		return fmt.Errorf("%w: %s is there already, and is none (look at it, it may hold what was meant for a disk, and move it away)", ErrNode, path)
	}
	return nil
}

// CheckNode returns an error if the name of a disk does not lead to it.
func CheckNode(id int) error {
	if err := checkID(id); err != nil {
		return err
	}
	return checkNode(diskPath(uint32(id)), unix.S_IFBLK, filepath.Join(sysBlock(uint32(id)), "dev"))
}

// awaitNode is CheckNode for a disk that has just been made.
func awaitNode(id uint32) error {
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		_, missing := os.Lstat(diskPath(id))
		err := CheckNode(int(id))
		if err == nil || !errors.Is(missing, fs.ErrNotExist) || time.Since(begin) > nodePatience {
			return err
		}
	}
}

// checkNode returns an error unless a path leads to a device of a kind, of the
// number that is in a file of sysfs.
func checkNode(path string, kind uint32, number string) error {
	want, ok := readNumber(number)
	if !ok {
		_, err := os.ReadFile(number)
		return fmt.Errorf("%w: the kernel shows no number for it: %w", ErrNode, cmp.Or(err, errors.New(number)))
	}
	letter := "b"
	if kind == unix.S_IFCHR {
		letter = "c"
	}
	// If a new device fails for this, it is deleted, and its number means
	// nothing any more.
	remedy := fmt.Sprintf("mount a devtmpfs on /dev, in a container the machine's, or for a device that is there: mknod %s %s %d %d", path, letter, unix.Major(want), unix.Minor(want))
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: there is no %s (%s)", ErrNode, path, remedy)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrNode, path, err)
	case st.Mode&unix.S_IFMT != kind:
		return fmt.Errorf("%w: %s is none (look at it, it may hold what was meant for a disk, and move it away; then %s)", ErrNode, path, remedy)
	case uint64(st.Rdev) != want:
		return fmt.Errorf("%w: %s is device %d:%d, and not %d:%d (remove it; then %s)", ErrNode, path,
			unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)), unix.Major(want), unix.Minor(want), remedy)
	}
	return nil
}

func diskPath(id uint32) string { return fmt.Sprintf("/dev/ublkb%d", id) }

// charPath is the character device through which a server serves the disk.
func charPath(id uint32) string { return fmt.Sprintf("/dev/ublkc%d", id) }

// checkChar is CheckNode for the character device.
func checkChar(id uint32) error {
	path := charPath(id)
	return checkNode(path, unix.S_IFCHR, "/sys/class/ublk-char/"+filepath.Base(path)+"/dev")
}
