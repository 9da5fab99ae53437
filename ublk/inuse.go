package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/mountinfo"
)

// The users of a disk are found by its device numbers, never by a name. Anybody
// can make names, in a mount namespace or a root folder of their own: a file
// called /dev/ublkb0 is no reason to keep the disk, and a disk that is open
// under another name must not be taken away.
//
// Nothing here asks the disk, which may be without a server, and nothing waits
// for a file system that others have brought along.

// Users tells who uses a disk, in words: mounts, devices on top, processes. It
// does not always see where the kernel itself has the disk open.
func Users(id int) []string { return users(uint32(id)) }

func users(id uint32) []string {
	disk := numbersOf(id)
	if len(disk) == 0 {
		return nil // nothing to use
	}
	found := &list{}
	for _, pattern := range []string{sysBlock(id) + "/holders/*", sysBlock(id) + "/*/holders/*"} {
		holders, _ := filepath.Glob(pattern)
		for _, holder := range holders {
			found.add("%s is on top of it", filepath.Base(holder))
		}
	}
	disk.swapping(found)
	disk.serving(found)
	// In the order of numbers: a mount is then named as the first process of the
	// machine sees it, if it does.
	disk.processes(found)
	return found.words
}

// list is words without repetition.
type list struct {
	words []string
	seen  map[string]bool
}

func (l *list) add(format string, args ...any) {
	w := fmt.Sprintf(format, args...)
	if !l.seen[w] {
		if l.seen == nil {
			l.seen = map[string]bool{}
		}
		l.seen[w] = true
		l.words = append(l.words, w)
	}
}

// numbers are those of a disk and its partitions.
type numbers map[uint64]bool

func numbersOf(id uint32) numbers {
	n := numbers{}
	disk := sysBlock(id)
	files, _ := filepath.Glob(disk + "/" + filepath.Base(disk) + "*/dev")
	for _, file := range append(files, disk+"/dev") {
		if dev, ok := readNumber(file); ok {
			n[dev] = true
		}
	}
	return n
}

// readNumber reads a device's number as sysfs has it.
func readNumber(file string) (dev uint64, ok bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), err1 == nil && err2 == nil
}

// named reports whether a path leads to the disk. The kernel has the path from
// root. Paths outside of /dev are not looked at, since that might take for ever.
func (n numbers) named(path string) bool {
	if filepath.Clean(path) != path || !strings.HasPrefix(path, "/dev/") {
		return false
	}
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && n[uint64(st.Rdev)]
}

// swapping looks for swap on the disk.
func (n numbers) swapping(found *list) {
	text, _ := os.ReadFile("/proc/swaps")
	for line := range strings.SplitSeq(string(text), "\n") {
		path, _, _ := strings.Cut(line, " ")
		if path = mountinfo.Unescape(path); n.named(path) {
			found.add("swap is on it")
		}
	}
}

// serving looks for parts of the kernel that have a file open without claiming
// the disk, and say which: loop devices, iSCSI and other targets, NVMe over
// fabrics.
func (n numbers) serving(found *list) {
	for _, p := range []struct{ pattern, what string }{
		{"/sys/block/loop*/loop/backing_file", "loop device"},
		{"/sys/kernel/config/target/core/*/*/udev_path", "storage target"},
		{"/sys/kernel/config/nvmet/subsystems/*/namespaces/*/device_path", "NVMe target"},
	} {
		files, _ := filepath.Glob(p.pattern)
		for _, file := range files {
			path, err := os.ReadFile(file)
			if err == nil && n.named(string(bytes.TrimRight(path, "\n"))) {
				found.add("%s %s has it open", p.what, filepath.Base(strings.TrimSuffix(filepath.Dir(file), "/loop")))
			}
		}
	}
}

// processes looks for mounts and open files.
func (n numbers) processes(found *list) {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	byDevice := needDevice()
	parsed := map[string][]mountinfo.Mount{} // most processes see the same
	for i, pid := range pids {
		proc := fmt.Sprintf("/proc/%d", pid)
		text, err := os.ReadFile(proc + "/mountinfo")
		if err != nil {
			continue // it has ended
		}
		mounts, seen := parsed[string(text)]
		if !seen {
			mounts = mountinfo.Parse(string(text))
			parsed[string(text)] = mounts
		}
		for _, m := range mounts {
			if seen || !n[unix.Mkdev(m.Major, m.Minor)] && !(m.Major == 0 && byDevice[m.Type] && n.named(m.Source)) {
				continue
			}
			point := quoteOdd(m.Point)
			switch {
			case i == 0 || found.seen["mounted on "+point]:
				found.add("mounted on %s", point)
			default:
				found.add("mounted on %s as %s sees it", point, process(pid))
			}
		}
		if n.open(proc, mounts) {
			found.add("%s has it open", process(pid))
		}
	}
}

// open reports whether a process has the disk open.
func (n numbers) open(proc string, mounts []mountinfo.Mount) bool {
	remote := map[string]bool{}
	for _, m := range mounts {
		if mayWait(m.Type) {
			remote[strconv.Itoa(m.ID)] = true
		}
	}
	fds, _ := os.ReadDir(proc + "/fd")
	for _, fd := range fds {
		info := proc + "/fdinfo/" + fd.Name()
		if len(remote) > 0 && remote[field(info, "mnt_id:")] {
			continue
		}
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, proc+"/fd/"+fd.Name(), unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || !n[unix.Mkdev(st.Rdev_major, st.Rdev_minor)] {
			continue
		}
		// With O_PATH anybody may have it, and has not opened the disk.
		if flags, err := strconv.ParseUint(field(info, "flags:"), 8, 64); err == nil && flags&unix.O_PATH == 0 {
			return true
		}
	}
	return false
}

// mayWait reports whether a look at a file of such a file system may have to
// wait for a server's answer.
func mayWait(fs string) bool {
	for _, kind := range []string{"nfs", "9p", "cifs", "smb", "ceph", "afs", "fuse", "autofs"} {
		if strings.HasPrefix(fs, kind) {
			return true
		}
	}
	return false
}

// needDevice returns the file systems that are on a block device; to mount one
// takes a right to the device. Some of them have a number of their own all the
// same, btrfs for one: for these the source of the mount counts.
func needDevice() map[string]bool {
	need := map[string]bool{}
	text, _ := os.ReadFile("/proc/filesystems")
	for line := range strings.SplitSeq(string(text), "\n") {
		if nodev, fs, ok := strings.Cut(line, "\t"); ok && nodev == "" {
			need[fs] = true
		}
	}
	return need
}

// field returns the rest of the line that begins with name, in a file in
// /proc.
func field(file, name string) string {
	text, _ := os.ReadFile(file)
	for line := range strings.SplitSeq(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// process names a process.
func process(pid int) string {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return fmt.Sprintf("process %d (%s)", pid, quoteOdd(string(bytes.TrimSuffix(name, []byte("\n")))))
}

// quoteOdd quotes a text that would look different in a line of output.
func quoteOdd(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

// inUse is ErrInUse with the users of a disk.
func inUse(users []string) error {
	return fmt.Errorf("%w (%s)", ErrInUse, strings.Join(users, ", "))
}

// lookUnused returns ErrInUse for a disk that somebody is seen to use.
func lookUnused(id uint32) error {
	if found := users(id); len(found) > 0 {
		return inUse(found)
	}
	return nil
}

// checkUnused is lookUnused for a disk that is served: it also tries to claim the
// disk, which fails while this is mounted or has a device on top, in any
// namespace.
func checkUnused(id uint32) error {
	disk := diskPath(id)
	numbers := numbersOf(id)
	if len(numbers) == 0 {
		return nil // there is no disk
	}
	if !numbers.named(disk) {
		return fmt.Errorf("%s is not this disk, so that it cannot be told whether it is in use", disk)
	}
	fd, err := unix.Open(disk, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return inUse(append(users(id), "the kernel has a claim on it"))
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO): // it has gone
		return nil
	case err != nil:
		return fmt.Errorf("open %s: %w", disk, err)
	}
	unix.Close(fd)
	return lookUnused(id)
}
