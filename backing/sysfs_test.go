package backing

import (
	"os"
	"path/filepath"
	"testing"
)

// fakeSysfs makes files below a folder, which it returns.
func fakeSysfs(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

// TestZeroesCheaply: a command for zeros is not enough, it must not write them.
func TestZeroesCheaply(t *testing.T) {
	const (
		command = "/queue/write_zeroes_max_bytes"
		unmap   = "/queue/write_zeroes_unmap_max_hw_bytes"
		discard = "/queue/discard_max_bytes"
		turns   = "/queue/rotational"
		scsi    = "/device/scsi_disk/0:0:0:0/zeroing_mode"
	)
	sys := fakeSysfs(t, map[string]string{
		"none" + command: "0", "none" + discard: "1048576", "none" + turns: "0",
		"nvme" + command: "2097152", "nvme" + unmap: "0", "nvme" + discard: "2199023255040", "nvme" + turns: "0",
		"nvme/p1/partition": "1",
		"turning" + command: "2097152", "turning" + unmap: "2097152", "turning" + turns: "1", "turning" + discard: "0",
		"sas" + command: "33553920", "sas" + discard: "0", "sas" + turns: "1", "sas" + scsi: "writesame",
		"sas-ssd" + command: "33553920", "sas-ssd" + discard: "4294966784", "sas-ssd" + turns: "0", "sas-ssd" + scsi: "writesame",
		"thin" + command: "33553920", "thin" + discard: "4294966784", "thin" + turns: "1", "thin" + scsi: "writesame_16_unmap",
		"loop" + command: "4294966784", "loop" + discard: "4294966784", "loop" + turns: "1",
		"plain" + command: "4294966784", "plain" + discard: "0", "plain" + turns: "1",
		"dm-good" + command: "2097152", "dm-good" + discard: "1048576", "dm-good" + turns: "1",
		"dm-mixed" + command: "2097152", "dm-mixed" + discard: "1048576", "dm-mixed" + turns: "0",
		"dm-dm" + command: "2097152", "dm-dm" + discard: "1048576", "dm-dm" + turns: "0",
	})
	for _, l := range [][2]string{
		{"nvme/p1", "dm-good/slaves/p1"}, {"thin", "dm-good/slaves/thin"},
		{"nvme", "dm-mixed/slaves/nvme"}, {"sas", "dm-mixed/slaves/sas"},
		{"dm-mixed", "dm-dm/slaves/dm-mixed"},
	} {
		link(t, filepath.Join(sys, l[0]), filepath.Join(sys, l[1]))
	}
	for name, want := range map[string]bool{
		"none": false, "nvme": true, "nvme/p1": true, "turning": true, "sas": false, "sas-ssd": false, "thin": true,
		"loop": true, "plain": false, "dm-good": true, "dm-mixed": false, "dm-dm": false, "missing": false,
	} {
		if got := diskAt(filepath.Join(sys, name)).zeroesCheaply(); got != want {
			t.Errorf("%s: %v, should be %v", name, got, want)
		}
	}
}

// TestUnitSerial: some SCSI disks have no name but in this page.
func TestUnitSerial(t *testing.T) {
	sys := fakeSysfs(t, map[string]string{
		"old/device/vpd_pg80": "\x00\x80\x00\x08  S1234 ", "old/p2/partition": "2", "empty/device/vpd_pg80": "\x00\x80\x00\x04    ",
		"short/device/vpd_pg80": "\x00\x80", "new/device/vpd_pg80": "\x00\x80\x00\x02S1", "new/device/wwid": "naa.5000",
	})
	for name, want := range map[string]string{"old": "S1234", "old/p2": "S1234-part2", "empty": "", "short": "", "new": "naa.5000"} {
		if got := diskAt(filepath.Join(sys, name)).serial(); got != want {
			t.Errorf("%s: %q, should be %q", name, got, want)
		}
	}
}

func TestZoned(t *testing.T) {
	sys := fakeSysfs(t, map[string]string{
		"none/queue/zoned": "none", "aware/queue/zoned": "host-aware", "smr/queue/zoned": "host-managed", "smr/p1/partition": "1",
	})
	for name, want := range map[string]bool{"none": false, "aware": false, "smr": true, "smr/p1": true, "missing": false} {
		if got := diskAt(filepath.Join(sys, name)).zoned(); got != want {
			t.Errorf("%s: %v, should be %v", name, got, want)
		}
	}
}
