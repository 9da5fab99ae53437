package pmem

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resident counts the pages of a file in the page cache.
func resident(t *testing.T, f *os.File, size int) (n int) {
	t.Helper()
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	in := make([]byte, size/pageSize)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(size), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, b := range in {
		n += int(b & 1)
	}
	return n
}

// TestSettle: all stores stay as they were, in ranges that are settled and
// elsewhere, and the file has them. If the file system has a disk, the page
// cache has no page of the file any more.
func TestSettle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	r, err := Open(path+",size=512M,volatile", ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// On pages and off them, longer than what is written at a time, at both ends.
	ranges := map[int64]int64{0: 20 << 10, 1<<20 + 100: 3<<20 + 4097, 100 << 20: 1, r.Size() - pageSize: pageSize}
	elsewhere := map[int64]int64{50 << 20: 8192, 300 << 20: 16}
	want := map[int64][]byte{}
	for off, n := range ranges {
		want[off&^7] = bytes.Repeat([]byte{byte(off >> 20), 7, 1, 2, 3, 4, 5, 6}, int(n+15)/8)
	}
	for off, n := range elsewhere {
		want[off] = bytes.Repeat([]byte("elsewhere-------")[:8], int(n)/8)
	}
	for off, p := range want {
		p = p[:min(int64(len(p)), r.Size()-off)]
		want[off] = p
		if _, err := r.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := r.Settle(func(yield func(off, n int64) bool) {
			for _, off := range slices.Sorted(maps.Keys(ranges)) {
				if !yield(off, ranges[off]) {
					return
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		var fs unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
			t.Fatal(err)
		}
		if n := resident(t, f, int(r.Size())); n > 0 && fs.Type != unix.TMPFS_MAGIC {
			t.Errorf("%d pages are still in the page cache", n)
		}
		for off, p := range want {
			got := make([]byte, len(p))
			if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
				t.Errorf("the file has something else at %d (%v)", off, err)
			}
			if _, err := r.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
				t.Errorf("the region has something else at %d (%v)", off, err)
			}
		}
		f.Close()
	}
	flags, err := unix.FcntlInt(r.file.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_DIRECT != 0 {
		t.Errorf("the file is left with flags %#x (%v)", flags, err)
	}
}
