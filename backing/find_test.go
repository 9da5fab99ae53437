package backing

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeNodes makes block devices, by their numbers, that nobody opens.
func fakeNodes(t *testing.T, numbers map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, number := range numbers {
		var major, minor uint32
		if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mknod(filepath.Join(dir, name), unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestFind: a device is found by its identity, whatever it is called now, and
// not if there are two.
func TestFind(t *testing.T) {
	sys := fakeSysfs(t, map[string]string{
		"sda/device/wwid": "naa.5000", "sda/dev": "1:3",
		"sda/sda1/partition": "1", "sda/sda1/dev": "1:5",
		"sdb/device/wwid": "naa.5001", "sdb/dev": "8:16",
		"sdc/device/wwid": "naa.5001", "sdc/dev": "8:32",
		"sdd/device/wwid": "naa.5002", "sdd/dev": "8:48",
		"dm-0/dm/uuid": "mpath-naa.5001", "dm-0/dev": "253:0",
		"ublkb0/serial": "naa.5003", "ublkb0/dev": "259:0",
	})
	all := t.TempDir()
	for _, dir := range []string{"sda", "sda/sda1", "sdb", "sdc", "sdd", "dm-0", "ublkb0"} {
		link(t, filepath.Join(sys, dir), filepath.Join(all, filepath.Base(dir)))
	}
	dev := fakeNodes(t, map[string]string{
		"sda": "1:3", "sda1": "1:5", "sdb": "8:16", "sdc": "8:32", "sdd": "8:49", "dm-0": "253:0", "ublkb0": "259:0",
	})
	devices, nodes = all, dev
	t.Cleanup(func() { devices, nodes = "/sys/class/block", "/dev" })

	for identity, want := range map[string]string{
		"naa.5000": "sda", "naa.5000-part1": "sda1", "mpath-naa.5001": "dm-0",
	} {
		if got, err := Find(identity); err != nil || got != filepath.Join(dev, want) {
			t.Errorf("%s: %q, %v", identity, got, err)
		}
	}
	for identity, want := range map[string]struct {
		err   error
		words []string
	}{
		"":         {ErrNameless, nil},
		"naa.5":    {ErrNotFound, []string{"naa.5"}},
		"naa.5001": {ErrAmbiguous, []string{"naa.5001", dev + "/sdb", dev + "/sdc"}},
		"naa.5002": {nil, []string{dev + "/sdd is another device"}},
		"naa.5003": {ErrNotFound, nil}, // one of ours
	} {
		path, err := Find(identity)
		if path != "" || err == nil || want.err != nil && !errors.Is(err, want.err) {
			t.Errorf("%q: %q, %v, should be %v", identity, path, err, want.err)
			continue
		}
		for _, w := range want.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q does not mention %q", err, w)
			}
		}
	}
}
