//go:build vm

package guest

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// A file is truncated under a cache that is being written to. No request fails as long as there are segments enough, and
// the server lives and names what is gone. Truncated once more, so that too few are left, it takes no more writes; what
// is on the disk is still read.
func TestFileTruncated(t *testing.T) {
	const start, segment = 20 << 10, 16 << 20
	wipe(t, disk)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	pmem := filepath.Join(mount(t, disk4K), "pmem")
	d := add(t, "-p", pmem+",size=544M", "-b", disk, "-q", "1")
	f := direct(t, d.path)
	want := stamp.New(f, 0, 32<<20)
	load := stamp.Load{Depth: 4, BlockSize: 4096, Seed: *seed, Flush: true}
	if _, err := load.Run(want, 24<<20, nil); err != nil {
		t.Fatal(err)
	}
	before := d.health(t)

	stop, ended := make(chan struct{}), make(chan error)
	go func() {
		_, err := load.Run(want, math.MaxInt64, stop)
		ended <- err
	}()
	const left = 7 // segments
	if err := os.Truncate(pmem, start+left*segment); err != nil {
		t.Fatal(err)
	}
	h := d.health(t)
	for begin := time.Now(); len(h.BadSegments) < 2 && time.Since(begin) < patience; h = d.health(t) {
		time.Sleep(100 * time.Millisecond)
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Errorf("seed %d: %v", *seed, err)
	}
	t.Logf("%d of %d segments are bad: %s", len(h.BadSegments), h.Segments, h.Error)
	if h.Health != "degraded" || len(h.BadSegments) < 2 || slices.Min(h.BadSegments) < left || h.PID != before.PID || len(h.BadMemory) == 0 {
		t.Errorf("%+v", h)
	}
	log, err := os.ReadFile("/run/ublk-pcache/" + d.id + ".log")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range h.BadMemory {
		if where := fmt.Sprintf("byte %d of the cache", p.Offset); p.Offset < start+left*segment || !strings.Contains(p.Error, pmem) || !strings.Contains(string(log), where) {
			t.Errorf("%+v is not a place that is gone, or not in the server's log", p)
		}
	}
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := want.Verify(buf); err != nil {
		t.Errorf("seed %d: %v", *seed, err)
	}

	pcache(t, "flush", d.id)
	if err := os.Truncate(pmem, start+segment); err != nil {
		t.Fatal(err)
	}
	clear(buf)
	for begin := time.Now(); time.Since(begin) < patience; {
		if _, err = f.WriteAt(buf, 64<<20); err != nil {
			break
		}
	}
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("a write to what is left: %v", err)
	}
	if h := d.health(t); h.Health != "failed" || h.PID != before.PID {
		t.Errorf("%+v", h)
	}
	if err := want.Verify(buf); err != nil {
		t.Errorf("of a cache that has failed, seed %d: %v", *seed, err)
	}
	f.Close()
	unix.Sync()
	d.remove(t)
}
