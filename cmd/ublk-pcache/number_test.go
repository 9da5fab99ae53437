package main

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

// TestNumberBounds: a number that the driver would cut off is refused wherever it comes from.
func TestNumberBounds(t *testing.T) {
	ownStateDir(t)
	for _, id := range []string{"1048576", "4294967296", "-1"} {
		if _, err := readConfig(config(t, "pmem = /dev/dax0.0\nbacking = /dev/sdb\nid = "+id+"\n")); err == nil || !strings.Contains(err.Error(), "give 0 to 1048575") {
			t.Errorf("a service with number %s: %v", id, err)
		}
	}
	d := someDevice(1 << 32)
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	if d.plausible(1 << 32) {
		t.Error("its state file is taken for one")
	}
	if all, err := readStates(); err != nil || len(all) > 0 {
		t.Errorf("it is among the devices: %+v, %v", all, err)
	}
	fails(t, reserve(someDevice(1<<32)), "4294967296")
}

// TestStatesAreLocked: nobody gives a number away, or takes one back, while somebody else is at it.
func TestStatesAreLocked(t *testing.T) {
	for name, do := range map[string]func() error{
		"reserve": func() error { return reserve(&device{ID: 4, PMEM: "/nope/p", Backing: "/nope/b"}) },
		"remove":  func() error { return someDevice(3).remove() },
	} {
		ownStateDir(t)
		if err := someDevice(3).save(); err != nil {
			t.Fatal(err)
		}
		unlock, err := lockStates()
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		begun := make(chan struct{})
		go func() {
			close(begun)
			done <- do()
		}()
		<-begun
		for range 100 {
			if _, err := os.Stat(statePath(4, ".json")); err == nil {
				t.Errorf("%s does not wait", name)
				break
			}
			if _, err := os.Stat(statePath(3, ".json")); err != nil {
				t.Errorf("%s does not wait", name)
				break
			}
			time.Sleep(time.Millisecond) // for whoever does not wait
		}
		unlock()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRemoveLeavesTheNext: the number of a device that is gone may be another's by the time its file is removed.
func TestRemoveLeavesTheNext(t *testing.T) {
	ownStateDir(t)
	gone := someDevice(3)
	gone.PID = 999_999_999
	if err := gone.save(); err != nil {
		t.Fatal(err)
	}
	if err := gone.remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(statePath(3, ".json")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("it is not removed: %v", err)
	}
	next := someDevice(3)
	if ok, err := next.create(); !ok || err != nil {
		t.Fatal(ok, err)
	}
	for _, late := range []*device{gone, {ID: 3}} { // the second one's file was damaged
		if err := late.remove(); err != nil {
			t.Error(err)
		}
		if d, err := readState(3); err != nil || d.PID != os.Getpid() {
			t.Errorf("the file of the next is %+v, %v", d, err)
		}
	}
	if err := next.remove(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(stateDir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	// And a folder that is not there has nothing in it.
	os.Remove(stateDir)
	if err := next.remove(); err != nil {
		t.Error(err)
	}
}

// TestLeftDirty: del says where the only copy of dirty data is, also when it knows no more than that.
func TestLeftDirty(t *testing.T) {
	for _, c := range []struct {
		d    *device
		n    int64
		want string
	}{
		{someDevice(3), 0, ""},
		{someDevice(3), 512, "up to 512 bytes of dirty data stay in cache /dev/dax0.0, /dev/nvme0n1 does not have them ("},
		{&device{ID: 3}, 512, "up to 512 bytes of dirty data stay in its cache, its backing device does not have them ("},
	} {
		if got := c.d.leftDirty("up to ", c.n, 0); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("of %d bytes it says %q", c.n, got)
		}
	}
}
