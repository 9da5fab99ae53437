//go:build vm

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/stamp"
	"ublk-pcache/ublk"
)

// A thread whose ring fails ends the server, whichever it is: that of a queue, or the one that talks to the disk. The device
// stays, and what is asked of it meanwhile is answered by the next server.
func TestRingLost(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk, "-q", "2")
	f := direct(t, d.path)
	want := stamp.New(f, 0, 64<<20)
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	const rings = 2 + 1 // queues; the disk's
	for i := range rings {
		if !end(t, d.entry(t).PID, func(pid int) error {
			failRing(t, ringThreads(t, pid, rings)[i])
			return nil
		}) {
			t.Fatal("the server has ended by itself")
		}
		written := make(chan error)
		go func() { written <- want.Write(buf, int64(i)<<20) }()
		pcache(t, "recover", d.id)
		if err := <-written; err != nil {
			t.Errorf("written while there was no server: %v", err)
		}
	}
	if err := want.Verify(buf); err != nil {
		t.Error(err)
	}
	f.Close()
	d.del(t)
	quiet()
}

// ringThreads waits until n threads of a process sleep in a ring, and returns them.
func ringThreads(t *testing.T, pid, n int) (tids []string) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		tids = nil
		calls, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range calls {
			task := filepath.Dir(call)
			text, _ := os.ReadFile(call)
			name, _ := os.ReadFile(task + "/comm")
			// The kernel's own workers for a ring look the same.
			if bytes.HasPrefix(text, []byte(strconv.Itoa(unix.SYS_IO_URING_ENTER)+" ")) && !bytes.HasPrefix(name, []byte("iou-")) {
				tids = append(tids, filepath.Base(task))
			}
		}
		if len(tids) == n {
			return tids
		}
	}
	t.Fatalf("%d threads of server %d sleep in a ring, want %d", len(tids), pid, n)
	return nil
}

// failRing makes a thread find its ring gone.
func failRing(t *testing.T, tid string) {
	t.Helper()
	cmd := exec.Command("strace", "-qq", "-o", "/dev/null", "-e", "inject=io_uring_enter:error=EBADF", "-p", tid)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go cmd.Wait() // it ends with the thread
}

// A server whose device is stopped by another program ends, and leaves the cache in order.
func TestStoppedByAnother(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	f := direct(t, d.path)
	want := stamp.New(f, 0, 1<<20)
	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := want.Write(buf, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	id, err := strconv.Atoi(d.id)
	if err != nil {
		t.Fatal(err)
	}
	server := d.entry(t).PID
	if err := ublk.Remove(id, true); err != nil {
		t.Fatal(err)
	}
	requireEnd(t, server)
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
	d = add(t, "-p", dax, "-b", disk)
	f = direct(t, d.path)
	if err := want.On(f).Verify(buf); err != nil {
		t.Error(err)
	}
	f.Close()
	d.del(t)
}
