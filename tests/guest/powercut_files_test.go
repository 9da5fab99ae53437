//go:build vm

package guest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// The two file systems share one device.
const cutFSSize = 512 << 20 // more than the least that mkfs.xfs makes

var cutFileSystems = []struct {
	name  string
	at    int64 // on the device
	make  []string
	check []string
}{
	{"ext4", 0, []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
	{"xfs", cutFSSize, []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}},
}

// TestAroundPowerCutsOfFiles is what happens in one boot of TestPowerCutOfFiles, which runs it; by itself it is nothing.
func TestAroundPowerCutsOfFiles(t *testing.T) {
	calm := quietKernel(t)
	fresh := *cutBefore == ""
	plain, dev := "", device{}
	if fresh { // the machine, too, so everything is blank
		must(t, "mkfs.ext4", "-q", "-F", disk4K)
		plain = ",size=512M"
	}
	plain = filepath.Join(mount(t, disk4K), "cache") + plain
	dev = add(t, "-p", dax, "-b", disk, "-q", "2")
	onFile := add(t, "-p", plain, "-b", tinyDisk, "-q", "1")
	for _, d := range []device{dev, onFile} { // so that there is some garbage collection
		pcache(t, "set", d.id, "gc_percent=10")
	}

	var users sync.WaitGroup
	var begun sync.WaitGroup
	for _, fs := range cutFileSystems {
		part := slice(t, dev, fs.name, fs.at, cutFSSize)
		if fresh {
			must(t, append(fs.make, part)...)
		}
		dir := mount(t, part) // which replays its journal
		must(t, "umount", dir)
		must(t, append(fs.check, part)...)
		must(t, "mount", part, dir)
		mustHaveFiles(t, dir, filepath.Join(*cutBefore, fs.name))
		if *cutLast {
			must(t, "umount", dir)
			continue
		}
		begun.Add(1)
		users.Go(func() {
			err := promiseFiles(dir, filepath.Join(*cutJournal, fs.name), begun.Done)
			t.Errorf("%s: %v", fs.name, err)
		})
	}

	f := direct(t, onFile.path)
	want, what, err := stamp.Recover(f, 0, 16<<20, *cutBefore, *cutJournal, stamp.OnceFlushed)
	t.Logf("plain file: %s", what)
	if err != nil {
		t.Fatalf("on the plain file: %v", err)
	}
	if !*cutLast {
		begun.Wait()
		durable, err := os.OpenFile(onFile.path, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = stamp.Load{Depth: 4, BlockSize: 512, Seed: *seed, Flush: true, Durable: durable, Zero: zeroer(f)}.Run(want, math.MaxInt64, nil)
		t.Fatalf("the load ended: %v", err)
	}
	f.Close()
	for _, fs := range cutFileSystems {
		must(t, "dmsetup", "remove", fs.name)
	}
	for _, d := range []device{dev, onFile} {
		pcache(t, "flush", d.id)
		pcache(t, "del", d.id)
	}
	if err := want.On(direct(t, tinyDisk)).Verify(buffer(t)); err != nil {
		t.Errorf("on the disk alone: %v", err)
	}
	for _, fs := range cutFileSystems {
		part := slice(t, device{path: disk}, fs.name, fs.at, cutFSSize)
		must(t, append(fs.check, part)...)
		mustHaveFiles(t, mount(t, part), filepath.Join(*cutBefore, fs.name))
	}
	calm()
}

// promiseFiles makes files and syncs them until it fails. It notes each in the file called promises once it must last.
func promiseFiles(dir, promises string, first func()) error {
	noted, err := os.OpenFile(promises, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	// What is left from the boot before is in the way, and removing it is part of the load.
	old, err := filepath.Glob(filepath.Join(dir, "file*"))
	if err != nil {
		return err
	}
	for _, name := range old {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	var key [32]byte
	rnd := rand.NewChaCha8(key)
	size := rand.New(rnd)
	for i := 0; ; i++ {
		data := make([]byte, 1+size.IntN(64<<10))
		rnd.Read(data)
		name := fmt.Sprintf("file%d", i)
		if err := synced(filepath.Join(dir, name), data); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(noted, "%s %x\n", name, sha256.Sum256(data)); err != nil {
			return err
		}
		if i == 0 {
			first()
		}
	}
}

// synced makes a file that lasts, name and all.
func synced(name string, data []byte) error {
	for _, step := range []func() error{
		func() error { return os.WriteFile(name, data, 0o600) },
		func() error { return fsync(name) },
		func() error { return fsync(filepath.Dir(name)) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func fsync(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// mustHaveFiles compares a file system with what was promised, if anything was.
func mustHaveFiles(t *testing.T, dir, promises string) {
	t.Helper()
	text, err := os.ReadFile(promises)
	if os.IsNotExist(err) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	n := 0
	for _, line := range lines {
		var name, sum string
		if !bytes.HasSuffix(line, []byte("\n")) { // the power went while it was noted
			continue
		}
		if _, err := fmt.Sscan(string(line), &name, &sum); err != nil {
			t.Fatalf("%s: %q: %v", promises, line, err)
		}
		n++
		data, err := os.ReadFile(filepath.Join(dir, name))
		if got := fmt.Sprintf("%x", sha256.Sum256(data)); err != nil || got != sum {
			t.Errorf("%s: %s, of %d bytes, is not what was synced (%v)", promises, name, len(data), err)
		}
	}
	t.Logf("%s: %d files had to last", promises, n)
}
