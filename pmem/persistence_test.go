package pmem

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeSysfs makes files, given by their paths in sysfs and what they hold, and
// lets the package read them.
func fakeSysfs(t *testing.T, files map[string]string) {
	t.Helper()
	old := sysfs
	t.Cleanup(func() { sysfs = old })
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	sysfs = dir
	for name, text := range files {
		path := filepath.Join(sysfs, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			err = os.Symlink(filepath.Join(sysfs, target), path)
		} else {
			err = os.WriteFile(path, []byte(text+"\n"), 0o444)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestPersistenceOfMemory: what a device-dax device, and a disk on the same
// memory, are made of, from the paths and files that Linux has for them.
func TestPersistenceOfMemory(t *testing.T) {
	const (
		nfit   = "devices/LNXSYSTM:00/LNXSYBUS:00/ACPI0012:00/ndbus0/"
		e820   = "devices/platform/e820_pmem/ndbus0/"
		virtio = "devices/pci0000:00/0000:00:05.0/virtio2/ndbus0/"
		bridge = "devices/platform/ACPI0017:00/root0/nvdimm-bridge0/ndbus0/"
		cxl    = "devices/platform/ACPI0017:00/root0/decoder0.0/region0/"
		hmem   = "devices/platform/hmem_platform.0/hmem.0/"
	)
	nd := func(bus, provider, kind string) map[string]string {
		return map[string]string{bus + "provider": provider, bus + "uevent": "", bus + "region0/uevent": "DEVTYPE=" + kind, bus + "region0/dax0.1/uevent": "DEVTYPE=nd_dax"}
	}
	for name, c := range map[string]struct {
		files  map[string]string
		device string // of the memory, folder in sysfs without the last part
		char   Persistence
		disk   Persistence
		why    string
	}{
		"NVDIMM":                {nd(nfit, "ACPI.NFIT", "nd_pmem"), nfit + "region0/dax0.1/", Persistent, OnSync, ""},
		"CXL, persistent":       {nd(bridge, "CXL", "nd_pmem"), bridge + "region0/dax0.1/", Persistent, OnSync, ""},
		"NVDIMM, volatile":      {nd(nfit, "ACPI.NFIT", "nd_volatile"), nfit + "region0/dax0.1/", Volatile, Volatile, "volatile region"},
		"memmap=":               {nd(e820, "e820", "nd_pmem"), e820 + "region0/dax0.1/", Unknown, Unknown, "memmap="},
		"virtio-pmem":           {nd(virtio, "virtio-pmem", "nd_pmem"), virtio + "region0/dax0.1/", Volatile, OnSync, "virtio-pmem"},
		"CXL, ram":              {map[string]string{cxl + "uevent": "DEVTYPE=cxl_region", cxl + "mode": "ram", cxl + "dax_region0/uevent": "DEVTYPE=cxl_dax_region"}, cxl + "dax_region0/", Volatile, Volatile, `"ram"`},
		"CXL, pmem by itself":   {map[string]string{cxl + "uevent": "DEVTYPE=cxl_region", cxl + "mode": "pmem", cxl + "dax_region0/uevent": "DEVTYPE=cxl_dax_region"}, cxl + "dax_region0/", Persistent, OnSync, ""},
		"CXL, no mode":          {map[string]string{cxl + "uevent": "DEVTYPE=cxl_region", cxl + "dax_region0/uevent": "DEVTYPE=cxl_dax_region"}, cxl + "dax_region0/", Volatile, Volatile, "CXL"},
		"special purpose":       {map[string]string{hmem + "uevent": "DRIVER=hmem\nMODALIAS=platform:hmem"}, hmem, Volatile, Volatile, "special purpose"},
		"nothing that is known": {map[string]string{"devices/platform/new.0/uevent": "DRIVER=new"}, "devices/platform/new.0/", Unknown, OnSync, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c.files[c.device+"dax0.0/uevent"] = "DEVNAME=dax0.0\nDRIVER=device_dax"
			c.files[c.device+"block/pmem0/uevent"] = "DEVNAME=pmem0\nDEVTYPE=disk"
			c.files[c.device+"block/pmem0/pmem0p1/partition"] = "1"
			c.files["devices/virtual/block/dm-0/slaves/pmem0p1"] = "-> " + c.device + "block/pmem0/pmem0p1"
			c.files["dev/char/251:0"] = "-> " + c.device + "dax0.0"
			c.files["dev/block/259:0"] = "-> " + c.device + "block/pmem0"
			c.files["dev/block/253:0"] = "-> devices/virtual/block/dm-0"
			fakeSysfs(t, c.files)
			for node, want := range map[string]struct {
				mode, major uint32
				p           Persistence
			}{"dax": {unix.S_IFCHR, 251, c.char}, "disk": {unix.S_IFBLK, 259, c.disk}, "dm": {unix.S_IFBLK, 253, c.disk}} {
				path := filepath.Join(t.TempDir(), node)
				if err := unix.Mknod(path, want.mode|0o600, int(unix.Mkdev(want.major, 0))); err != nil {
					t.Fatal(err)
				}
				p, why := PersistenceOf(path)
				doubt := p == Volatile || p == Unknown
				if p != want.p || doubt != (why != "") || doubt && !strings.Contains(why, c.why) {
					t.Errorf("%s: %s, %q, want %s, %q", node, p, why, want.p, c.why)
				}
			}
		})
	}
}

// TestPersistenceOfDisks: disks that are memory, or are on some.
func TestPersistenceOfDisks(t *testing.T) {
	inMemory := filepath.Join(mountTmpfs(t, "1m"), "file")
	onDisk := filepath.Join(t.TempDir(), "file")
	for _, path := range []string{inMemory, onDisk} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	block := "devices/virtual/block/"
	files := map[string]string{"devices/pci0000:00/nvme/nvme0/nvme0n1/uevent": "DEVTYPE=disk"}
	disks := []struct {
		name string
		want Persistence
		on   string
	}{
		{"ram0", Volatile, ""}, {"zram1", Volatile, ""}, {"nullb0", Volatile, ""}, {"sda", OnSync, ""}, {"ramen0", OnSync, ""},
		{"loop0", Volatile, inMemory}, {"loop1", OnSync, onDisk + "x"}, {"loop2", OnSync, "/nowhere"},
		{"dm-1", Volatile, "ram0"}, {"dm-2", OnSync, "sda"}, {"md0", Volatile, "dm-1"},
	}
	for i, d := range disks {
		files[block+d.name+"/uevent"] = "DEVTYPE=disk"
		files[fmt.Sprintf("dev/block/240:%d", i)] = "-> " + block + d.name
		switch {
		case strings.HasPrefix(d.name, "loop"):
			files[block+d.name+"/loop/backing_file"] = d.on
		case d.on != "":
			files[block+d.name+"/slaves/"+d.on] = "-> " + block + d.on
		}
	}
	fakeSysfs(t, files)
	for i, d := range disks {
		node := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(240, uint32(i)))); err != nil {
			t.Fatal(err)
		}
		if p, why := PersistenceOf(node); p != d.want || (p == Volatile) != (why != "") {
			t.Errorf("%s: %s, %q, want %s", d.name, p, why, d.want)
		}
	}
	if p, why := PersistenceOf("/nowhere"); p != Unknown || why == "" {
		t.Errorf("nothing: %s, %q", p, why)
	}
}

// TestVolatile: a file that a reboot takes, existing or to be made, is refused
// unless ",volatile" is given; and a file that is refused is not made.
func TestVolatile(t *testing.T) {
	dir := mountTmpfs(t, "600m")
	path := dir + "/cache"
	for _, s := range []Spec{{Path: path, Size: MinSize}, {Path: path, Volatile: true}} {
		if _, err := s.Open(ReadWrite); err == nil || errors.Is(err, ErrVolatile) == s.Volatile {
			t.Errorf("%+v: %v", s, err)
		}
	}
	_, err := Open(path+",size=512M", ReadWrite)
	var volatile *VolatileError
	if !errors.As(err, &volatile) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "tmpfs") || volatile.Said.String() != path+",size=536870912,volatile" {
		t.Errorf("the refusal does not say what may be said: %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Fatal("a refused file is there")
	}
	r, err := Open(path+",size=512M,volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if p, why := r.Persistence(); p != Volatile || !strings.Contains(why, "tmpfs") || r.Durable() {
		t.Errorf("%s, %q", p, why)
	}
	r.Close()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link} {
		if _, err := Open(p, ReadWrite); !errors.Is(err, ErrVolatile) {
			t.Errorf("%s: %v", p, err)
		}
	}
	r, err = Open(path, ReadOnly) // to look at it harms nobody
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
}

// mountTmpfs mounts a tmpfs on a folder of the test.
func mountTmpfs(t *testing.T, size string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}
