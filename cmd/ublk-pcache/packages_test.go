package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestRemovalOfThePackage: the script of the packages lets the program go where there is no device, or no program, and
// refuses where there is one, or nobody can tell.
func TestRemovalOfThePackage(t *testing.T) {
	for what, c := range map[string]struct {
		program string // what it does
		refused bool
	}{
		"no device":      {"echo 'DEVICE  NAME  PMEM'", false},
		"a device":       {"echo 'DEVICE  NAME  PMEM'; echo '/dev/ublkb0  -  /dev/dax0.0'", true},
		"cannot be told": {"echo 'DEVICE  NAME  PMEM'; exit 1", true},
		"no program":     {"", false},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{"ublk-pcache": c.program, "systemctl": "exit 1"} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, args := range [][]string{{"remove"}, {"0"}, {"upgrade", "0.2.0"}, {"1"}} {
			cmd := exec.Command("/bin/sh", append([]string{"../../packages/preremove.sh"}, args...)...)
			cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin"}
			out, err := cmd.CombinedOutput()
			if goes := len(args) == 1 && args[0] != "1"; (err != nil) != (goes && c.refused) {
				t.Errorf("%s, %q: %v\n%s", what, args, err, out)
			}
		}
	}
}
