package backing

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// disk is a block device's folder in sysfs, or nothing where there is no sysfs.
type disk struct {
	dir       string // of the device itself
	whole     string // of the disk it is a partition of, or the same
	partition string // its number, or nothing
}

func findDisk(device uint64) disk {
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(device), unix.Minor(device)))
	if err != nil {
		return disk{}
	}
	return diskAt(dir)
}

func diskAt(dir string) disk {
	d := disk{dir: dir, whole: dir, partition: attribute(dir, "partition")}
	if d.partition != "" {
		d.whole = filepath.Dir(dir)
	}
	return d
}

func attribute(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// serial is the first name that the disk has, from world-wide to just the
// vendor's. Each kind of driver puts it somewhere else: NVMe wwid, SCSI
// device/wwid, NVMe again device/serial, virtio serial, device mapper and md
// in their own folders.
func (d disk) serial() string {
	for _, name := range []string{"wwid", "device/wwid", "device/serial", "serial", "dm/uuid", "md/uuid"} {
		if s := attribute(d.whole, name); s != "" {
			if d.partition != "" {
				s += "-part" + d.partition
			}
			return s
		}
	}
	return ""
}

// writesZeroes tells whether the disk has a command for that.
func (d disk) writesZeroes() bool {
	n, err := strconv.ParseUint(attribute(d.whole, "queue/write_zeroes_max_bytes"), 10, 64)
	return err == nil && n > 0
}

// blockHolder says what keeps a device from being opened exclusively, and what
// to do about it. It is a search for something to tell the user: mounts and
// swap, on the device or its partitions, then devices built on top of it.
func blockHolder(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err.Error()
	}
	d := findDisk(st.Rdev)
	devices := []string{fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))}
	parts, _ := filepath.Glob(filepath.Join(d.dir, "*", "partition"))
	folders := []string{d.dir}
	for _, part := range parts {
		folders = append(folders, filepath.Dir(part))
		devices = append(devices, attribute(filepath.Dir(part), "dev"))
	}
	if mount := mountOf(devices); mount != "" {
		return fmt.Sprintf("it is mounted on %s: unmount it", mount)
	}
	if swap := swapOn(devices); swap != "" {
		return fmt.Sprintf("it holds swap (%s): swapoff it", swap)
	}
	for _, folder := range folders {
		if holders, _ := os.ReadDir(filepath.Join(folder, "holders")); len(holders) > 0 {
			return fmt.Sprintf("/dev/%s is built on it: remove that", holders[0].Name())
		}
	}
	return "another program has it open exclusively: stop that program"
}

// mountOf looks through /proc/self/mountinfo (proc_pid_mountinfo(5)): the
// third field is the device, the fifth the place.
func mountOf(devices []string) string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 4 && slices.Contains(devices, fields[2]) {
			return fields[4]
		}
	}
	return ""
}

func swapOn(devices []string) string {
	f, err := os.Open("/proc/swaps")
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		name, _, _ := strings.Cut(s.Text(), " ")
		var st unix.Stat_t
		if unix.Stat(name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK &&
			slices.Contains(devices, fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))) {
			return name
		}
	}
	return ""
}
