package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/spf13/pflag"
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
	path := config(t, "# a comment\n\npmem = /dev/dax0.0\n backing=/dev/sdb\nid = 3\nqueues = 1\ngc-percent = 0\nmode = writethrough\n")
	o, err := readConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	d := o.Device
	if d.PMEM != "/dev/dax0.0" || d.Backing != "/dev/sdb" || d.ID != 3 || d.Queues != 1 || d.Depth != 128 ||
		o.Settings["gc_percent"] != "0" || o.Settings["mode"] != "writethrough" || o.DataCRC != nil || !o.Foreground || !o.Existing {
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
		{good + "# more\n\ndepth = 0", `data.conf:5: depth 0: give 1 to 4096`},
		{good + "queues = 0", `data.conf:3: queues 0: give 1 to`},
		{good + "writeback-depth = 1000", `data.conf:3: writeback-depth 1000: give`},
		{good + "gc_percent = 91", `data.conf:3: gc-percent 91: give 0 to 90`},
		{good + "seq_cutoff = 4X", `data.conf:3: seq-cutoff 4X: give bytes`},
		{good + "mode = fast", `data.conf:3: mode fast: give writeback, writeonly, writethrough, writearound or passthrough`},
		{good + "writeback = yes", `data.conf:3: writeback yes: give on or off`},
		{good + "dirty_high = 0", `data.conf:3: dirty-high 0: give 1 to 90, or auto`},
		{good + "id = -1", `data.conf:3: id -1: give 0 to 1048575`},
		{good + "depth =", `data.conf:3: depth has no value`},
		{"pmem = /dev/dax0.0", "data.conf: no backing device"},
		{"backing = /dev/sdb\npmem = /cache,size=1G", "data.conf:2: pmem /cache,size=1073741824: a service makes no pmem"},
		{good + "pmem = /dev/dax1.0", `data.conf:3: pmem is given again, after line 1`},
		{good + "gc_percent = 50\ngc-percent = 50", `data.conf:4: gc-percent is given again, after line 3`},
		{"\nbacking = \"/dev/sdb", `data.conf:2: backing = "/dev/sdb: the quote has no end`},
		{"backing = '/dev/sdb\"", `data.conf:1: backing = '/dev/sdb": the quote has no end`},
		{"backing = /dev/sdb'", `data.conf:1: backing = /dev/sdb': no quote begins`},
		{"backing = '/dev/sdb'1", `data.conf:1: backing = '/dev/sdb'1: the value goes on behind the quote`},
		{"backing = '/it's'", `data.conf:1: backing = '/it's': the value goes on`},
		{`backing = "/dev/disk/by-id/a\x20b"`, `data.conf:1: backing = "/dev/disk/by-id/a\x20b": a backslash in quotes`},
		{"backing = '/dev/sdb' # the big one", `data.conf:1: backing = '/dev/sdb' # the big one: give the comment a line of its own`},
		{"backing = ''", `data.conf:1: backing has no value`},
		{"backing = 'sdb'", `data.conf:1: backing = sdb: give the whole path`},
		{good + "depth = '4 '", `data.conf:3: invalid argument "4 "`},
		{good + "pmem = '/dev/dax0.0'", `data.conf:3: pmem is given again, after line 1`},
		{"backing = /dev/sdb # the big one", `data.conf:1: backing = /dev/sdb # the big one: give the comment a line of its own`},
		{good + "depth = 4\t# deep", `data.conf:3: depth = 4`},
		{"pmem = dax0.0", `data.conf:1: pmem = dax0.0: give the whole path`},
		{"backing = /dev/disk/by-label/data", `data.conf:1: backing = /dev/disk/by-label/data: that is the name of what is on the disk`},
		{"backing = /dev/disk/by-uuid/1", `take one from /dev/disk/by-id`},
	} {
		if _, err := readConfig(config(t, c.text)); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", c.text, err, c.says)
		}
	}
	if _, err := readConfig("/nowhere/x.conf"); err == nil || !strings.Contains(err.Error(), "/nowhere/x.conf") {
		t.Error(err)
	}
}

// TestExampleConfig: the description that packages bring can be read, also with all that it has as comments.
func TestExampleConfig(t *testing.T) {
	text := textOf(t, "../../packages/example.conf")
	options := regexp.MustCompile(`(?m)^#([a-z-]+ = )`)
	if n := len(options.FindAllString(text, -1)); n == 0 {
		t.Error("it has no option as a comment")
	}
	for _, text := range []string{text, options.ReplaceAllString(text, "$1")} {
		if _, err := readConfig(config(t, text)); err != nil {
			t.Error(err)
		}
	}
}

// TestConfigSpelling: underscores are dashes, and a # within a value is itself.
func TestConfigSpelling(t *testing.T) {
	o, err := readConfig(config(t, "pmem = /cache#1\nbacking = /dev/sdb\ngc_percent = 7\nwriteback_depth=3\ndata_crc = true\n"))
	if err != nil {
		t.Fatal(err)
	}
	if o.Device.PMEM != "/cache#1" || o.Settings["gc_percent"] != "7" || o.Device.Writeback != 3 || o.DataCRC == nil || !*o.DataCRC {
		t.Errorf("%+v", o)
	}
}

// TestConfigQuotes: what is in quotes is the value, a # and the other quotes with it. Without
// them it is what it was before there were any.
func TestConfigQuotes(t *testing.T) {
	for written, value := range map[string]string{
		`"/dev/sdb"`: "/dev/sdb", `'/dev/sdb'`: "/dev/sdb", `"/a #1"`: "/a #1", `'/a "b"'`: `/a "b"`, `"/it's"`: "/it's", `'/a '`: "/a ",
		`/a b`: "/a b", `/a"b"c`: `/a"b"c`, `/a\x20b`: `/a\x20b`, `/it's "a" b`: `/it's "a" b`,
	} {
		path := config(t, "pmem = '/cache'\nbacking = "+written+"\ndepth = \"4\"\n")
		o, err := readConfig(path)
		if err != nil || o.Device.PMEM != "/cache" || o.Device.Backing != value || o.Device.Depth != 4 {
			t.Errorf("%s: %+v, %v", written, o.Device, err)
		}
		if service := backedBy(filepath.Dir(path), []string{value}); service != "data" {
			t.Errorf("%s: its disk is found for %q", written, service)
		}
	}
}

// TestConfigOfALargerMachine: CPUs that are missing are no reason for a disk to
// be.
func TestConfigOfALargerMachine(t *testing.T) {
	o, err := readConfig(config(t, fmt.Sprintf("pmem = /cache\nbacking = /dev/sdb\nqueues = %d\n", runtime.NumCPU()+1)))
	if err != nil || o.Device.Queues != runtime.NumCPU() {
		t.Errorf("%d queues on %d CPUs, %v", o.Device.Queues, runtime.NumCPU(), err)
	}
}

// TestConfigIsDocumented: the man page of a service's file has every option, and no other.
func TestConfigIsDocumented(t *testing.T) {
	text, err := os.ReadFile("man/ublk-pcache.conf.5.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	for line := range strings.Lines(between(string(text), "\n# OPTIONS\n", "\n# ")) {
		if !strings.HasPrefix(line, "**") { // which begins what is told
			continue
		}
		for _, name := range regexp.MustCompile(`\*\*([a-z-]+)\*\*`).FindAllStringSubmatch(line, -1) {
			told[name[1]] = true
		}
	}
	var a addOptions
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	a.define(f)
	f.VisitAll(func(option *pflag.Flag) {
		if !told[option.Name] {
			t.Errorf("it does not tell of %s", option.Name)
		}
		delete(told, option.Name)
	})
	for name := range told {
		t.Errorf("it tells of %s, which there is not", name)
	}
}
