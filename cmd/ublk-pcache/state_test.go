package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// ownStateDir gives the test a folder of its own for state files.
func ownStateDir(t *testing.T) {
	t.Helper()
	before := stateDir
	t.Cleanup(func() { stateDir = before })
	stateDir = filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
}

// TestStateDirOfOthers: a folder that somebody else has prepared is not used.
func TestStateDirOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(dir string) error
		refused bool
	}{
		"ours":              {func(dir string) error { return nil }, false},
		"not there yet":     {os.Remove, false},
		"readable":          {func(dir string) error { return os.Chmod(dir, 0o755) }, false},
		"group writes":      {func(dir string) error { return os.Chmod(dir, 0o770) }, true},
		"everybody writes":  {func(dir string) error { return os.Chmod(dir, 0o777) }, true},
		"with a sticky bit": {func(dir string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, true},
		"nobody's":          {func(dir string) error { return os.Chown(dir, 65534, 65534) }, true},
		"a link": {func(dir string) error {
			return errors.Join(os.Rename(dir, dir+".x"), os.Symlink(dir+".x", dir))
		}, true},
		"a file": {func(dir string) error { return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600)) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			ownStateDir(t)
			if err := c.prepare(stateDir); err != nil {
				t.Fatal(err)
			}
			if err := checkStateDir(); c.refused {
				fails(t, err, stateDir, "only root", "move it away")
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}
