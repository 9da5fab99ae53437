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
	makeInstall(t)
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
	pid := func(t *testing.T) string {
		t.Helper()
		_, rest, _ := strings.Cut(s.must(t, "ublk-pcache", "list", "--json"), `"id": 7,`)
		_, rest, _ = strings.Cut(rest, `"pid": `)
		pid, _, _ := strings.Cut(rest, ",")
		return pid
	}
	write := func(t *testing.T, when string) {
		t.Helper()
		s.must(t, "sh", "-c", "echo "+when+" | dd of="+dev+" bs=4096 conv=sync oflag=direct status=none")
		if got := s.must(t, "head", "-c", "20", dev); !strings.HasPrefix(got, when+"\n") {
			t.Errorf("%s: the device holds %q", when, got)
		}
	}
	isFollowed := func(t *testing.T, before, unit string) {
		t.Helper()
		waitFor(t, func() string {
			if now := pid(t); now == before || now == "0" || s.show(t, unit, "MainPID") != now {
				return "no new server in " + unit + ": " + s.must(t, "ublk-pcache", "list")
			}
			return ""
		})
	}
	killed := func(t *testing.T, unit string) {
		t.Helper()
		before := pid(t)
		s.must(t, "kill", "-9", before)
		isFollowed(t, before, unit)
	}
	write(t, "added")
	// The name that add has waited at is anybody's once it has ended.
	_, config, _ := strings.Cut(s.must(t, "cat", "/proc/"+pid(t)+"/cmdline"), `"answer":"`)
	name, _, _ := strings.Cut(config, `"`)
	if err := asNobody(t, func() error {
		stranger, err := net.Listen("unix", name)
		if err == nil {
			t.Cleanup(func() { stranger.Close() })
		}
		return err
	}); err != nil {
		t.Fatalf("listen at %q: %v", name, err)
	}
	killed(t, unit)
	write(t, "restarted")
	s.must(t, "ublk-pcache", "upgrade", "7")
	write(t, "upgraded")
	killed(t, unit)
	write(t, "restarted-again")

	move := func(t *testing.T, from, to string) {
		t.Helper()
		s.must(t, "mv", from, to)
	}
	isGone := func(t *testing.T, unit string) {
		t.Helper()
		waitFor(t, func() string {
			if state := s.show(t, unit, "LoadState"); state != "not-found" {
				return unit + " is " + state
			}
			return ""
		})
	}

	// Disk and pmem have gone when the server dies. Its unit goes on trying, and serves when they are back.
	t.Run("disk gone", func(t *testing.T) {
		before := pid(t)
		move(t, back, back+".gone")
		move(t, pmem, pmem+".gone")
		s.must(t, "kill", "-9", before)
		for begin := time.Now(); time.Since(begin) < 20*time.Second; {
			if state := s.show(t, unit, "LoadState"); state != "loaded" {
				t.Fatalf("without its disk the unit is %s after %v", state, time.Since(begin))
			}
		}
		move(t, back+".gone", back)
		move(t, pmem+".gone", pmem)
		isFollowed(t, before, unit)
		write(t, "back-again")
	})

	// A disk that the unit does not find is given by hand, and the device has another unit from then on.
	t.Run("disk moved", func(t *testing.T) {
		const second = `ublk-pcache-tmp-unit.pmem-2.service`
		before, restarts := pid(t), s.show(t, unit, "NRestarts")
		move(t, back, back+".moved")
		s.must(t, "kill", "-9", before)
		waitFor(t, func() string {
			if s.show(t, unit, "NRestarts") == restarts {
				return "the unit does not try again"
			}
			return ""
		})
		s.must(t, "ublk-pcache", "recover", "7", "-b", back+".moved")
		isFollowed(t, before, second)
		write(t, "recovered")
		isGone(t, unit)
		killed(t, second)
		write(t, "recovered-again")
		s.must(t, "ublk-pcache", "del", "7")
		move(t, back+".moved", back)
		s.must(t, args...)
	})

	// A server that has answered to del may not have ended yet, here for another client, nor one that was refused.
	t.Run("del and add", func(t *testing.T) {
		client, err := net.Dial("unix", "/proc/"+s.pid+"/root/run/ublk-pcache/7.sock")
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(2*time.Second, func() { client.Close() })
		s.must(t, append([]string{"sh", "-c", `ublk-pcache del 7 && "$0" "$@"`}, args...)...)
		write(t, "added-again")
		s.must(t, append([]string{"sh", "-c", `ublk-pcache del 7; ! "$0" "$@" --changed=discard && "$0" "$@"`}, args...)...)
	})
	s.must(t, "ublk-pcache", "del", "7")
	isGone(t, unit)

	// What systemd could take for variables and specifiers is part of the name.
	t.Run("odd name", func(t *testing.T) {
		const dir, back, odd = "/tmp/odd", "/tmp/odd/disk", `/tmp/odd/a$$b${HOME}%n`
		const unit = `ublk-pcache-tmp-odd-a\x24\x24b\x24\x7bHOME\x7d\x25n.service`
		t.Cleanup(func() { os.RemoveAll(dir) })
		s.must(t, "sh", "-c", "umask 077; mkdir "+dir+"; truncate -s 64M "+back)
		s.must(t, "ublk-pcache", "add", "-p", odd+",size=512M,volatile", "-b", back, "-n", "7")
		if made := s.must(t, "sh", "-c", "echo "+dir+"/a*"); made != odd+"\n" {
			t.Errorf("for %s it has made %s", odd, made)
		}
		if list := s.must(t, "ublk-pcache", "list"); !strings.Contains(list, odd) {
			t.Errorf("list says %s", list)
		}
		s.must(t, "systemctl", "daemon-reload") // which has only what systemd has written down of the unit
		killed(t, unit)
		write(t, "odd")
		s.must(t, "ublk-pcache", "del", "7")
		isGone(t, unit)
	})

	// From another network the unit would find nobody to answer to.
	t.Run("other network", func(t *testing.T) {
		s.must(t, append([]string{"unshare", "--net"}, args...)...)
		write(t, "from-elsewhere")
		isGone(t, unit)
		s.must(t, "ublk-pcache", "del", "7")
	})

	// The link by a name is there as long as the device, and not longer; here another one takes the number, made by a
	// program that has its files elsewhere.
	t.Run("link", func(t *testing.T) {
		const link, file = "/dev/ublk-pcache/named", "/run/ublk-pcache/7.udev"
		leads := func(when, want string) {
			t.Helper()
			s.must(t, "udevadm", "settle")
			if to := strings.TrimSpace(s.run("readlink", "-e", link).stdout.String()); to != want {
				t.Errorf("%s: %s leads to %q, want %q", when, link, to, want)
			}
		}
		s.must(t, append(args, "--name", "named")...)
		leads("added", dev)
		killed(t, unit)
		write(t, "named") // udev looks again when it is closed
		leads("restarted", dev)
		s.must(t, "ublk-pcache", "del", "named")
		leads("removed", "")
		if s.run("test", "-e", file).err == nil {
			t.Errorf("%s is left behind", file)
		}
		isGone(t, unit)

		s.must(t, "sh", "-c", "echo UBLK_PCACHE_NAME=named > "+file)
		pcache(t, "add", "-p", pmem+",volatile", "-b", back, "-n", "7")
		s.must(t, "udevadm", "settle") // it has the disk open for a while
		pcache(t, "del", "7")
		waitFor(t, func() string {
			if s.run("test", "-e", file).err == nil {
				return file + " is there for whoever takes the number"
			}
			return ""
		})
	})
	s.must(t, "systemctl", "poweroff", "--no-block")
	s.wait(t)
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
}
