//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/ondisk"
	"ublk-pcache/tests/stamp"
)

// The kernel's own target and this server take turns on one cache. The kernel takes block devices only, so the pmem
// namespace changes between the modes fsdax and devdax; in both, its data is at the same place.

const (
	fsdax = "/dev/pmem0" // what dax is in mode fsdax

	// The part of the disk that is written: its last, and small enough to be read whole at every turn. A cache runs
	// full all the same, since new data never goes where old data was.
	turnsSize = 64 << 20
	turnsBase = 4<<30 - turnsSize
)

// namespaceMode changes the mode of the pmem namespace.
func namespaceMode(t *testing.T, mode string) {
	t.Helper()
	must(t, "ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", mode, "--map=mem")
}

// A kernelCache is a running target.
type kernelCache struct{ *os.File }

const kernelName = "pc"

// openKernel puts the kernel's target in front of the disk. On a pmem without a cache it makes one.
func openKernel(t *testing.T, crc bool) kernelCache {
	t.Helper()
	if _, err := os.Stat("/sys/module/dm_pcache"); err != nil {
		must(t, "modprobe", "dm-mod")
		must(t, "insmod", "/share/dm-pcache.ko")
	}
	namespaceMode(t, "fsdax")
	t.Cleanup(func() {
		if _, err := os.Stat(fsdax); err == nil {
			run(t, "dmsetup", "remove", "--force", kernelName)
			namespaceMode(t, "devdax")
		}
	})
	sectors := strings.TrimSpace(must(t, "blockdev", "--getsz", disk))
	must(t, "dmsetup", "create", kernelName, "--table",
		fmt.Sprintf("0 %s pcache %s %s 4 cache_mode writeback data_crc %t", sectors, fsdax, disk, crc))
	must(t, "dmsetup", "mknodes")
	return kernelCache{direct(t, "/dev/mapper/"+kernelName)}
}

// status is the target's line, and it is checked to be one.
func (k kernelCache) status(t *testing.T) dmStatus {
	t.Helper()
	return parseStatus(t, must(t, "dmsetup", "status", kernelName))
}

// close removes the target and gives the pmem back to servers.
func (k kernelCache) close(t *testing.T) {
	t.Helper()
	k.File.Close()
	must(t, "dmsetup", "remove", kernelName)
	namespaceMode(t, "devdax")
}

// quiet returns when the target's write-back has just found nothing to do; it looks again no sooner than after 5 s. A
// target that is removed while it writes back uses memory that it has freed (Linux 7.3: pcache_cache_stop frees the
// segments before it waits for the requests).
func (k kernelCache) quiet(t *testing.T, want *stamp.Device) (since time.Time) {
	t.Helper()
	// Something dirty, so that being clean is news.
	if err := want.Write(buffer(t)[:512], 0); err != nil {
		t.Fatal(err)
	}
	if err := want.Flush(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); !k.status(t).clean(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still dirty after %v: %s", patience, k.status(t).line)
		}
	}
	return time.Now()
}

// leaveDirty writes a little and closes the target before it has written that back.
func (k kernelCache) leaveDirty(t *testing.T, want *stamp.Device, load stamp.Load) {
	t.Helper()
	for {
		since := k.quiet(t, want)
		tail := k.status(t).dirtyTail
		if _, err := load.Run(want, 8<<20, nil); err != nil {
			t.Fatal(err)
		}
		if err := want.Flush(); err != nil {
			t.Fatal(err)
		}
		if k.status(t).dirtyTail == tail && time.Since(since) < 3*time.Second {
			break
		}
		load.Seed++
	}
	k.close(t)
}

func buffer(t *testing.T) []byte {
	t.Helper()
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(buf) })
	return buf
}

// dmStatus is a status line of dm-pcache.
type dmStatus struct {
	line      string // all of it, without the newline
	keyHead   string
	dirtyTail string
}

// Start, length, target, superblock flags, segments of the device and of the cache, used ones, gc percent, cache_info
// flags, key_head, dirty_tail, key_tail (dm_pcache_status in drivers/md/dm-pcache/dm_pcache.c, Linux 7.3).
var statusLine = regexp.MustCompile(`^0 \d+ pcache 0 \d+ \d+ \d+ \d+ [0-9a-f]+ (\d+:\d+) (\d+:\d+) \d+:\d+\n$`)

func parseStatus(t *testing.T, line string) dmStatus {
	t.Helper()
	m := statusLine.FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("not a status line of dm-pcache: %q", line)
	}
	return dmStatus{strings.TrimSuffix(line, "\n"), m[1], m[2]}
}

func (s dmStatus) clean() bool { return s.keyHead == s.dirtyTail }

// dirtyBytes is how much, by the server, the disk does not have yet.
func (d device) dirtyBytes(t *testing.T) (n int64) {
	t.Helper()
	var s struct {
		Health     string `json:"health"`
		DirtyBytes *int64 `json:"dirty_bytes"`
		ZeroBytes  *int64 `json:"zero_bytes"`
	}
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &s); err != nil || s.DirtyBytes == nil || s.ZeroBytes == nil {
		t.Fatalf("status --json: %v", err)
	}
	if s.Health != "ok" {
		t.Errorf("the server's health is %q", s.Health)
	}
	return *s.DirtyBytes + *s.ZeroBytes
}

// written is how much the disk was told to change. A flush is an operation, too, but changes nothing.
func written(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(text))
	return fmt.Sprintf("%s sectors written, %s discarded", f[6], f[13])
}

// newKernelCache has the kernel make a cache, and moves the empty log to where its segment is nearly full, as if it had
// been in use for long: the next few thousand keys cross into another segment.
func newKernelCache(t *testing.T, crc bool) {
	t.Helper()
	openKernel(t, crc).close(t)
	at := ondisk.Position{Seg: 0, Off: ondisk.SegmentData - 100_000}
	mapped(t, dax, func(mem []byte) {
		// An older cache may have had its log there.
		clear(mem[ondisk.SegmentsOff+ondisk.SegmentSize-ondisk.SegmentData+int(at.Off):][:ondisk.SegmentData-at.Off])
		var buf [ondisk.PositionSize]byte
		for _, tail := range []ondisk.Tail{ondisk.KeyTail, ondisk.DirtyTail} {
			for slot := range 2 {
				off := ondisk.EncodePosition(buf[:], tail, ondisk.Replica{Slot: uint8(slot), Seq: 1}, at)
				copy(mem[off:], buf[:])
			}
		}
	})
	pcache(t, "check", dax)
}

// Three times a round, the kernel's target and the server change places: dirty data stays in the cache, and whoever
// comes next has every sector as it was. Either finds a cache that the other left clean to be clean.
func TestTurnsWithTheKernel(t *testing.T) {
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("data_crc=%t", crc), func(t *testing.T) {
			calm := quietKernel(t)
			wipe(t, disk)
			newKernelCache(t, crc)
			want := stamp.New(nil, turnsBase, turnsSize)
			load := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed}
			for round := range 3 {
				load.Seed++
				want = turnOfKernel(t, crc, want, load, round)
				load.Seed++
				want = turnOfServer(t, want, load, round)
				if t.Failed() {
					t.Fatalf("round %d, seed %d", round, *seed)
				}
			}
			mustBeClean(t, crc, want, load)
			calm()
		})
	}
}

// gcPercents are those of the rounds: the default, one that makes garbage collection run after everything clean, and
// again one that leaves some.
var gcPercents = []string{"70", "0", "30"}

func turnOfKernel(t *testing.T, crc bool, want *stamp.Device, load stamp.Load, round int) *stamp.Device {
	t.Helper()
	start := time.Now()
	k := openKernel(t, crc)
	want = want.On(k)
	if err := want.Verify(buffer(t)); err != nil {
		t.Fatalf("in the kernel: %v", err)
	}
	must(t, "dmsetup", "message", kernelName, "0", "gc_percent", gcPercents[round])
	if _, err := load.Run(want, 64<<20, nil); err != nil {
		t.Fatalf("in the kernel: %v", err)
	}
	k.leaveDirty(t, want, load)
	t.Logf("round %d, kernel: %s dirty keys left, %v", round, dirtyKeys(t), time.Since(start).Round(time.Millisecond))
	return want
}

func turnOfServer(t *testing.T, want *stamp.Device, load stamp.Load, round int) *stamp.Device {
	t.Helper()
	start := time.Now()
	d := add(t, "-p", dax, "-b", disk, "-q", "2")
	f := direct(t, d.path)
	want, load.Zero = want.On(f), zeroer(f)
	if err := want.Verify(buffer(t)); err != nil {
		t.Fatalf("in the server: %v", err)
	}
	pcache(t, "set", d.id, "gc_percent="+gcPercents[round])
	if _, err := load.Run(want, 64<<20, nil); err != nil {
		t.Fatalf("in the server: %v", err)
	}
	pcache(t, "flush", d.id)
	// With 0 everything is written back at once, and this is about what is not.
	pcache(t, "set", d.id, "gc_percent="+gcPercents[0])
	if round == 1 {
		d.fillWindow(t)
	}
	for {
		load.Seed++
		if _, err := load.Run(want, 8<<20, nil); err != nil {
			t.Fatalf("in the server: %v", err)
		}
		f.Close()
		d.del(t)
		if dirtyKeys(t) != "0" {
			break
		}
		// Idle for a second, the server has written everything back.
		d = add(t, "-p", dax, "-b", disk, "-q", "2")
		f = direct(t, d.path)
		want, load.Zero = want.On(f), zeroer(f)
	}
	t.Logf("round %d, server: %s dirty keys left, %v", round, dirtyKeys(t), time.Since(start).Round(time.Millisecond))
	return want
}

// fillWindow reads so much that what has been read takes all the segments that the log does not need, and some of it
// twice. The kernel is to find all of these segments free.
func (d device) fillWindow(t *testing.T) {
	t.Helper()
	read := func(more ...string) {
		must(t, append([]string{"dd", "if=" + d.path, "of=/dev/null", "bs=1M", "iflag=direct", "status=none"}, more...)...)
	}
	read("count=450")
	read("count=50", "skip=400")
	read("count=150") // the collector moves some of that to the log
	var s struct {
		Segments int
		Used     int   `json:"segments_used"`
		Window   int   `json:"segments_window"`
		Promoted int64 `json:"promoted_bytes"`
	}
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &s); err != nil {
		t.Fatal(err)
	}
	t.Logf("of %d segments %d are used, %d of them by the window; %d bytes have been promoted", s.Segments, s.Used, s.Window, s.Promoted)
	// Free are those that are kept for writers.
	if s.Window < 4 || s.Used < s.Segments-4 {
		t.Error("the window is not full")
	}
}

var checkLine = regexp.MustCompile(`, (\d+) dirty with `)

// dirtyKeys is how many keys of the cache, which must be in order, the disk does not have yet.
func dirtyKeys(t *testing.T) string {
	t.Helper()
	text := pcache(t, "check", dax)
	m := checkLine.FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("check says %q", text)
	}
	return m[1]
}

// mustBeClean has either side clean the cache and the other one look at it, and at the disk alone.
func mustBeClean(t *testing.T, crc bool, want *stamp.Device, load stamp.Load) {
	t.Helper()
	onDisk := func(who string) {
		if err := want.On(direct(t, disk)).Verify(buffer(t)); err != nil {
			t.Fatalf("cleaned by the %s, on the disk alone: %v", who, err)
		}
	}
	k := openKernel(t, crc)
	// From here on garbage collection is no reason for a difference.
	must(t, "dmsetup", "message", kernelName, "0", "gc_percent", "90")
	want = want.On(k)
	k.quiet(t, want)
	k.close(t)
	onDisk("kernel")

	before := written(t)
	d := add(t, "-p", dax, "-b", disk)
	if dirty := d.dirtyBytes(t); dirty != 0 {
		t.Errorf("cleaned by the kernel, the server has %d dirty bytes", dirty)
	}
	f := direct(t, d.path)
	want, load.Zero = want.On(f), zeroer(f)
	if err := want.Verify(buffer(t)); err != nil {
		t.Fatalf("cleaned by the kernel, in the server: %v", err)
	}
	if now := written(t); now != before {
		t.Errorf("cleaned by the kernel, the server wrote to the disk: %s, then %s", before, now)
	}
	if _, err := load.Run(want, 8<<20, nil); err != nil {
		t.Fatal(err)
	}
	f.Close()
	pcache(t, "flush", d.id)
	ours := parseStatus(t, pcache(t, "status", "--dm", d.id))
	d.del(t)
	onDisk("server")

	before = written(t)
	k = openKernel(t, crc)
	if theirs := k.status(t); theirs.line != ours.line || !theirs.clean() {
		t.Errorf("cleaned by the server, which says\n%s\nand the kernel\n%s", ours.line, theirs.line)
	}
	want = want.On(k)
	if err := want.Verify(buffer(t)); err != nil {
		t.Fatalf("cleaned by the server, in the kernel: %v", err)
	}
	if now := written(t); now != before {
		t.Errorf("cleaned by the server, the kernel wrote to the disk: %s, then %s", before, now)
	}
	k.close(t)
}
