//go:build vm

package guest

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A service as an administrator has it: its file system is made, mounted by label, the service is stopped in the wrong moment
// and in the right one, the file system is mounted while the service does not run, the service is started again.
func TestService(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	pcache(t, "format", dax)
	makeInstall(t)
	s := startSystemd(t, map[string]string{
		// There is no journal, and the time is what a stop waits for a server that does not end.
		"/etc/systemd/system/ublk-pcache@.service.d/test.conf": "[Service]\nTimeoutStopSec=3s\nStandardOutput=file:/dev/kmsg\nStandardError=file:/dev/kmsg\n",
		"/etc/ublk-pcache/quoted.conf":                         "pmem = \"" + dax + "\nbacking = " + byID + "\n",
		// What is made on a device that is there is seen, however long udev takes for a new one.
		"/etc/udev/rules.d/99-slow.rules": "ACTION==\"add\", KERNEL==\"ublkb0\", PROGRAM=\"/bin/sleep 2\"\n",
		"/etc/ublk-pcache/late.conf":      "pmem = " + dax + "\nbacking = /dev/disk/by-id/late\n",
	})
	s.waitFor(t, "test.target", "ActiveState=active")
	server := s.show(t, service, "MainPID")

	// The first file system of the device. What closes it after writing makes its links.
	s.must(t, "mkfs.ext4", "-q", "-L", "cached", "/dev/ublkb0")
	s.mustLead(t, "/dev/disk/by-label/cached", "/dev/ublkb0")
	s.must(t, "mount", "LABEL=cached", "/srv")
	s.mustBeOn(t, "/dev/ublkb0")
	s.must(t, "sh", "-c", "echo -n old > /srv/file && sync /srv/file && ublk-pcache flush 0") // from here on the disk has it, too
	s.must(t, "umount", "/srv")
	s.must(t, "mount", "LABEL=cached", "/srv")
	s.must(t, "sh", "-c", "echo -n new > /srv/file && sync /srv/file")

	t.Run("stop refused", func(t *testing.T) {
		for _, verb := range []string{"stop", "restart"} {
			begin := time.Now()
			if o := s.run("systemctl", verb, service); o.err == nil || time.Since(begin) > 10*time.Second {
				t.Errorf("systemctl %s of a service whose device is mounted: %v after %v\n%s", verb, o.err, time.Since(begin), &o.stderr)
			}
		}
		// A signal is for the server what del is, and no more is left of it when it has been refused.
		s.must(t, "systemctl", "kill", "--kill-who=main", service)
		s.waitForLog(t, "told to end, refused")
		s.must(t, "umount", "/srv")
		time.Sleep(time.Second) // in which nothing may happen
		if got := s.show(t, service, "ActiveState") + s.show(t, service, "SubState") + s.show(t, service, "MainPID"); got != "activerunning"+server {
			t.Errorf("after stops that were refused, and umount, the service is %q, want its server %s", got, server)
		}
		s.must(t, "mount", "LABEL=cached", "/srv")
		s.mustBeOn(t, "/dev/ublkb0")
	})

	// A stop that nobody can refuse: the unit fails, the server stays, and the next start has it again.
	t.Run("adopted", func(t *testing.T) {
		s.run("systemctl", "stop", `system-ublk\x2dpcache.slice`)
		s.waitFor(t, service, "ActiveState=failed")
		s.must(t, "sh", "-c", "echo -n newer > /srv/file && sync /srv/file")
		s.must(t, "systemctl", "reset-failed", service)
		s.must(t, "systemctl", "start", service)
		s.waitFor(t, service, "SubState=running", "MainPID="+server)
		s.killServer(t)
		s.must(t, "sh", "-c", "echo -n newest > /srv/file && sync /srv/file")
	})

	t.Run("not running", func(t *testing.T) {
		s.must(t, "umount", "/srv")
		// As after each writer, udev looks at the device at once; del is not kept from its work by that.
		s.must(t, "sh", "-c", "tune2fs -m 1 /dev/ublkb0 >/dev/null && ublk-pcache del 0")
		s.waitFor(t, service, "ActiveState=inactive")
		s.must(t, "udevadm", "settle")
		for _, by := range []string{"label", "uuid"} {
			if o := s.run("sh", "-c", "ls -l /dev/disk/by-"+by+"/* | grep nvme0n1"); o.err == nil {
				t.Errorf("there are links to the disk: %s", &o.stdout)
			}
		}
		s.mustLead(t, byID, disk)
		// What opens the disk and is refused leaves it as it was.
		if o := s.run("ublk-pcache", "add", "-p", dax, "-b", disk, "--data-crc"); o.err == nil || !strings.Contains(o.stderr.String(), "crc") {
			t.Errorf("add with other checksums: %v\n%s", o.err, &o.stderr)
		}
		for _, what := range []string{"LABEL=cached", disk} {
			if o := s.run("mount", what, "/srv"); o.err == nil {
				t.Errorf("mount %s while the service does not run mounts %s", what, s.must(t, "findmnt", "-no", "SOURCE", "/srv"))
				s.must(t, "umount", "/srv")
			}
		}
		s.must(t, "systemctl", "start", service)
		s.mustLead(t, "/dev/disk/by-label/cached", "/dev/ublkb0")
		s.must(t, "mount", "LABEL=cached", "/srv")
		s.mustBeOn(t, "/dev/ublkb0")
		if text := s.must(t, "cat", "/srv/file"); text != "newest" {
			t.Errorf("the file holds %q, want what was written last", text)
		}
	})

	// A server that somebody has started by hand, and that no service looks after, becomes the service's.
	t.Run("started by hand", func(t *testing.T) {
		s.must(t, "umount", "/srv")
		s.must(t, "ublk-pcache", "del", "0")
		s.must(t, "sh", "-c", `systemd-run --scope --quiet ublk-pcache add --foreground -p "$0" -b "$1" >/dev/null 2>&1 &
			until ublk-pcache status 0 >/dev/null 2>&1; do sleep 0.1; done`, dax, byID)
		s.mustLead(t, "/dev/disk/by-label/cached", "/dev/ublkb0")
		s.must(t, "mount", "LABEL=cached", "/srv")
		pid := func() string {
			t.Helper()
			var h health
			if err := json.Unmarshal([]byte(s.must(t, "ublk-pcache", "status", "0", "--json")), &h); err != nil {
				t.Fatal(err)
			}
			return strconv.Itoa(h.PID)
		}
		s.must(t, "systemctl", "start", service)
		s.waitFor(t, service, "SubState=running", "MainPID="+pid())
		// So do those that follow it.
		for range 2 {
			before := pid()
			s.must(t, "ublk-pcache", "upgrade", "0")
			waitFor(t, func() string {
				if s.run("kill", "-0", before).err == nil {
					return "process " + before + " does not end"
				}
				return ""
			})
			s.waitFor(t, service, "ActiveState=active", "SubState=running", "MainPID="+pid())
		}
		s.killServer(t)
		s.must(t, "sh", "-c", "echo -n last > /srv/file && sync /srv/file")
	})

	// A disk has partitions of the same names as its cache's device.
	t.Run("partitions", func(t *testing.T) {
		const part = tinyDisk + "p1"
		table := make([]byte, 512)
		binary.LittleEndian.PutUint32(table[440:], 0x12345678) // from which PARTUUIDs are made
		binary.LittleEndian.PutUint32(table[446+4:], 0x83)     // the type, Linux
		binary.LittleEndian.PutUint32(table[446+8:], 2048)     // first sector
		binary.LittleEndian.PutUint32(table[446+12:], 20480)   // sectors
		binary.LittleEndian.PutUint16(table[510:], 0xaa55)
		overwrite := func(data []byte) {
			t.Helper()
			if err := os.WriteFile(tinyDisk, data, 0); err != nil {
				t.Fatal(err)
			}
			must(t, "blockdev", "--rereadpt", tinyDisk)
		}
		overwrite(table)
		defer overwrite(make([]byte, 512))
		s.must(t, "mkfs.ext4", "-q", "-L", "inside", part)
		s.must(t, "udevadm", "settle")
		before := s.must(t, "udevadm", "info", "--query=symlink", "--name="+part)
		for _, dir := range []string{"by-uuid", "by-label", "by-partuuid", "by-path"} {
			if !strings.Contains(before, "disk/"+dir+"/") {
				t.Errorf("before it has a cache, %s has the links %s", part, before)
			}
		}
		s.must(t, "sh", "-c", `printf 'pmem = /dev/dax1.0\nbacking = %s\n' "$0" > /etc/ublk-pcache/parted.conf`, tinyDisk)
		defer os.Remove("/etc/ublk-pcache/parted.conf")
		s.must(t, "udevadm", "trigger", "--settle", tinyDisk)
		s.must(t, "udevadm", "trigger", "--settle", part)
		after := s.must(t, "udevadm", "info", "--query=all", "--name="+part)
		if !strings.Contains(after, "S: disk/by-path/") || !strings.Contains(after, "E: SYSTEMD_READY=0\n") ||
			regexp.MustCompile("S: disk/by-(uuid|label|partuuid)").MatchString(after) {
			t.Errorf("udev knows of a partition of a cache's disk\n%s", after)
		}
		s.must(t, "ublk-pcache", "claim", "parted")
		if o := s.run("mount", part, "/mnt"); o.err == nil {
			t.Errorf("a partition of a claimed disk can be mounted")
			s.must(t, "umount", "/mnt")
		}
		s.must(t, "sh", "-c", `losetup --detach $(losetup --noheadings --output NAME --associated "$0")`, tinyDisk)
	})

	t.Run("description", func(t *testing.T) {
		const quoted, late = "ublk-pcache@quoted.service", "ublk-pcache@late.service"
		if o := s.run("systemctl", "start", quoted); o.err == nil {
			t.Errorf("%s starts", quoted)
		}
		s.waitFor(t, quoted, "ActiveState=failed", "NRestarts=0", "ExecMainStatus=78")
		s.waitForLog(t, "/etc/ublk-pcache/quoted.conf:1: pmem = ")
		s.must(t, "systemctl", "start", "--no-block", late)
		s.waitFor(t, late, "StatusText=waiting for /dev/disk/by-id/late to appear")
		s.must(t, "systemctl", "kill", late)
		s.waitFor(t, late, "ActiveState=failed", "NRestarts=0")
	})

	// The name that keeps a server alive when all others are killed stays with those who follow.
	s.must(t, "ublk-pcache", "upgrade", "0")
	if line := s.must(t, "cat", "/proc/"+s.show(t, service, "MainPID")+"/cmdline"); !strings.HasPrefix(line, "@") {
		t.Errorf("the server's command line is %q, want an @", line)
	}
	s.must(t, "systemctl", "poweroff", "--no-block")
	s.wait(t)
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
	d := add(t, "-p", dax, "-b", disk) // which takes back the claim to the disk
	must(t, "e2fsck", "-fn", d.path)
	d.del(t)
	quiet()
}

// mustLead waits for a link to lead to a device.
func (s *systemd) mustLead(t *testing.T, link, device string) {
	t.Helper()
	s.must(t, "udevadm", "settle")
	if to := strings.TrimSpace(s.must(t, "readlink", "-f", link)); to != device {
		t.Fatalf("%s leads to %s, want %s", link, to, device)
	}
}

// mustBeOn checks what is mounted on /srv.
func (s *systemd) mustBeOn(t *testing.T, device string) {
	t.Helper()
	if on := strings.TrimSpace(s.must(t, "findmnt", "-no", "SOURCE", "/srv")); on != device {
		t.Fatalf("/srv is %s, want %s", on, device)
	}
}

func (s *systemd) waitForLog(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(s.log(t), text); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nobody says %q", text)
		}
	}
}

// TestInterrupted: a ^C that is refused leaves nothing behind.
func TestInterrupted(t *testing.T) {
	wipe(t, disk)
	log := filepath.Join(t.TempDir(), "log")
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	server := exec.Command("ublk-pcache", "add", "--foreground", "-p", dax, "-b", disk)
	server.Stdout, server.Stderr = out, out
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	t.Cleanup(func() { device{"/dev/ublkb0", "0"}.remove(t) })
	says := func(text string) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			all, err := os.ReadFile(log)
			if err == nil && strings.Contains(string(all), text) {
				return
			}
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("it does not say %q, but %v\n%s", text, err, all)
			}
		}
	}
	says("/dev/ublkb0\n")
	must(t, "mkfs.ext4", "-q", "/dev/ublkb0")
	dir := mount(t, "/dev/ublkb0")
	server.Process.Signal(unix.SIGINT)
	says("told to end, refused")
	must(t, "umount", dir)
	select {
	case err := <-ended:
		t.Errorf("after it had refused, it ended: %v", err)
	case <-time.After(time.Second): // in which nothing may happen
	}
	server.Process.Signal(unix.SIGINT)
	select {
	case err := <-ended:
		if left := leftovers(t); err != nil || len(left) > 0 {
			t.Errorf("%v, and there still are %v", err, left)
		}
	case <-time.After(patience):
		t.Error("it does not end")
	}
}
