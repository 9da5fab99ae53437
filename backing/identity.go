package backing

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An identity that is not a serial number begins with one of these: the number
// of its partition; the number of a file, in a file system; the number of the
// partition table that is on it. The last one is not the device's own: users
// of the device may replace it through a cache.
const (
	partitionPrefix = "partuuid:"
	filePrefix      = "file:"
	tablePrefix     = "gpt:"
)

// Identity tells the device from all others, across reboots and renaming: it is
// the Serial if there is one, and otherwise a name with one of the prefixes
// above. It is empty if there is neither. Identity may read the device.
func (d *Device) Identity() string {
	if !d.block {
		return fileIdentity(d.fd)
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return ""
	}
	return findDisk(st.Rdev).identity()
}

// SameKind reports whether two identities can be compared at all. A file is no
// disk; but disks lose and gain serial numbers with the way in which they are
// attached.
func SameKind(a, b string) bool {
	if strings.HasPrefix(a, filePrefix) || strings.HasPrefix(b, filePrefix) {
		return true
	}
	return kind(a) == kind(b)
}

func kind(identity string) string {
	for _, prefix := range []string{partitionPrefix, filePrefix, tablePrefix} {
		if strings.HasPrefix(identity, prefix) {
			return prefix
		}
	}
	return ""
}

// OnDevice reports whether an identity is stored on the device itself, where it
// may be replaced through a cache.
func OnDevice(identity string) bool { return kind(identity) == tablePrefix }

// IsFile tells whether an identity is a file's. A loop device on that file has it, too.
func IsFile(identity string) bool { return kind(identity) == filePrefix }

// IsSerial reports whether an identity is a Serial.
func IsSerial(identity string) bool { return kind(identity) == "" }

func (d disk) identity() string {
	if s := d.serial(); s != "" {
		return s
	}
	if path := attribute(d.whole, "loop/backing_file"); path != "" {
		return d.loopIdentity(path)
	}
	table, err := d.table()
	if err != nil {
		return ""
	}
	if d.partition != "" {
		return table.partition(d.partition)
	}
	return table.disk
}

// loopIdentity is the identity of the file at path, and the part of it that the
// device is. The file may be missing in a server's mount namespace, and visible
// in that of the first process.
func (d disk) loopIdentity(path string) string {
	for _, root := range []string{"", "/proc/1/root"} {
		fd, err := unix.Open(root+path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		s := fileIdentity(fd)
		unix.Close(fd)
		if s == "" {
			continue
		}
		if offset := attribute(d.whole, "loop/offset"); offset != "0" {
			s += "+" + offset
		}
		if d.partition != "" {
			s += "-part" + d.partition
		}
		return s
	}
	return ""
}

// table reads the partition table of the disk, also for one of its partitions.
func (d disk) table() (table, error) {
	node, err := node(d.whole)
	if err != nil {
		return table{}, err
	}
	f, err := os.Open(node)
	if err != nil {
		return table{}, err
	}
	defer f.Close()
	return readTable(f)
}

// nodes is where devices have their nodes. A variable, for tests.
var nodes = "/dev"

// node returns the device node that belongs to a folder in sysfs.
func node(dir string) (string, error) {
	path := filepath.Join(nodes, strings.ReplaceAll(filepath.Base(dir), "!", "/"))
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || numberOf(st.Rdev) != attribute(dir, "dev") {
		return "", fmt.Errorf("%s is another device", path)
	}
	return path, nil
}

// The ioctls of include/uapi/linux/fs.h that x/sys does not have. The first is
// answered by Linux 6.9 and later.
const (
	fsIocGetFSUUID  = 0x80111500 // struct fsuuid2
	fsIocGetVersion = 0x80087601 // i_generation, of which it writes an int
)

// fileIdentity is the identity of a regular file; a copy of the file has
// another one. A file system that numbers its inodes anew with each mount has
// no generation of them either, so its files have no identity.
func fileIdentity(fd int) string {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ""
	}
	var uuid struct {
		length uint8
		bytes  [16]byte
	}
	var generation uint64
	if ioctl(fd, fsIocGetFSUUID, unsafe.Pointer(&uuid)) != nil || int(uuid.length) > len(uuid.bytes) ||
		ioctl(fd, fsIocGetVersion, unsafe.Pointer(&generation)) != nil {
		return ""
	}
	return fmt.Sprintf("%s%x:%d:%d", filePrefix, uuid.bytes[:uuid.length], st.Ino, uint32(generation))
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// devices is where sysfs has all block devices. A variable, for tests.
var devices = "/sys/class/block"

// Find returns the path of the block device that has an identity now, which may
// be another path than before.
func Find(identity string) (string, error) {
	if identity == "" {
		return "", ErrNameless
	}
	entries, err := os.ReadDir(devices)
	if err != nil {
		return "", err
	}
	var found []string
	for _, e := range entries {
		dir, err := filepath.EvalSymlinks(filepath.Join(devices, e.Name()))
		if err != nil {
			continue // it has gone
		}
		if d := diskAt(dir); !d.mayBe(identity) || d.identity() != identity {
			continue
		}
		path, err := node(dir)
		if err != nil {
			return "", fmt.Errorf("the device known as %q has no node: %w", identity, err)
		}
		found = append(found, path)
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%w %q", ErrNotFound, identity)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%w %q: %s", ErrAmbiguous, identity, strings.Join(found, ", "))
}

// mayBe reports whether a disk can have an identity, without reading the disk.
// The other disks are not read, since they may never answer: above all the
// devices of this program, whose server may be dead, and devices that are
// built on them.
func (d disk) mayBe(identity string) bool {
	if strings.HasPrefix(filepath.Base(d.whole), "ublkb") {
		return false
	}
	switch kind(identity) {
	case partitionPrefix, tablePrefix:
		below, _ := os.ReadDir(filepath.Join(d.whole, "slaves"))
		return len(below) == 0 && (d.partition != "") == (kind(identity) == partitionPrefix)
	case filePrefix:
		return attribute(d.whole, "loop/backing_file") != ""
	}
	return d.serial() != ""
}
