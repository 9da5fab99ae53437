//go:build vm

package guest

import (
	"crypto/sha256"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
)

// kills is how often the server is killed; each time it is busy with something else.
const kills = 5

// The server is killed in the middle of writes and recovered, again and again. One half of the device carries a mounted
// file system in which files are made and synced, the other is written raw and never flushed. No request fails, and
// everything that was acknowledged is there, during all this and afterwards.
func TestServerKilled(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk, "-q", "2")
	fs, raw := slice(t, d, "fs", 0, 1<<30), slice(t, d, "raw", 1<<30, 1<<30)
	must(t, "mkfs.ext4", "-q", fs)
	dir := mount(t, fs)
	// Whoever has the device open waits for a server, and so would all other cleaning up.
	t.Cleanup(func() {
		if t.Failed() {
			go exec.Command("ublk-pcache", "del", "--force", d.id).Run()
		}
	})

	f := direct(t, raw)
	want := stamp.New(f, 0, 1<<30)
	stop := make(chan struct{})
	var users sync.WaitGroup
	users.Add(2)
	go func() {
		defer users.Done()
		written, err := stamp.Load{Depth: 8, BlockSize: 512, Seed: *seed}.Run(want, math.MaxInt64, stop)
		t.Logf("raw: %d MiB acknowledged", written>>20)
		if err != nil {
			t.Errorf("raw, seed %d: %v", *seed, err)
		}
	}()
	var files map[string][32]byte
	go func() {
		defer users.Done()
		var err error
		files, err = makeFiles(dir, stop)
		t.Logf("files: %d acknowledged", len(files))
		if err != nil {
			t.Errorf("files, seed %d: %v", *seed, err)
		}
	}()

	rnd := rand.New(rand.NewPCG(*seed, 0))
	for round := range kills {
		time.Sleep(time.Duration(500+rnd.IntN(1500)) * time.Millisecond) // of undisturbed work
		killServer(t, d)
		start := time.Now()
		pcache(t, "recover", d.id)
		t.Logf("round %d: recovered in %v", round, time.Since(start).Round(time.Millisecond))
	}
	close(stop)
	users.Wait()

	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := want.Verify(buf); err != nil {
		t.Errorf("raw, seed %d: %v", *seed, err)
	}
	f.Close()
	must(t, "umount", dir)
	must(t, "e2fsck", "-fn", fs)
	must(t, "mount", fs, dir) // nothing of it is in the page cache any more
	for name, sum := range files {
		if data, err := os.ReadFile(name); err != nil || sha256.Sum256(data) != sum {
			t.Errorf("%s is not what was synced (%v)", name, err)
		}
	}
	must(t, "umount", dir)
	must(t, "dmsetup", "remove", "fs", "raw")
	d.del(t)
	quiet()
}

// slice makes a device out of a part of another, in bytes. Nothing else makes the node: there is no udev.
func slice(t *testing.T, d device, name string, from, size int64) string {
	t.Helper()
	must(t, "dmsetup", "create", name, "--table", fmt.Sprintf("0 %d linear %s %d", size/512, d.path, from/512))
	t.Cleanup(func() { run(t, "dmsetup", "remove", "--force", name) })
	must(t, "dmsetup", "mknodes")
	return "/dev/mapper/" + name
}

// killServer kills without warning and waits until the process is no more, which is not the end of its last requests.
func killServer(t *testing.T, d device) {
	t.Helper()
	pid := d.entry(t).PID
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("server %d: %v", pid, err)
	}
	defer unix.Close(pidfd)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatalf("kill server %d: %v", pid, err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(patience.Milliseconds())); n != 1 {
		t.Fatalf("server %d still runs after SIGKILL: %v", pid, err)
	}
}

// keptFiles bounds the room that makeFiles takes; beyond it, old files are overwritten.
const keptFiles = 1000

// makeFiles writes and syncs files until stop is closed, and returns what the acknowledged ones hold.
func makeFiles(dir string, stop <-chan struct{}) (map[string][32]byte, error) {
	acknowledged := map[string][32]byte{}
	rnd := rand.NewChaCha8([32]byte{})
	for i := 0; ; i++ {
		select {
		case <-stop:
			return acknowledged, nil
		default:
		}
		data := make([]byte, 1+i*4099%(64<<10))
		rnd.Read(data)
		name := filepath.Join(dir, fmt.Sprintf("file%d", i%keptFiles))
		if err := replace(name, data); err != nil {
			return acknowledged, err
		}
		acknowledged[name] = sha256.Sum256(data)
	}
}

func replace(name string, data []byte) error {
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}
