package main

import (
	"os"
	"testing"

	"ublk-pcache/ondisk"
)

// TestExposed: neither cache nor disk may be open to all users, new or old, but
// where somebody waits for the device.
func TestExposed(t *testing.T) {
	s := newServer(t)
	files := []string{s.dev.PMEM, s.dev.Backing}
	for _, old := range []bool{false, true} {
		for _, path := range files {
			for _, mode := range []os.FileMode{0o604, 0o602, 0o601} {
				if err := os.Chmod(path, mode); err != nil {
					t.Fatal(err)
				}
				_, err := s.open(&serveOptions{})
				fails(t, err, path, "open to all users", "chmod o= "+path)
				if blank, err := ondisk.Blank(s.region, s.region.Size()); blank == old {
					t.Errorf("old cache %v, blank %v, %v", old, blank, err)
				}
				for _, o := range []serveOptions{{Existing: true}, {Recover: true}} {
					if _, err := s.open(&o); old && err != nil {
						t.Errorf("%+v: %v", o, err)
					}
				}
			}
			if err := os.Chmod(path, 0o660); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.open(&serveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}
