//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// counts are those of what status --json says that modes show in.
type counts struct {
	KeyHead    string `json:"key_head"`
	DirtyBytes int64  `json:"dirty_bytes"`
	ZeroBytes  int64  `json:"zero_bytes"`
	Writes     uint64 `json:"writes"`
	ReadMisses uint64 `json:"read_misses"`
}

func (d device) counts(t *testing.T) (c counts) {
	t.Helper()
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// mustHaveMode looks at both forms of status.
func (d device) mustHaveMode(t *testing.T, want, when string) {
	t.Helper()
	if got := d.settings(t)["mode"]; got != want {
		t.Errorf("%s: status --json says mode %q, want %q", when, got, want)
	}
	if out := pcache(t, "status", d.id); !strings.Contains(out, " mode="+want+" ") {
		t.Errorf("%s: status does not say mode=%s:\n%s", when, want, out)
	}
}

// worksOn waits until so many writes have come since.
func (d device) worksOn(t *testing.T, writes uint64) {
	t.Helper()
	begin := d.counts(t).Writes
	waitFor(t, func() string {
		if n := d.counts(t).Writes - begin; n < writes {
			return fmt.Sprintf("%d writes in mode %s, not %d", n, d.settings(t)["mode"], writes)
		}
		return ""
	})
}

// A device goes through all modes under load, and in each its server is killed and recovered and the cache closed and
// opened. Every read is right, the mode stays, and in the clean ones nothing is dirty once all writes have been answered.
func TestModes(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk, "-q", "2")
	d.mustHaveMode(t, "writeback", "a new cache")
	want, buf := stamp.New(nil, 0, 64<<20), buffer(t)
	for _, mode := range []string{"writeonly", "writethrough", "writearound", "passthrough", "writeback"} {
		f := direct(t, d.path)
		want = want.On(f)
		stop, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			_, err := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed, Zero: zeroer(f)}.Run(want, math.MaxInt64, stop)
			ended <- err
		}()
		d.worksOn(t, 50)
		if said := pcache(t, "set", d.id, "mode="+mode); said != "" {
			t.Errorf("set mode=%s says %q", mode, said)
		}
		d.mustHaveMode(t, mode, "after set")
		d.worksOn(t, 50)
		killServer(t, d, unix.SIGKILL)
		pcache(t, "recover", d.id)
		d.mustHaveMode(t, mode, "after a kill")
		d.worksOn(t, 50)
		close(stop)
		if err := <-ended; err != nil {
			t.Fatalf("seed %d, mode %s: %v", *seed, mode, err)
		}
		clean := mode != "writeonly" && mode != "writeback"
		if c := d.counts(t); clean && c.DirtyBytes+c.ZeroBytes != 0 {
			t.Errorf("mode %s: %d bytes are dirty, %d to be zeroed, when all is answered", mode, c.DirtyBytes, c.ZeroBytes)
		}
		if clean {
			alone := direct(t, disk)
			if err := want.On(alone).Verify(buf); err != nil {
				t.Errorf("seed %d, mode %s, on the disk: %v", *seed, mode, err)
			}
			alone.Close()
		}
		if err := want.Verify(buf); err != nil {
			t.Errorf("seed %d, mode %s: %v", *seed, mode, err)
		}
		f.Close()
		d.del(t)
		d = add(t, "-p", dax, "-b", disk, "-q", "2")
		d.mustHaveMode(t, mode, "added again")
	}

	f := direct(t, d.path)
	const far = 1 << 30 // nothing was read or written from there on
	for i, c := range []struct {
		mode                  string
		readsKept, writesKept bool
	}{
		{"writeback", true, true}, {"writeonly", false, true}, {"writethrough", true, true},
		{"writearound", true, false}, {"passthrough", false, false},
	} {
		pcache(t, "set", d.id, "mode="+c.mode)
		off := int64(far + i<<26)
		before := d.counts(t)
		for range 2 {
			if _, err := f.ReadAt(buf[:4096], off); err != nil {
				t.Fatal(err)
			}
		}
		after, misses := d.counts(t), uint64(2)
		if c.readsKept {
			misses = 1
		}
		if n := after.ReadMisses - before.ReadMisses; n != misses {
			t.Errorf("mode %s: two reads of one block are %d misses, want %d", c.mode, n, misses)
		}
		if _, err := f.WriteAt(buf[:4096], off+32<<20); err != nil {
			t.Fatal(err)
		}
		if moved := d.counts(t).KeyHead != after.KeyHead; moved != c.writesKept {
			t.Errorf("mode %s: key_head moved with a write of what is not cached: %t", c.mode, moved)
		}
	}
	f.Close()
	d.del(t)
}

// A drain that is broken off has changed nothing: the old mode counts, while the disk hangs, too. The add that then asks
// for the same mode makes a device that is clean.
func TestModesBrokenOff(t *testing.T) {
	b := newBadDisk(t, disk, "bad", badSize)
	wipe(t)
	d := add(t, "-p", dax, "-b", b.path, "-q", "1", "--writeback", "off")
	f := direct(t, d.path)
	want, buf := stamp.New(f, 0, worked), buffer(t)
	if err := want.Write(buf, 0); err != nil {
		t.Fatal(err)
	}
	was := d.settings(t)
	must(t, "dmsetup", "suspend", b.name)
	t.Cleanup(func() { run(t, "dmsetup", "resume", b.name) })
	var said strings.Builder
	set := exec.Command("ublk-pcache", "set", d.id, "mode=writethrough", "gc_percent=50")
	set.Stdout, set.Stderr = &said, &said
	if err := set.Start(); err != nil {
		t.Fatal(err)
	}
	d.awaitHealth(t, "degraded", "has not answered for") // so the drain is under way
	set.Process.Signal(os.Interrupt)
	if err := set.Wait(); set.ProcessState.ExitCode() != 1 {
		t.Errorf("a set that is broken off ends with %v", err)
	}
	if want := "ublk-pcache: broken off: all settings are as they were, mode=writeback\n"; said.String() != want {
		t.Errorf("a set that is broken off says %q, want %q", said.String(), want)
	}
	if now := d.settings(t); fmt.Sprint(now) != fmt.Sprint(was) {
		t.Errorf("after a set that was broken off: %v, want %v", now, was)
	}
	if err := want.Write(buf, 8<<20); err != nil { // it does not wait for the disk
		t.Fatal(err)
	}
	must(t, "dmsetup", "resume", b.name)
	f.Close()
	d.mustStayDirty(t, pcache(t, "del", d.id))
	d = add(t, "-p", dax, "-b", b.path, "--mode", "writethrough")
	d.mustHaveMode(t, "writethrough", "after add --mode")
	if c := d.counts(t); c.DirtyBytes != 0 {
		t.Errorf("after add --mode writethrough %d bytes are dirty", c.DirtyBytes)
	}
	d.del(t)
	if out := pcache(t, "dump", dax); !strings.Contains(out, " mode=writethrough ") {
		t.Errorf("dump shows %.400s", out)
	}
	if err := want.On(direct(t, disk)).Verify(buf); err != nil {
		t.Errorf("on the disk: %v", err)
	}
	must(t, "dmsetup", "remove", b.name)
}

// In a clean mode the region is lost at any moment, with the server, and the disk alone has every write that was
// answered. In writeback it has not, or this would show nothing.
func TestDiskHasAll(t *testing.T) {
	const size = 32 << 20
	storm := newStorm(t)
	for _, mode := range []string{"writethrough", "writearound", "passthrough", "writeback"} {
		t.Run(mode, func(t *testing.T) {
			wipe(t, disk)
			d := add(t, "-p", dax, "-b", disk, "-q", "2", "--writeback", "off")
			f := direct(t, d.path)
			before, after := t.TempDir(), t.TempDir()
			want, _, err := stamp.Recover(f, 0, size, "", before, stamp.OnceAcknowledged)
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() {
				_, err := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed, Zero: zeroer(f)}.Run(want, math.MaxInt64, nil)
				ended <- err
			}()
			d.worksOn(t, 50) // so that some is cached, and dirty
			pcache(t, "set", d.id, "mode="+mode)
			d.worksOn(t, 100)
			storm.sleep(0, 2*time.Second)
			killServer(t, d, unix.SIGKILL)
			storm.count("SIGKILL", mode)
			pcache(t, "del", "--force", d.id)
			if err := <-ended; err == nil {
				t.Error("the load has ended by itself")
			}
			f.Close()
			wipe(t)
			_, what, err := stamp.Recover(direct(t, disk), 0, size, before, after, stamp.OnceAcknowledged)
			if lacks := mode == "writeback"; (err != nil) != lacks {
				t.Errorf("seed %d: the disk has what was answered (%s): %v", *seed, what, err)
			}
			t.Log(what)
		})
	}
}
