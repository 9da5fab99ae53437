//go:build vm

package guest

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

var hang = flag.Duration("disk.hang", 8*time.Second, "how long a disk hangs; longer than it takes to be called degraded, 5 s")

// A badDisk is a part of a real one, through a device mapper table that can be exchanged.
type badDisk struct {
	name, path, under string
	size              int64
}

// newBadDisk makes one that is well, at the head of a blank disk.
func newBadDisk(t *testing.T, under, name string, size int64) badDisk {
	t.Helper()
	wipe(t, under)
	return badDisk{name, slice(t, device{path: under}, name, 0, size), under, size}
}

// becomes exchanges the table. Requests that wait in a suspended disk meet the new one.
func (b badDisk) becomes(t *testing.T, lines ...string) {
	t.Helper()
	run(t, "dmsetup", "suspend", b.name) // which it may be already
	must(t, "dmsetup", "load", b.name, "--table", strings.Join(lines, "\n"))
	must(t, "dmsetup", "resume", b.name)
}

// line is a table's line for the bytes [from, to): a target that has the same place of the disk below, and then args.
func (b badDisk) line(from, to int64, target string, args ...string) string {
	return fmt.Sprintf("%d %d %s %s %d %s", from/512, (to-from)/512, target, b.under, from/512, strings.Join(args, " "))
}

func (b badDisk) heal(t *testing.T) {
	t.Helper()
	b.becomes(t, b.line(0, b.size, "linear"))
}

// flakey fails what is named in all its requests: intervals of 0 s of health and 1 s of failure.
func (b badDisk) flakey(from, to int64, what string) string {
	return b.line(from, to, "flakey", "0 1 1", what)
}

func (b badDisk) gone() string { return fmt.Sprintf("0 %d error", b.size/512) }

// The device's first part is cached, and worked on while the disk is bad. The rest is zeros that only the disk has.
const (
	badSize   = 32 << 20
	worked    = 24 << 20
	badSector = 28 << 20
)

// awaitHealth waits for the status to be so and to say so.
func (d device) awaitHealth(t *testing.T, want, says string) {
	t.Helper()
	var h health
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if h = d.health(t); h.Health == want && strings.Contains(h.Error, says) {
			return
		}
	}
	t.Fatalf("after %v the status is %+v, want %s with %q", patience, h, want, says)
}

// readOne reads a block that is not cached, as a user would.
func readOne(t *testing.T, d device, off int64) <-chan error {
	f, buf := direct(t, d.path), buffer(t)[:4096]
	ended := make(chan error, 1)
	go func() {
		_, err := f.ReadAt(buf, off)
		for _, b := range buf {
			if err == nil && b != 0 {
				err = errors.New("not the disk's content")
			}
		}
		f.Close()
		ended <- err
	}()
	return ended
}

// mustEnd returns what a request ends with.
func mustEnd(t *testing.T, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(patience):
		t.Fatalf("a request did not end in %v", patience)
		return nil
	}
}

// A disk is bad in one way for a while, and then it is well. Meanwhile what needs the disk waits, or fails, as the disk
// does; everything else goes on. Nothing is lost: the disk gets everything once it is well, or once the cache comes back
// to it.
func TestBadDisk(t *testing.T) {
	for _, c := range []struct {
		name string
		on   string
		sick func(b badDisk) []string // the table; nil to suspend it
		read error                    // of what is not cached; nil for waiting until the disk answers
		says string                   // in the status, once there is dirty data
		del  bool                     // the device is removed before the disk is well again
		kill bool                     // and its server killed before that
	}{
		{name: "reads fail", on: disk, read: unix.EIO, says: "",
			sick: func(b badDisk) []string { return []string{b.flakey(0, badSize, "error_reads")} }},
		{name: "writes fail", on: disk, says: "input/output error",
			sick: func(b badDisk) []string { return []string{b.flakey(0, badSize, "error_writes")} }},
		{name: "writes fail for good", on: disk4K, says: "input/output error", del: true,
			sick: func(b badDisk) []string { return []string{b.flakey(0, badSize, "error_writes")} }},
		{name: "a part fails", on: disk4K, read: unix.EIO, says: "input/output error",
			sick: func(b badDisk) []string {
				return []string{b.line(0, worked/2, "linear"), fmt.Sprintf("%d %d error", worked/2/512, (badSize-worked/2)/512)}
			}},
		// A flush goes to each line of the table; nothing is written to the last.
		{name: "flushes fail", on: disk, says: "flush the backing device",
			sick: func(b badDisk) []string {
				return []string{b.line(0, worked, "linear"), b.flakey(worked, badSize, "error_writes")}
			}},
		{name: "is slow", on: disk, says: "",
			sick: func(b badDisk) []string { return []string{b.line(0, badSize, "delay", "100")} }},
		{name: "is gone", on: disk, read: unix.EIO, says: "input/output error", del: true, kill: true,
			sick: func(b badDisk) []string { return []string{b.gone()} }},
		{name: "hangs", on: disk, says: "has not answered for"},
		{name: "hangs and is gone", on: disk4K, read: unix.EIO, says: "has not answered for"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBadDisk(t, c.on, "bad", badSize)
			wipe(t)
			d := add(t, "-p", dax, "-b", b.path, "-q", "1")
			f := direct(t, d.path)
			want, buf := stamp.New(f, 0, worked), buffer(t)
			for off := int64(0); off < worked; off += int64(len(buf)) {
				if err := want.Write(buf, off); err != nil {
					t.Fatal(err)
				}
			}
			pcache(t, "flush", d.id)

			start := time.Now()
			if c.sick == nil {
				must(t, "dmsetup", "suspend", b.name)
			} else {
				b.becomes(t, c.sick(b)...)
			}
			read := readOne(t, d, badSector)
			load := stamp.Load{Depth: 8, BlockSize: 4096, Seed: *seed, Zero: zeroer(f)}
			if written, err := load.Run(want, 16<<20, nil); err != nil {
				t.Fatalf("seed %d, in the cache, after %d bytes: %v", *seed, written, err)
			}
			if c.says != "" {
				d.awaitHealth(t, "degraded", c.says)
			}
			if c.sick == nil {
				time.Sleep(*hang - time.Since(start)) // the hang itself
				if len(read) > 0 {
					t.Errorf("a read of the disk did not wait for it: %v", <-read)
				}
				if c.read != nil {
					b.becomes(t, b.gone())
				} else {
					must(t, "dmsetup", "resume", b.name)
				}
			}
			if err := mustEnd(t, read); !errors.Is(err, c.read) {
				t.Errorf("a read of what is not cached ended with %v, want %v", err, c.read)
			}
			if c.says != "" && !strings.HasPrefix(c.says, "has not") {
				if r := run(t, "ublk-pcache", "flush", d.id); r.code == 0 || !strings.Contains(r.stderr, c.says) {
					t.Errorf("a flush of a bad disk ends with %d: %s", r.code, r.stderr)
				}
			}
			if err := want.Verify(buf); err != nil {
				t.Errorf("seed %d, before the disk is well: %v", *seed, err)
			}
			f.Close()
			if c.kill {
				killServer(t, d, unix.SIGKILL)
			}
			if c.del {
				d.mustStayDirty(t, pcache(t, "del", d.id))
				b.heal(t)
				d = add(t, "-p", dax, "-b", b.path)
			} else {
				b.heal(t)
			}
			pcache(t, "flush", d.id)
			d.awaitHealth(t, "ok", "")
			if err := mustEnd(t, readOne(t, d, badSector)); err != nil {
				t.Errorf("a read of the disk that is well again: %v", err)
			}
			if said := pcache(t, "del", d.id); said != "" {
				t.Errorf("del of a clean cache says %q", said)
			}
			if err := want.On(direct(t, c.on)).Verify(buf); err != nil {
				t.Errorf("seed %d, on the disk alone: %v", *seed, err)
			}
			must(t, "dmsetup", "remove", b.name)
		})
	}
}

var staysDirty = regexp.MustCompile(`^(?:up to )?([0-9]+) bytes of dirty data(?: and [0-9]+ bytes to be zeroed)? stay in cache ` + dax + `, .* does not have them \(.*flush\)\n$`)

// mustStayDirty checks what del said of a cache that is not clean.
func (d device) mustStayDirty(t *testing.T, said string) {
	t.Helper()
	if m := staysDirty.FindStringSubmatch(said); m == nil || m[1] == "0" {
		t.Errorf("del %s says %q, not how much stays dirty", d.id, said)
	}
	if _, err := os.Stat(d.path); err == nil {
		t.Errorf("%s is still there after del", d.path)
	}
}

// A device is removed although its disk hangs, with write-back under way, by force with requests under way, too, or with
// nothing else. What the cache has it keeps, and the disk gets it when both come back.
func TestRemovedWhileDiskHangs(t *testing.T) {
	for _, c := range []struct{ force, dirty bool }{{false, true}, {true, true}, {true, false}} {
		force := c.force
		t.Run(fmt.Sprintf("force=%t,dirty=%t", force, c.dirty), func(t *testing.T) {
			b := newBadDisk(t, disk, "bad", badSize)
			wipe(t)
			d := add(t, "-p", dax, "-b", b.path, "-q", "1")
			server := d.entry(t).PID
			f := direct(t, d.path)
			want, buf := stamp.New(f, 0, worked), buffer(t)
			if err := want.Write(buf, 0); err != nil {
				t.Fatal(err)
			}
			pcache(t, "flush", d.id) // so that the next one finds a flush of the disk under way, too
			write := func(off int64) {
				if c.dirty {
					if err := want.Write(buf, off); err != nil {
						t.Fatal(err)
					}
				}
			}
			write(8 << 20)
			must(t, "dmsetup", "suspend", b.name)
			t.Cleanup(func() { run(t, "dmsetup", "resume", b.name) })
			write(16 << 20)
			args := []string{"ublk-pcache", "del", d.id}
			var read <-chan error
			if force {
				read = readOne(t, d, badSector)
				args = append(args, "--force")
			} else {
				f.Close()
			}
			d.awaitHealth(t, "degraded", "has not answered for")
			r := run(t, args...)
			if r.code != 0 || !strings.Contains(r.stderr, b.path+" does not answer, process "+fmt.Sprint(server)) {
				t.Errorf("%s: exit status %d, says %q", r.commandLine, r.code, r.stderr)
			}
			if c.dirty {
				d.mustStayDirty(t, r.stdout)
			}
			if force {
				if !strings.Contains(r.stderr, d.path) {
					t.Errorf("del --force of an open device says %q", r.stderr)
				}
				if err := mustEnd(t, read); !errors.Is(err, unix.EIO) {
					t.Errorf("the read of a device that is removed by force ended with %v", err)
				}
				f.Close()
			}
			if left, _ := filepath.Glob("/run/ublk-pcache/*"); len(left) > 0 {
				t.Errorf("after del there still are %v", left)
			}

			must(t, "dmsetup", "resume", b.name)
			for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
				if _, err := os.Stat(fmt.Sprintf("/proc/%d", server)); err != nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("server %d does not end although the disk answers", server)
				}
			}
			d = add(t, "-p", dax, "-b", b.path)
			f = direct(t, d.path)
			if err := want.On(f).Verify(buf); err != nil {
				t.Errorf("through the cache: %v", err)
			}
			f.Close()
			pcache(t, "flush", d.id)
			d.del(t)
			if err := want.On(direct(t, disk)).Verify(buf); err != nil {
				t.Errorf("on the disk alone: %v", err)
			}
			must(t, "dmsetup", "remove", b.name)
		})
	}
}

// A disk is pulled out while the cache has dirty data for it, and put back.
func TestDiskPulledOut(t *testing.T) {
	wipe(t, disk4K)
	address, err := filepath.EvalSymlinks("/sys/class/nvme/" + strings.TrimSuffix(filepath.Base(disk4K), "n1") + "/device")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { putBack(t, filepath.Base(address)) })
	d := add(t, "-p", dax, "-b", disk4K, "-q", "1")
	f := direct(t, d.path)
	want, buf := stamp.New(f, 0, worked), buffer(t)
	if _, err := (stamp.Load{Depth: 8, BlockSize: 4096, Seed: *seed}).Run(want, 16<<20, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(address, "remove"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < worked; off += int64(len(buf)) {
		if err := want.Write(buf, off); err != nil {
			t.Fatalf("without a disk: %v", err)
		}
	}
	if err := want.Verify(buf); err != nil {
		t.Errorf("without a disk: %v", err)
	}
	if err := mustEnd(t, readOne(t, d, badSector)); err == nil {
		t.Error("a read of a disk that is not there succeeded")
	}
	d.awaitHealth(t, "degraded", disk4K+": the device is gone")
	f.Close()
	d.mustStayDirty(t, pcache(t, "del", d.id))
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("after del there still are %v", left)
	}

	putBack(t, filepath.Base(address))
	d = add(t, "-p", dax, "-b", disk4K)
	pcache(t, "flush", d.id)
	d.awaitHealth(t, "ok", "")
	d.del(t)
	if err := want.On(direct(t, disk4K)).Verify(buf); err != nil {
		t.Errorf("seed %d, on the disk alone: %v", *seed, err)
	}
}

// putBack finds a controller that was removed and gives it to its driver. The machine has no probing by itself.
func putBack(t *testing.T, address string) {
	t.Helper()
	if _, err := os.Stat(disk4K); err == nil {
		return
	}
	if err := os.WriteFile("/sys/bus/pci/rescan", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/sys/bus/pci/drivers/nvme/bind", []byte(address), 0); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(disk4K); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come back", disk4K)
		}
	}
}
