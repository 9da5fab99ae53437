package filelock

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// descriptor opens a file for the caller to close.
func descriptor(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func newFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestModes: one server, or any number of readers; also where the other one is of
// a version that knows flock alone.
func TestModes(t *testing.T) {
	flags := map[Mode]int{Exclusive: unix.O_RDWR, Shared: unix.O_RDONLY}
	for first := range flags {
		for second := range flags {
			path := newFile(t)
			a, b := descriptor(t, path, flags[first]), descriptor(t, path, flags[second])
			lock, err := Take(a, first)
			if err != nil {
				t.Fatal(err)
			}
			compatible := first == Shared && second == Shared
			if err := unix.Flock(b, second.flock()); (err == nil) != compatible {
				t.Errorf("flock of %d besides %d: %v", second, first, err)
			}
			unix.Flock(b, unix.LOCK_UN)
			other, err := Take(b, second)
			if (err == nil) != compatible || err != nil && !errors.Is(err, ErrHeld) {
				t.Errorf("%d besides %d: %v", second, first, err)
			}
			if err == nil {
				other.Close()
			}
			lock.Close()
			unix.Close(a)
			if other, err = Take(b, second); err != nil {
				t.Errorf("%d after %d: %v", second, first, err)
			} else {
				other.Close()
			}
			unix.Close(b)

			// The other way round.
			a, b = descriptor(t, path, flags[first]), descriptor(t, path, flags[second])
			if err := unix.Flock(a, first.flock()); err != nil {
				t.Fatal(err)
			}
			if other, err = Take(b, second); (err == nil) != compatible || err != nil && !errors.Is(err, ErrHeld) {
				t.Errorf("%d besides an older version's %d: %v", second, first, err)
			}
			if err == nil {
				other.Close()
			}
			unix.Close(a)
			unix.Close(b)
		}
	}
}

// TestRefusedTakesNothing: who is refused keeps nobody out.
func TestRefusedTakesNothing(t *testing.T) {
	path := newFile(t)
	a, b, c := descriptor(t, path, unix.O_RDWR), descriptor(t, path, unix.O_RDWR), descriptor(t, path, unix.O_RDWR)
	defer unix.Close(b)
	if _, err := record(a, Exclusive); err != nil { // but not flock
		t.Fatal(err)
	}
	if _, err := Take(b, Exclusive); !errors.Is(err, ErrHeld) {
		t.Fatalf("besides a lock for writing: %v", err)
	}
	unix.Close(a)
	lock, err := Take(c, Exclusive)
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
	unix.Close(c)
}

// TestInherit: a copy of the descriptor has the locks, from an older version, too.
func TestInherit(t *testing.T) {
	path := newFile(t)
	old, other := descriptor(t, path, unix.O_RDWR), descriptor(t, path, unix.O_RDWR)
	defer unix.Close(other)
	if err := unix.Flock(old, Exclusive.flock()); err != nil {
		t.Fatal(err)
	}
	heir, err := unix.Dup(old)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := Inherit(heir, Exclusive)
	if err != nil || lock.stop != nil {
		t.Fatalf("%+v, %v: not all locks", lock, err)
	}
	unix.Close(old)
	if _, err := Take(other, Exclusive); !errors.Is(err, ErrHeld) {
		t.Errorf("besides the heir: %v", err)
	}
	lock.Close()
	unix.Close(heir)
}
