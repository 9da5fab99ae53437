//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// The message ids of docs/admin.md that are waited for.
const (
	idStarted   = "10e572d683c948c0883a0acb30b4bd39"
	idRecovered = "80536241b51e4609908b16547f2cf50f"
	idUpgraded  = "f9b7d1f71ed043b0a3dfc3340d5702c1"
	idRemoved   = "266f1382ce3e47848ca64b6eff5fbb4d"
	idSettings  = "9a4487aceb334917bb971604659f05c5"
	idDefers    = "f8f892ac0d0944d185ba361da45ef931"
	idWorks     = "e4336aca0d524d64ba4eee8c13dcb364"
)

// journal returns what the service has in the journal, and what of it has all the fields.
func (s *systemd) journal(t *testing.T, fields map[string]string) (found []map[string]any, all string) {
	t.Helper()
	all = s.must(t, "journalctl", "--no-pager", "-o", "json", "-u", service)
	for line := range strings.Lines(all) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		fits := true
		for name, value := range fields {
			fits = fits && strings.Contains(fmt.Sprint(entry[name]), value)
		}
		if fits {
			found = append(found, entry)
		}
	}
	return found, all
}

// awaitEntry waits until the service has more such entries than before, and returns the last.
func (s *systemd) awaitEntry(t *testing.T, before int, fields map[string]string) (last map[string]any) {
	t.Helper()
	waitFor(t, func() string {
		found, all := s.journal(t, fields)
		if len(found) <= before {
			return fmt.Sprintf("no entry of %v in\n%s", fields, all)
		}
		last = found[len(found)-1]
		return ""
	})
	return last
}

// With a real journal, what happens to a service is found there by priority, device and message id, whichever server of
// it has said that: also by one whose journal has stood still, or was started again. log_level is what it was after an
// upgrade and a kill.
func TestJournal(t *testing.T) {
	const size = 64 << 20
	b := newBadDisk(t, disk, "journalled", size)
	pcache(t, "format", "--force", dax)
	t.Cleanup(func() { device{"/dev/ublkb0", "0"}.remove(t) })
	makeInstall(t)
	s := startSystemd(t, map[string]string{
		"/etc/systemd/system/test.target": "[Unit]\nWants=systemd-journald.service systemd-udevd.service " + service + "\n",
		"/etc/ublk-pcache/test.conf":      "pmem = " + dax + "\nbacking = " + b.path + "\n",
		// What is shown of a failure is in the kernel's log, as without a journal.
		"/etc/systemd/journald.conf.d/test.conf": "[Journal]\nStorage=volatile\nReadKMsg=no\nForwardToKMsg=yes\nMaxLevelKMsg=debug\n",
		"/etc/systemd/system.conf.d/test.conf":   "[Manager]\nDefaultStandardOutput=journal\nDefaultStandardError=journal\n",
	})
	s.waitFor(t, service, "SubState=running")
	is := func(entry map[string]any, want map[string]string) {
		t.Helper()
		for name, value := range want {
			if got := fmt.Sprint(entry[name]); !strings.Contains(got, value) {
				t.Errorf("%s is %q, want %q, in %v", name, got, value, entry)
			}
		}
	}
	always := map[string]string{
		"SYSLOG_IDENTIFIER": "ublk-pcache", "UBLK_PCACHE_DEVICE": "/dev/ublkb0", "UBLK_PCACHE_NAME": "test", "_TRANSPORT": "journal",
		"CODE_FILE": ".go", "CODE_LINE": "", "_SYSTEMD_UNIT": service,
	}
	await := func(id string, want map[string]string) {
		t.Helper()
		entry := s.awaitEntry(t, 0, map[string]string{"MESSAGE_ID": id})
		is(entry, always)
		is(entry, want)
	}
	await(idStarted, map[string]string{"PRIORITY": "6", "MESSAGE": "serving {", "UBLK_PCACHE_RECOVERED": "false"})
	status := func() string {
		t.Helper()
		return s.must(t, "ublk-pcache", "status", "--json", "test")
	}
	if text := status(); !strings.Contains(text, `"log": "journalctl -u `+service+`"`) || !strings.Contains(text, `"log_level": "info"`) {
		t.Errorf("status says\n%s", text)
	}
	s.killServer(t)
	await(idRecovered, map[string]string{"PRIORITY": "6", "UBLK_PCACHE_RECOVERED": "true"})

	write := func() {
		t.Helper()
		s.must(t, "dd", "if=/dev/urandom", "of=/dev/ublkb0", "bs=4096", "count=1", "oflag=direct", "status=none")
	}
	b.becomes(t, b.gone())
	write()
	await(idDefers, map[string]string{"PRIORITY": "3", "MESSAGE": "cannot be written back", "UBLK_PCACHE_ERROR": "input/output error", "CODE_FILE": "engine/writeback.go"})
	b.heal(t)
	await(idWorks, map[string]string{"PRIORITY": "6", "MESSAGE": "write-back works again"})

	s.must(t, "ublk-pcache", "set", "test", "log_level=debug")
	await(idSettings, map[string]string{"PRIORITY": "6", "UBLK_PCACHE_FROM": `{"log_level":"info"}`, "UBLK_PCACHE_TO": `{"log_level":"debug"}`})
	status()
	is(s.awaitEntry(t, 0, map[string]string{"PRIORITY": "7", "MESSAGE": "answer: status", "UBLK_PCACHE_COMMAND": `{"do":"status"}`}), always)
	stays := func(when string) {
		t.Helper()
		if text := status(); !strings.Contains(text, `"log_level": "debug"`) {
			t.Errorf("after %s status says\n%s", when, text)
		}
	}
	s.must(t, "ublk-pcache", "upgrade", "test")
	stays("an upgrade")
	await(idUpgraded, map[string]string{"PRIORITY": "6"})
	s.killServer(t)
	stays("a kill")

	// A journal that stands still: what the server has to say is more than the journal's queue takes.
	journald := s.show(t, "systemd-journald.service", "MainPID")
	changes, _ := s.journal(t, map[string]string{"MESSAGE_ID": idSettings})
	s.must(t, "kill", "-STOP", journald)
	for i := range 30 {
		s.must(t, "ublk-pcache", "set", "test", fmt.Sprint("gc_percent=", 40+i))
	}
	write()
	stays("a standstill of the journal")
	s.must(t, "kill", "-CONT", journald)
	s.awaitEntry(t, len(changes), map[string]string{"MESSAGE_ID": idSettings})
	s.must(t, "systemctl", "restart", "systemd-journald.service")
	s.must(t, "ublk-pcache", "flush", "test")
	s.awaitEntry(t, 0, map[string]string{"MESSAGE": "answer: flush"})

	s.must(t, "ublk-pcache", "del", "test")
	await(idRemoved, map[string]string{"PRIORITY": "6", "UBLK_PCACHE_DIRTY_BYTES": "0"})
	s.must(t, "systemctl", "poweroff", "--no-block")
	s.wait(t)
	add(t, "-p", dax, "-b", b.path).del(t) // which takes the claim on the disk back
}
