package pmem

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-pcache/internal/mountinfo"
)

// Persistence is what a power cut leaves of a region. Device-dax, and a
// mapping with MAP_SYNC, mean only that stores reach the memory: memory for a
// special purpose, and the volatile part of a CXL device, are device-dax as
// well. Sysfs tells the kind of memory, by what the device is a part of.
type Persistence string

const (
	// Persistent: all that was stored and fenced is left.
	Persistent Persistence = "persistent"
	// OnSync: all that was synced is left, of a file on something that
	// persists.
	OnSync Persistence = "on-sync"
	// Volatile: nothing is left.
	Volatile Persistence = "volatile"
	// Unknown: the kernel has only somebody's word.
	Unknown Persistence = "unknown"
)

// sysfs is where sysfs is mounted. A variable, for tests.
var sysfs = "/sys"

// maxDepth bounds how many disks on top of each other are looked through.
const maxDepth = 8

// Persistence returns what a power cut leaves of the region, and a reason if a
// user may expect something else of its kind.
func (r *Region) Persistence() (p Persistence, why string) { return r.persistence, r.doubt }

func (r *Region) findPersistence() {
	r.persistence, r.doubt = persistenceOf(int(r.file.Fd()), maxDepth)
	if r.persistence == OnSync && r.kind == DAXFile {
		// A file system takes MAP_SYNC only if the memory needs no more than a
		// flush of the processor's (include/linux/dax.h, daxdev_mapping_supported).
		r.persistence = Persistent
	}
}

// PersistenceOf is Region.Persistence for a path: a device-dax device, a
// block device, a file, or a folder in which a file would be made. It cannot
// tell whether a file system does DAX.
func PersistenceOf(path string) (p Persistence, why string) {
	return persistenceOfPath(path, maxDepth)
}

func persistenceOfPath(path string, depth int) (Persistence, string) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return Unknown, err.Error()
	}
	defer unix.Close(fd)
	return persistenceOf(fd, depth)
}

// memoryFileSystems are those without a disk. devtmpfs is tmpfs or ramfs
// (drivers/base/devtmpfs.c), and so is the first root of a machine.
var memoryFileSystems = map[int64]string{
	unix.TMPFS_MAGIC:     "tmpfs",
	unix.RAMFS_MAGIC:     "ramfs",
	unix.HUGETLBFS_MAGIC: "hugetlbfs",
}

func persistenceOf(fd, depth int) (Persistence, string) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return Unknown, err.Error()
	}
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		switch p, why := memoryPersistence(deviceDir("char", stat.Rdev)); p {
		case "":
			return Unknown, "the kernel does not say what memory it is"
		case OnSync:
			return Volatile, why + ", and device-dax has no sync"
		default:
			return p, why
		}
	case unix.S_IFBLK:
		return diskPersistence(deviceDir("block", stat.Rdev), depth)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return Unknown, err.Error()
	}
	if name, ok := memoryFileSystems[int64(fs.Type)]; ok {
		return Volatile, "it is in memory (" + name + ")"
	}
	if unix.Major(stat.Dev) != 0 {
		return diskPersistence(deviceDir("block", stat.Dev), depth)
	}
	// A file system that is on several disks, on another file system, or elsewhere.
	m := mountOf(fd)
	if m.Type == "overlay" {
		return overlayPersistence(m, depth)
	}
	if filepath.IsAbs(m.Source) {
		if err := unix.Stat(m.Source, &stat); err == nil && stat.Mode&unix.S_IFMT == unix.S_IFBLK {
			return diskPersistence(deviceDir("block", stat.Rdev), depth)
		}
	}
	return OnSync, ""
}

// overlayPersistence follows an overlay to the folder where it keeps what is
// written, if this process can see that.
func overlayPersistence(m mountinfo.Mount, depth int) (Persistence, string) {
	upper := ""
	for _, option := range strings.Split(m.Options, ",") {
		if option == "volatile" || option == "fsync=volatile" { // Linux 7.3 says the second
			return Volatile, "it is on an overlay that was mounted volatile, which passes no sync on"
		}
		if value, ok := strings.CutPrefix(option, "upperdir="); ok {
			upper = mountinfo.Unescape(value)
		}
	}
	if depth == 0 {
		return OnSync, ""
	}
	// A backslash may be part of the name, or of what was given to mount(2).
	for _, path := range []string{upper, strings.ReplaceAll(upper, `\`, "")} {
		if p, why := persistenceOfPath(path, depth-1); p == Volatile {
			return p, why + ", below an overlay"
		}
	}
	return OnSync, ""
}

// memoryDisk matches the disks that are memory: brd, zram, and null_blk, which
// may even keep nothing at all.
var memoryDisk = regexp.MustCompile(`^(ram|zram|nullb)[0-9]+$`)

// diskPersistence looks at a disk, given by its folder in sysfs, and at those
// that it is made of.
func diskPersistence(dir string, depth int) (Persistence, string) {
	if _, err := os.Stat(dir + "/partition"); err == nil {
		dir = filepath.Dir(dir)
	}
	if disk := filepath.Base(dir); memoryDisk.MatchString(disk) {
		return Volatile, fmt.Sprintf("its disk, %s, is in memory", disk)
	}
	if p, why := memoryPersistence(dir); p == Volatile || p == Unknown {
		return p, why
	}
	if depth == 0 {
		return OnSync, ""
	}
	if file, err := os.ReadFile(dir + "/loop/backing_file"); err == nil {
		if p, why := persistenceOfPath(strings.TrimSuffix(string(file), "\n"), depth-1); p == Volatile {
			return p, why + ", below a loop device"
		}
	}
	slaves, _ := filepath.Glob(dir + "/slaves/*")
	for _, s := range slaves {
		if s, err := filepath.EvalSymlinks(s); err == nil {
			if p, why := diskPersistence(s, depth-1); p != OnSync {
				return p, why
			}
		}
	}
	return OnSync, ""
}

// memoryPersistence goes up from a device in sysfs to the memory that it is a
// part of, and returns "" if there is none. Linux 6.12 and 7.3:
//
//	nd_pmem       drivers/nvdimm/region_devs.c: an NVDIMM, a CXL device in mode
//	              pmem, or what a provider says is one
//	nd_volatile   likewise, for memory that is called volatile
//	cxl_region    drivers/cxl/core/region.c, mode_show: ram, pmem
//	hmem          drivers/dax/hmem: what the firmware has set apart
//
// virtio-pmem (drivers/nvdimm/virtio_pmem.c) is a file's pages in the host; a
// sync makes the request that makes them durable. e820 (drivers/nvdimm/e820.c) is
// memory that an old firmware calls persistent, or the kernel's command line
// (memmap=). It mostly is common memory.
func memoryPersistence(dir string) (Persistence, string) {
	for ; len(dir) > len(sysfs); dir = filepath.Dir(dir) {
		event := readUevent(dir)
		switch {
		case event["DEVTYPE"] == "nd_volatile":
			return Volatile, "it is a volatile region of the firmware's"
		case event["DEVTYPE"] == "nd_pmem":
			switch provider := readLine(filepath.Dir(dir) + "/provider"); provider {
			case "virtio-pmem":
				return OnSync, "it is virtio-pmem, page cache of the host"
			case "e820":
				return Unknown, "only the e820 table, or memmap= on the kernel's command line, calls it persistent"
			}
			return Persistent, ""
		case event["DEVTYPE"] == "cxl_region":
			if mode := readLine(dir + "/mode"); mode != "pmem" {
				return Volatile, fmt.Sprintf("it is a CXL region of mode %q", mode)
			}
			return Persistent, ""
		case event["DRIVER"] == "hmem":
			return Volatile, "it is memory that the firmware has set apart for a special purpose (dax_hmem)"
		}
	}
	return "", ""
}

// deviceDir is the folder of a device in sysfs, without symbolic links.
func deviceDir(kind string, rdev uint64) string {
	link := fmt.Sprintf("%s/dev/%s/%d:%d", sysfs, kind, unix.Major(rdev), unix.Minor(rdev))
	dir, err := filepath.EvalSymlinks(link)
	if err != nil {
		return link
	}
	return dir
}

// readUevent returns what the kernel tells udev about a device.
func readUevent(dir string) map[string]string {
	text, _ := os.ReadFile(dir + "/uevent")
	event := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		event[name] = value
	}
	return event
}

func readLine(path string) string {
	text, _ := os.ReadFile(path)
	return strings.TrimSpace(string(text))
}

// mountOf finds the mount that a file is on. If it cannot, it returns an empty
// one.
func mountOf(fd int) (m mountinfo.Mount) {
	var stat unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stat); err != nil || stat.Mask&unix.STATX_MNT_ID == 0 {
		return m
	}
	mounts, _ := mountinfo.Read("/proc/thread-self/mountinfo")
	for _, mount := range mounts {
		if uint64(mount.ID) == stat.Mnt_id {
			return mount
		}
	}
	return m
}
