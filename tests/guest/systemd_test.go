//go:build vm

package guest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
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

// The machine has no init but the agent. So systemd is process 1 of namespaces of its own: processes, mounts and control
// groups. Devices and their events are those of the machine.

// bringUp is what runs first in the new mount namespace, and becomes systemd. Mounts are shared, as systemd itself makes them
// where it is not in a container: a service with mounts of its own sees what is unmounted.
const bringUp = `set -e
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/systemd
echo $$ > /sys/fs/cgroup/systemd/cgroup.procs
exec unshare --cgroup --pid --fork --kill-child sh -c '
mount -t proc proc /proc
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env container=test /lib/systemd/systemd --system --unit=test.target --log-target=kmsg --show-status=no'`

const (
	byID    = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_disk1"
	service = "ublk-pcache@test.service"

	exporter      = "ublk-pcache-exporter.service"
	metricsSocket = "/run/ublk-pcache-exporter/socket"
)

var systemdFiles = map[string]string{
	// Cold plugging only the disks saves half a minute.
	"/etc/systemd/system/coldplug.service": `[Unit]
DefaultDependencies=no
After=systemd-udevd.service
[Service]
Type=oneshot
ExecStart=/bin/udevadm trigger --type=devices --subsystem-match=block --action=add
`,
	"/etc/systemd/system/test.target": `[Unit]
Wants=systemd-udevd.service coldplug.service local-fs.target ` + service + `
After=local-fs.target
`,
	"/etc/ublk-pcache/test.conf":           "# The disk is named by what only udev makes.\npmem = " + dax + "\nbacking = " + byID + "\ngc-percent = 60\n",
	"/etc/systemd/system.conf.d/test.conf": "[Manager]\nDefaultStandardOutput=kmsg\nDefaultStandardError=kmsg\n",
	// It would empty /tmp, which is the machine's.
	"/etc/systemd/system/systemd-tmpfiles-setup.service": "",
	"/etc/machine-id": "00000000000000000000000000000001\n",
}

// A file system lies on a disk that has a cache, with its newest state in the cache alone. systemd must check and mount it
// through the cache, although the disk has the same label; bring the server back when it dies, follow an upgrade, and end
// in order.
func TestSystemd(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk)
	must(t, "mkfs.ext4", "-q", "-L", "cached", d.path)
	dir := mount(t, d.path)
	write := func(name, text string) {
		t.Helper()
		if err := replace(name, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	write(dir+"/file", "old")
	must(t, "umount", dir)
	pcache(t, "flush", d.id)
	must(t, "mount", d.path, dir)
	write(dir+"/file", "new")
	must(t, "umount", dir)
	d.del(t)

	makeInstall(t)
	s := startSystemd(t, map[string]string{
		"/etc/fstab": "LABEL=cached /srv ext4 defaults 0 2\n",
		"/etc/systemd/system/" + exporter + ".d/test.conf": "[Service]\nEnvironment=LISTEN=" + metricsSocket + "\n",
	})
	s.waitFor(t, "test.target", "ActiveState=active")
	if text := s.must(t, "cat", "/srv/file"); text != "new" {
		t.Errorf("systemd mounted %q, want what is in the cache", text)
	}
	if on := s.must(t, "findmnt", "-no", "SOURCE", "/srv"); on != "/dev/ublkb0\n" {
		t.Errorf("/srv is %q", on)
	}
	for dev, want := range map[string]string{
		disk:          "E: SYSTEMD_READY=0\n",
		"/dev/ublkb0": "S: disk/by-label/cached\n",
	} {
		if text := s.must(t, "udevadm", "info", "--query=all", "--name="+dev); !strings.Contains(text, want) {
			t.Errorf("udev knows of %s\n%s\nwant %q", dev, text, want)
		}
	}
	if links := s.must(t, "readlink", "-f", "/dev/disk/by-label/cached", byID); links != "/dev/ublkb0\n"+disk+"\n" {
		t.Errorf("the label and the disk lead to %q", links)
	}
	if link := s.must(t, "readlink", "-f", "/dev/ublk-pcache/test"); link != "/dev/ublkb0\n" || !strings.Contains(s.must(t, "ublk-pcache", "status", "test"), "/dev/ublkb0") {
		t.Errorf("the service's name leads to %q", link)
	}
	if text := s.must(t, "systemd-analyze", "verify", service); text != "" {
		t.Errorf("systemd-analyze: %s", text)
	}

	if text := s.must(t, "ublk-pcache", "status", "test"); !regexp.MustCompile(`(?m)^its log +(journalctl -u ` + service + `|standard error of process [0-9]+)$`).MatchString(text) {
		t.Errorf("status does not say where the log is\n%s", text)
	}
	// The exporter has what it needs, and not more.
	s.must(t, "systemctl", "start", exporter)
	up := func(when string) {
		t.Helper()
		if text := s.metrics(t); !strings.Contains(text, "\nublk_pcache_up{device=\"ublkb0\",name=\"test\"} 1\n") || !strings.Contains(text, "\nublk_pcache_size_bytes{device=\"ublkb0\",name=\"test\"} 4.294967296e+09\n") {
			t.Errorf("%s the metrics are\n%s", when, text)
		}
	}
	up("when all is well")
	for unit, most := range map[string]float64{exporter: 2} {
		text := s.must(t, "systemd-analyze", "security", unit)
		m := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(text)
		if m == nil {
			t.Errorf("systemd-analyze security of %s says\n%s", unit, text)
		} else if exposed, err := strconv.ParseFloat(m[1], 64); err != nil || exposed >= most {
			t.Errorf("the exposure of %s is %s, want less than %v\n%s", unit, m[1], most, text)
		}
	}

	// A server that dies comes back, and so does one that was not the first.
	write = func(name, text string) {
		t.Helper()
		s.must(t, "sh", "-c", `echo -n "$1" > $0 && sync $0`, name, text)
	}
	hasGC := func(when, want string) {
		t.Helper()
		if text := s.must(t, "ublk-pcache", "status", "test"); !strings.Contains(text, " gc_percent="+want+" ") {
			t.Errorf("%s status does not say gc_percent=%s\n%s", when, want, text)
		}
	}
	hasGC("as its file says", "60")
	s.must(t, "ublk-pcache", "set", "test", "gc_percent=50")
	s.killServer(t)
	hasGC("after set and a kill", "50")
	write("/srv/a", "1")
	up("after a kill")
	before := s.show(t, service, "MainPID")
	t.Log(strings.TrimSpace(s.must(t, "ublk-pcache", "upgrade", "0")))
	write("/srv/b", "2")
	if after := s.show(t, service, "MainPID"); after == before || !strings.Contains(s.must(t, "ublk-pcache", "list", "--json"), `"pid": `+after) {
		t.Errorf("after the upgrade the main process is %s, before it was %s; list says\n%s", after, before, s.must(t, "ublk-pcache", "list"))
	}
	up("after an upgrade")
	s.killServer(t)
	write("/srv/c", "3")

	// The end: first the file system, then the cache.
	s.must(t, "systemctl", "poweroff", "--no-block")
	log := s.wait(t)
	if !regexp.MustCompile(`(?s)Unmounted srv\.mount.*Stopped ublk-pcache@test\.service.*Reached target shutdown\.target`).MatchString(log) {
		t.Errorf("no order in\n%s", log)
	}
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
	if text := pcache(t, "check", dax); !regexp.MustCompile(`: in order, .* [0-9]+ dirty `).MatchString(text) {
		t.Errorf("check says %q", text)
	}
	d = add(t, "-p", dax, "-b", disk)
	must(t, "e2fsck", "-fn", d.path)
	must(t, "mount", "-o", "ro", d.path, dir)
	for name, want := range map[string]string{"file": "new", "a": "1", "b": "2", "c": "3"} {
		if text, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(text) != want {
			t.Errorf("%s holds %q, want %q (%v)", name, text, want, err)
		}
	}
	must(t, "umount", dir)
	d.del(t)
	quiet()
}

// A systemd is one that runs in namespaces of its own.
type systemd struct {
	cmd  *exec.Cmd
	pid  string // of its process 1, outside
	test string // whose it is
}

// makeInstall puts what make install does into the machine, until the test ends.
func makeInstall(t *testing.T) {
	t.Helper()
	must(t, "cp", "-a", "/share/installed/.", "/")
	t.Cleanup(func() {
		run(t, "sh", "-c", "cd /share/installed && find . -type f -exec rm -f /{} +")
	})
}

// startSystemd boots one that finds systemdFiles and more.
func startSystemd(t *testing.T, more map[string]string) *systemd {
	t.Helper()
	files := maps.Clone(systemdFiles)
	maps.Copy(files, more)
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	must(t, "mkdir", "-p", "/srv")
	// It says much, and all of it counts.
	if err := os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0); err != nil {
		t.Fatal(err)
	}
	s := &systemd{test: t.Name(), cmd: exec.Command("unshare", "--mount", "sh", "-c", bringUp)}
	s.cmd.Stdout, s.cmd.Stderr = os.Stdout, os.Stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("systemd:\n%s", s.log(t))
		}
		s.cmd.Process.Kill()
		s.cmd.Wait()
		for name := range files {
			os.Remove(name)
		}
	})
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		s.pid = strings.TrimSpace(run(t, "pgrep", "-x", "-o", "systemd").stdout)
		if s.pid != "" && s.run("systemctl", "show", "-P", "Version").err == nil {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatal("systemd does not come up")
		}
	}
}

type outcome struct {
	stdout, stderr bytes.Buffer
	err            error
}

// run runs a program where systemd is.
func (s *systemd) run(args ...string) *outcome {
	o := &outcome{}
	cmd := exec.Command("timeout", append([]string{fmt.Sprint(int(patience.Seconds())), "nsenter", "-t", s.pid, "-m", "-p", "-C", "--"}, args...)...)
	cmd.Stdout, cmd.Stderr = &o.stdout, &o.stderr
	o.err = cmd.Run()
	return o
}

func (s *systemd) must(t *testing.T, args ...string) string {
	t.Helper()
	o := s.run(args...)
	if o.err != nil {
		t.Fatalf("%q: %v\n%s%s", args, o.err, &o.stdout, &o.stderr)
	}
	return o.stdout.String()
}

// show returns a property of a unit.
func (s *systemd) show(t *testing.T, unit, property string) string {
	t.Helper()
	return strings.TrimSpace(s.must(t, "systemctl", "show", "-P", property, unit))
}

// waitFor waits until a unit has all the properties.
func (s *systemd) waitFor(t *testing.T, unit string, properties ...string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		have := "\n" + s.must(t, "systemctl", "show", unit)
		missing := false
		for _, p := range properties {
			missing = missing || !strings.Contains(have, "\n"+p+"\n")
		}
		if !missing {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s has not come to %v\n%s\n%s", unit, properties, s.must(t, "systemctl", "list-jobs"), have)
		}
	}
}

// metrics are what the exporter tells.
func (s *systemd) metrics(t *testing.T) string {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", "/proc/"+s.pid+"/root"+metricsSocket)
	}}
	r, err := (&http.Client{Transport: transport, Timeout: patience}).Get("http://exporter/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v\n%s", r.Status, err, text)
	}
	return string(text)
}

// killServer kills the service's main process and waits for another.
func (s *systemd) killServer(t *testing.T) {
	t.Helper()
	pid := s.show(t, service, "MainPID")
	restarts, err := strconv.Atoi(s.show(t, service, "NRestarts"))
	if err != nil {
		t.Fatal(err)
	}
	s.must(t, "kill", "-9", pid)
	s.waitFor(t, service, "SubState=running", fmt.Sprintf("NRestarts=%d", restarts+1))
}

// wait returns what systemd has logged when it has ended.
func (s *systemd) wait(t *testing.T) string {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- s.cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Logf("jobs:\n%s", &s.run("systemctl", "list-jobs").stdout)
		unix.Kill(s.cmd.Process.Pid, unix.SIGKILL)
		t.Error("systemd does not end")
	}
	return s.log(t)
}

// log is what systemd, and what it runs, has said in this test.
func (s *systemd) log(t *testing.T) string {
	t.Helper()
	_, text, _ := strings.Cut(must(t, "dmesg"), "guest test "+s.test+" starts")
	return text
}
