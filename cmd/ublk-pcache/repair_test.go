package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// ward is a cache with dirty data that nobody uses, and what is known about it.
type ward struct {
	pmem, backing string
	model         []byte  // what the device reads
	writes        []int64 // where, in bytes
	ksets         []int64
	data          int64 // where the data of the last write is, for sectors lastAt to lastAt+7
	firstData     int64 // where that of the first is
}

const lastAt = 4000

// firstWard is what the first test that needs a ward has made, for all of them.
var firstWard struct {
	ward
	region, disk content
}

// newWard returns a cache that was written to a few hundred times and closed before
// any of it was written back. Its files are the test's own.
func newWard(t *testing.T) *ward {
	t.Helper()
	dir := t.TempDir()
	first := &firstWard
	if first.region.size == 0 {
		first.ward = ward{}
		t.Run("writes", func(t *testing.T) { first.fill(t, newServerIn(t, dir)) })
		if t.Failed() {
			t.FailNow()
		}
		first.region, first.disk = contentOf(t, first.pmem), contentOf(t, first.backing)
	}
	w := first.ward
	// With holes, copies of it are made in no time.
	w.pmem, w.backing = filepath.Join(dir, "pmem"), filepath.Join(dir, "disk")
	first.region.write(t, w.pmem)
	first.disk.write(t, w.backing)
	return &w
}

func (w *ward) fill(t *testing.T, s *server) {
	s.format(t)
	layout, err := ondisk.ReadLayout(s.region, s.region.Size())
	if err != nil {
		t.Fatal(err)
	}
	c, err := engine.Open(s.region, disk{s.disk}, engine.Options{Queues: 1, Log: logger{s.log}})
	if err != nil {
		t.Fatal(err)
	}
	// Nothing is to be written back, however long it takes to fill.
	if _, err := c.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.pmem, w.backing, w.model = s.dev.PMEM, s.dev.Backing, make([]byte, s.disk.Size())
	rnd := rand.New(rand.NewPCG(1, 1))
	bytesOf := rand.NewChaCha8([32]byte{})
	q := c.Queue(0)
	for i := range 200 {
		at := rnd.IntN(lastAt - 8)
		if i == 199 {
			at = lastAt
		}
		r := &engine.Request{Op: engine.Write, Off: int64(at) * 512, Buf: make([]byte, 8*512)}
		bytesOf.Read(r.Buf)
		copy(w.model[r.Off:], r.Buf)
		w.writes = append(w.writes, r.Off)
		q.Submit(r)
		if done := q.Turn(); len(done) != 1 || r.Err != nil {
			t.Fatal(len(done), r.Err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	layout.WalkLog(s.region, layout.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		w.ksets = append(w.ksets, layout.Offset(at.Seg, at.Off))
		if w.data = layout.Offset(k.Keys[0].Seg, k.Keys[0].SegOff); w.firstData == 0 {
			w.firstData = w.data
		}
		return nil
	})
	if len(w.ksets) != 200 {
		t.Fatalf("%d ksets", len(w.ksets))
	}
}

// spoil inverts bytes of a file.
func spoil(t *testing.T, path string, off int64, n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	for i := range p {
		p[i] ^= 0x55
	}
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// unchanged returns a function that fails the test if the file holds anything else
// by then. It may have been opened, and its holes may have been given blocks.
func unchanged(t *testing.T, path string) (check func()) {
	t.Helper()
	zeros := make([]byte, 4096)
	state := func() string {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		hash := sha256.New()
		eachBlock(t, f, func(p []byte, off int64) {
			if !bytes.Equal(p, zeros[:len(p)]) {
				fmt.Fprint(hash, off)
				hash.Write(p)
			}
		})
		return string(hash.Sum(nil))
	}
	before := state()
	return func() {
		t.Helper()
		if state() != before {
			t.Errorf("%s was changed", path)
		}
	}
}

// onDisk compares the backing device with the model, but for some sectors.
func (w *ward) onDisk(t *testing.T, but func(sector int) bool) {
	t.Helper()
	got, err := os.ReadFile(w.backing)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(got)/512; i++ {
		if !but(i) && !bytes.Equal(got[i*512:][:512], w.model[i*512:][:512]) {
			t.Errorf("sector %d is wrong on the backing device", i)
			return
		}
	}
}

func TestRepairCommand(t *testing.T) {
	w := newWard(t)
	fresh := filepath.Join(t.TempDir(), "copy")
	// Both copies of cache_info, of all four positions, and a superblock.
	spoil(t, w.pmem, ondisk.InfoOff+8, 4)
	spoil(t, w.pmem, ondisk.InfoOff+4096+8, 4)
	spoil(t, w.pmem, ondisk.CtrlOff, 64)
	spoil(t, w.pmem, ondisk.SuperblockOff+16, 4)
	same := unchanged(t, w.pmem)
	out, err := execute(newCheckCmd(), w.pmem)
	fails(t, err, w.pmem, "problems found", "writeback "+w.pmem, "repair "+w.pmem)
	if !strings.Contains(out, "superblock") {
		t.Errorf("check says %q", out)
	}
	out, err = execute(newRepairCmd(), w.pmem)
	fails(t, err, "nothing was changed", "--in-place")
	for _, words := range []string{"cache_info: both copies", "key_tail: both copies", "dirty_tail: both copies", "superblock"} {
		if !strings.Contains(out, words) {
			t.Errorf("repair does not say %q: %q", words, out)
		}
	}
	_, err = execute(newRepairCmd(), w.pmem, fresh, "--in-place")
	fails(t, err, "--in-place", fresh)
	if _, err := execute(newRepairCmd(), w.pmem, fresh); err != nil {
		t.Error(err)
	}
	same()
	_, err = execute(newRepairCmd(), w.pmem, fresh)
	fails(t, err, fresh, "exists")
	if _, err := execute(newRepairCmd(), w.pmem, "--in-place"); err != nil {
		t.Error(err)
	}
	var heads [2][64 << 10]byte // the first 20 KiB, and the log
	for i, path := range []string{w.pmem, fresh} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(heads[i][:], 0); err != nil {
			t.Fatal(err)
		}
	}
	if heads[0] != heads[1] {
		t.Error("the copy is not what was made in place")
	}
	for _, path := range []string{w.pmem, fresh} {
		if out, err := execute(newCheckCmd(), path); err != nil {
			t.Errorf("check %s: %q, %v", path, out, err)
		}
		if out, err := execute(newRepairCmd(), path, "--in-place"); err != nil || !strings.Contains(out, "nothing to mend") {
			t.Errorf("repaired again: %q, %v", out, err)
		}
	}
	if out, err := execute(newWritebackCmd(), fresh, "-b", w.backing); err != nil || !strings.Contains(out, "format --force "+fresh) {
		t.Errorf("writeback: %q, %v", out, err)
	}
	w.onDisk(t, func(int) bool { return false })
}

// TestRepairLogCommand: nothing acknowledged is given up without being asked for.
func TestRepairLogCommand(t *testing.T) {
	w := newWard(t)
	spoil(t, w.pmem, w.ksets[100]+30, 8)
	fresh := filepath.Join(t.TempDir(), "copy")
	same := unchanged(t, w.pmem)
	out, err := execute(newCheckCmd(), w.pmem)
	fails(t, err, "problems found: 1")
	if !strings.Contains(out, "99 keys in 99 ksets") || !strings.Contains(out, " bytes of dirty data, sectors ") {
		t.Errorf("check says %q", out)
	}
	out, err = execute(newRepairCmd(), w.pmem, fresh)
	fails(t, err, "--give-up-log-damage", "writeback")
	if !strings.Contains(out, "remains: the log is damaged") {
		t.Errorf("repair says %q", out)
	}
	out, err = execute(newRepairCmd(), w.pmem, fresh, "--give-up-log-damage")
	if err != nil || !strings.Contains(out, "the 99 keys in 99 ksets behind it are kept") {
		t.Errorf("repair says %q, %v", out, err)
	}
	if out, err := execute(newCheckCmd(), fresh); err != nil {
		t.Errorf("check: %q, %v", out, err)
	}
	same()
	before := filepath.Join(t.TempDir(), "before")
	copySparse(t, w.pmem, before)
	_, err = execute(newWritebackCmd(), w.pmem, "-b", w.backing)
	fails(t, err, "all that is intact was written", "the log was damaged")
	onlyRecorded(t, before, w.pmem)
}

// TestWriteback saves what there is, and says what there is not.
func TestWriteback(t *testing.T) {
	w := newWard(t)
	same := unchanged(t, w.pmem)

	// A disk that is not the one, or was changed, and a cache that is in use.
	small := filepath.Join(t.TempDir(), "small")
	if err := os.WriteFile(small, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := execute(newWritebackCmd(), w.pmem, "-b", small)
	fails(t, err, small, "1048576 bytes, less than the 4194304")
	_, err = execute(newWritebackCmd(), w.pmem, "-b", w.backing, "--changed=discard")
	fails(t, err, "--changed=discard", "overwrite")
	spoil(t, w.backing, 4<<10, 512)
	unwritten := unchanged(t, w.backing)
	_, err = execute(newWritebackCmd(), w.pmem, "-b", w.backing)
	fails(t, err, w.pmem, w.backing, "written without its cache", "--changed=overwrite")
	r, err := pmem.Open(w.pmem+",volatile", pmem.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	_, err = execute(newWritebackCmd(), w.pmem, "-b", w.backing)
	fails(t, err, w.pmem, "in use")
	r.Close()
	unwritten()
	spoil(t, w.backing, 4<<10, 512)

	// The last write's data, the key_tail, and one kset.
	same()
	spoil(t, w.pmem, w.data+1000, 1)
	spoil(t, w.pmem, ondisk.CtrlOff, 32)
	spoil(t, w.pmem, w.ksets[100]+8, 8)
	before := filepath.Join(t.TempDir(), "before")
	copySparse(t, w.pmem, before)
	out, err := execute(newWritebackCmd(), w.pmem, "-b", w.backing)
	fails(t, err, w.pmem, "not everything was written")
	for _, words := range []string{"not written: sectors 4000-4007, 4096 bytes", "read as if mended: key_tail", "read as if mended: log: what was damaged"} {
		if !strings.Contains(out, words) {
			t.Errorf("writeback does not say %q: %q", words, out)
		}
	}
	onlyRecorded(t, before, w.pmem)
	var hidden int64 // what the kset that is lost wrote last
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 101 {
		hidden = int64(rnd.IntN(lastAt - 8))
	}
	w.onDisk(t, func(s int) bool { return s >= lastAt && s < lastAt+8 || int64(s) >= hidden && int64(s) < hidden+8 })

	spoil(t, w.backing, 4<<10, 512)
	if _, err := execute(newWritebackCmd(), w.pmem, "-b", w.backing, "--changed=overwrite"); err == nil || strings.Contains(err.Error(), "without") {
		t.Errorf("--changed=overwrite: %v", err)
	}
}
