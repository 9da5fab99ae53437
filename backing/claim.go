package backing

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A disk that belongs to a cache, and that no server has open, is open to all: a
// file system on it mounts, by its label too, and lacks the data that only the
// cache has. Claim keeps others from it without a process: a loop device has it
// open exclusively. That loop device begins where the disk ends, so it has size
// 0, and nobody finds anything in it (drivers/block/loop.c: "offset is beyond
// i_size, weird but possible").

// claimName is the file name in the loop device of a claim. losetup shows
// the path of the disk all the same, which the kernel knows.
const claimName = "ublk-pcache"

// Claim keeps everybody but Open from a block device, until Open opens it. It
// leaves a device that somebody has claimed already, one that does not exist,
// and a file as they are.
func Claim(path string) error {
	if err := claim(path); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("claim %s: %w", path, err)
	}
	return nil
}

// claim is Claim, but returns EBUSY for a device that somebody has open
// exclusively.
func claim(path string) error {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) || err == nil && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil
	}
	if err != nil {
		return err
	}
	// Not for writing: udev looks at a disk again when a writer closes it.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return giveToLoop(fd)
}

// giveToLoop has a loop device of size 0 hold what fd has open.
func giveToLoop(fd int) error {
	size, err := ioctlGetInt64(fd, unix.BLKGETSIZE64)
	if err != nil {
		return err
	}
	config := unix.LoopConfig{Fd: uint32(fd), Info: unix.LoopInfo64{Offset: uint64(size), Flags: unix.LO_FLAGS_READ_ONLY}}
	copy(config.Info.File_name[:], claimName)
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%w: open /dev/loop-control: %w", ErrNoLoop, err)
	}
	defer unix.Close(control)
	for {
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := unix.Open(fmt.Sprintf("/dev/loop%d", n), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = unix.IoctlLoopConfigure(loop, &config)
		unix.Close(loop)
		if !errors.Is(err, unix.EBUSY) { // that one has been taken meanwhile
			return err
		}
	}
}

// unclaim takes back the claim to a block device, and reports whether there was one.
// The kernel lets go of it when nobody has the loop device open any more. unclaim
// does not ask a loop device that has a size: its file may be on a file system that
// does not answer.
func unclaim(path string) (was bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return false
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop")
	for _, dir := range loops {
		if attribute(filepath.Dir(dir), "size") != "0" {
			continue
		}
		fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(dir)), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		info, err := unix.IoctlLoopGetStatus64(fd)
		if err == nil && info.Rdevice == st.Rdev && unix.ByteSliceToString(info.File_name[:]) == claimName {
			unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
			was = true
		}
		unix.Close(fd)
	}
	return was
}
