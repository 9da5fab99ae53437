//go:build vm

package guest

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A file system on the cache, with fio verifying every block on two queues, is whole after unmounting and is still
// there, to the byte, after the cache was stopped and started.
func TestFileSystems(t *testing.T) {
	for _, fs := range []struct {
		name  string
		make  []string
		check []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			quiet := quietKernel(t)
			wipe(t, disk)
			d := add(t, "-p", dax, "-b", disk, "-q", "2")
			queues, err := filepath.Glob("/sys/block/" + filepath.Base(d.path) + "/mq/*")
			if err != nil || len(queues) != 2 {
				t.Fatalf("the device has %d queues, want 2 (%v)", len(queues), err)
			}
			must(t, append(fs.make, d.path)...)
			dir := mount(t, d.path)
			start := time.Now()
			must(t, "fio", "--name=verified", "--directory="+dir, "--size=48M", "--rw=randrw", "--bsrange=4k-64k",
				"--ioengine=io_uring", "--iodepth=32", "--direct=1", "--numjobs=2", "--cpus_allowed=0,1", "--cpus_allowed_policy=split",
				"--verify=crc32c", "--verify_fatal=1", "--group_reporting")
			written := time.Now()
			before := checksums(t, dir)
			t.Logf("written in %v, read in %v", written.Sub(start), time.Since(written))
			must(t, "umount", dir)
			must(t, append(fs.check, d.path)...)
			d.del(t)

			d = add(t, "-p", dax, "-b", disk)
			must(t, "mount", d.path, dir)
			if after := checksums(t, dir); after != before {
				t.Errorf("after del and add the files are\n%swant\n%s", after, before)
			}
			must(t, "umount", dir)
			must(t, append(fs.check, d.path)...)
			d.del(t)
			quiet()
		})
	}
}

func checksums(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(dir + "/verified*")
	if err != nil || len(names) != 2 {
		t.Fatalf("fio left %d files, want 2 (%v)", len(names), err)
	}
	// What is in the page cache says nothing about the device.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
	return must(t, append([]string{"sha256sum"}, names...)...)
}
