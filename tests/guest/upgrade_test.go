//go:build vm

package guest

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var upgrades = flag.Int("upgrades", 3, "how often the server is replaced")

// The server is replaced in the middle of writes, again and again. In between the installed program is one that does not
// work: as long as the old server can go on it does, and after that the device waits to be recovered.
func TestUpgrade(t *testing.T) {
	const good = "/share/ublk-pcache"
	rnd := rand.New(rand.NewPCG(*seed, 0))
	version := strings.Fields(pcache(t, "--version"))[2]
	said := fmt.Sprintf("version %s in place of %[1]s, requests waited for ", version)
	pause := func() { time.Sleep(time.Duration(500+rnd.IntN(1500)) * time.Millisecond) }
	underLoad(t, func(d device) {
		for range *upgrades {
			pause()
			before := d.entry(t).PID
			out := pcache(t, "upgrade", d.id)
			t.Log(strings.TrimSpace(out))
			after := d.entry(t)
			if after.PID == before || after.State != "live" || after.Version != version || !strings.Contains(out, said) {
				t.Errorf("upgrade printed %q, process %d became %+v", out, before, after)
			}
			requireEnd(t, before)
		}

		server := d.entry(t).PID
		for _, c := range []struct{ program, says string }{
			{"exit 3", "ended without a word: exit status 3"},
			{"echo not today >&3", "not today"},
			{"kill -9 $$", "signal: killed"},
		} {
			install(t, c.program)
			r := run(t, good, "upgrade", d.id)
			t.Log(strings.TrimSpace(r.stderr))
			if err := installProgram(); err != nil {
				t.Fatal(err)
			}
			if r.code != 1 || !strings.Contains(r.stderr, c.says) || !strings.Contains(r.stderr, "the old one goes on") || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("with %q for a program: %+v", c.program, r)
			}
			if e := d.entry(t); e.PID != server || e.State != "live" {
				t.Errorf("after an upgrade that failed: %+v, want process %d", e, server)
			}
			pause() // the load must go on
		}

		install(t, "echo prepared >&3; read head <&4; echo sorry >&3")
		r := run(t, good, "upgrade", d.id)
		t.Log(strings.TrimSpace(r.stderr))
		if !regexp.MustCompile(`^ublk-pcache: the new server failed: sorry \(.*ublk-pcache recover `+d.id+`\)\n$`).MatchString(r.stderr) || r.code != 1 {
			t.Errorf("with a program that fails too late: %+v", r)
		}
		requireEnd(t, server)
		if err := installProgram(); err != nil {
			t.Fatal(err)
		}
		pcache(t, "recover", d.id)
		pause()
		pcache(t, "upgrade", d.id)
	})
}

// The server is replaced while each of its queues waits for a slow disk, over and over. What was asked of the disk does
// not keep the next one from going on, and is asked again.
func TestUpgradeWithReadsUnderWay(t *testing.T) {
	const slow = 2 * time.Second // for one read
	b := newBadDisk(t, disk, "slow", badSize)
	wipe(t)
	d := add(t, "-p", dax, "-b", b.path, "-q", "2")
	b.becomes(t, b.line(0, badSize, "delay", fmt.Sprint(slow.Milliseconds()), b.under, "0", "0"))
	var next atomic.Int64
	var stop atomic.Bool
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			for !stop.Load() {
				if err := <-readOne(t, d, next.Add(4096)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 2 {
		server := d.entry(t).PID
		out := pcache(t, "upgrade", d.id)
		t.Log(strings.TrimSpace(out))
		_, waited, _ := strings.Cut(strings.TrimSpace(out), "requests waited for ")
		if pause, err := time.ParseDuration(waited); err != nil || pause > slow/2 {
			t.Errorf("the pause has something to do with the disk: %v, %v", waited, err)
		}
		requireEnd(t, server)
	}
	stop.Store(true)
	readers.Wait()
	d.del(t)
	must(t, "dmsetup", "remove", b.name)
}

// The device is removed while the server that is to follow gets ready, which has disk and pmem open as well. When that is
// done both are free.
func TestRemovedDuringUpgrade(t *testing.T) {
	const good, program, kept = "/share/ublk-pcache", "/tmp/bin/ublk-pcache", "/tmp/bin/kept"
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	for _, how := range []string{
		good + " del 0",
		"kill -TERM $1; while [ -e /run/ublk-pcache/0.json ]; do :; done",
	} {
		server := d.entry(t).PID
		must(t, "ln", program, kept)
		install(t, "exec sleep 600")
		upgrade := begin(t, good, "upgrade", d.id)
		waitFor(t, func() string {
			if run(t, "pgrep", "-x", "-P", fmt.Sprint(server), "sleep").code != 0 {
				return "no server to follow"
			}
			return ""
		})
		must(t, "sh", "-ec", how+"; mv "+kept+" "+program+"; "+program+" add -p "+dax+" -b "+disk, "", fmt.Sprint(server))
		if r := upgrade(); r.code != 1 || r.stderr != "ublk-pcache: device 0: it has been removed meanwhile\n" {
			t.Errorf("upgrade of a device that was removed by %q: %+v", how, r)
		}
	}
	d.del(t)
}

// install puts a shell script where the program is installed. The test binary's TestMain has put the real one there.
func install(t *testing.T, script string) {
	t.Helper()
	const path = "/tmp/bin/ublk-pcache"
	if err := os.WriteFile(path+".new", []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { installProgram() })
}

// requireEnd waits for the end of a process that is about to end.
func requireEnd(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(patience); unix.Kill(pid, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not end", pid)
		}
	}
}
