package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/unit"
)

// config writes the description of a service into a folder of its own.
func config(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "data.conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfig(t *testing.T) {
	path := config(t, "# a comment\n\npmem = /dev/dax0.0\n backing=/dev/sdb\nid = 3\nqueues = 1\ngc-percent = 0\n")
	o, err := readConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	d := o.Device
	if d.PMEM != "/dev/dax0.0" || d.Backing != "/dev/sdb" || d.ID != 3 || d.Queues != 1 || d.Depth != 128 ||
		o.GCPercent == nil || *o.GCPercent != 0 || o.DataCRC != nil || !o.Foreground || !o.Existing {
		t.Errorf("%+v", o)
	}
	const good = "pmem = /dev/dax0.0\nbacking = /dev/sdb\n"
	for _, c := range []struct{ text, says string }{
		{good + "nonsense", `data.conf:3: "nonsense" is not OPTION = VALUE`},
		{good + "depht = 3", `data.conf:3: no option "depht"`},
		// What gives up data is nothing to do at every boot.
		{good + "format = true", `data.conf:3: no option "format"`},
		{good + "force = true", `no option "force"`},
		{good + "changed = overwrite", `no option "changed"`},
		{good + "depth = many", `data.conf:3: invalid argument "many"`},
		{good + "depth = 0", `--depth 0`},
		{"pmem = /dev/dax0.0", "no backing device"},
		{"backing = /dev/sdb\npmem = /cache,size=1G", "without a size"},
	} {
		if _, err := readConfig(config(t, c.text)); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", c.text, err, c.says)
		}
	}
	if _, err := readConfig("/nowhere/x.conf"); err == nil || !strings.Contains(err.Error(), "/nowhere/x.conf") {
		t.Error(err)
	}
}

// TestBackedBy: a disk is found by any of its names, before it has them and
// next to a service that cannot be read.
func TestBackedBy(t *testing.T) {
	path := config(t, "pmem = /dev/dax0.0\nbacking = /dev/disk/by-id/late\n")
	dir := filepath.Dir(path)
	file := filepath.Join(dir, "disk")
	for name, text := range map[string]string{
		"disk": "", "broken.conf": "what\n", "file.conf": "backing = " + file + "\n", "none.conf": "pmem = /dev/sdc\n",
		"other.txt": "backing = /dev/sdx\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		names []string
		want  string
	}{
		{[]string{"/dev/sdb", "disk/by-path/x", "disk/by-id/late"}, "data"},
		{[]string{"/dev/disk/by-id/late"}, "data"},
		{[]string{link}, "file"},
		{[]string{"/dev/sdb", "disk/by-id/lat"}, ""},
		{[]string{"/dev/sdx"}, ""},
		{[]string{"/dev/sdc"}, ""},
	} {
		if got := backedBy(dir, c.names); got != c.want {
			t.Errorf("%q belongs to %q, want %q", c.names, got, c.want)
		}
	}
}

// TestUnit: what the service promises, as systemd would read it.
func TestUnit(t *testing.T) {
	f, err := os.Open("../../systemd/ublk-pcache@.service")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	options, err := unit.DeserializeOptions(f)
	if err != nil {
		t.Fatal(err)
	}
	has := func(section, name, value string) bool {
		return slices.ContainsFunc(options, func(o *unit.UnitOption) bool {
			return o.Section == section && o.Name == name && slices.Contains(strings.Fields(o.Value), value)
		})
	}
	for _, want := range [][3]string{
		{"Unit", "DefaultDependencies", "no"}, // or it would come after the file systems
		{"Unit", "Before", "local-fs-pre.target"},
		{"Unit", "Wants", "local-fs-pre.target"}, // nobody else pulls that in
		{"Unit", "Before", "shutdown.target"},
		{"Unit", "Conflicts", "shutdown.target"},
		{"Unit", "After", "modprobe@ublk_drv.service"},
		{"Unit", "Wants", "modprobe@ublk_drv.service"},
		{"Service", "Type", "notify"},
		{"Service", "Restart", "always"},
		{"Service", "RestartPreventExitStatus", "0"},
		{"Service", "SendSIGKILL", "no"},
		{"Service", "OOMScoreAdjust", "-1000"},
		{"Service", "LimitMEMLOCK", "infinity"},
		{"Service", "PrivateMounts", "yes"},
		{"Install", "WantedBy", "sysinit.target"},
	} {
		if !has(want[0], want[1], want[2]) {
			t.Errorf("the unit lacks [%s] %s=%s", want[0], want[1], want[2])
		}
	}
	i := slices.IndexFunc(options, func(o *unit.UnitOption) bool { return o.Name == "ExecStart" })
	if i < 0 || options[i].Value != "/usr/sbin/ublk-pcache "+newRunCmd().Name()+" %i" {
		t.Errorf("ExecStart of the unit: %+v", options)
	}
}

// TestRule: each line is comma-separated KEY OP "value", labels that are gone to
// exist, and the program that is asked is a command here.
func TestRule(t *testing.T) {
	text, err := os.ReadFile("../../systemd/61-ublk-pcache.rules")
	if err != nil {
		t.Fatal(err)
	}
	item := regexp.MustCompile(`^([A-Z]+)(\{[^}]+\})?(==|!=|\+=|:=|=)"([^"]*)"$`)
	var to, labels []string
	for n, line := range strings.Split(string(text), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		for _, part := range strings.Split(line, ", ") {
			m := item.FindStringSubmatch(part)
			switch {
			case m == nil:
				t.Errorf("line %d: %q", n+1, part)
			case m[1] == "GOTO":
				to = append(to, m[4])
			case m[1] == "LABEL":
				labels = append(labels, m[4])
			case m[1] == "PROGRAM" && !strings.HasPrefix(m[4], "/usr/sbin/ublk-pcache "+newIsBackingCmd().Name()+" "):
				t.Errorf("line %d asks %q", n+1, m[4])
			}
		}
	}
	for _, label := range to {
		if !slices.Contains(labels, label) {
			t.Errorf("no label %q", label)
		}
	}
}
