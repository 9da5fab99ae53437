package pmem

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-pcache/internal/bytesize"
)

// open makes a file region of the least size and closes it with the test.
func open(t testing.TB) *Region {
	t.Helper()
	r, err := Open(filepath.Join(t.TempDir(), "pm,size=512M,volatile"), ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// TestStores compares WriteAt and Zero with a plain copy, for every offset
// and length around the sizes that the assembly treats apart, and every
// alignment of the source.
func TestStores(t *testing.T) {
	const size = 1 << 10
	for _, r := range []*Region{open(t), Heap(size)} {
		want := make([]byte, size)
		src := make([]byte, size+8)
		check := func(what string, off, n int) {
			got := make([]byte, size)
			if _, err := r.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%v: %s of %d bytes at %d", r.Kind(), what, n, off)
			}
		}
		for off := 0; off < 128; off += 8 {
			for n := 0; n <= 800; n += 8 {
				if n > 304 && n < 744 {
					continue
				}
				for i := range src {
					src[i] = byte(rand.Uint32())
				}
				p := src[(off+n)/8%8:][:n]
				if k, err := r.WriteAt(p, int64(off)); k != n || err != nil {
					t.Fatalf("write of %d at %d: %d, %v", n, off, k, err)
				}
				r.Fence()
				copy(want[off:], p)
				check("write", off, n)

				if err := r.Zero(int64(off+8), int64(n/2&^7)); err != nil {
					t.Fatal(err)
				}
				r.Fence()
				clear(want[off+8:][:n/2&^7])
				check("zero", off+8, n/2&^7)
			}
		}
	}
}

func TestBounds(t *testing.T) {
	r := Heap(4096)
	p := make([]byte, 16)
	for _, c := range []struct {
		off  int64
		n    int
		want error
	}{
		{0, 16, nil}, {4080, 16, nil}, {4096, 0, nil},
		{4, 8, ErrUnaligned}, {0, 12, ErrUnaligned},
		{-8, 8, ErrRange}, {4088, 16, ErrRange}, {1 << 62, 8, ErrRange}, {1<<63 - 8, 16, ErrRange},
	} {
		if _, err := r.WriteAt(p[:c.n], c.off); !errors.Is(err, c.want) {
			t.Errorf("write of %d at %d: %v, want %v", c.n, c.off, err, c.want)
		}
		if err := r.Zero(c.off, int64(c.n)); !errors.Is(err, c.want) {
			t.Errorf("zero of %d at %d: %v, want %v", c.n, c.off, err, c.want)
		}
	}
	if err := r.Zero(0, -8); !errors.Is(err, ErrRange) {
		t.Errorf("zero of -8: %v", err)
	}
	if n, err := r.ReadAt(p, 4090); n != 6 || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if _, err := r.ReadAt(p, -1); !errors.Is(err, ErrRange) {
		t.Errorf("read at -1: %v", err)
	}
	if _, err := r.ReadAt(p, 4097); !errors.Is(err, ErrRange) {
		t.Errorf("read behind the end: %v", err)
	}
	for _, off := range []int64{-1, 4090, 4097, 1<<63 - 8} {
		if n, err := r.ReadEach([][]byte{p, p, p}, []int64{0, off, 0}); n != 1 || !errors.Is(err, ErrRange) {
			t.Errorf("reads at 0, %d and 0: %d, %v", off, n, err)
		}
	}
}

func TestReadEach(t *testing.T) {
	r := Heap(4096)
	for i := range r.mem {
		r.mem[i] = byte(i * 7 >> 3)
	}
	bufs, offs := [][]byte{make([]byte, 512), {}, make([]byte, 100)}, []int64{1024, 4096, 3}
	if n, err := r.ReadEach(bufs, offs); n != len(bufs) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	for i, p := range bufs {
		if want := r.mem[offs[i]:][:len(p)]; !bytes.Equal(p, want) {
			t.Errorf("at %d there is %x, want %x", offs[i], p, want)
		}
	}
}

// TestFault takes away the file under the mapping.
func TestFault(t *testing.T) {
	r := open(t)
	const bad = 64 << 20
	if err := os.Truncate(r.Path(), bad); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8192)
	calls := map[string]func(off int64) error{
		"read":  func(off int64) error { n, err := r.ReadAt(p, off); return counted(n, len(p), err) },
		"write": func(off int64) error { n, err := r.WriteAt(p, off); return counted(n, len(p), err) },
		"zero":  func(off int64) error { return r.Zero(off, int64(len(p))) },
	}
	for name, call := range calls {
		for _, off := range []int64{bad, bad - 4096, bad + 512<<10, r.Size() - 8192} {
			err := call(off)
			var fault *FaultError
			if !errors.As(err, &fault) || !errors.Is(err, syscall.EIO) || fault.Path != r.Path() ||
				fault.Off < max(off, bad) || fault.Off >= off+8192 {
				t.Errorf("%s at %d: %v", name, off, err)
			}
		}
		if err := call(bad - 8192); err != nil {
			t.Errorf("%s before the hole: %v", name, err)
		}
	}
	first := make([]byte, 8192)
	n, err := r.ReadEach([][]byte{first, p, first}, []int64{0, bad - 4096, 0})
	var fault *FaultError
	if n != 1 || !errors.As(err, &fault) || fault.Off < bad || fault.Off >= bad+4096 {
		t.Errorf("reads before the hole, into it and before it: %d, %v", n, err)
	}
	if debug.SetPanicOnFault(false) {
		t.Error("faults of the goroutine still panic")
	}
}

func counted(n, want int, err error) error {
	if err == nil && n != want {
		return fmt.Errorf("%d bytes of %d", n, want)
	}
	if err != nil && n != 0 {
		return fmt.Errorf("%d bytes with %v", n, err)
	}
	return err
}

// TestForeignFault makes sure that a bad buffer of the caller is not taken
// for a media error.
func TestForeignFault(t *testing.T) {
	r := open(t)
	wall, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(wall)
	for name, call := range map[string]func(){
		"read":  func() { r.ReadAt(wall, 0) },
		"write": func() { r.WriteAt(wall, 0) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
			call()
		}()
	}
}

func TestNoAllocations(t *testing.T) {
	r := open(t)
	p := make([]byte, 4096)
	bufs, offs := [][]byte{p, p}, []int64{0, 4096}
	if n := testing.AllocsPerRun(100, func() {
		r.WriteAt(p, 4096)
		r.Zero(8192, 24)
		r.ReadAt(p, 4096)
		r.ReadEach(bufs, offs)
		r.Fence()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for name, size := range map[string]int64{"small": 511 << 20, "odd": 512<<20 + 512, "good": 512 << 20} {
		if err := os.WriteFile(path(name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path(name), size); err != nil {
			t.Fatal(err)
		}
	}
	held, err := Open(path("held,size=512M,volatile"), ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	shared, err := Open(path("good"), ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer shared.Close()
	disk := path("disk")
	if err := unix.Mknod(disk, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 250))); err != nil {
		t.Fatal(err)
	}
	pipe := path("pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}

	before := names(t, dir)
	for _, c := range []struct {
		spec string
		mode Mode
		want error
	}{
		{path("none"), ReadWrite, ErrMissing},
		{path("none,size=512M"), ReadOnly, ErrMissing},
		{path("none,size=511M"), ReadWrite, ErrTooSmall},
		{path("none,size=536870913"), ReadWrite, ErrMisaligned},
		{path("none,size="), ReadWrite, bytesize.ErrSyntax},
		{path("none,size=1X"), ReadWrite, bytesize.ErrSyntax},
		{path("none,size=-1G"), ReadWrite, bytesize.ErrSyntax},
		{path("none,size=9999999999T"), ReadWrite, bytesize.ErrSyntax},
		{path("none,size=4000000T"), ReadWrite, ErrNoSpace},
		{path("small"), ReadWrite, ErrTooSmall},
		{path("odd"), ReadWrite, ErrMisaligned},
		{path("good,size=1G"), ReadWrite, ErrOtherSize},
		{path("held"), ReadWrite, ErrInUse},
		{path("held"), ReadOnly, ErrInUse},
		{path("good"), ReadWrite, ErrInUse},
		{path("good"), ReadOnly, nil},
		{dir, ReadOnly, ErrNotMappable},
		{dir, ReadWrite, unix.EISDIR},
		{disk, ReadWrite, ErrBlockDevice},
		{pipe, ReadWrite, ErrNotMappable},
		{"/dev/null", ReadWrite, ErrNotMappable},
		{"/dev/dax9.9", ReadWrite, ErrNoDevice},
		{"/dev/dax9.9,size=1G", ReadWrite, ErrNoDevice},
		{"/dev/dax9.9", ReadOnly, ErrNoDevice},
		{"/dev/mapper/none/x,size=1G", ReadWrite, ErrNoDevice},
		{"/dev/shm/none", ReadWrite, ErrMissing},
	} {
		r, err := Open(c.spec+",volatile", c.mode)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.spec, err, c.want)
		}
		if err == nil {
			if r.Kind() != File || r.Durable() || r.Size() != 512<<20 {
				t.Errorf("%s: %v of %d bytes", c.spec, r.Kind(), r.Size())
			}
			r.Close()
		}
	}
	if after := names(t, dir); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("refusals left files behind: %v, before %v", after, before)
	}
	if _, err := shared.WriteAt(make([]byte, 8), 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("store into a read-only region: %v", err)
	}
}

func names(t *testing.T, dir string) (names []string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestReopen writes, closes, and finds everything again in a file whose space
// was reserved.
func TestReopen(t *testing.T) {
	spec := filepath.Join(t.TempDir(), "pm,size=524288K,volatile")
	want := []byte("persistent bytes, forty of them in total")
	for i := range 2 {
		r, err := Open(spec, ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if _, err := r.WriteAt(want, 512<<20-40); err != nil {
				t.Fatal(err)
			}
			r.Fence()
			if err := r.Sync(); err != nil {
				t.Fatal(err)
			}
			var stat unix.Stat_t
			if err := unix.Stat(r.Path(), &stat); err != nil || stat.Blocks*512 < 512<<20 {
				t.Errorf("%d bytes reserved, %v", stat.Blocks*512, err)
			}
		}
		got := make([]byte, 40)
		if _, err := r.ReadAt(got, 512<<20-40); err != nil || !bytes.Equal(got, want) {
			t.Errorf("read %q, %v", got, err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// The benchmarks go round a window larger than the caches, as a cache does.
const window = 256 << 20

func benchmark(b *testing.B, size int64, op func(r *Region, p []byte, off int64)) {
	r := open(b)
	if err := r.Zero(0, window); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, size)
	b.SetBytes(size)
	var off int64
	for b.Loop() {
		op(r, p, off)
		off = (off + size) % window
	}
}

func BenchmarkWriteAt4K(b *testing.B) {
	benchmark(b, 4096, func(r *Region, p []byte, off int64) { r.WriteAt(p, off); r.Fence() })
}

func BenchmarkBareStore4K(b *testing.B) {
	benchmark(b, 4096, func(r *Region, p []byte, off int64) {
		store(unsafe.Pointer(&r.mem[off]), unsafe.Pointer(&p[0]), 4096)
		fence()
	})
}

func BenchmarkBareMove4K(b *testing.B) {
	benchmark(b, 4096, func(r *Region, p []byte, off int64) { copy(r.mem[off:], p) })
}

func BenchmarkReadAt4K(b *testing.B) {
	benchmark(b, 4096, func(r *Region, p []byte, off int64) { r.ReadAt(p, off) })
}

func BenchmarkBareRead4K(b *testing.B) {
	benchmark(b, 4096, func(r *Region, p []byte, off int64) { copy(p, r.mem[off:]) })
}

func BenchmarkWriteAt16(b *testing.B) {
	benchmark(b, 16, func(r *Region, p []byte, off int64) { r.WriteAt(p, off) })
}

func BenchmarkBareStore16(b *testing.B) {
	benchmark(b, 16, func(r *Region, p []byte, off int64) { store(unsafe.Pointer(&r.mem[off]), unsafe.Pointer(&p[0]), 16) })
}
