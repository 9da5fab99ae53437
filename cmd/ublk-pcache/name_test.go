package main

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"ublk-pcache/ublk"
)

// TestDeviceID: no argument is taken for another device's number, or its name.
func TestDeviceID(t *testing.T) {
	ownStateDir(t)
	named := someDevice(3)
	named.Name = "data"
	if err := named.save(); err != nil {
		t.Fatal(err)
	}
	for arg, want := range map[string]int{
		"0": 0, "7": 7, "/dev/ublkb0": 0, "/dev/ublkb12": 12, "ublkb5": 5, strconv.Itoa(ublk.MaxID): ublk.MaxID,
		"data": 3, "/dev/ublk-pcache/data": 3,
	} {
		if id, err := deviceID(arg); err != nil || id != want {
			t.Errorf("%q is device %d, %v", arg, id, err)
		}
	}
	for _, arg := range []string{
		"", "-1", "+1", "01", "00", " 1", "1 ", "0x1", "1_0", "1e0", "4294967296", "4294967295", "18446744073709551616", strconv.Itoa(ublk.MaxID + 1),
		"/dev/ublkb", "/dev/ublkb0p1", "/dev/ublkb00", "/dev/ublkb-0", "/dev/ublkb+1", "/dev/ublkc0", "ublkb00", "ublkb", "ublkb0p1", "/dev/sda", "/dev/0", "/dev/data",
		"/dev/ublkb/dev/ublkb0", "/dev/ublk-pcache/", "/dev/ublk-pcache/0", "data/", "../data", "da ta", "3data",
	} {
		id, err := deviceID(arg)
		if err == nil {
			t.Errorf("%q is taken for device %d", arg, id)
			continue
		}
		fails(t, err, "is not a device")
	}
	_, err := deviceID("Data")
	fails(t, err, `no device "Data"`, "ublk-pcache list")
}

// TestNames: what can be told from a number, a node and a part of a path is a name.
func TestNames(t *testing.T) {
	for _, name := range []string{"data", "_", "vm-1.home", "Z9", strings.Repeat("x", longestName)} {
		if err := checkName(name); err != nil {
			t.Errorf("%q is refused: %v", name, err)
		}
	}
	for _, name := range []string{"", "0", "1st", "-x", ".x", "a/b", "a b", "ä", "a\n", "ublkb7", "data-part1", strings.Repeat("x", longestName+1)} {
		if checkName(name) == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
}

// TestNameForUdev: udev finds the name of a device that has one, also where there is no room to write it again, and none
// of what is gone.
func TestNameForUdev(t *testing.T) {
	ownStateDir(t)
	d := someDevice(3)
	d.servedByUs()
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "data", "data", "other", "", ""} {
		d.Name = name
		if err := d.tellUdev(); err != nil {
			t.Fatal(err)
		}
		want := ""
		if name != "" {
			want = "UBLK_PCACHE_NAME=" + name + "\n"
		}
		if text, err := os.ReadFile(statePath(3, udevExt)); string(text) != want || (err == nil) != (name != "") {
			t.Errorf("the name is %q, udev reads %q, %v", name, text, err)
		}
	}
	d.Name = "data"
	if err := d.tellUdev(); err != nil {
		t.Fatal(err)
	}
	before := time.Unix(1, 0)
	if err := os.Chtimes(statePath(3, udevExt), before, before); err != nil {
		t.Fatal(err)
	}
	if err := d.tellUdev(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(statePath(3, udevExt)); err != nil || !after.ModTime().Equal(before) {
		t.Errorf("what is there is written again: %v", err)
	}
	if err := d.remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(statePath(3, udevExt)); err == nil {
		t.Error("a device that is removed leaves its name")
	}
}

// TestNameIsOnes: two devices never have the same name, unless whoever wrote the state files has seen to it; then it is
// refused with the numbers.
func TestNameIsOnes(t *testing.T) {
	ownStateDir(t)
	first := someDevice(3)
	first.Name = "data"
	first.servedByUs()
	if err := first.save(); err != nil {
		t.Fatal(err)
	}
	second := someDevice(4)
	second.Name = "data"
	fails(t, reserve(second), "device 3", "data", "ublk-pcache del 3")
	if _, err := os.Stat(statePath(4, ".json")); err == nil {
		t.Error("the refused device has a state file")
	}
	second.Name = ""
	if err := second.takeName("data"); err == nil || second.Name != "" {
		t.Errorf("a device that had no name is %q, %v", second.Name, err)
	}
	if err := second.takeName("other"); err != nil || second.Name != "other" {
		t.Errorf("a device that had no name is %q, %v", second.Name, err)
	}
	if err := reserve(second); err != nil {
		t.Errorf("another name is refused: %v", err)
	}
	second.Name = "data"
	if err := second.save(); err != nil {
		t.Fatal(err)
	}
	_, err := deviceID("data")
	fails(t, err, "3, 4", "data", "number")
}

// TestNameOfTheUnreadable: where a state file is no good, its name is not known.
func TestNameOfTheUnreadable(t *testing.T) {
	ownStateDir(t)
	if err := os.WriteFile(statePath(3, ".json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := deviceID("data")
	fails(t, err, `no device "data"`, statePath(3, ".json"))
}

// TestNameOfService: it is that of the file, where a device can have it.
func TestNameOfService(t *testing.T) {
	for file, want := range map[string]string{"data.conf": "data", "0.conf": "", "a b.conf": ""} {
		path := t.TempDir() + "/" + file
		if err := os.WriteFile(path, []byte("pmem = /dev/dax0.0\nbacking = /dev/sdb\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		o, err := readConfig(path)
		if err != nil || o.Device.Name != want {
			t.Errorf("the device of %s has the name %q, %v", file, o.Device.Name, err)
		}
	}
}
