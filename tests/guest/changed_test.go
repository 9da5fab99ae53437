//go:build vm

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The disk of these tests is a part of the real one, so that it can be made to refuse everything for a while: then dirty
// data stays dirty. The file system has the first half of it; dirtyAt is behind that.
const (
	changedSize = 256 << 20
	fileSystem  = 128 << 20
	dirtyAt     = 192 << 20
	dirtySize   = 1 << 20
)

// breakable makes the disk. Broken, it fails every request.
func breakable(t *testing.T) (path string, setBroken func(broken bool)) {
	t.Helper()
	wipe(t, disk)
	path = slice(t, device{path: disk}, "breakable", 0, changedSize)
	return path, func(broken bool) {
		table := fmt.Sprintf("0 %d linear %s 0", changedSize/512, disk)
		if broken {
			table = fmt.Sprintf("0 %d error", changedSize/512)
		}
		must(t, "dmsetup", "suspend", "breakable")
		must(t, "dmsetup", "load", "breakable", "--table", table)
		must(t, "dmsetup", "resume", "breakable")
	}
}

// edit mounts a file system and writes a file there.
func edit(t *testing.T, dev, name, text string) {
	t.Helper()
	dir := mount(t, dev)
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "umount", dir)
}

// mustHold checks the files of a file system, and that it is whole.
func mustHold(t *testing.T, dev string, files map[string]string) {
	t.Helper()
	must(t, "e2fsck", "-fn", dev)
	dir := mount(t, dev, "-o", "ro")
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %s holds %q, want %q (%v)", dev, name, got, want, err)
		}
	}
	must(t, "umount", dir)
}

// dirtyPart reads where the dirty data is.
func dirtyPart(t *testing.T, dev string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "part")
	must(t, "dd", "if="+dev, "of="+out, "bs=1M", fmt.Sprintf("skip=%d", dirtyAt>>20), "count=1", "iflag=direct", "status=none")
	data, err := os.ReadFile(out)
	if err != nil || len(data) != dirtySize {
		t.Fatal(len(data), err)
	}
	return data
}

// A file system is used with the cache, then without it, then with it again: nothing of what the cache held clean is left.
func TestDiskMountedWithoutItsCache(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "mkfs.ext4", "-q", "-F", d.path)
	edit(t, d.path, "kept", "with the cache")
	edit(t, d.path, "changed", "with the cache")
	mustHold(t, d.path, map[string]string{"kept": "with the cache", "changed": "with the cache"})
	pcache(t, "flush", d.id)
	d.del(t)

	edit(t, disk, "changed", "without it")
	edit(t, disk, "new", "without it")

	for range 2 {
		d = add(t, "-p", dax, "-b", disk)
		mustHold(t, d.path, map[string]string{"kept": "with the cache", "changed": "without it", "new": "without it"})
		d.del(t)
	}
	pcache(t, "check", dax)
	quiet()
}

// The same with dirty data in the cache: nothing happens before somebody has chosen.
func TestDirtyDataOfAChangedDisk(t *testing.T) {
	for _, choice := range []string{"overwrite", "discard"} {
		t.Run(choice, func(t *testing.T) {
			path, setBroken := breakable(t)
			d := add(t, "-p", dax, "-b", path)
			must(t, "mkfs.ext4", "-q", "-F", d.path, fmt.Sprintf("%dk", fileSystem>>10))
			pcache(t, "flush", d.id)
			setBroken(true)
			data := bytes.Repeat([]byte("dirty"), dirtySize)[:dirtySize]
			leaveDirty(t, d.path, data)
			d.del(t)
			setBroken(false)

			refuse(t, []string{dax, disk}, t.TempDir(), []refusal{
				{name: "discard without a change", args: "add --changed=discard -p " + dax + " -b " + path,
					says: []string{dax, path, "--changed=discard", "--format --force"}},
			})
			edit(t, path, "new", "without the cache")
			refuse(t, []string{dax, disk}, t.TempDir(), []refusal{
				{name: "no choice", args: "add -p " + dax + " -b " + path,
					says: []string{dax, path, "1048576 bytes of dirty data", "--changed=overwrite", "--changed=discard"}},
				{name: "no such choice", args: "add --changed=merge -p " + dax + " -b " + path, says: []string{"merge", "overwrite or discard"}},
			})

			want := data
			if choice == "discard" {
				want = make([]byte, dirtySize)
			}
			for _, args := range [][]string{{"--changed=" + choice}, nil} {
				d = add(t, append(args, "-p", dax, "-b", path)...)
				if !bytes.Equal(dirtyPart(t, d.path), want) {
					t.Errorf("the device does not hold what %s means", choice)
				}
				mustHold(t, d.path, map[string]string{"new": "without the cache"})
				d.del(t)
			}
			if !bytes.Equal(dirtyPart(t, path), want) {
				t.Errorf("the disk does not hold what %s means", choice)
			}
			pcache(t, "check", dax)
			must(t, "dmsetup", "remove", "breakable")
		})
	}
}

// The disk is written while a dead server's device waits for the next one.
func TestDiskChangedBeforeRecover(t *testing.T) {
	path, setBroken := breakable(t)
	d := add(t, "-p", dax, "-b", path)
	must(t, "mkfs.ext4", "-q", "-F", d.path, fmt.Sprintf("%dk", fileSystem>>10))
	pcache(t, "flush", d.id)
	setBroken(true)
	data := bytes.Repeat([]byte("dirty"), dirtySize)[:dirtySize]
	leaveDirty(t, d.path, data)
	killServer(t, d, unix.SIGKILL)
	t.Cleanup(func() {
		if t.Failed() {
			exec.Command("ublk-pcache", "del", "--force", d.id).Run()
		}
	})
	setBroken(false)
	edit(t, path, "new", "without the cache")
	refuse(t, []string{dax, disk}, t.TempDir(), []refusal{
		{name: "no choice", args: "recover " + d.id, says: []string{dax, path, "1048576 bytes of dirty data", "recover --changed=overwrite", "waits"}},
		{name: "discard", args: "recover --changed=discard " + d.id, says: []string{"overwrite", "del --force " + d.id}},
	})
	pcache(t, "recover", "--changed=overwrite", d.id)
	if !bytes.Equal(dirtyPart(t, d.path), data) {
		t.Error("the device does not hold what was acknowledged")
	}
	mustHold(t, d.path, map[string]string{"new": "without the cache"})
	d.del(t)
	must(t, "dmsetup", "remove", "breakable")
}

// leaveDirty writes where dirtyPart reads.
func leaveDirty(t *testing.T, dev string, data []byte) {
	t.Helper()
	in := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "dd", "if="+in, "of="+dev, "bs=1M", fmt.Sprintf("seek=%d", dirtyAt>>20), "count=1", "oflag=direct", "conv=notrunc", "status=none")
}
