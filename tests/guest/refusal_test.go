//go:build vm

package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
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

func refuse(t *testing.T, tmp string, cases []refusal) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare(t)
			}
			before, running := fingerprint(t, tmp), leftovers(t)
			args := strings.Fields(strings.ReplaceAll(c.args, "TMP/", tmp+"/"))
			r := run(t, append([]string{"ublk-pcache"}, args...)...)
			r.mustRefuse(t, c.says)
			if after := fingerprint(t, tmp); after != before {
				t.Errorf("the refused command changed something; before:\n%safter:\n%s", before, after)
			}
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

// fingerprint sums up what a refused command might have touched: the metadata on the pmem, both ends of the disks, and
// the files of the test.
func fingerprint(t *testing.T, tmp string) string {
	t.Helper()
	var text bytes.Buffer
	mapped(t, dax, func(mem []byte) {
		h := sha256.New()
		h.Write(mem[:1<<20])
		for seg := 20 << 10; seg < len(mem); seg += 16 << 20 {
			h.Write(mem[seg:min(seg+64<<10, len(mem))])
		}
		fmt.Fprintf(&text, "%s %x\n", dax, h.Sum(nil)[:8])
	})
	files, err := filepath.Glob(tmp + "/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{disk, disk4K, tinyDisk}, files...) {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			t.Fatal(err)
		}
		ends := make([]byte, 2<<20)
		n, _ := f.ReadAt(ends[:1<<20], 0)
		m, _ := f.ReadAt(ends[1<<20:], max(0, size-1<<20))
		f.Close()
		fmt.Fprintf(&text, "%s %d bytes %d %d %x\n", name, size, n, m, sha256.Sum256(ends))
	}
	return text.String()
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
	sparseFile(t, tmp, "empty", 0)
	sparseFile(t, tmp, "ragged", 1<<20+100)
	refuse(t, tmp, []refusal{
		{name: "pmem missing", args: "add -p /dev/dax9.9 -b " + disk, says: []string{"/dev/dax9.9", "no such|not exist|missing|not there"}},
		{name: "pmem file missing and no size", args: "add -p TMP/none -b " + disk, says: []string{"TMP/none|none", "size="}},
		{name: "pmem too small", args: "add -p TMP/small -b " + disk, says: []string{"small", "512 MiB"}},
		{name: "pmem misaligned", args: "add -p TMP/odd -b " + disk, says: []string{"odd", "multiple"}},
		{name: "pmem is a block device", args: "add -p " + disk4K + " -b " + disk, says: []string{disk4K, "ndctl"}},
		{name: "pmem is a folder", args: "add -p TMP/ -b " + disk, says: []string{"folder|directory|regular"}},
		{name: "pmem is another character device", args: "add -p /dev/null -b " + disk, says: []string{"/dev/null", "dax"}},
		{name: "no pmem", args: "add -b " + disk, says: []string{"pmem"}},
		{name: "backing missing", args: "add -p " + dax + " -b /dev/nvme9n9", says: []string{"/dev/nvme9n9", "no such|not exist|missing|not there"}},
		{name: "backing is a character device", args: "add -p " + dax + " -b /dev/null", says: []string{"/dev/null", "block device"}},
		{name: "backing is empty", args: "add -p " + dax + " -b TMP/empty", says: []string{"empty", "size|empty|0 bytes"}},
		{name: "backing is not whole sectors", args: "add -p " + dax + " -b TMP/ragged", says: []string{"ragged", "multiple|512"}},
		{name: "no backing", args: "add -p " + dax, says: []string{"backing"}},
		{name: "pmem is the backing device too", args: "add -p TMP/odd -b TMP/odd", says: []string{"odd"}},
		{name: "backing mounted", prepare: func(t *testing.T) {
			must(t, "mkfs.ext4", "-q", "-F", disk4K)
			mount(t, disk4K)
		}, args: "add -p " + dax + " -b " + disk4K, says: []string{disk4K, "mounted|in use|busy", "umount|unmount|stop|close|release|free"}},
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
		{name: "check of blank pmem", args: "check " + dax, says: []string{dax, "not formatted|blank|no cache"}},
		{name: "dump of blank pmem", args: "dump " + dax, says: []string{dax, "not formatted|blank|no cache"}},
		{name: "no ublk driver", prepare: func(t *testing.T) {
			must(t, "rmmod", "ublk_drv")
			t.Cleanup(func() { must(t, "modprobe", "ublk_drv") })
		}, args: "add -p " + dax + " -b " + disk, says: []string{"ublk", "modprobe ublk_drv"}},
	})
}

func TestRefusesAnyoneButRoot(t *testing.T) {
	wipe(t, disk)
	before := fingerprint(t, t.TempDir())
	// A copy that everybody may execute; the shared folder need not let them.
	program := filepath.Join("/tmp", "ublk-pcache")
	must(t, "install", "-m", "755", "/share/ublk-pcache", program)
	defer os.Remove(program)
	for _, args := range [][]string{{"add", "-p", dax, "-b", disk}, {"del", "0"}, {"format", dax}} {
		cmd := exec.Command(program, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		runCommand(t, cmd).mustRefuse(t, []string{"root"})
	}
	if after := fingerprint(t, t.TempDir()); after != before {
		t.Errorf("something changed; before:\n%safter:\n%s", before, after)
	}
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
	refuse(t, t.TempDir(), []refusal{
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
	d = add(t, "-p", tmp+"/cache", "-b", tmp+"/backing")
	d.del(t)

	refuse(t, tmp, []refusal{
		{name: "format of dirty data", args: "add --format -p " + dax + " -b " + disk, says: []string{dax, "dirty", "--force"}},
		{name: "format command on dirty data", args: "format " + dax, says: []string{dax, "dirty|not blank", "--force"}},
		{name: "another backing device", args: "add -p " + dax + " -b " + tinyDisk, says: []string{tinyDisk}},
		{name: "other data crc", args: "add --data-crc -p " + dax + " -b " + disk, says: []string{"crc"}},
		{name: "backing smaller than before", prepare: func(t *testing.T) {
			if err := os.Truncate(tmp+"/backing", 32<<20); err != nil {
				t.Fatal(err)
			}
		}, args: "add -p TMP/cache -b TMP/backing", says: []string{"backing", "smaller|size"}},
	})
}

// One pmem, one backing device, one id: one server. And a device in use is not taken away.
func TestRefusesWhatARunningCacheHolds(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	tmp := t.TempDir()
	sparseFile(t, tmp, "other", 512<<20)
	refuse(t, tmp, []refusal{
		{name: "same pmem", args: "add -p " + dax + " -b " + disk4K, says: []string{dax, "in use|busy"}},
		{name: "same backing", args: "add -p TMP/other -b " + disk, says: []string{disk, "in use|busy"}},
		{name: "same id", args: "add -n " + d.id + " -p TMP/other -b " + disk4K, says: []string{d.id, "in use|exists|taken|busy"}},
		{name: "format of a pmem in use", args: "format " + dax, says: []string{dax, "in use|busy"}},
		{name: "recover of a running server", args: "recover " + d.id, says: []string{d.id, "runs|running|alive|live"}},
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
}
