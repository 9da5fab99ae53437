package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/internal/mountinfo"
)

// A server leaves all mounts that it does not need. Others decide which there are, and
// what they are called: every user of the machine can mount with fusermount, in any
// place of theirs, and rename and link folders while we look. So nothing that is met
// here keeps a server from starting. A mount that cannot be reached stays and is said,
// once there is a log.
//
// A mount goes with everything that is mounted in it. So only those are detached
// that hang on a needed one: no path leads through a file system that is not
// needed, where it might wait for somebody who does not answer. And it is looked
// up from the folder that it is in, by a path without links, in the mount that
// the kernel has named: otherwise a user could make it lead to /dev.

// mountLayers is how often mounts are looked for that others have covered: far
// more than anybody piles up for a reason, and an end to it if somebody mounts
// all the time.
const mountLayers = 10

// neededPaths are the paths that a server needs besides its own.
func neededPaths(own ...string) []string {
	return append(own, "/dev", "/proc", stateDir, journalDir, "/sys")
}

// unmountAllBut detaches the mounts of the calling thread's namespace that are
// on the way to none of the paths.
func unmountAllBut(keep []string) {
	for range mountLayers {
		mounts, err := mountinfo.Read("/proc/thread-self/mountinfo")
		if err != nil {
			return // strayMounts says so
		}
		needed := map[int]bool{}
		at := map[string]int{}
		for _, m := range mounts {
			needed[m.ID] = onTheWay(m.Point, keep)
			at[m.Point]++
		}
		detached := false
		for _, m := range slices.Backward(mounts) {
			if needed[m.ID] || !needed[m.Parent] {
				continue
			}
			for range at[m.Point] { // those that it is under come first
				if detach(m) != nil {
					break
				}
				detached = true
			}
		}
		if !detached {
			return
		}
	}
}

// onTheWay reports whether one of the paths leads through a mount point.
func onTheWay(point string, paths []string) bool {
	below := strings.TrimSuffix(point, "/") + "/"
	return slices.ContainsFunc(paths, func(path string) bool { return strings.HasPrefix(path+"/", below) })
}

// detach detaches what is mounted topmost where m is.
func detach(m mountinfo.Mount) error {
	dir := filepath.Dir(m.Point)
	fd, err := unix.Openat2(unix.AT_FDCWD, dir, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var in unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &in); err != nil {
		return err
	}
	if in.Mnt_id != uint64(m.Parent) {
		return fmt.Errorf("%q is covered by another mount", dir)
	}
	return unix.Unmount(fmt.Sprintf("/proc/thread-self/fd/%d/%s", fd, filepath.Base(m.Point)), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// strayMounts returns the mount points that are on the way to none of the paths,
// quoted.
func strayMounts(keep []string) ([]string, error) {
	mounts, err := mountinfo.Read("/proc/thread-self/mountinfo")
	var stray []string
	for _, m := range mounts {
		if !onTheWay(m.Point, keep) {
			stray = append(stray, strconv.Quote(m.Point))
		}
	}
	return stray, err
}

// shownMounts is how many mount points a line of the log has room for.
const shownMounts = 10

// reportMounts says which mounts the server has not been able to leave.
func (s *server) reportMounts() {
	self, err := os.Executable()
	stray, unread := strayMounts(neededPaths(self, s.dev.PMEM, s.dev.Backing))
	switch {
	case err != nil || unread != nil:
		s.log.Warn("cannot tell which mounts are held", zap.Errors("why", []error{err, unread}))
	case len(stray) > 0:
		s.log.Warn("these mounts, which others cover, cannot be left: what is mounted there stays busy until the server ends or they are unmounted",
			zap.Int("count", len(stray)), zap.Strings("first", stray[:min(len(stray), shownMounts)]))
	}
}
