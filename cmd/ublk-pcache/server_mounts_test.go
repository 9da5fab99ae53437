package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/internal/mountinfo"
)

// apart calls f on a thread with a mount namespace of its own, which ends with it.
func apart(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// mountAll mounts a tmpfs on each of the points, in order.
func mountAll(points ...string) error {
	for _, point := range points {
		err := os.MkdirAll(point, 0o700)
		if err == nil {
			err = unix.Mount("none", point, "tmpfs", 0, "size=64k")
		}
		if err != nil {
			return fmt.Errorf("mount on %q: %w", point, err)
		}
	}
	return nil
}

// TestUnmountAllBut: whatever users have mounted, what is not needed goes, what is needed stays, and what cannot be
// reached is known.
func TestUnmountAllBut(t *testing.T) {
	for _, c := range []struct {
		name   string
		mounts []string // in order
		keep   []string
		stay   []string // of the mount points, once for each mount
		stray  []string // of these, those that nobody needs
	}{
		{name: "one", mounts: []string{"a"}, keep: []string{"b"}},
		{name: "quote", mounts: []string{`a"b`}, keep: []string{"b"}},
		{name: "latin-1", mounts: []string{"caf\xe9"}, keep: []string{"caf"}},
		{name: "spaces", mounts: []string{" a\tb\n\u00a0\r", `\040`, "x//y z"}, keep: []string{"b"}},
		{name: "needed", mounts: []string{"a", "b"}, keep: []string{"a/file"}, stay: []string{"a"}},
		{name: "needed itself", mounts: []string{"a", "b"}, keep: []string{"b"}, stay: []string{"b"}},
		{name: "needed with odd names", mounts: []string{`a"b`, "caf\xe9", "a b\n"}, keep: []string{`a"b/file`, "caf\xe9/x", "a b\n/x"},
			stay: []string{`a"b`, "caf\xe9", "a b\n"}},
		{name: "a name that begins alike", mounts: []string{"a", "ab"}, keep: []string{"ab/file"}, stay: []string{"ab"}},
		{name: "nested", mounts: []string{"a", "a/b", "a/b/c"}, keep: []string{"b"}},
		{name: "needed below", mounts: []string{"a", "a/b", "a/b/c", "a/d"}, keep: []string{"a/b/file"}, stay: []string{"a", "a/b"}},
		{name: "stacked", mounts: []string{"a", "a", "a"}, keep: []string{"b"}},
		{name: "stacked often", mounts: slices.Repeat([]string{"a"}, 3*mountLayers), keep: []string{"b"}},
		{name: "needed and stacked", mounts: []string{"a", "a"}, keep: []string{"a/x"}, stay: []string{"a", "a"}},
		{name: "covered by one that goes", mounts: []string{"a/b/c", "a/b", "a"}, keep: []string{"b"}},
		{name: "covered by one that stays", mounts: []string{"m", "m/old", "m"}, keep: []string{"m/file"}, stay: []string{"m", "m/old", "m"}, stray: []string{"m/old"}},
		{name: "covered, with another in its place", mounts: []string{"m", "m/old", "m", "m/old"}, keep: []string{"m/old/file"}, stay: []string{"m", "m/old", "m", "m/old"}},
		{name: "below a covered one, with another in its place", mounts: []string{"m", "m/old", "m/old/x", "m", "m/old", "m/old/x"}, keep: []string{"m/old/file"},
			stay: []string{"m", "m/old", "m/old/x", "m", "m/old"}, stray: []string{"m/old/x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			in := func(names []string) (paths []string) {
				for _, name := range names {
					paths = append(paths, dir+"/"+name)
				}
				return paths
			}
			apart(t, func() error {
				if err := mountAll(in(c.mounts)...); err != nil {
					return err
				}
				keep := neededPaths(in(c.keep)...)
				unmountAllBut(keep)
				mounts, err := mountinfo.Read("/proc/thread-self/mountinfo")
				var points []string
				for _, m := range mounts {
					if point, ok := strings.CutPrefix(m.Point, dir+"/"); ok {
						points = append(points, point)
					}
				}
				if err != nil || !slices.Equal(slices.Sorted(slices.Values(points)), slices.Sorted(slices.Values(c.stay))) {
					t.Errorf("left are %q, %v, want %q", points, err, c.stay)
				}
				var stray []string
				for _, point := range in(c.stray) {
					stray = append(stray, fmt.Sprintf("%q", point))
				}
				if got, err := strayMounts(keep); err != nil || !slices.Equal(got, stray) {
					t.Errorf("nobody needs %q, %v, want %q", got, err, stray)
				}
				return nil
			})
		})
	}
}

// TestDetachIsNotLedAstray: a user who renames folders and puts links in their place does not choose which mount goes.
func TestDetachIsNotLedAstray(t *testing.T) {
	dir := t.TempDir()
	apart(t, func() error {
		point := dir + "/of-the-system/dev"
		if err := mountAll(dir+"/home/user/dev", point); err != nil {
			return err
		}
		mounts, err := mountinfo.Read("/proc/thread-self/mountinfo")
		if err != nil {
			return err
		}
		i := slices.IndexFunc(mounts, func(m mountinfo.Mount) bool { return m.Point == dir+"/home/user/dev" })
		theirs := mounts[i]
		for _, change := range []func() error{
			func() error { return os.Symlink(dir+"/of-the-system", dir+"/home/user") },
			func() error { return errors.Join(os.Remove(dir+"/home/user"), os.Mkdir(dir+"/home/user", 0o700)) },
			func() error { return os.Symlink(point, dir+"/home/user/dev") },
			func() error { return mountAll(dir+"/home/user", dir+"/home/user/dev") },
		} {
			os.Rename(dir+"/home/user", dir+"/home/elsewhere")
			if err := change(); err != nil {
				return err
			}
			if err := detach(theirs); err == nil {
				t.Error("something was detached")
			}
		}
		mounts, err = mountinfo.Read("/proc/thread-self/mountinfo")
		if err == nil && !slices.ContainsFunc(mounts, func(m mountinfo.Mount) bool { return m.Point == point }) {
			err = fmt.Errorf("%s is gone", point)
		}
		return err
	})
}

// TestMountsThatNobodyAnswersFor: a folder that cannot be opened, as a user's own file system is to root, is not gone
// through.
func TestMountsThatNobodyAnswersFor(t *testing.T) {
	dir := t.TempDir()
	apart(t, func() error {
		fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fuse)
		if err := mountAll(dir+"/a", dir+"/a/b"); err != nil {
			return err
		}
		// A daemon that never answers, between what is needed and a mount that was there before.
		if err := os.Mkdir(dir+"/a/silent", 0o700); err != nil {
			return err
		}
		if err := unix.Mount("none", dir+"/a/silent", "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=65534,group_id=65534", fuse)); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(dir, "a/silent/x")); err == nil {
			return errors.New("the file system answers")
		}
		unmountAllBut(neededPaths(dir + "/b"))
		if stray, err := strayMounts(neededPaths(dir + "/b")); err != nil || len(stray) > 0 {
			t.Errorf("left are %s, %v", stray, err)
		}
		return nil
	})
}
