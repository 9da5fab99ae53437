package backing

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-pcache/internal/mountinfo"
)

// disk is a block device's folders in sysfs, empty where there is no sysfs.
type disk struct {
	dir       string // of the device itself
	whole     string // of the disk it is a partition of, or the same
	partition string // its number, empty for a whole disk
}

func findDisk(device uint64) disk {
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + numberOf(device))
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
// vendor's. Each kind of driver has it in another place: NVMe in wwid and in
// device/serial, SCSI in device/wwid, virtio in serial, device mapper and md
// in their own folders, and old SCSI disks in a page of their own.
func (d disk) serial() string {
	for _, name := range []string{"wwid", "device/wwid", "device/serial", "serial", "dm/uuid", "md/uuid", unitSerial} {
		s := attribute(d.whole, name)
		if name == unitSerial {
			s = strings.TrimSpace(s[min(unitSerialHead, len(s)):])
		}
		if s != "" {
			if d.partition != "" {
				s += "-part" + d.partition
			}
			return s
		}
	}
	return ""
}

// unitSerial is a page as the disk has sent it (SPC-4, 7.8.16). Its head has
// unitSerialHead bytes.
const (
	unitSerial     = "device/vpd_pg80"
	unitSerialHead = 4
)

// zoned reports whether the disk refuses writes anywhere but at the end of a
// zone. A disk that takes them, and is only faster without them ("host-aware"),
// counts as any other.
func (d disk) zoned() bool { return attribute(d.whole, "queue/zoned") == "host-managed" }

// zeroesCheaply reports whether the disk has a command for writing zeros that
// does not write them to the medium. It is not enough that there is a command: a
// SAS disk has one, and writes as long as if the zeros had been sent. The signs
// are, the surest first,
//
//   - what the kernel says, since 6.17, also of disks that are built on others;
//   - how a SCSI disk zeroes (drivers/scsi/sd.c, zeroing_mode);
//   - the disks below;
//   - of all others, whether they discard, or have no moving parts.
func (d disk) zeroesCheaply() bool {
	if d.number("queue/write_zeroes_max_bytes") == 0 {
		return false
	}
	if d.number("queue/write_zeroes_unmap_max_hw_bytes") > 0 {
		return true
	}
	if modes, _ := filepath.Glob(filepath.Join(d.whole, "device/scsi_disk/*/zeroing_mode")); len(modes) > 0 {
		return strings.HasSuffix(attribute(filepath.Dir(modes[0]), "zeroing_mode"), "_unmap")
	}
	if below, _ := filepath.Glob(filepath.Join(d.whole, "slaves/*")); len(below) > 0 {
		return !slices.ContainsFunc(below, func(link string) bool {
			dir, err := filepath.EvalSymlinks(link)
			return err != nil || !diskAt(dir).zeroesCheaply()
		})
	}
	return d.number("queue/discard_max_bytes") > 0 || attribute(d.whole, "queue/rotational") == "0"
}

// number returns an attribute that is a number, 0 if there is none.
func (d disk) number(name string) uint64 {
	n, _ := strconv.ParseUint(attribute(d.whole, name), 10, 64)
	return n
}

// blockHolder says what keeps a device from being opened exclusively, and what
// to do about it. It is a search for something to tell the user: mounts and
// swap, on the device, its partitions or the disk that it is one of, then devices
// built on top of these.
func blockHolder(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err.Error()
	}
	d := findDisk(st.Rdev)
	folders := []string{d.dir}
	if d.whole != d.dir {
		folders = append(folders, d.whole)
	}
	parts, _ := filepath.Glob(filepath.Join(d.dir, "*", "partition"))
	for _, part := range parts {
		folders = append(folders, filepath.Dir(part))
	}
	devices := []string{numberOf(st.Rdev)}
	for _, folder := range folders {
		devices = append(devices, attribute(folder, "dev"))
	}
	if mount := mountOf(devices); mount != "" {
		return fmt.Sprintf("it is mounted on %s", mount)
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

func numberOf(device uint64) string {
	return fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device))
}

// namespaces bounds how many mount namespaces are looked at: more are not
// worth it for an error message.
const namespaces = 256

// mountOf finds where one of the devices is mounted, and says how to undo it. The
// mounts of this process are the last ones to look at: a server's own namespace is
// all but empty. Those of the first process are what users see, and everybody else
// may have some of their own.
func mountOf(devices []string) string {
	if place := mountedIn("1", devices); place != "" {
		return place + ": unmount it"
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return ""
	}
	seen := map[string]bool{}
	for _, dir := range processes {
		namespace, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil || seen[namespace] {
			continue
		}
		if len(seen) == namespaces {
			break
		}
		seen[namespace] = true
		pid := filepath.Base(dir)
		if place := mountedIn(pid, devices); place != "" {
			return fmt.Sprintf("%s in the mount namespace of process %s (%s): unmount it there", place, pid, attribute(dir, "comm"))
		}
	}
	return ""
}

// mountedIn looks through the mounts of a process. btrfs, which may have several
// devices, has a number of its own, and one of them as its source. The source of
// other file systems is no proof: anybody may mount some of them, and give any
// source.
func mountedIn(pid string, devices []string) string {
	mounts, _ := mountinfo.Read(filepath.Join("/proc", pid, "mountinfo")) // none of a process that has ended
	for _, m := range mounts {
		if slices.Contains(devices, fmt.Sprintf("%d:%d", m.Major, m.Minor)) ||
			m.Type == "btrfs" && slices.Contains(devices, blockAt(m.Source)) {
			return m.Point
		}
	}
	return ""
}

func swapOn(devices []string) string {
	swaps, _ := os.ReadFile("/proc/swaps")
	for line := range strings.Lines(string(swaps)) {
		name, _, _ := strings.Cut(line, " ")
		if name = mountinfo.Unescape(name); slices.Contains(devices, blockAt(name)) {
			return name
		}
	}
	return ""
}

// blockAt returns the number of the block device at a path, empty if there
// is none.
func blockAt(path string) string {
	var st unix.Stat_t
	if !strings.HasPrefix(path, "/dev/") || unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return ""
	}
	return numberOf(st.Rdev)
}
