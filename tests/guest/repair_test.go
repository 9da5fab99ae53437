//go:build vm

package guest

import (
	"bytes"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/ondisk"
	"ublk-pcache/tests/stamp"
)

// leaveDamaged fills a cache with dirty data, kills its server, takes the device away, and hands the pmem to damage.
func leaveDamaged(t *testing.T, damage func(mem []byte, l *ondisk.Layout), args ...string) *stamp.Device {
	t.Helper()
	wipe(t, disk)
	d := add(t, append([]string{"-p", dax, "-b", disk, "-q", "2"}, args...)...)
	f := direct(t, d.path)
	want := stamp.New(f, turnsBase, turnsSize)
	load := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed, Zero: zeroer(f)}
	if _, err := load.Run(want, 16<<20, nil); err != nil {
		t.Fatal(err)
	}
	pcache(t, "flush", d.id)
	pid := d.entry(t).PID // now, since what is written below is not dirty for long
	if _, err := load.Run(want, 16<<20, nil); err != nil {
		t.Fatal(err)
	}
	buf := buffer(t)[:4096]
	// Each of these is a kset of its own, and the second round overwrites what the first wrote.
	for range 2 {
		for i := range int64(8) {
			if err := want.Write(buf, i*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !end(t, pid, killedBy(unix.SIGKILL)) {
		t.Fatalf("server %d has ended by itself", pid)
	}
	f.Close()
	pcache(t, "del", "--force", d.id)
	mapped(t, dax, func(mem []byte) {
		l, err := ondisk.ReadLayout(bytes.NewReader(mem), cacheSize)
		if err != nil {
			t.Fatal(err)
		}
		damage(mem, l)
	})
	return want
}

// wreckMetadata takes what a cache cannot be opened without.
func wreckMetadata(mem []byte, l *ondisk.Layout) {
	clear(mem[ondisk.SuperblockOff:][:ondisk.SuperblockSize])
	for i := range 2 {
		mem[ondisk.InfoOff+i*4096+9] ^= 0xFF
	}
	clear(mem[ondisk.CtrlOff:][:64])
	clear(mem[l.Offset(5, 0)-ondisk.SegmentHeader:][:8<<10]) // both copies of a segment_info
}

// A server is killed with dirty data, and then the metadata of its cache is damaged. The data can be written to the disk
// as it is, without a device; and the cache can be mended, and serves as before.
func TestRepairAfterKill(t *testing.T) {
	quiet := quietKernel(t)
	want := leaveDamaged(t, wreckMetadata)
	if r := run(t, "ublk-pcache", "check", dax); r.code != 4 || !strings.Contains(r.stdout, "superblock") {
		t.Errorf("check: exit status %d\n%s", r.code, r.stdout)
	}
	if r := run(t, "ublk-pcache", "add", "-p", dax, "-b", disk); r.code != 6 {
		t.Errorf("add took a damaged cache\n%s", r.stdout)
	}
	if text := pcache(t, "writeback", dax, "-b", disk); !strings.Contains(text, "format --force "+dax) {
		t.Errorf("writeback says\n%s", text)
	}
	if err := want.On(direct(t, disk)).Verify(buffer(t)); err != nil {
		t.Errorf("written back, on the disk alone: %v", err)
	}

	copied := t.TempDir() + "/copy"
	mustMend(t, dax, copied)
	pcache(t, "check", copied)
	mustMend(t, dax, "--in-place")
	pcache(t, "check", dax)
	if text := pcache(t, "repair", dax, "--in-place"); !strings.Contains(text, "nothing to mend") {
		t.Errorf("repaired again: %s", text)
	}
	// What writeback has written is no change of the disk.
	d := add(t, "-p", dax, "-b", disk)
	f := direct(t, d.path)
	if err := want.On(f).Verify(buffer(t)); err != nil {
		t.Errorf("repaired: %v", err)
	}
	f.Close()
	d.del(t)
	quiet()
}

// The log is damaged among its dirty ksets, and mended. The kernel's target reads on behind what was given up, writes all
// of it back, and collects it.
func TestRepairedForTheKernel(t *testing.T) {
	calm := quietKernel(t)
	want := leaveDamaged(t, func(mem []byte, l *ondisk.Layout) {
		var first []int64 // ksets of the sectors that are written again
		l.WalkLog(bytes.NewReader(mem), l.DirtyTail, func(at ondisk.Position, k *ondisk.Kset) error {
			if len(k.Keys) == 1 && k.Keys[0].Len == 4096 && k.Keys[0].Off < turnsBase+8*4096 {
				first = append(first, l.Offset(at.Seg, at.Off))
			}
			return nil
		})
		if len(first) < 16 {
			t.Fatalf("%d ksets that are single writes", len(first))
		}
		// Two in a row, of the first round.
		first = first[len(first)-16:]
		clear(mem[first[2]+8:][:16])
		mem[first[3]+30] ^= 0xFF
		wreckMetadata(mem, l)
	}, "--data-crc")
	if r := run(t, "ublk-pcache", "repair", dax, "--in-place"); r.code != 4 || !strings.Contains(r.stderr, "--give-up-log-damage") {
		t.Errorf("repair without the flag: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	mustMend(t, dax, "--in-place", "--give-up-log-damage")
	if dirtyKeys(t) == "0" {
		t.Error("nothing is dirty any more")
	}
	k := openKernel(t, true)
	want = want.On(k)
	if err := want.Verify(buffer(t)); err != nil {
		t.Fatalf("repaired, in the kernel: %v", err)
	}
	must(t, "dmsetup", "message", kernelName, "0", "gc_percent", "0")
	k.quiet(t, want)
	k.close(t)
	if err := want.On(direct(t, disk)).Verify(buffer(t)); err != nil {
		t.Errorf("cleaned by the kernel, on the disk alone: %v", err)
	}
	pcache(t, "check", dax)
	d := add(t, "-p", dax, "-b", disk)
	f := direct(t, d.path)
	if err := want.On(f).Verify(buffer(t)); err != nil {
		t.Errorf("after the kernel: %v", err)
	}
	f.Close()
	d.del(t)
	calm()
}

// mustMend repairs what is damaged, all of it.
func mustMend(t *testing.T, args ...string) {
	t.Helper()
	r := run(t, append([]string{"ublk-pcache", "repair"}, args...)...)
	if r.code != 1 || r.stderr != "" { // as fsck has it
		t.Fatalf("%s: exit status %d\n%s%s", r.commandLine, r.code, r.stdout, r.stderr)
	}
	t.Log(r.stdout)
}
