//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A device is known by its name as well as by its number, with a server, another server, and without one; a second one
// does not get it, and it is free when the device has gone.
func TestNames(t *testing.T) {
	wipe(t, disk, disk4K)
	dir := t.TempDir()
	d := add(t, "-p", dax, "-b", disk, "--name", "data")
	other := add(t, "-p", filepath.Join(dir, "cache,size=512M,volatile"), "-b", disk4K)

	refuse(t, []string{disk, disk4K, tinyDisk}, t.TempDir(), []refusal{
		{name: "taken", args: "add -p TMP/second,size=512M,volatile -b " + tinyDisk + " --name data", says: []string{"device " + d.id, "data", "del " + d.id}},
		{name: "number", args: "add -p TMP/second,size=512M,volatile -b " + tinyDisk + " --name 7", says: []string{"--name 7", "letter"}},
		{name: "node", args: "add -p TMP/second,size=512M,volatile -b " + tinyDisk + " --name ublkb7", says: []string{"--name ublkb7"}},
		{name: "unknown", args: "status dato", says: []string{`no device "dato"`, "ublk-pcache list"}},
	})

	named := func() string { // as what answers to the name has it
		t.Helper()
		var s struct {
			Device, Name string
		}
		r := run(t, "ublk-pcache", "status", "--json", "data")
		if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
			t.Fatalf("%s: %+v, %v", r.commandLine, r, err)
		}
		return s.Name + " " + s.Device
	}
	mustBeNamed := func(when string) {
		t.Helper()
		if got, want := named(), "data "+d.path; got != want {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	mustBeNamed("new")
	pcache(t, "flush", "data")
	pcache(t, "set", "data", "gc_percent=60")
	if r := run(t, "ublk-pcache", "upgrade", "data"); r.code == 0 && !strings.HasPrefix(r.stdout, fmt.Sprintf("device %s (data) is served by", d.id)) ||
		r.code != 0 && !strings.Contains(r.stderr, "the kernel is too old") {
		t.Errorf("upgrade: %+v", r)
	}
	mustBeNamed("upgraded, where that can be")
	killServer(t, d, unix.SIGKILL)
	mustBeNamed("dead")
	if r := run(t, "ublk-pcache", "flush", "data"); !strings.Contains(r.stderr, fmt.Sprintf("the server of device %s (data) is dead", d.id)) {
		t.Errorf("flush of what has no server says %q", r.stderr)
	}

	// All of them, the dead one, too.
	var all []struct {
		ID          int
		State, Name string
		Error       string
	}
	r := run(t, "ublk-pcache", "status", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil || len(all) != 2 || r.code == 0 ||
		strconv.Itoa(all[0].ID) != d.id || all[0].State != "dead" || all[0].Name != "data" ||
		all[1].State != "live" || all[1].Error != "" || !strings.Contains(all[0].Error, "recover "+d.id) {
		t.Errorf("status of all: %+v, %v", r, err)
	}
	if text := run(t, "ublk-pcache", "status").stdout; strings.Count(text, "\n\n") != 1 || !strings.Contains(text, other.path) || !strings.Contains(text, "data") {
		t.Errorf("status of all prints\n%s", text)
	}
	want := fmt.Sprintf("ID NAME STATE HEALTH MODE %s data dead - - %s - live ok writeback", d.id, other.id)
	if r := run(t, "ublk-pcache", "list", "-o", "id,name,state,health,mode"); r.code != 0 || strings.Join(strings.Fields(r.stdout), " ") != want {
		t.Errorf("list says\n%s%s", r.stdout, r.stderr)
	}

	pcache(t, "recover", "data")
	mustBeNamed("recovered")
	if r := run(t, "ublk-pcache", "status"); r.code != 0 || r.stderr != "" {
		t.Errorf("status of all: %+v", r)
	}
	pcache(t, "del", "data")
	other.del(t)
	again := add(t, "-p", dax, "-b", disk, "--name", "data", "-n", "9")
	if got := named(); got != "data /dev/ublkb9" {
		t.Errorf("the next with the name is %q", got)
	}
	again.del(t)
	if _, err := os.Stat(stateDir + "/9.json"); err == nil {
		t.Error("its state file is left")
	}
}

// TestJSON: what commands tell programs of a device is what status tells, and del and upgrade say what they have done.
func TestJSON(t *testing.T) {
	wipe(t, disk)
	read := func(form any, args ...string) {
		t.Helper()
		text := pcache(t, append(args, "--json")...)
		if err := json.Unmarshal([]byte(text), form); err != nil {
			t.Fatalf("%q prints %q: %v", args, text, err)
		}
	}
	type shown struct {
		ID         int
		Name       string
		Device     string
		State      string
		Health     string
		Log        string
		DirtyBytes int64 `json:"dirty_bytes"`
		SizeBytes  int64 `json:"size_bytes"`
		Settings   map[string]string
	}
	var added, set, flushed, recovered shown
	read(&added, "add", "-p", dax, "-b", disk, "--name", "data", "--idle-after", "0")
	d := device{added.Device, strconv.Itoa(added.ID)}
	t.Cleanup(func() { d.remove(t) })
	if text, err := os.ReadFile(added.Log); err != nil || !strings.Contains(string(text), `"msg":"serving"`) {
		t.Errorf("the log is said to be in %q, which has %q, %v", added.Log, text, err)
	}
	if added.Name != "data" || added.State != "live" || added.Health != "ok" || added.SizeBytes != 4<<30 || added.Settings["idle_after"] != "0" {
		t.Errorf("add tells of %+v", added)
	}
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	read(&set, "set", "data", "gc_percent=60")
	if set.ID != added.ID || set.Settings["gc_percent"] != "60" || set.DirtyBytes != 1<<20 {
		t.Errorf("set tells of %+v", set)
	}
	read(&flushed, "flush", d.path)
	if flushed.ID != added.ID || flushed.DirtyBytes != 0 {
		t.Errorf("flush tells of %+v", flushed)
	}
	if r := run(t, "ublk-pcache", "upgrade", "--all", "--json"); r.code == 0 {
		var replaced []struct {
			ID, PID int
			PauseMS float64 `json:"pause_ms"`
		}
		if err := json.Unmarshal([]byte(r.stdout), &replaced); err != nil || len(replaced) != 1 || replaced[0].ID != added.ID || replaced[0].PID != d.entry(t).PID || replaced[0].PauseMS <= 0 {
			t.Errorf("upgrade prints %s, %v", r.stdout, err)
		}
	} else if !strings.Contains(r.stderr, "the kernel is too old") || r.stdout != "[]\n" {
		t.Errorf("upgrade: %+v", r)
	}
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "count=16", "oflag=direct", "status=none")
	killServer(t, d, unix.SIGKILL)
	if r := run(t, "ublk-pcache", "del", "data", "--flush"); r.code != 4 || !strings.Contains(r.stderr, "nothing is removed: ") || !strings.Contains(r.stderr, "recover "+d.id) {
		t.Errorf("del --flush without a server: %+v", r)
	}
	read(&recovered, "recover", "data")
	if recovered.ID != added.ID || recovered.State != "live" || recovered.DirtyBytes != 1<<20 {
		t.Errorf("recover tells of %+v", recovered)
	}
	var gone []struct {
		ID         int
		Name       string
		DirtyBytes int64 `json:"dirty_bytes"`
		AtMost     bool  `json:"at_most"`
	}
	read(&gone, "del", "--all")
	if len(gone) != 1 || gone[0].ID != added.ID || gone[0].Name != "data" || gone[0].DirtyBytes != 1<<20 || gone[0].AtMost {
		t.Errorf("del tells of %+v", gone)
	}
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("there still are %v", left)
	}
	d = add(t, "-p", dax, "-b", disk)
	var clean struct {
		DirtyBytes *int64 `json:"dirty_bytes"`
	}
	read(&clean, "del", "--flush", d.id)
	if clean.DirtyBytes == nil || *clean.DirtyBytes != 0 || !strings.Contains(pcache(t, "check", dax), " 0 dirty ") {
		t.Errorf("del --flush leaves %+v", clean)
	}
}
