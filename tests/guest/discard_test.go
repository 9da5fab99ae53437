//go:build vm

package guest

import (
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// zeroer makes ranges of a block device read as zeros in the ways that programs have: the first is a discard, the
// others come as write zeroes.
func zeroer(f *os.File) func(off, n int64, way int) error {
	return func(off, n int64, way int) error {
		switch way % 4 {
		case 0:
			return ioctlRange(f, unix.BLKDISCARD, off, n)
		case 1:
			return ioctlRange(f, unix.BLKZEROOUT, off, n)
		case 2:
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		default:
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		}
	}
}

func ioctlRange(f *os.File, request uint, off, n int64) error {
	span := [2]int64{off, n}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(&span))); errno != 0 {
		return errno
	}
	return nil
}

// Discards and write zeroes of all kinds and sizes go on among writes and reads, over more than the cache holds, while
// the server is killed and recovered. What was acknowledged as zeroed reads as zeros and nothing else does: all the
// time, after it, and on the disk alone once the cache was flushed.
func TestZeroing(t *testing.T) {
	for _, on := range []struct {
		name      string
		blockSize int64
		prepare   func(t *testing.T) (backing string)
	}{
		{"512", 512, func(t *testing.T) string { wipe(t, disk); return disk }},
		{"4096", 4096, func(t *testing.T) string { wipe(t, disk4K); return disk4K }},
		{"file", 512, backingFile}, // with blocks of 4096 bytes, so that a hole often is only part of one
	} {
		t.Run(on.name, func(t *testing.T) {
			quiet := quietKernel(t)
			backing := on.prepare(t)
			d := add(t, "-p", dax, "-b", backing, "-q", "2")
			t.Cleanup(func() {
				if t.Failed() { // whoever has the device open waits for a server
					go exec.Command("ublk-pcache", "del", "--force", d.id).Run()
				}
			})
			f := direct(t, d.path)
			want := stamp.New(f, 0, 256<<20)
			stop, ended := make(chan struct{}), make(chan error)
			go func() {
				written, err := stamp.Load{Depth: 8, BlockSize: on.blockSize, Seed: *seed, Zero: zeroer(f)}.Run(want, math.MaxInt64, stop)
				t.Logf("%d MiB written", written>>20)
				ended <- err
			}()
			rnd := rand.New(rand.NewPCG(*seed, 0))
			for range 3 {
				time.Sleep(time.Duration(1000+rnd.IntN(2000)) * time.Millisecond) // of undisturbed work
				killServer(t, d, unix.SIGKILL)
				pcache(t, "recover", d.id)
			}
			close(stop)
			if err := <-ended; err != nil {
				t.Fatalf("seed %d: %v", *seed, err)
			}
			buf, err := stamp.Buffer(1 << 20)
			if err != nil {
				t.Fatal(err)
			}
			if err := want.Verify(buf); err != nil {
				t.Fatalf("seed %d, through the device: %v", *seed, err)
			}
			f.Close()
			pcache(t, "flush", d.id)
			d.del(t)
			if err := want.On(direct(t, backing)).Verify(buf); err != nil {
				t.Fatalf("seed %d, on the disk alone: %v", *seed, err)
			}
			quiet()
		})
	}
}

// backingFile makes a file of 1 GiB without blocks, on a file system of its own, and blanks the cache.
func backingFile(t *testing.T) string {
	t.Helper()
	wipe(t, disk)
	must(t, "mkfs.ext4", "-q", "-F", disk)
	file := filepath.Join(mount(t, disk), "backing")
	must(t, "truncate", "-s", "1G", file)
	must(t, "chmod", "o=", file)
	return file
}

// What a file system trims costs no space in the file that is the backing device, nor does what is discarded or zeroed
// as a whole; the other files are as they were.
func TestTrimFreesFile(t *testing.T) {
	quiet := quietKernel(t)
	file := backingFile(t)
	d := add(t, "-p", dax, "-b", file)
	allocated := func() int64 {
		t.Helper()
		pcache(t, "flush", d.id)
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	const big, little = 32 << 20, 1 << 20

	must(t, "mkfs.ext4", "-q", d.path)
	empty := allocated()
	dir := mount(t, d.path)
	must(t, "dd", "if=/dev/urandom", "of="+dir+"/big", "bs=1M", "count=32", "conv=fsync", "status=none")
	must(t, "dd", "if=/dev/urandom", "of="+dir+"/little", "bs=1M", "count=1", "conv=fsync", "status=none")
	sum := must(t, "sha256sum", dir+"/little")
	full := allocated()
	if full < empty+big {
		t.Errorf("with %d bytes in files, the backing file takes %d, before it took %d", big+little, full, empty)
	}
	must(t, "rm", dir+"/big")
	must(t, "sync", "-f", dir)
	t.Log(strings.TrimSpace(must(t, "fstrim", "-v", dir)))
	if n := allocated(); n > full-big+(1<<20) { // of metadata
		t.Errorf("after a trim of %d bytes, the backing file takes %d of %d", big, n, full)
	}
	must(t, "umount", dir)
	must(t, "e2fsck", "-fn", d.path)
	d.del(t)
	must(t, "e2fsck", "-fn", file)
	d = add(t, "-p", dax, "-b", file)
	must(t, "mount", d.path, dir)
	if got := must(t, "sha256sum", dir+"/little"); got != sum {
		t.Errorf("the file that was kept is %s, was %s", got, sum)
	}
	must(t, "umount", dir)

	for _, zero := range [][]string{{"blkdiscard", "-f", d.path}, {"blkdiscard", "-f", "-z", d.path}} {
		must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=1M", "count=8", "oflag=direct", "status=none")
		if n := allocated(); n < 8<<20 {
			t.Errorf("with 8 MiB of data the backing file takes %d bytes", n)
		}
		must(t, zero...)
		if n := allocated(); n > 64<<10 { // the file's own tree of blocks
			t.Errorf("after %v the backing file takes %d bytes", zero, n)
		}
		for _, path := range []string{d.path, file} {
			must(t, "cmp", "-n", "64M", path, "/dev/zero")
		}
	}
	d.del(t)
	quiet()
}

// A discard is offered where it spares the disk something, and only there. Write zeroes always is: it spares the users
// of the device the zeros.
func TestDiscardIsOfferedWhereItIsCheap(t *testing.T) {
	must(t, "modprobe", "brd", "rd_nr=1", "rd_size=65536")
	t.Cleanup(func() { run(t, "rmmod", "brd") })
	for _, c := range []struct {
		backing string
		offered bool
	}{{disk, true}, {"/dev/ram0", false}} {
		wipe(t)
		d := add(t, "-p", dax, "-b", c.backing)
		must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=1M", "count=16", "oflag=direct", "status=none")
		head := func() string { return must(t, "sh", "-c", "head -c 16M "+d.path+" | sha256sum") }
		before := head()
		if r := run(t, "blkdiscard", "-l", "8M", d.path); (r.code == 0) != c.offered {
			t.Errorf("%s: exit status %d with %s behind it: %s", r.commandLine, r.code, c.backing, r.stderr)
		}
		if after := head(); (after != before) != c.offered {
			t.Errorf("with %s behind it, after a discard the content is %s, before %s", c.backing, after, before)
		}
		must(t, "blkdiscard", "-z", "-l", "16M", d.path)
		must(t, "cmp", "-n", "16M", d.path, "/dev/zero")
		for limit, want := range map[string]string{"discard_max_bytes": "67108864\n", "write_zeroes_max_bytes": "67108864\n"} {
			if limit == "discard_max_bytes" && !c.offered {
				want = "0\n"
			}
			got, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.path), "queue", limit))
			if err != nil || string(got) != want {
				t.Errorf("with %s behind it, %s is %q (%v), want %q", c.backing, limit, got, err, want)
			}
		}
		pcache(t, "flush", d.id)
		d.del(t)
		must(t, "cmp", "-n", "16M", c.backing, "/dev/zero")
	}
}
