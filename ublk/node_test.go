package ublk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCheckNode: a name counts if the kernel's number is behind it, and each error says how to get one.
func TestCheckNode(t *testing.T) {
	dir := t.TempDir()
	number := filepath.Join(dir, "number")
	if err := os.WriteFile(number, []byte("7:9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "node")
	mknod := func(kind uint32, major, minor uint32) func() error {
		return func() error { return unix.Mknod(path, kind|0o600, int(unix.Mkdev(major, minor))) }
	}
	for _, c := range []struct {
		name string
		put  func() error
		says string
	}{
		{"it", mknod(unix.S_IFBLK, 7, 9), ""},
		{"a link to it", func() error {
			return errors.Join(mknod(unix.S_IFBLK, 7, 9)(), os.Rename(path, path+".x"), os.Symlink(path+".x", path))
		}, ""},
		{"nothing", func() error { return nil }, "there is no " + path},
		{"a file", func() error { return os.WriteFile(path, nil, 0o600) }, "move it away"},
		{"a folder", func() error { return os.Mkdir(path, 0o700) }, "move it away"},
		{"another kind", mknod(unix.S_IFCHR, 7, 9), "move it away"},
		{"another one", mknod(unix.S_IFBLK, 9, 7), "is device 9:7, and not 7:9"},
	} {
		if err := c.put(); err != nil {
			t.Fatal(err)
		}
		err := checkNode(path, unix.S_IFBLK, number)
		if c.says == "" && err != nil || c.says != "" && (!errors.Is(err, ErrNode) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "mknod "+path+" b 7 9")) {
			t.Errorf("%s: %v", c.name, err)
		}
		os.RemoveAll(path)
	}
	if err := checkNode(path, unix.S_IFBLK, number+".x"); !errors.Is(err, ErrNode) {
		t.Errorf("without a number: %v", err)
	}
}

// TestWords: those who use a disk are told once each, on one line whatever they are called.
func TestWords(t *testing.T) {
	var l list
	for _, name := range []string{"plain", "a\nb", "plain", "caf\xe9", `a"b`} {
		l.add("mounted on %s", quoteOdd(name))
	}
	if got, want := fmt.Sprint(l.words), `[mounted on plain mounted on "a\nb" mounted on "caf\xe9" mounted on "a\"b"]`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if err := checkID(MaxID + 1); !errors.Is(err, ErrNoDevice) {
		t.Error(err)
	}
	if err := checkID(MaxID); err != nil {
		t.Error(err)
	}
}
