package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

// onlyRecorded fails the test if a region has changed in more than its record of
// the backing device.
func onlyRecorded(t *testing.T, before, after string) {
	t.Helper()
	var f [2]*os.File
	for i, path := range []string{before, after} {
		var err error
		if f[i], err = os.Open(path); err != nil {
			t.Fatal(err)
		}
		defer f[i].Close()
	}
	other := make([]byte, 4096)
	for i := range f {
		eachBlock(t, f[i], func(p []byte, off int64) {
			if _, err := f[1-i].ReadAt(other[:len(p)], off); err != nil {
				t.Fatal(err)
			}
			for slot := range uint8(2) {
				var buf [ondisk.FingerprintSize]byte
				if at := ondisk.EncodeFingerprint(buf[:], ondisk.Replica{Slot: slot}, &ondisk.Fingerprint{}); off == 0 {
					clear(p[at:][:len(buf)])
					clear(other[at:][:len(buf)])
				}
			}
			if !bytes.Equal(p, other[:len(p)]) {
				t.Errorf("%s has changed in the page at %d", after, off)
			}
		})
	}
}

// scripted is a disk whose writes ask first.
type scripted struct {
	disk
	write func(off int64, n int) error
}

func (d scripted) Write(buf []byte, off int64, done func(error)) {
	if err := d.write(off, len(buf)); err != nil {
		done(err)
		return
	}
	d.disk.Write(buf, off, done)
}

// save runs writeback on a disk that asks.
func (w *ward) save(t *testing.T, o writebackOptions, write func(off int64, n int) error) (out string, err error) {
	t.Helper()
	r, readOnly, err := openToSave(w.pmem)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dev, err := backing.Open(w.backing)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if o.pmem == "read-only" {
		readOnly = unix.EROFS
	}
	var text bytes.Buffer
	err = o.save(&text, r, readOnly, dev, scripted{disk{dev}, write})
	return text.String(), err
}

func takesAll(int64, int) error { return nil }

// add opens the cache as add does, on copies.
func (w *ward) add(t *testing.T, o serveOptions) (err error) {
	t.Helper()
	dir := t.TempDir()
	c := &ward{pmem: filepath.Join(dir, "pmem"), backing: filepath.Join(dir, "disk")}
	copySparse(t, w.pmem, c.pmem)
	copySparse(t, w.backing, c.backing)
	t.Run("add", func(t *testing.T) {
		s := serverOn(t, c.pmem, c.backing)
		if _, err = s.open(&o); err != nil {
			return
		}
		// Nothing clean was given up.
		if rep := ondisk.Check(s.region, s.region.Size(), false); o.Changed == engine.Refuse && rep.Keys != 200 {
			t.Errorf("the cache has %d keys", rep.Keys)
		}
	})
	return err
}

// full is a disk without room for some places.
func full(isFull func(off int64) bool) func(int64, int) error {
	return func(off int64, n int) error {
		if isFull(off) || isFull(off+int64(n)-1) {
			return unix.ENOSPC
		}
		return nil
	}
}

// TestWritebackRepeated: what writeback has written itself, all of it or a part, is
// no change of the disk to its next run nor to add; what somebody else has, is.
func TestWritebackRepeated(t *testing.T) {
	for name, isFull := range map[string]func(off int64) bool{
		"behind 1 MiB":     func(off int64) bool { return off >= 1<<20 },
		"in the first KiB": func(off int64) bool { return off < 64<<10 },
		"everywhere":       func(int64) bool { return true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWard(t)
			before := filepath.Join(t.TempDir(), "before")
			copySparse(t, w.pmem, before)
			foreign := func(when string) {
				t.Helper()
				spoil(t, w.backing, 4<<10, 512)
				defer spoil(t, w.backing, 4<<10, 512)
				same, sameDisk := unchanged(t, w.pmem), unchanged(t, w.backing)
				_, err := w.save(t, writebackOptions{}, takesAll)
				fails(t, err, "written without its cache", "--changed=overwrite")
				fails(t, w.add(t, serveOptions{}), "written without its cache", "--changed=overwrite", "--changed=discard")
				if same(); t.Failed() {
					t.Fatal(when)
				}
				sameDisk()
			}
			for range 2 {
				out, err := w.save(t, writebackOptions{}, full(isFull))
				fails(t, err, w.pmem, "not everything was written", "no space left", "repeated")
				if !strings.Contains(out, "not written: sectors ") {
					t.Errorf("writeback says %q", out)
				}
				onlyRecorded(t, before, w.pmem)
				if err := w.add(t, serveOptions{}); err != nil {
					t.Fatalf("half written: %v", err)
				}
				foreign("half written")
			}
			for range 2 {
				if out, err := w.save(t, writebackOptions{}, takesAll); err != nil || !strings.Contains(out, "819200 bytes of dirty data") && !strings.Contains(out, ", 0 bytes were not") {
					t.Fatalf("repeated: %q, %v", out, err)
				}
				w.onDisk(t, func(int) bool { return false })
				onlyRecorded(t, before, w.pmem)
				if err := w.add(t, serveOptions{}); err != nil {
					t.Fatalf("all written: %v", err)
				}
				foreign("all written")
			}
		})
	}
}

// TestWritebackCutOff: at whatever write the machine dies, nothing but somebody else's
// work is taken for that.
func TestWritebackCutOff(t *testing.T) {
	w := newWard(t)
	var snaps []*ward
	writes := 0
	snap := func(int64, int) error {
		if writes++; writes%12 == 1 {
			c := &ward{pmem: filepath.Join(t.TempDir(), "pmem"), backing: filepath.Join(t.TempDir(), "disk")}
			copySparse(t, w.pmem, c.pmem)
			copySparse(t, w.backing, c.backing)
			snaps = append(snaps, c)
		}
		return nil
	}
	if _, err := w.save(t, writebackOptions{}, snap); err != nil {
		t.Fatal(err)
	}
	if len(snaps) < 5 {
		t.Fatalf("%d writes", writes)
	}
	for i, c := range snaps {
		if err := c.add(t, serveOptions{}); err != nil {
			t.Errorf("cut off at write %d: %v", 12*i, err)
		}
	}
}

// TestWritebackOverAChange: what was written over a change stays so to add, since the
// clean data in the cache is out of date, however far writeback came.
func TestWritebackOverAChange(t *testing.T) {
	for name, write := range map[string]func(int64, int) error{"all": takesAll, "half": full(func(off int64) bool { return off >= 1<<20 })} {
		w := newWard(t)
		spoil(t, w.backing, 4<<10, 512)
		out, err := w.save(t, writebackOptions{changed: "overwrite"}, write)
		if (err == nil) != (name == "all") || !strings.Contains(out, "an add has to be given --changed=overwrite, too") {
			t.Errorf("%s: %q, %v", name, out, err)
		}
		fails(t, w.add(t, serveOptions{}), "written without its cache", "--changed=overwrite")
		if err := w.add(t, serveOptions{Changed: engine.Overwrite}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Nothing is dirty: what is clean must not count as good either.
	w := newWard(t)
	t.Run("clean", func(t *testing.T) {
		s := serverOn(t, w.pmem, w.backing)
		c, err := engine.Open(s.region, disk{s.disk}, engine.Options{Queues: 1, Log: logger{s.log}})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Flush(t.Context()), c.Close()); err != nil {
			t.Fatal(err)
		}
	})
	spoil(t, w.backing, 4<<10, 512)
	for range 2 {
		if out, err := w.save(t, writebackOptions{}, takesAll); err != nil || strings.Contains(out, "add") {
			t.Errorf("nothing dirty: %q, %v", out, err)
		}
	}
	t.Run("opened", func(t *testing.T) {
		s := serverOn(t, w.pmem, w.backing)
		if _, err := s.open(&serveOptions{}); err != nil {
			t.Fatal(err)
		}
		if rep := ondisk.Check(s.region, s.region.Size(), false); rep.Keys != 0 {
			t.Errorf("the cache still has %d keys of a disk that was changed", rep.Keys)
		}
	})
}

// TestWritebackReadOnly: a region that cannot be written to is saved all the same, and
// it is said what add will say, and which answer is right.
func TestWritebackReadOnly(t *testing.T) {
	w := newWard(t)
	same := unchanged(t, w.pmem)
	out, err := w.save(t, writebackOptions{pmem: "read-only"}, takesAll)
	if err != nil || !strings.Contains(out, "read-only file system") || !strings.Contains(out, "--changed=overwrite is right") {
		t.Errorf("%q, %v", out, err)
	}
	same()
	w.onDisk(t, func(int) bool { return false })
	fails(t, w.add(t, serveOptions{}), "right after a writeback that could not record itself: --changed=overwrite")
	if err := w.add(t, serveOptions{Changed: engine.Overwrite}); err != nil {
		t.Error(err)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	_, err = execute(newWritebackCmd(), missing+",size=512M", "-b", w.backing)
	fails(t, err, missing, "no such file")
	if _, err := os.Stat(missing); err == nil {
		t.Error("writeback has made a region")
	}
}

// TestWritebackDamaged: the record is right for the cache as it is and as repair makes
// it, whichever of its positions are lost.
func TestWritebackDamaged(t *testing.T) {
	for name, damage := range map[string]func(w *ward){
		"superblock":      func(w *ward) { erase(t, w.pmem, ondisk.SuperblockOff, ondisk.SuperblockSize) },
		"dirty_tail":      func(w *ward) { erase(t, w.pmem, ondisk.CtrlOff+32, 32) },
		"both tails":      func(w *ward) { erase(t, w.pmem, ondisk.CtrlOff, 64) },
		"the fingerprint": func(w *ward) { spoil(t, w.pmem, 3<<9+16, 8); spoil(t, w.pmem, 3<<9+2<<10+16, 8) },
		"one copy of it":  func(w *ward) { spoil(t, w.pmem, 3<<9+16, 8) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWard(t)
			damage(w)
			before := filepath.Join(t.TempDir(), "before")
			copySparse(t, w.pmem, before)
			for range 2 {
				if out, err := w.save(t, writebackOptions{}, takesAll); err != nil {
					t.Fatalf("%q, %v", out, err)
				}
			}
			onlyRecorded(t, before, w.pmem)
			if out, err := execute(newRepairCmd(), w.pmem, "--in-place"); err != nil {
				t.Fatalf("%q, %v", out, err)
			}
			if err := w.add(t, serveOptions{}); err != nil {
				t.Errorf("add: %v", err)
			}
			spoil(t, w.backing, 4<<10, 512)
			fails(t, w.add(t, serveOptions{}), "written without its cache")
		})
	}
}
