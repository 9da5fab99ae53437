package pmem

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInherit: a region is handed on with its lock, which nobody else can get
// in between.
func TestInherit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pm")
	old, err := Open(path+",size=512M,volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(old.File().Fd())) // as a child process gets it
	if err != nil {
		t.Fatal(err)
	}
	heir, err := Inherit(os.NewFile(uintptr(fd), path))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := old.WriteAt([]byte("12345678"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path+",volatile", ReadWrite); !errors.Is(err, ErrInUse) {
		t.Errorf("opened besides its heir: %v", err)
	}
	var p [8]byte
	if _, err := heir.ReadAt(p[:], 1<<20); err != nil || string(p[:]) != "12345678" || heir.Path() != path {
		t.Errorf("the heir reads %q of %q: %v", p, heir.Path(), err)
	}
	if err := heir.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(path+",volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
