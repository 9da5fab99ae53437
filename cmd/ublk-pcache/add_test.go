package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestQueues: the number of queues fits the cache, a new one or an old one, unless it was
// given.
func TestQueues(t *testing.T) {
	dir := t.TempDir()
	cache, back := filepath.Join(dir, "cache"), filepath.Join(dir, "back")
	sparse(t, cache)
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(back, 64<<20); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name          string
		any           bool
		queues, chose int
	}{
		{"new", true, 16, 4},
		{"old", true, 16, 4},
		{"two processors", true, 2, 2},
		{"given", false, 16, 16},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serverOn(t, cache, back)
			s.dev.Queues = c.queues
			if _, err := s.open(&serveOptions{AnyQueues: c.any}); err != nil {
				t.Fatal(err)
			}
			if s.dev.Queues != c.chose {
				t.Errorf("%d queues, not %d", s.dev.Queues, c.chose)
			}
		})
	}
	for segments, want := range map[int]int{1: 1, 8: 1, 9: 2, 31: 4, 128: 16, 4096: 16} {
		if n := queuesFor(segments); n != want {
			t.Errorf("%d queues for %d segments, not %d", n, segments, want)
		}
	}
}
