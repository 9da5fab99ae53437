//go:build vm

package guest

import (
	"math"
	"path/filepath"
	"strings"
	"testing"

	"ublk-pcache/tests/stamp"
)

// The package's life on a machine, from nothing to nothing: installed, configured, replaced by the next version under a
// device that is written, not removed while that is there, removed, purged.

// withoutCaches is a machine on which nothing of ours is installed.
var withoutCaches = map[string]string{
	"/etc/systemd/system/test.target": "[Unit]\nWants=systemd-udevd.service coldplug.service\nAfter=coldplug.service\n",
}

const (
	exporterConfig = "/etc/default/ublk-pcache-exporter"
	dataConfig     = "/etc/ublk-pcache/data.conf"
	dataService    = "ublk-pcache@data.service"
	installed      = "/usr/sbin/ublk-pcache"
)

// manage runs a package manager, as it is called from a login and not from this test.
func (s *systemd) manage(args ...string) *outcome {
	return s.run(append([]string{"env", "-i", "PATH=/usr/sbin:/usr/bin", "DEBIAN_FRONTEND=noninteractive"}, args...)...)
}

func (s *systemd) mustManage(t *testing.T, args ...string) string {
	t.Helper()
	o := s.manage(args...)
	if o.err != nil {
		t.Fatalf("%q: %v\n%s%s", args, o.err, &o.stdout, &o.stderr)
	}
	return o.stdout.String()
}

// versions are the packages of a kind: of the version before, and of this one.
func versions(t *testing.T, pattern string) (before, now string) {
	t.Helper()
	found, err := filepath.Glob("/share/packages/" + pattern)
	if err != nil || len(found) != 2 {
		t.Fatalf("%s: %q, %v", pattern, found, err)
	}
	return found[0], found[1]
}

// manager is the command lines of one. Without a purge, the removal is one.
type manager struct{ install, upgrade, remove, purge, files, version []string }

func TestPackages(t *testing.T) {
	quiet := quietKernel(t)
	s := startSystemd(t, withoutCaches)
	s.waitFor(t, "test.target", "ActiveState=active")
	t.Run("deb", func(t *testing.T) {
		before, now := versions(t, "*.deb")
		s.testPackage(t, manager{
			install: []string{"apt-get", "install", "-y", "-q", before},
			upgrade: []string{"apt-get", "install", "-y", "-q", now},
			remove:  []string{"apt-get", "remove", "-y", "-q", "ublk-pcache"},
			purge:   []string{"apt-get", "purge", "-y", "-q", "ublk-pcache"},
			files:   []string{"dpkg", "-L", "ublk-pcache"},
			version: []string{"dpkg-query", "-f", "${Version}", "-W", "ublk-pcache"},
		})
	})
	t.Run("rpm", func(t *testing.T) {
		before, now := versions(t, "*.rpm")
		s.testPackage(t, manager{
			install: []string{"rpm", "-i", "--nodeps", before}, // it knows none of the machine's own packages
			upgrade: []string{"rpm", "-U", "--nodeps", now},
			remove:  []string{"rpm", "-e", "ublk-pcache"},
			files:   []string{"rpm", "-ql", "ublk-pcache"},
			version: []string{"rpm", "-q", "--queryformat", "%{VERSION}-%{RELEASE}", "ublk-pcache"},
		})
	})
	s.must(t, "systemctl", "poweroff", "--no-block")
	s.wait(t)
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
	quiet()
}

func (s *systemd) testPackage(t *testing.T, m manager) {
	wipe(t, disk)
	t.Cleanup(func() { // the next one finds a machine without any of it
		s.run("ublk-pcache", "del", "--all", "--force") // the package's may be gone
		s.run("umount", "/srv")
		s.manage(m.remove...)
		if m.purge != nil {
			s.manage(m.purge...)
		}
		s.run("sh", "-c", "rm -rf /etc/ublk-pcache "+exporterConfig+"*")
	})

	// From nothing to a mounted file system, as the README says.
	s.mustManage(t, m.install...)
	was := s.mustManage(t, m.version...)
	files := strings.Fields(s.mustManage(t, m.files...))
	for _, want := range []string{installed, exporterConfig, "/usr/lib/systemd/system/ublk-pcache@.service", "/usr/share/man/man8/ublk-pcache.8.gz", "/usr/share/doc/ublk-pcache/copyright"} {
		if s.must(t, "stat", "-c", "%U:%G", want) != "root:root\n" {
			t.Errorf("%s is not root's", want)
		}
	}
	s.must(t, "sh", "-c", `printf 'pmem = %s\nbacking = %s\nid = 0\n' "$0" "$1" > `+dataConfig, dax, byID)
	s.must(t, installed, "format", dax)
	s.must(t, "systemctl", "enable", "--now", dataService)
	s.must(t, "udevadm", "settle")
	s.must(t, "sh", "-c", "mkfs.ext4 -q /dev/ublkb0 1G && mount /dev/ublkb0 /srv && echo kept > /srv/file")
	s.must(t, "sh", "-c", "echo LISTEN=$0 > "+exporterConfig, metricsSocket)
	s.must(t, "systemctl", "start", exporter)

	// The next version: servers are replaced under what uses them, and what was configured stays.
	f := direct(t, "/dev/ublkb0")
	want, stop, loaded := stamp.New(f, 1<<30, 256<<20), make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := stamp.Load{Depth: 2, BlockSize: 4096, Seed: *seed}.Run(want, math.MaxInt64, stop)
		loaded <- err
	}()
	server, metrics := s.show(t, dataService, "MainPID"), s.show(t, exporter, "MainPID")
	out := s.manage(m.upgrade...)
	close(stop)
	if err := <-loaded; err != nil {
		t.Errorf("under load, seed %d: %v", *seed, err)
	}
	if out.err != nil {
		t.Fatalf("the package is not upgraded: %v\n%s%s", out.err, &out.stdout, &out.stderr)
	}
	t.Logf("%s%s", &out.stdout, &out.stderr)
	if is := s.mustManage(t, m.version...); is == was {
		t.Errorf("version %s is installed after the upgrade, too", is)
	}
	if now := s.show(t, dataService, "MainPID"); now == server || now == "0" {
		t.Errorf("the server is process %s, before the upgrade it was %s", now, server)
	}
	if now := s.show(t, exporter, "MainPID"); now == metrics || now == "0" {
		t.Errorf("the exporter is process %s, before the upgrade it was %s", now, metrics)
	}
	if text := s.metrics(t); !strings.Contains(text, "\nublk_pcache_up{device=\"ublkb0\",name=\"data\"} 1\n") {
		t.Errorf("where it was configured to be, the exporter says\n%s", text)
	}

	// It does not go while there is a device, with a server or without.
	for _, how := range []string{"served", "dead"} {
		if how == "dead" {
			s.must(t, "systemctl", "mask", "--runtime", dataService)
			s.must(t, "kill", "-9", s.show(t, dataService, "MainPID"))
			s.waitFor(t, dataService, "MainPID=0")
		}
		o := s.manage(m.remove...)
		if said := o.stdout.String() + o.stderr.String(); o.err == nil || !strings.Contains(said, "/dev/ublkb0  data  "+dax) || !strings.Contains(said, "ublk-pcache del --all") {
			t.Errorf("%s: removal: %v\n%s", how, o.err, said)
		}
		if how == "dead" {
			s.must(t, "systemctl", "unmask", "--runtime", dataService)
			s.must(t, installed, "recover", "data")
		}
		if text := s.must(t, "cat", "/srv/file"); text != "kept\n" {
			t.Errorf("%s: the file holds %q", how, text)
		}
	}

	buf, err := stamp.Buffer(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := want.Verify(buf); err != nil {
		t.Errorf("seed %d: %v", *seed, err)
	}
	f.Close()
	s.must(t, "umount", "/srv")
	s.must(t, "udevadm", "settle") // it looks at what was written
	s.must(t, installed, "del", "--all", "--flush")
	s.mustManage(t, m.remove...)
	if text := s.must(t, "cat", dataConfig); !strings.Contains(text, dax) {
		t.Errorf("after the removal %s holds %q", dataConfig, text)
	}
	if m.purge != nil {
		if text := s.must(t, "cat", exporterConfig); !strings.Contains(text, metricsSocket) {
			t.Errorf("after the removal %s holds %q", exporterConfig, text)
		}
		s.mustManage(t, m.purge...)
	}
	for _, file := range files {
		if strings.Contains(file, "ublk-pcache") && file != "/etc/ublk-pcache" && s.run("test", "-e", file).err == nil {
			t.Errorf("%s is left behind", file)
		}
	}
	if left := strings.TrimSpace(s.must(t, "sh", "-c", "ls -d /etc/systemd/system/*.wants/ublk-pcache* 2>/dev/null || true")); left != "" {
		t.Errorf("%s is left behind", left)
	}
}
