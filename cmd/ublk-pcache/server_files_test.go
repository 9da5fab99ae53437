package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestSee: a name is resolved whatever links are in it, also to a file that is not
// there yet, and a file is told from every other one.
func TestSee(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.Mkdir(filepath.Join(dir, "real"), 0o700),
		os.WriteFile(filepath.Join(dir, "real", "file"), nil, 0o600),
		os.Symlink("real", filepath.Join(dir, "folder")),
		os.Symlink("folder/file", filepath.Join(dir, "link")),
		os.Symlink("folder/new", filepath.Join(dir, "dangling")),
		os.Symlink(filepath.Join(dir, "dangling"), filepath.Join(dir, "twice")),
		os.Symlink("ring", filepath.Join(dir, "ring")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"real/file": "real/file", "folder/file": "real/file", "link": "real/file",
		"folder/new": "real/new", "dangling": "real/new", "twice": "real/new",
	} {
		s, err := see(filepath.Join(dir, name))
		if err != nil || s.Path != filepath.Join(dir, want) || (s.Ino != 0) != (want == "real/file") {
			t.Errorf("%s leads to %+v, %v", name, s, err)
		}
	}
	if s, err := see(filepath.Join(dir, "ring")); err == nil {
		t.Errorf("a ring of links leads to %+v", s)
	}
	null, err := see("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	file, err := see(filepath.Join(dir, "link"))
	if err != nil {
		t.Fatal(err)
	}
	for path, is := range map[string]*seen{"/dev/null": &null, "/dev/zero": nil, filepath.Join(dir, "real", "file"): &file, os.Args[0]: nil} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []*seen{&null, &file} {
			if err := s.same(f); (err == nil) != (s == is) {
				t.Errorf("%s taken for %s: %v", path, s.Path, err)
			}
		}
		f.Close()
	}
}
