package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// memory is a folder that a reboot takes.
func memory(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=600m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// TestVolatileByName: where PMEM may be in memory is said in its specification,
// which a service and the working directory leave as it is.
func TestVolatileByName(t *testing.T) {
	dir := memory(t)
	t.Chdir(dir)
	o := serveOptions{Device: device{PMEM: "a,b,volatile,size=1G", Backing: "disk", Queues: 1, Depth: 1, Writeback: 1}}
	if err := o.check(false); err != nil || o.Device.PMEM != dir+"/a,b,size=1073741824,volatile" {
		t.Errorf("%q, %v", o.Device.PMEM, err)
	}
	if o, err := readConfig(config(t, "pmem = /dev/shm/cache,volatile\nbacking = /dev/sdb\n")); err != nil || o.Device.PMEM != "/dev/shm/cache,volatile" {
		t.Errorf("%q, %v", o.Device.PMEM, err)
	}
	if _, err := readConfig(config(t, "pmem = /cache,size=1G,volatile\nbacking = /dev/sdb\n")); err == nil || !strings.Contains(err.Error(), "without a size") {
		t.Error(err)
	}

	_, err := execute(newFormatCmd(), dir+"/cache,size=512M")
	fails(t, err, dir+"/cache", "tmpfs", "cache,size=536870912,volatile")
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("a refused format leaves %v, %v", left, err)
	}
	if _, err := execute(newFormatCmd(), dir+"/cache,size=512M,volatile"); err != nil {
		t.Fatal(err)
	}
	_, err = execute(newFormatCmd(), dir+"/cache", "--force")
	fails(t, err, dir+"/cache", "tmpfs", "volatile")
	// What is there can be looked at, and mended.
	for _, args := range [][]string{{"check", dir + "/cache"}, {"repair", "--in-place", dir + "/cache"}} {
		cmd := newCheckCmd()
		if args[0] == "repair" {
			cmd = newRepairCmd()
		}
		if _, err := execute(cmd, args[1:]...); err != nil {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestDoubts(t *testing.T) {
	dir := memory(t)
	disk := filepath.Join(t.TempDir(), "disk")
	for _, path := range []string{dir + "/cache", dir + "/disk", disk} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	onDisk, why := pmem.PersistenceOf(disk)
	t.Logf("the test's files are %s %s", onDisk, why)
	says := func(d device, want ...string) {
		t.Helper()
		if onDisk == pmem.Volatile && d.Backing == disk {
			want = append(want, disk)
		}
		got := d.doubts()
		if len(got) != len(want) {
			t.Fatalf("%+v: %q, want %q", d, got, want)
		}
		for i := range got {
			if !strings.Contains(got[i], want[i]) || !strings.Contains(got[i], "does not survive a power cut") {
				t.Errorf("%+v: %q, want %q", d, got[i], want[i])
			}
		}
	}
	says(device{PMEM: dir + "/cache", Backing: disk}, dir+"/cache does not")
	says(device{PMEM: dir + "/cache,volatile", Backing: disk})
	says(device{PMEM: dir + "/cache,volatile", Backing: dir + "/disk"}, dir+"/disk")
	says(device{PMEM: dir + "/cache", Backing: dir + "/disk"}, dir+"/cache does not", dir+"/disk")
}

// TestOpenReserves: a file with holes gets its blocks when nothing is refused
// any more, and before anything is written.
func TestOpenReserves(t *testing.T) {
	for _, full := range []bool{false, true} {
		dir := t.TempDir()
		if full {
			dir = memory(t)
		}
		s := newServerIn(t, dir)
		if full {
			if err := os.WriteFile(dir+"/filler", make([]byte, 80<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		// As another program would have made it.
		hole := int64(100 << 20)
		if err := unix.Fallocate(int(s.region.File().Fd()), unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, hole, hole); err != nil {
			t.Fatal(err)
		}
		if full {
			if err := os.WriteFile(dir+"/filler2", make([]byte, 80<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		blocks := func() int64 {
			var stat unix.Stat_t
			if err := unix.Stat(s.dev.PMEM, &stat); err != nil {
				t.Fatal(err)
			}
			return stat.Blocks * 512
		}
		const read = 1 << 20 // is more than what is looked at, which tmpfs gives blocks
		before := blocks()
		_, err := s.open(&serveOptions{Changed: "discard"})
		if err == nil || blocks() > before+read {
			t.Errorf("a refused cache has %d bytes of blocks, before it %d (%v)", blocks(), before, err)
		}
		_, err = s.open(&serveOptions{})
		if !full && (err != nil || blocks() < pmem.MinSize) {
			t.Errorf("%d bytes have blocks, %v", blocks(), err)
		}
		if full {
			if !errors.Is(err, pmem.ErrNoSpace) || blocks() > before+read {
				t.Errorf("without room: %d bytes have blocks, %v", blocks(), err)
			}
			if blank, err := ondisk.Blank(s.region, s.region.Size()); !blank {
				t.Errorf("it has been written to (%v)", err)
			}
		}
	}
}

// TestShrunk: a region that is smaller than the cache on it says what there is
// to do, and that is not repair.
func TestShrunk(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cache")
	if _, err := execute(newFormatCmd(), path+",size=544M,volatile"); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, pmem.MinSize); err != nil {
		t.Fatal(err)
	}
	s := newServer(t)
	s.region.Close()
	s.dev.PMEM = path
	var err error
	if s.region, err = pmem.Open(path+",volatile", pmem.ReadWrite); err != nil {
		t.Fatal(err)
	}
	_, err = s.open(&serveOptions{})
	fails(t, err, path, "smaller than its cache", "33 segments, which take 553668608 bytes", "--format --force")
	if strings.Contains(err.Error(), "repair") {
		t.Errorf("repair does not help: %v", err)
	}
}
