package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/unit"
	"github.com/spf13/cobra"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestBackedBy: a disk is found by any of its names, before it has them and
// next to a service that cannot be read.
func TestBackedBy(t *testing.T) {
	path := config(t, "pmem = /dev/dax0.0\nbacking = /dev/disk/by-id/late\n")
	dir := filepath.Dir(path)
	file := filepath.Join(dir, "disk")
	for name, text := range map[string]string{
		"disk": "", "broken.conf": "what\nbacking = /dev/sdy\nbacking = /dev/sdz\n", "file.conf": "backing = " + file + "\n", "none.conf": "pmem = /dev/sdc\n",
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
		{[]string{"/dev/sdy"}, "broken"},
		{[]string{"/dev/sdx"}, ""},
		{[]string{"/dev/sdc"}, ""},
	} {
		if got := backedBy(dir, c.names); got != c.want {
			t.Errorf("%q belongs to %q, want %q", c.names, got, c.want)
		}
	}
}

// TestHardwareLinks: what is left of a disk's links tells nothing of what is on
// it.
func TestHardwareLinks(t *testing.T) {
	links := strings.Fields("disk/by-id/x disk/by-uuid/1 disk/by-label/l disk/by-partuuid/2 disk/by-partlabel/p disk/by-path/y disk/by-diskseq/3")
	for _, c := range []struct {
		within bool
		want   string
	}{
		{true, "disk/by-id/x disk/by-path/y disk/by-diskseq/3"},
		{false, "disk/by-id/x disk/by-partuuid/2 disk/by-partlabel/p disk/by-path/y disk/by-diskseq/3"},
	} {
		if got := strings.Join(hardwareLinks(links, c.within), " "); got != c.want {
			t.Errorf("within=%t: %q, want %q", c.within, got, c.want)
		}
	}
}

// TestFinalErrors: which failures of a start systemd tries again.
func TestFinalErrors(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "x")
	why := errors.New("why")
	for _, c := range []struct {
		o    serveOptions
		err  error
		want int
	}{
		{serveOptions{Existing: true}, why, exitFinal},
		{serveOptions{Existing: true}, fmt.Errorf("open: %w", backing.ErrInUse), 1},
		{serveOptions{Existing: true}, fmt.Errorf("open: %w", pmem.ErrInUse), 1},
		{serveOptions{Existing: true, Recover: true}, why, 1}, // a device waits
		{serveOptions{Recover: true}, why, 1},
		{serveOptions{Recover: true}, fmt.Errorf("open: %w", engine.ErrChanged), exitFinal},
		{serveOptions{Recover: true}, fmt.Errorf("open: %w", &ondisk.Damage{Cause: why}), exitFinal},
		{serveOptions{}, why, 1}, // a person tries
	} {
		err := fmt.Errorf("x: %w", c.o.startError(c.err))
		if got := statusAfter(newRunCmd(), err); got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%+v, %v: exit status %d (%v), want %d", c.o, c.err, got, err, c.want)
		}
	}
}

// TestVolatilePmemOfAService: a file in memory would be refused again, too.
func TestVolatilePmemOfAService(t *testing.T) {
	ownStateDir(t)
	dir, err := os.MkdirTemp("/dev/shm", "ublk-pcache")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "pmem")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (pmem.Spec{Path: path}).RefuseVolatile(); !errors.Is(err, pmem.ErrVolatile) {
		t.Skipf("%s is not taken for memory: %v", dir, err)
	}
	_, err = launch(serveOptions{Device: device{PMEM: path, Backing: path}, Existing: true, Foreground: true})
	if !errors.Is(err, pmem.ErrVolatile) || statusAfter(newRunCmd(), err) != exitFinal {
		t.Errorf("exit status %d (%v), want %d", statusAfter(newRunCmd(), err), err, exitFinal)
	}
}

// TestAppear: what cannot come is not waited for.
func TestAppear(t *testing.T) {
	begin := time.Now()
	if err := appear(t.TempDir() + "/cache.img"); !errors.Is(err, fs.ErrNotExist) || time.Since(begin) > devicePatience/2 {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	if err := appear("/dev/null"); err != nil {
		t.Error(err)
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
		{"Unit", "RefuseManualStop", "yes"},
		{"Unit", "IgnoreOnIsolate", "yes"},
		{"Service", "RestartPreventExitStatus", "0"},
		{"Service", "RestartPreventExitStatus", strconv.Itoa(exitFinal)},
		{"Service", "RestartPreventExitStatus", "SIGTERM"},
		{"Service", "ExecStopPost", newClaimCmd().Name()},
		{"Service", "SendSIGKILL", "no"},
		{"Service", "KillMode", "process"},
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
	if i < 0 || options[i].Value != "@/usr/sbin/ublk-pcache @ublk-pcache "+newRunCmd().Name()+" %i" {
		t.Errorf("ExecStart of the unit: %+v", options)
	}
}

// TestRule: each line is comma-separated KEY OP "value", labels that are gone to
// exist, and the program that is asked is a command here.
func TestRule(t *testing.T) {
	text := textOf(t, "../../systemd/61-ublk-pcache.rules")
	item := regexp.MustCompile(`^([A-Z]+)(\{[^}]+\})?(==|!=|\+=|:=|=)"([^"]*)"$`)
	asks := func(program string, cmd *cobra.Command) bool {
		return strings.HasPrefix(program, "/usr/sbin/ublk-pcache "+cmd.Name()+" ")
	}
	var to, labels []string
	for n, line := range strings.Split(text, "\n") {
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
			case m[1] == "PROGRAM" && !asks(m[4], newIsBackingCmd()), m[1] == "RUN" && !asks(m[4], newDiskGoneCmd()):
				t.Errorf("line %d asks %q", n+1, m[4])
			case m[1] == "IMPORT" && m[2] == "{file}" && m[4] != filepath.Join(stateDir, "%n"+udevExt):
				t.Errorf("line %d reads %q", n+1, m[4])
			}
		}
	}
	for _, label := range to {
		if !slices.Contains(labels, label) {
			t.Errorf("no label %q", label)
		}
	}
}
