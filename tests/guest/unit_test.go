//go:build vm

package guest

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// Where systemd runs, the server of an add is not of the login that it was called from: it has a unit of the system's,
// which starts it again when it dies and is gone when the device is. What add says is the same.
func TestServerOfItsOwnUnit(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "mkfs.ext4", "-q", "-L", "cached", d.path) // for what the other tests' service mounts
	d.del(t)
	s := startSystemd(t, nil)
	s.waitFor(t, "test.target", "ActiveState=active")
	const pmem, back, unit, dev = "/tmp/unit.pmem", "/tmp/unit.disk", `ublk-pcache-tmp-unit.pmem.service`, "/dev/ublkb7"
	t.Cleanup(func() { os.Remove(pmem); os.Remove(back) })
	s.must(t, "sh", "-c", "umask 077; truncate -s 64M "+back)
	args := []string{"ublk-pcache", "add", "-p", pmem + ",size=512M,volatile", "-b", back, "-n", "7"}

	refused := s.run(append(args, "--changed=discard")...)
	if refused.err == nil || strings.Count(refused.stderr.String(), "\n") != 1 || !strings.Contains(refused.stderr.String(), "--changed=discard: a new cache") {
		t.Errorf("a refused add: %v\n%s%s", refused.err, &refused.stdout, &refused.stderr)
	}
	if state := s.show(t, unit, "LoadState"); state != "not-found" {
		t.Errorf("a refused add has left its unit %s", state)
	}
	if out := s.must(t, args...); out != dev+"\n" {
		t.Fatalf("add printed %q", out)
	}
	if group := s.show(t, unit, "ControlGroup"); group != "/system.slice/"+unit {
		t.Errorf("the server's control group is %q", group)
	}
	pid := func() string {
		t.Helper()
		_, rest, _ := strings.Cut(s.must(t, "ublk-pcache", "list", "--json"), `"id": 7,`)
		_, rest, _ = strings.Cut(rest, `"pid": `)
		pid, _, _ := strings.Cut(rest, "\n")
		return pid
	}
	write := func(when string) {
		t.Helper()
		s.must(t, "sh", "-c", "echo "+when+" | dd of="+dev+" bs=4096 conv=sync oflag=direct status=none")
		if got := s.must(t, "head", "-c", "20", dev); !strings.HasPrefix(got, when+"\n") {
			t.Errorf("%s: the device holds %q", when, got)
		}
	}
	killed := func() {
		t.Helper()
		before := pid()
		s.must(t, "kill", "-9", before)
		waitFor(t, func() string {
			if now := pid(); now == before || now == "0" || s.show(t, unit, "MainPID") != now {
				return "no new server: " + s.must(t, "ublk-pcache", "list")
			}
			return ""
		})
	}
	write("added")
	killed()
	write("restarted")
	s.must(t, "ublk-pcache", "upgrade", "7")
	write("upgraded")
	killed()
	write("restarted-again")
	// A server that has answered to del may not have ended yet, here for another client.
	client, err := net.Dial("unix", "/proc/"+s.pid+"/root/run/ublk-pcache/7.sock")
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(2*time.Second, func() { client.Close() })
	s.must(t, append([]string{"sh", "-c", `ublk-pcache del 7 && "$0" "$@"`}, args...)...)
	write("added-again")
	// Nor has one that was refused, and the other way round.
	s.must(t, append([]string{"sh", "-c", `ublk-pcache del 7; ! "$0" "$@" --changed=discard && "$0" "$@"`}, args...)...)
	s.must(t, "ublk-pcache", "del", "7")
	waitFor(t, func() string {
		if state := s.show(t, unit, "LoadState"); state != "not-found" {
			return "the unit is " + state
		}
		return ""
	})
	s.must(t, "systemctl", "poweroff", "--no-block")
	s.wait(t)
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
}
