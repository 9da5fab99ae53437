//go:build vm

package guest

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A refusal is a command that must fail with one line which names the thing and the remedy, change nothing on pmem or
// disk, and leave nothing behind.
type refusal struct {
	name    string
	prepare func(t *testing.T) // may be nil; its t.Cleanup undoes it
	args    string             // of ublk-pcache, separated by spaces; TMP/ is a folder of the test
	says    []string           // regular expressions, all of which the line must match
}

// theDevices are what no refused command may change.
var theDevices = []string{dax, disk, disk4K, tinyDisk}

// refuse tries the cases. Each must leave the devices and the files in tmp as they were.
func refuse(t *testing.T, devices []string, tmp string, cases []refusal) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare(t)
			}
			before, running := contents(t, devices, tmp), leftovers(t)
			args := strings.Fields(strings.ReplaceAll(c.args, "TMP/", tmp+"/"))
			r := run(t, append([]string{"ublk-pcache"}, args...)...)
			for i := range c.says {
				c.says[i] = strings.ReplaceAll(c.says[i], "TMP/", tmp+"/")
			}
			r.mustRefuse(t, c.says)
			mustNotHaveChanged(t, before, contents(t, devices, tmp))
			if left := leftovers(t); !slices.Equal(left, running) {
				t.Errorf("there are %v now, before %v", left, running)
			}
		})
	}
}

func (r result) mustRefuse(t *testing.T, says []string) {
	t.Helper()
	line, ended := strings.CutSuffix(r.stderr, "\n")
	switch {
	case r.code == 0:
		t.Fatalf("%s succeeded:\n%s%s", r.commandLine, r.stdout, r.stderr)
	case r.stdout != "":
		t.Errorf("%s printed %q on stdout", r.commandLine, r.stdout)
	case !ended || line == "" || strings.Contains(line, "\n"):
		t.Errorf("%s: stderr is not one line:\n%s", r.commandLine, r.stderr)
	}
	for _, pattern := range says {
		if !regexp.MustCompile("(?i)" + pattern).MatchString(line) {
			t.Errorf("%s: the error does not match %q:\n%s", r.commandLine, pattern, line)
		}
	}
}

// contents is what a refused command might have touched, by name: the metadata on a pmem, both ends of disks and of the
// files in tmp.
func contents(t *testing.T, devices []string, tmp string) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob(tmp + "/*")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]byte{}
	for _, name := range slices.Concat(devices, files) {
		if name == dax {
			mapped(t, dax, func(mem []byte) {
				all[dax] = slices.Clone(mem[:1<<20])
				for seg := 20 << 10; seg < len(mem); seg += 16 << 20 {
					all[dax] = append(all[dax], mem[seg:min(seg+64<<10, len(mem))]...)
				}
			})
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			t.Fatal(err)
		}
		const end = 64 << 10
		ends := make([]byte, 2*end)
		f.ReadAt(ends[:end], 0)
		f.ReadAt(ends[end:], max(0, size-end))
		f.Close()
		all[name] = binary.LittleEndian.AppendUint64(ends, uint64(size))
	}
	return all
}

func mustNotHaveChanged(t *testing.T, before, after map[string][]byte) {
	t.Helper()
	for name := range before {
		if !bytes.Equal(before[name], after[name]) {
			t.Errorf("the refused command changed %s", name)
		}
	}
	if len(after) != len(before) {
		t.Errorf("there were %v, now there are %v", slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
	}
}

// sparseFile makes a file of the given size in tmp.
func sparseFile(t *testing.T, tmp, name string, size int64) {
	t.Helper()
	name = filepath.Join(tmp, name)
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
}

// Nothing is wrong with the pmem or the disk as such, only with what is asked for.
func TestRefusesBadArguments(t *testing.T) {
	wipe(t, disk, disk4K, tinyDisk)
	tmp := t.TempDir()
	sparseFile(t, tmp, "small", 256<<20)
	sparseFile(t, tmp, "odd", 512<<20+100)
	sparseFile(t, tmp, "open", 512<<20)
	if err := os.Chmod(tmp+"/open", 0o644); err != nil {
		t.Fatal(err)
	}
	sparseFile(t, tmp, "empty", 0)
	sparseFile(t, tmp, "ragged", 1<<20+100)
	refuse(t, theDevices, tmp, []refusal{
		{name: "pmem missing", args: "add -p /dev/dax9.9 -b " + disk, says: []string{"/dev/dax9.9", "no such|not exist|missing|not there"}},
		{name: "pmem file missing and no size", args: "add -p TMP/none -b " + disk, says: []string{"TMP/none", "size="}},
		{name: "pmem too small", args: "add -p TMP/small,volatile -b " + disk, says: []string{"small", "512 MiB"}},
		{name: "pmem misaligned", args: "add -p TMP/odd,volatile -b " + disk, says: []string{"odd", "multiple"}},
		{name: "pmem is open to all users", args: "add -p TMP/open,volatile -b " + disk, says: []string{"TMP/open", "all users", "chmod o= TMP/open"}},
		{name: "pmem is a block device", args: "add -p " + disk4K + " -b " + disk, says: []string{disk4K, "ndctl"}},
		{name: "pmem is a folder", args: "add -p TMP/ -b " + disk, says: []string{"folder|directory|regular"}},
		{name: "pmem is another character device", args: "add -p /dev/null -b " + disk, says: []string{"/dev/null", "dax"}},
		{name: "no pmem", args: "add -b " + disk, says: []string{"pmem"}},
		{name: "backing missing", args: "add -p " + dax + " -b /dev/nvme9n9", says: []string{"/dev/nvme9n9", "no such|not exist|missing|not there"}},
		{name: "backing is a character device", args: "add -p " + dax + " -b /dev/null", says: []string{"/dev/null", "block device"}},
		{name: "backing is empty", args: "add -p " + dax + " -b TMP/empty", says: []string{"empty", "size|empty|0 bytes"}},
		{name: "backing is not whole sectors", args: "add -p " + dax + " -b TMP/ragged", says: []string{"ragged", "multiple|512"}},
		{name: "no backing", args: "add -p " + dax, says: []string{"backing"}},
		{name: "pmem is the backing device too", args: "add -p TMP/odd,volatile -b TMP/odd", says: []string{"odd"}},
		{name: "backing mounted", prepare: func(t *testing.T) {
			must(t, "mkfs.ext4", "-q", "-F", disk4K)
			mount(t, disk4K, "-o", "ro") // the kernel writes to one that is not
		}, args: "add -p " + dax + " -b " + disk4K, says: []string{disk4K, "it is mounted on /[^ ]+: unmount it"}},
		{name: "backing held by another", prepare: func(t *testing.T) {
			f, err := os.OpenFile(disk, os.O_RDWR|unix.O_EXCL, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
		}, args: "add -p " + dax + " -b " + disk, says: []string{disk, "in use|busy|held"}},
		{name: "backing read-only", prepare: func(t *testing.T) {
			must(t, "blockdev", "--setro", disk)
			t.Cleanup(func() { must(t, "blockdev", "--setrw", disk) })
		}, args: "add -p " + dax + " -b " + disk, says: []string{disk, "read-only|read only", "setrw|writable"}},
		{name: "gc percent too high", args: "add --gc-percent 91 -p " + dax + " -b " + disk, says: []string{"91", "90"}},
		{name: "write-back depth", args: "add --writeback-depth 0 -p " + dax + " -b " + disk, says: []string{"--writeback-depth 0", "256"}},
		{name: "gc percent not a number", args: "add --gc-percent x -p " + dax + " -b " + disk, says: []string{"gc-percent"}},
		{name: "no queues", args: "add -q 0 -p " + dax + " -b " + disk, says: []string{"queues"}},
		{name: "no depth", args: "add -d 0 -p " + dax + " -b " + disk, says: []string{"depth"}},
		{name: "too deep", args: "add -d 100000 -p " + dax + " -b " + disk, says: []string{"depth", "100000"}},
		{name: "negative id", args: "add -n -5 -p " + dax + " -b " + disk, says: []string{"id"}},
		{name: "unknown option", args: "add --fast -p " + dax + " -b " + disk, says: []string{"--fast"}},
		{name: "unknown command", args: "start", says: []string{"start"}},
		{name: "del of no device", args: "del 7", says: []string{"7"}},
		{name: "flush of no device", args: "flush 7", says: []string{"7"}},
		{name: "status of no device", args: "status 7", says: []string{"7"}},
		{name: "set of no device", args: "set 7 gc_percent=80", says: []string{"7"}},
		{name: "recover of no device", args: "recover 7", says: []string{"7"}},
		{name: "id is not a number", args: "status x", says: []string{"x"}},
		{name: "no ublk driver", prepare: func(t *testing.T) {
			must(t, "rmmod", "ublk_drv")
			t.Cleanup(func() { must(t, "modprobe", "ublk_drv") })
		}, args: "add -p " + dax + " -b " + disk, says: []string{"ublk", "modprobe ublk_drv"}},
	})
}

// Check and dump are there to look at what is broken: they say on stdout what they find, and still end like a refusal.
func TestLookingAtBlankPmem(t *testing.T) {
	wipe(t)
	tmp := t.TempDir()
	before := contents(t, theDevices, tmp)
	for _, command := range []string{"check", "dump"} {
		r := run(t, "ublk-pcache", command, dax)
		if !strings.Contains(r.stdout, "no cache on this device") || !strings.Contains(r.stdout, "ublk-pcache format") {
			t.Errorf("%s does not say that there is no cache, and how to make one:\n%s", r.commandLine, r.stdout)
		}
		r.stdout = ""
		r.mustRefuse(t, []string{dax})
	}
	mustNotHaveChanged(t, before, contents(t, theDevices, tmp))
}

// superblock writes a superblock with a valid checksum unless damage is done to it afterwards.
func superblock(t *testing.T, flags, segments uint32, magic uint64, damage func(p []byte)) {
	t.Helper()
	mapped(t, dax, func(mem []byte) {
		p := mem[4096:][:24]
		binary.LittleEndian.PutUint32(p[4:], flags)
		binary.LittleEndian.PutUint64(p[8:], magic)
		binary.LittleEndian.PutUint32(p[16:], segments)
		binary.LittleEndian.PutUint32(p[0:], ^crc32.Update(^uint32(0x3B15A), crc32.MakeTable(crc32.Castagnoli), p[4:]))
		damage(p)
	})
}

// The pmem holds something, and it is not a cache that can be used.
func TestRefusesForeignPmem(t *testing.T) {
	const (
		magic    = 0x65B05EFA96C596EF
		segments = 32
	)
	intact := func([]byte) {}
	addIt := "add -p " + dax + " -b " + disk
	blank := func(then func(t *testing.T)) func(t *testing.T) {
		return func(t *testing.T) { wipe(t); then(t) }
	}
	wipe(t, disk)
	refuse(t, theDevices, t.TempDir(), []refusal{
		{name: "not blank", prepare: blank(func(t *testing.T) {
			mapped(t, dax, func(mem []byte) { copy(mem[65536:], "somebody's data") })
		}), args: addIt, says: []string{dax, "not blank|not empty|data", "--format"}},
		{name: "not blank, in a segment", prepare: blank(func(t *testing.T) {
			mapped(t, dax, func(mem []byte) { mem[20<<10+5*16<<20+12<<10+100] = 1 })
		}), args: addIt, says: []string{dax, "not blank|not empty|data", "--format"}},
		{name: "wrong magic", prepare: blank(func(t *testing.T) { superblock(t, 0, segments, magic+1, intact) }),
			args: addIt, says: []string{dax, "magic|not a cache|no cache", "--format"}},
		{name: "bad crc", prepare: blank(func(t *testing.T) { superblock(t, 0, segments, magic, func(p []byte) { p[0]++ }) }),
			args: addIt, says: []string{dax, "crc|checksum", "check"}},
		{name: "big endian", prepare: blank(func(t *testing.T) { superblock(t, 1, segments, magic, intact) }),
			args: addIt, says: []string{dax, "endian"}},
		{name: "more segments than the device holds", prepare: blank(func(t *testing.T) { superblock(t, 0, segments+1, magic, intact) }),
			args: addIt, says: []string{dax, "segments", "33"}},
		{name: "no segments", prepare: blank(func(t *testing.T) { superblock(t, 0, 0, magic, intact) }),
			args: addIt, says: []string{dax, "segments"}},
		{name: "cache info lost", prepare: blank(func(t *testing.T) { superblock(t, 0, segments, magic, intact) }),
			args: addIt, says: []string{dax, "info|initiali"}},
	})
}

// There is a cache with dirty data in it, and a command that would harm or lose it.
func TestRefusesToHarmACache(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	d.del(t)

	// The same cache, but over a file that can shrink.
	tmp := t.TempDir()
	sparseFile(t, tmp, "cache", 512<<20)
	sparseFile(t, tmp, "backing", 64<<20)
	d = add(t, "-p", tmp+"/cache,volatile", "-b", tmp+"/backing")
	d.del(t)

	refuse(t, theDevices, tmp, []refusal{
		{name: "format of dirty data", args: "add --format -p " + dax + " -b " + disk, says: []string{dax, "dirty", "--force"}},
		{name: "format command on dirty data", args: "format " + dax, says: []string{dax, "dirty|not blank", "--force"}},
		{name: "another backing device", args: "add -p " + dax + " -b " + tinyDisk, says: []string{tinyDisk}},
		{name: "other data crc", args: "add --data-crc -p " + dax + " -b " + disk, says: []string{"crc"}},
		{name: "backing smaller than before", prepare: func(t *testing.T) {
			if err := os.Truncate(tmp+"/backing", 32<<20); err != nil {
				t.Fatal(err)
			}
		}, args: "add -p TMP/cache,volatile -b TMP/backing", says: []string{"TMP/backing", "33554432", "67108864", "right device|as large"}},
	})
}

// One pmem, one backing device, one id: one server. And a device in use is not taken away.
func TestRefusesWhatARunningCacheHolds(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	tmp := t.TempDir()
	sparseFile(t, tmp, "other", 512<<20)
	// The server writes to its own pmem when it likes.
	refuse(t, []string{disk, disk4K, tinyDisk}, tmp, []refusal{
		{name: "same pmem", args: "add -p " + dax + " -b " + disk4K, says: []string{dax, "device " + d.id, "del " + d.id}},
		{name: "same backing", args: "add -p TMP/other,volatile -b " + disk, says: []string{disk, "device " + d.id, "del " + d.id}},
		{name: "same id", args: "add -n " + d.id + " -p TMP/other,volatile -b " + disk4K, says: []string{d.id, "in use|exists|taken|busy"}},
		{name: "format of a pmem in use", args: "format " + dax, says: []string{dax, "in use|busy"}},
		{name: "recover of a running server", args: "recover " + d.id, says: []string{"device " + d.id, "nothing to recover", "del " + d.id}},
		{name: "gc percent too high", args: "set " + d.id + " gc_percent=91", says: []string{"gc_percent", "90"}},
		{name: "unknown setting", args: "set " + d.id + " colour=red", says: []string{"colour"}},
		{name: "setting without a value", args: "set " + d.id + " gc_percent", says: []string{"gc_percent", "="}},
		{name: "del of an open device", prepare: func(t *testing.T) {
			f, err := os.Open(d.path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
		}, args: "del " + d.id, says: []string{d.path, "open|in use|busy", "--force"}},
	})
	d.del(t)
	pcache(t, "check", dax)
}
