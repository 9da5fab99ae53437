package filelock

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstPIDNamespace has every process in it (PROC_PID_INIT_INO of
// include/linux/proc_ns.h, 6.12 and 7.3).
const firstPIDNamespace = "pid:[4026531836]"

// findUser returns another user of fd's file: a process that has it open for
// writing, or is one of ours. It is empty if there is none.
func findUser(fd int) (user string, err error) {
	if ns, err := os.Readlink("/proc/self/ns/pid"); err != nil {
		return "", err
	} else if ns != firstPIDNamespace {
		return "", errors.New("processes outside of this PID namespace are not seen")
	}
	wanted, err := fileAt(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return "", err
	}
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", p.Name())
		open, err := os.ReadDir(dir + "/fd")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		} else if err != nil {
			return "", err
		}
		for _, o := range open {
			if pid == os.Getpid() && o.Name() == strconv.Itoa(fd) {
				continue
			}
			if f, err := fileAt(dir + "/fd/" + o.Name()); err != nil || f != wanted {
				continue
			}
			if writes(dir+"/fdinfo/"+o.Name()) || ours(dir) {
				name, _ := os.ReadFile(dir + "/comm")
				return fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(name))), nil
			}
		}
	}
	return "", nil
}

// file identifies a file.
type file struct {
	major, minor uint32
	inode        uint64
}

// fileAt does not ask the servers of network file systems: they may not answer.
func fileAt(link string) (file, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	return file{st.Dev_major, st.Dev_minor, st.Ino}, err
}

// writes reports whether a descriptor is open for writing (proc_pid_fdinfo(5)).
func writes(fdinfo string) bool {
	text, _ := os.ReadFile(fdinfo)
	for line := range strings.Lines(string(text)) {
		if octal, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(octal), 8, 32)
			return err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	return false
}

// ours reports whether a process has all four user ids of root, and runs this
// program or another version of it. A program that runs as root for other users
// may have got the descriptor from them.
func ours(dir string) bool {
	name := func(dir string) string {
		exe, _ := os.Readlink(dir + "/exe")
		return filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	}
	status, _ := os.ReadFile(dir + "/status")
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			return strings.Join(strings.Fields(ids), " ") == "0 0 0 0" && name(dir) == name("/proc/self")
		}
	}
	return false
}
