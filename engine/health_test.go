package engine

import (
	"strings"
	"syscall"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// refusing makes a disk fail all operations of a kind.
func refusing(disk *backing.Fake, kind backing.Kind) {
	disk.Script(func(op backing.Op) (f backing.Fault) {
		if op.Kind == kind {
			f.Err = syscall.EIO
		}
		return f
	})
}

// TestHealthOfReads: a cache whose disk fails its reads is degraded until one works.
func TestHealthOfReads(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 2)
	defer r.kill()
	read := func(queue int, off int64, fails bool) {
		t.Helper()
		if err := r.do(queue, &Request{Op: Read, Off: off, Buf: make([]byte, 4096)}); (err != nil) != fails {
			t.Errorf("read: %v", err)
		}
	}
	want := func(when string, state State, text string) {
		t.Helper()
		if s := r.Status(); s.State != state || !strings.Contains(s.Error, text) {
			t.Errorf("%s: %v, %q", when, s.State, s.Error)
		}
	}
	r.write(t, 0, make([]byte, 4096))
	want("at first", Healthy, "")
	for queue := range 2 { // one has its own way to read, the other the disk's
		refusing(disk, backing.OpRead)
		for i := range int64(3) {
			read(queue, 8<<20+i<<12, true)
		}
		want("reads fail", Degraded, "read the backing device at 8396800: input/output error")
		read(queue, 0, false)
		want("a hit says nothing", Degraded, "input/output error")
		disk.Script(nil)
		read(queue, 16<<20+int64(queue)<<16, false)
		want("a read works", Healthy, "")
	}
	if n := r.Status().DiskReadErrors; n != 6 {
		t.Errorf("%d errors are counted, not 6", n)
	}
}

// TestHealthAfterOpen: what fails while the cache is opened is told, and is over
// when the same works.
func TestHealthAfterOpen(t *testing.T) {
	for _, c := range []struct {
		kind backing.Kind
		text string
		mend func(t *testing.T, r *rig)
	}{
		{backing.OpRead, "read the backing device at", func(t *testing.T, r *rig) { r.read(t, 32<<20, 4096) }},
		{backing.OpFlush, "flush the backing device", func(t *testing.T, r *rig) {
			r.write(t, 0, make([]byte, 4096))
			if err := r.Flush(t.Context()); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(c.kind.String(), func(t *testing.T) {
			mem := pmem.NewFake(ondisk.MinSize)
			formatSmall(t, mem, 6, false, 70)
			disk := backing.NewFake(64<<20, 512, 1)
			defer disk.Close()
			refusing(disk, c.kind)
			r := newRig(t, mem, disk, 1)
			defer r.kill()
			if s := r.Status(); s.State != Degraded || !strings.Contains(s.Error, c.text) {
				t.Errorf("opened: %v, %q", s.State, s.Error)
			}
			disk.Script(nil)
			c.mend(t, r)
			if s := r.Status(); s.State != Healthy {
				t.Errorf("mended: %v, %q", s.State, s.Error)
			}
		})
	}
}
