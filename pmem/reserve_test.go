package pmem

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sparse makes a file without blocks but for some in the middle.
func sparse(t *testing.T, dir string) (path string, data []byte) {
	t.Helper()
	path = filepath.Join(dir, "sparse")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data = bytes.Repeat([]byte("data"), 1<<18)
	if _, err := f.WriteAt(data, 100<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(MinSize); err != nil {
		t.Fatal(err)
	}
	return path, data
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Blocks * 512
}

// TestReserve: the holes of a file get blocks, and nothing else changes.
func TestReserve(t *testing.T) {
	path, data := sparse(t, t.TempDir())
	r, err := Open(path+",volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n := blocks(t, path); n >= MinSize {
		t.Fatalf("%d bytes have blocks before", n)
	}
	if err := r.Reserve(); err != nil {
		t.Fatal(err)
	}
	if n := blocks(t, path); n < MinSize {
		t.Errorf("%d bytes have blocks", n)
	}
	got := make([]byte, len(data)+8)
	if _, err := r.ReadAt(got, 100<<20-8); err != nil || !bytes.Equal(got[8:], data) || !bytes.Equal(got[:8], make([]byte, 8)) {
		t.Errorf("what the file holds has changed (%v)", err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != MinSize {
		t.Errorf("the file has %d bytes, %v", info.Size(), err)
	}
	if err := r.Reserve(); err != nil {
		t.Errorf("again: %v", err)
	}
}

// TestReserveWithoutRoom: a file system that has too few blocks keeps those it
// has, and a store that finds none says so.
func TestReserveWithoutRoom(t *testing.T) {
	dir := mountTmpfs(t, "16m")
	path, data := sparse(t, dir)
	r, err := Open(path+",volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	before := blocks(t, path)
	err = r.Reserve()
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
	if n := blocks(t, path); n != before {
		t.Errorf("%d bytes have blocks, before it were %d", n, before)
	}

	// Nobody has asked for room.
	var fault *FaultError
	for off := int64(0); off < MinSize && err != nil && fault == nil; off += 1 << 20 {
		if _, err := r.WriteAt(make([]byte, 1<<20), off); err != nil && !errors.As(err, &fault) {
			t.Fatal(err)
		}
	}
	if fault == nil || !errors.Is(fault, unix.EIO) || fault.Cause != errHole || strings.Contains(fault.Error(), "media error") {
		t.Errorf("a store without room: %v", fault)
	}
	got := make([]byte, len(data))
	if _, err := r.ReadAt(got, 100<<20); err != nil || !bytes.Equal(got, data) && fault.Off > 101<<20 {
		t.Errorf("what the file holds: %v", err)
	}
	if err := os.Truncate(path, MinSize-pageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadAt(got[:8], MinSize-8); !errors.As(err, &fault) || fault.Cause != errTruncated {
		t.Errorf("behind the end: %v", err)
	}
}
