package pmem

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCreateWhole: until a file has its size and its space it has no name, so
// that a process that is killed meanwhile leaves none.
func TestCreateWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cache")
	// A file system where space is short, and where a name appears meanwhile.
	full := filepath.Join(mountTmpfs(t, "1m"), "cache")
	if _, err := Open(full+",size=512M,volatile", ReadWrite); !errors.Is(err, ErrNoSpace) {
		t.Errorf("without space: %v", err)
	}
	if left := names(t, filepath.Dir(full)); len(left) > 0 {
		t.Errorf("without space there are %v", left)
	}
	f, err := create(path, MinSize)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Name() != path {
		t.Errorf("it is called %q", f.Name())
	}
	if _, err := create(path, MinSize); !errors.Is(err, ErrAppeared) {
		t.Errorf("a name that is taken: %v", err)
	}
	if left := names(t, dir); len(left) != 1 {
		t.Errorf("there are %v", left)
	}
	if err := os.Symlink("nothing", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir+"/link,size=512M,volatile", ReadWrite); !errors.Is(err, ErrDangling) {
		t.Errorf("a link to nothing: %v", err)
	}
}

// TestCreateKilled looks at the folder from the moment at which the space is
// being reserved: with a name, a file has all of it.
func TestCreateKilled(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cache")
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, dir, unix.IN_CREATE|unix.IN_MODIFY|unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	r, err := Open(path+",size=512M,volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	// The name is the last thing: nothing is done to a file that has one.
	events := make([]byte, 4096)
	n, err := unix.Read(watch, events)
	if err != nil || strings.Count(string(events[:n]), "cache") != 1 {
		t.Errorf("what happened to names in the folder: %q, %v", events[:max(n, 0)], err)
	}
}

// TestCreateWithoutTmpfile: where a file cannot be made without a name, it gets
// another one first. One that was left by a process that died is named.
func TestCreateWithoutTmpfile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cache")
	for _, rename := range []bool{true, false} {
		temporary := path + unfinished
		fd, err := unix.Open(temporary, unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		if !rename {
			if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := name(f, temporary); !errors.Is(err, ErrAppeared) {
				t.Errorf("over another file: %v", err)
			}
			continue
		}
		if err := name(f, temporary); err != nil {
			t.Fatal(err)
		}
		if got := names(t, dir); len(got) != 1 || got[0] != "cache" {
			t.Errorf("there are %v", got)
		}
		os.Remove(path)
	}
}
