package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What udev makes of a new disk, it makes some time after the disk is there: its links, and the watch by which it notices
// that somebody has written to it. A file system that is made in between is there for mount, and under no label, since
// udev has looked before and nobody tells it to look again. So a device is ready when udev is through with it.

const (
	// udevRuns is there where udev runs, or would when there is something to do.
	udevRuns = "/run/udev/control"
	// udevPatience is how long udev may take: it may have a whole machine to look at. Commands wait meanwhile.
	udevPatience = 10 * time.Second
	// udevStep is how often is looked whether udev has a record of the disk, which it writes a moment before it says that
	// it is through, and whether the server was told to end. To one in another network namespace udev says nothing.
	udevStep = 500 * time.Millisecond
	// udevSays is the group of udev's own messages (systemd's sd-device, MONITOR_GROUP_UDEV), each of which is sent when
	// the event has been handled.
	udevSays = 2
	// udevMessage is more than a message takes, in bytes.
	udevMessage = 64 << 10
)

// udevEvents is what udev says of devices from now on. Nil says nothing.
type udevEvents struct{ socket *os.File }

// hearUdev begins to listen. Without udev there is nothing to hear.
func hearUdev() *udevEvents {
	if _, err := os.Stat(udevRuns); err != nil {
		return nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: udevSays}); err != nil {
		unix.Close(fd)
		return nil
	}
	return &udevEvents{os.NewFile(uintptr(fd), "udev")}
}

// awaitDisk waits until udev is through with a new disk, or not for ever, and ends the listening. A signal, which is for
// somebody else, ends it as well.
func (e *udevEvents) awaitDisk(path string, signals <-chan os.Signal) {
	if e == nil {
		return
	}
	defer e.socket.Close()
	message, recorded := make([]byte, udevMessage), false
	for begin := time.Now(); time.Since(begin) < udevPatience && len(signals) == 0; {
		e.socket.SetReadDeadline(time.Now().Add(udevStep))
		n, err := e.socket.Read(message)
		switch {
		case err == nil && isAdded(message[:n], path):
			return
		case errors.Is(err, os.ErrDeadlineExceeded) && recorded:
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			recorded = hasRecord(path)
		case errors.Is(err, unix.ENOBUFS): // some were lost
		case err != nil:
			return
		}
	}
}

// isAdded reports whether a message of udev's is about a disk that is new.
func isAdded(message []byte, path string) bool {
	return bytes.Contains(message, []byte("ACTION=add\x00")) && bytes.Contains(message, []byte("\x00DEVNAME="+path+"\x00"))
}

// hasRecord reports whether udev knows a disk.
func hasRecord(path string) bool {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false
	}
	_, err := os.Stat(fmt.Sprintf("/run/udev/data/b%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	return err == nil
}
