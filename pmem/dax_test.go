//go:build vm

package pmem

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"testing"
)

// TestDAX needs the namespace of the test VM: first as device-dax, then as the
// block device of an ext4 with DAX.
func TestDAX(t *testing.T) {
	const device = "/dev/dax0.0"
	exercise(t, device, DevDax)

	run(t, "ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", "fsdax", "--map=mem")
	if _, err := Open("/dev/pmem0", ReadWrite); !errors.Is(err, ErrBlockDevice) {
		t.Errorf("fsdax device itself: %v", err)
	}
	run(t, "mkfs.ext4", "-q", "-m0", "-N64", "-J", "size=4", "/dev/pmem0")
	dir := t.TempDir()
	run(t, "mount", "-o", "dax=always", "/dev/pmem0", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	// ext4 keeps 16 MiB to itself; the device is hardly larger than the file.
	if err := os.WriteFile("/sys/fs/ext4/pmem0/reserved_clusters", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	r := exercise(t, dir+"/pm,size=512M", DAXFile)
	if err := os.Truncate(r.Path(), 64<<20); err != nil {
		t.Fatal(err)
	}
	var fault *FaultError
	if _, err := r.WriteAt(make([]byte, 4096), 65<<20); !errors.As(err, &fault) || fault.Off != 65<<20 {
		t.Errorf("write where the file was truncated: %v", err)
	}
	r.Close()
	if _, err := Open(dir+"/more,size=512M", ReadWrite); !errors.Is(err, ErrNoSpace) {
		t.Errorf("file larger than its file system: %v", err)
	}
	if _, err := os.Stat(dir + "/more"); err == nil {
		t.Error("the file that did not fit is still there")
	}
}

// exercise opens, stores, closes, opens and reads. It leaves the region open.
func exercise(t *testing.T, spec string, kind Kind) *Region {
	want := bytes.Repeat([]byte("eight by"), 1000)
	for _, off := range []int64{0, 4104, 512<<20 - 8000} {
		r, err := Open(spec, ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		if r.Kind() != kind || !r.Durable() || r.Size() < 512<<20 {
			t.Fatalf("%s: %v of %d bytes", spec, r.Kind(), r.Size())
		}
		if p, why := r.Persistence(); p != Persistent || why != "" {
			t.Errorf("%s: %s, %q", spec, p, why)
		}
		if _, err := Open(spec, ReadOnly); !errors.Is(err, ErrInUse) {
			t.Errorf("opened twice: %v", err)
		}
		if _, err := r.WriteAt(want, off); err != nil {
			t.Fatal(err)
		}
		r.Fence()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r, err = Open(spec, ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := r.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: read at %d: %v", spec, off, err)
		}
		r.Close()
	}
	r, err := Open(spec, ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Zero(0, 16); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %v, %d bytes", r.Path(), r.Kind(), r.Size())
	if kind == DevDax {
		r.Close()
	}
	return r
}

func run(t *testing.T, name string, arg ...string) {
	t.Helper()
	if out, err := exec.Command(name, arg...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
