package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// eachBlock visits what a file holds outside its holes.
func eachBlock(t *testing.T, f *os.File, visit func(block []byte, off int64)) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for end := int64(0); ; {
		off, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		if end, err = unix.Seek(int(f.Fd()), off, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		for off < end {
			p := buf[:min(int64(len(buf)), end-off)]
			if _, err := f.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
			for block := range slices.Chunk(p, 4096) {
				visit(block, off)
				off += int64(len(block))
			}
		}
	}
}

// content is what a file holds, without its zeros.
type content struct {
	size   int64
	blocks map[int64][]byte // by offset
}

func contentOf(t *testing.T, path string) content {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	c := content{info.Size(), map[int64][]byte{}}
	zeros := make([]byte, 4096)
	eachBlock(t, f, func(p []byte, off int64) {
		if !bytes.Equal(p, zeros[:len(p)]) {
			c.blocks[off] = bytes.Clone(p)
		}
	})
	return c
}

// write makes a file of it, with holes for the zeros.
func (c content) write(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(c.size); err != nil {
		t.Fatal(err)
	}
	for off, p := range c.blocks {
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

// copySparse copies a file, and makes holes of all that is zero.
func copySparse(t *testing.T, from, to string) {
	t.Helper()
	contentOf(t, from).write(t, to)
}

// overwrite puts bytes into a file.
func overwrite(t *testing.T, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// sparse makes a blank region.
func sparse(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, pmem.MinSize); err != nil {
		t.Fatal(err)
	}
}

func erase(t *testing.T, path string, off int64, n int) { overwrite(t, path, off, make([]byte, n)) }

// serverOn opens a region and a backing device that are there, as start does.
func serverOn(t *testing.T, cache, back string) *server {
	t.Helper()
	s := &server{dev: device{ID: 3, PMEM: cache, Backing: back, Queues: 1}, log: zap.NewNop()}
	var err error
	if s.disk, err = backing.Open(back); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.disk.Close() })
	if s.region, err = pmem.Open(cache, pmem.ReadWrite); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.region.Close() })
	return s
}

// open is what start does with what a server opened.
func (s *server) open(o *serveOptions) (*engine.Cache, error) {
	p, err := s.plan(o)
	if err == nil {
		err = s.openCache(o, p)
	}
	if err != nil {
		return nil, err
	}
	return s.cache, s.cache.Close()
}

// What a call does with a region, or else words of the line that refuses it.
const (
	opens   = "opens"
	formats = "formats"
)

// TestFormatting: each state that a region can be in, and what each way to make a
// cache does there. What is refused is not touched.
func TestFormatting(t *testing.T) {
	w := newWard(t)
	dir := t.TempDir()
	empty, clean, cleanDisk := filepath.Join(dir, "empty"), filepath.Join(dir, "clean"), filepath.Join(dir, "clean disk")
	if _, err := execute(newFormatCmd(), empty+",size=512M"); err != nil {
		t.Fatal(err)
	}
	copySparse(t, w.pmem, clean)
	copySparse(t, w.backing, cleanDisk)
	t.Run("written back", func(t *testing.T) {
		s := serverOn(t, clean, cleanDisk)
		c, err := engine.Open(s.region, disk{s.disk}, engine.Options{Queues: 1, Log: logger{s.log}})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Flush(context.Background()), c.Close()); err != nil {
			t.Fatal(err)
		}
	})
	for _, made := range []*string{&empty, &clean} {
		copySparse(t, *made, *made+" copy")
		*made += " copy"
	}
	blank := filepath.Join(dir, "blank")
	sparse(t, blank)

	const (
		header  = ondisk.SegmentHeader
		seg     = ondisk.SegmentSize
		segment = ondisk.SegmentsOff // the first
	)
	noSuperblock := func(t *testing.T, p string) { erase(t, p, ondisk.SuperblockOff, ondisk.SuperblockSize) }
	noTails := func(t *testing.T, p string) { erase(t, p, ondisk.CtrlOff, 64) }
	noInfo := func(t *testing.T, p string) {
		spoil(t, p, ondisk.InfoOff+8, 4)
		spoil(t, p, ondisk.InfoOff+4096+8, 4)
	}
	tooMany := func(t *testing.T, p string) {
		var buf [ondisk.SuperblockSize]byte
		ondisk.EncodeSuperblock(buf[:], ondisk.Superblock{Segments: 33})
		overwrite(t, p, ondisk.SuperblockOff, buf[:])
	}
	damaged := func(dirty string) string {
		return "PMEM holds a damaged cache, in which " + dirty + " bytes of dirty data can be found|check PMEM|writeback PMEM -b BACK|repair PMEM"
	}
	var written ondisk.Ranges // by all ksets but the first
	for i, at := range w.writes {
		if i > 0 {
			written.Add(at, 4096)
		}
	}
	found := fmt.Sprint(written.Bytes())
	const lost, foreign = "superblock at byte 4096 is lost", "holds no cache, but is not blank"
	all := func(line, by string) string { return line + "|to give up what it holds: " + by + ")" }

	for _, c := range []struct {
		name              string
		of                string // the region
		then              func(t *testing.T, path string)
		format, add, with string // format, add, add --format; forced, each formats
	}{
		{"blank", blank, nil, formats, formats, formats},
		{"text in front", blank, func(t *testing.T, p string) { overwrite(t, p, 65536, []byte("somebody's")) },
			foreign + "|: --force)", foreign + "|: --format)", formats},
		{"text in a segment", blank, func(t *testing.T, p string) { overwrite(t, p, segment+5*seg+header+100, []byte("somebody's")) },
			foreign + "|: --force)", foreign + "|: --format)", formats},
		{"a file system", blank, func(t *testing.T, p string) {
			overwrite(t, p, 1024+56, []byte{0x53, 0xEF})
			overwrite(t, p, ondisk.SuperblockOff, []byte(strings.Repeat("group descriptors", 20)))
		}, foreign + "|: --force)", foreign + "|: --format)", formats},
		{"an empty cache", empty, nil, "without dirty data|--force", opens, formats},
		{"a clean cache", clean, nil, "without dirty data|--force", opens, formats},
		{"a dirty cache", w.pmem, nil,
			"685056 bytes of dirty data|writeback PMEM -b BACK|give them up: --force)", opens, "685056 bytes of dirty data|writeback PMEM -b BACK|give them up: --format --force)"},
		{"one copy damaged", w.pmem, func(t *testing.T, p string) { spoil(t, p, ondisk.CtrlOff+16, 8) },
			all(damaged("685056"), "--force"), opens, all(damaged("685056"), "--format --force")},
		{"no superblock, clean", clean, noSuperblock,
			"damaged cache, without dirty data|" + lost + "|repair PMEM|--force)", "damaged cache, without dirty data|" + lost + "|repair PMEM|: --format)", formats},
		{"no superblock, empty", empty, noSuperblock,
			"damaged cache, without dirty data|--force)", "damaged cache, without dirty data|: --format)", formats},
		{"no superblock", w.pmem, noSuperblock,
			all(damaged("685056")+"|"+lost, "--force"), all(damaged("685056")+"|"+lost, "--format --force"), all(damaged("685056")+"|"+lost, "--format --force")},
		{"another superblock", w.pmem, func(t *testing.T, p string) { overwrite(t, p, ondisk.SuperblockOff, []byte("somebody's superblock")) },
			all(damaged("685056")+"|"+lost, "--force"), all(damaged("685056")+"|"+lost, "--format --force"), all(damaged("685056")+"|"+lost, "--format --force")},
		{"superblock damaged", w.pmem, func(t *testing.T, p string) { spoil(t, p, ondisk.SuperblockOff, 4) },
			all(damaged("685056")+"|crc", "--force"), all(damaged("685056")+"|crc", "--format --force"), all(damaged("685056")+"|crc", "--format --force")},
		{"no superblock, first kset damaged", w.pmem, func(t *testing.T, p string) { noSuperblock(t, p); spoil(t, p, w.ksets[0], 4) },
			all(damaged("680960"), "--force"), all(damaged("680960"), "--format --force"), all(damaged("680960"), "--format --force")},
		// The log looks empty, so only a search finds the rest; what was overwritten counts once.
		{"no superblock, first kset erased", w.pmem, func(t *testing.T, p string) { noSuperblock(t, p); erase(t, p, w.ksets[0], 64) },
			all(damaged(found), "--force"), all(damaged(found), "--format --force"), all(damaged(found), "--format --force")},
		{"first kset damaged", w.pmem, func(t *testing.T, p string) { spoil(t, p, w.ksets[0], 4) },
			all(damaged("680960"), "--force"), "the log is damaged|check PMEM|writeback PMEM -b BACK|repair PMEM|--format --force)", all(damaged("680960"), "--format --force")},
		{"log damaged", w.pmem, func(t *testing.T, p string) { spoil(t, p, w.ksets[100]+30, 8) },
			all(damaged("742400"), "--force"), "the log is damaged|check PMEM|writeback PMEM -b BACK|repair PMEM|--format --force)", all(damaged("742400"), "--format --force")},
		{"a generation lost", w.pmem, func(t *testing.T, p string) { erase(t, p, w.data-(w.data-segment)%seg+8<<10, 32) },
			all(damaged("685056"), "--force"), all(damaged("685056")+"|generation", "--format --force"), all(damaged("685056"), "--format --force")},
		{"tails lost", w.pmem, noTails,
			all(damaged("685056"), "--force"), all(damaged("685056")+"|key_tail", "--format --force"), all(damaged("685056"), "--format --force")},
		{"all records in front lost", w.pmem, func(t *testing.T, p string) { noSuperblock(t, p); noTails(t, p); noInfo(t, p) },
			all(damaged("685056"), "--force"), all(damaged("685056"), "--format --force"), all(damaged("685056"), "--format --force")},
		// With the log. Nothing is found, and nothing tells what was there.
		{"first MiB erased", w.pmem, func(t *testing.T, p string) { erase(t, p, 0, 1<<20) },
			"damaged cache, in which 0 bytes|--force)", "damaged cache, in which 0 bytes|--format --force)", "damaged cache, in which 0 bytes|--format --force)"},
		{"of a larger device", w.pmem, tooMany,
			"damaged cache|smaller than its cache|whole|restore it from a copy|--force)", "smaller than its cache|--format --force)", "smaller than its cache|--format --force)"},
		{"never completed", empty, func(t *testing.T, p string) {
			var buf [ondisk.InfoSize]byte
			for slot := range uint8(2) {
				off := ondisk.EncodeInfo(buf[:], ondisk.Replica{Slot: slot, Seq: slot}, ondisk.Info{Segments: 32})
				overwrite(t, p, off, buf[:])
			}
		}, "never completely formatted|--force)", "never completely formatted|--format --force)", "never completely formatted|--format --force)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			of, disk := c.of, w.backing
			if of == clean {
				disk = cleanDisk
			}
			path, back := filepath.Join(t.TempDir(), "pmem"), filepath.Join(t.TempDir(), "disk")
			renew := func() {
				copySparse(t, of, path)
				copySparse(t, disk, back)
				if c.then != nil {
					c.then(t, path)
				}
			}
			renew()
			same := unchanged(t, path)
			for call, want := range map[string]string{"format": c.format, "add": c.add, "add --format": c.with} {
				var err error
				wantBack := back
				if call == "format" {
					_, err = execute(newFormatCmd(), path)
					wantBack = "BACKING" // it is not told
				} else {
					t.Run(call, func(t *testing.T) {
						_, err = serverOn(t, path, back).open(&serveOptions{Format: call != "add"})
					})
				}
				if want != opens && want != formats {
					fails(t, err, strings.Split(strings.NewReplacer("PMEM", path, "BACK", wantBack).Replace(want), "|")...)
					same()
					continue
				}
				if err != nil {
					t.Errorf("%s: %v", call, err)
				}
				r, err := pmem.Open(path, pmem.ReadOnly)
				if err != nil {
					t.Fatal(err)
				}
				rep := ondisk.Check(r, r.Size(), false)
				if hadKeys := of == w.pmem || of == clean; len(rep.Problems) > 0 || rep.Keys > 0 != (hadKeys && want == opens) {
					t.Errorf("%s: %d keys in the cache, problems %v", call, rep.Keys, rep.Problems)
				}
				r.Close()
				renew()
				same = unchanged(t, path)
			}
			r, err := pmem.Open(path, pmem.ReadOnly)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			for call, f := range map[string]formatting{"format --force": formatCommand(true), "add --format --force": addCommand(true, true)} {
				if err := f.check(r, back); err != nil {
					t.Errorf("%s: %v", call, err)
				}
			}
			if c.add != opens {
				// A service makes no cache of anything, and does not say that add could.
				_, err := (&server{dev: device{PMEM: path}, region: r}).planNew(&serveOptions{Existing: true})
				fails(t, err, path, "ublk-pcache format ")
				if strings.Contains(err.Error(), "--format") {
					t.Errorf("run: %v", err)
				}
			}
		})
	}
}

// TestFormattingUnreadable: nobody knows what is in memory that cannot be read.
func TestFormattingUnreadable(t *testing.T) {
	w := newWard(t)
	for name, c := range map[string]struct {
		prepare func(path string)
		cut     int64 // what is behind cannot be read
		says    string
	}{
		"not a cache":                 {func(p string) { sparse(t, p); overwrite(t, p, 8, []byte("somebody's")) }, 100 << 20, "cannot be read"},
		"the superblock":              {func(string) {}, ondisk.SuperblockOff, "superblock cannot be read"},
		"of a cache":                  {func(string) {}, 100 << 20, "a damaged cache"},
		"of one without a superblock": {func(p string) { erase(t, p, ondisk.SuperblockOff, 24) }, 100 << 20, "a damaged cache"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pmem")
			copySparse(t, w.pmem, path)
			c.prepare(path)
			r, err := pmem.Open(path, pmem.ReadOnly)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := os.Truncate(path, c.cut); err != nil {
				t.Fatal(err)
			}
			for call, f := range map[string]formatting{"format": formatCommand(false), "add": addCommand(false, false), "add --format": addCommand(true, false)} {
				err := f.check(r, "")
				fails(t, err, path, c.says, "check "+path, f.byAll)
				if err != nil && strings.Contains(err.Error(), "no cache") {
					t.Errorf("%s: %v", call, err)
				}
			}
		})
	}
}

// TestOpenDamaged: whoever is refused a damaged cache is told what can be done.
func TestOpenDamaged(t *testing.T) {
	w := newWard(t)
	spoil(t, w.pmem, w.ksets[100]+30, 8)
	same := unchanged(t, w.pmem)
	remedies := []string{"the log is damaged at 0:", "check " + w.pmem, "writeback " + w.pmem + " -b " + w.backing, "repair " + w.pmem}
	for call, c := range map[string]struct {
		o    serveOptions
		says string
		not  string
	}{
		"add":     {serveOptions{}, "give up what it holds: --format --force", "waits"},
		"recover": {serveOptions{Recover: true}, "cannot continue device 3|the device waits", "--format"},
		"run":     {serveOptions{Existing: true}, "ublk-pcache format --force " + w.pmem, "--format"},
	} {
		t.Run(call, func(t *testing.T) {
			_, err := serverOn(t, w.pmem, w.backing).open(&c.o)
			fails(t, err, append(strings.Split(c.says, "|"), remedies...)...)
			if err != nil && strings.Contains(err.Error(), c.not) {
				t.Errorf("%v", err)
			}
		})
	}
	for _, err := range []error{engine.ErrKeyGeneration, engine.ErrKeyInLog, engine.ErrKeyOverlap} {
		s := &server{dev: device{PMEM: w.pmem, Backing: w.backing}}
		fails(t, s.openError(&serveOptions{}, fmt.Errorf("key 1 of the kset at 0:0: %w", err)), w.pmem, "check "+w.pmem, "--format --force")
	}
	same()
	// Without a superblock, a device that waits is not told to make a new cache.
	erase(t, w.pmem, ondisk.SuperblockOff, ondisk.SuperblockSize)
	t.Run("recover without a superblock", func(t *testing.T) {
		_, err := serverOn(t, w.pmem, w.backing).open(&serveOptions{Recover: true})
		fails(t, err, w.pmem, "superblock", "check "+w.pmem, "writeback "+w.pmem, "the device waits")
		if err != nil && strings.Contains(err.Error(), "format") {
			t.Errorf("%v", err)
		}
	})
	t.Run("recover of a blank region", func(t *testing.T) {
		s := newServer(t)
		_, err := s.open(&serveOptions{Recover: true})
		fails(t, err, s.dev.PMEM, "no cache any more", "del --force", "the device waits")
	})
}

// TestShrunkDisk: a disk that was made smaller is refused, with the way to go on, which
// works.
func TestShrunkDisk(t *testing.T) {
	for _, dirty := range []bool{false, true} {
		w := newWard(t)
		if !dirty {
			w.pmem += " empty"
			sparse(t, w.pmem)
			t.Run("made", func(t *testing.T) {
				if _, err := serverOn(t, w.pmem, w.backing).open(&serveOptions{}); err != nil {
					t.Fatal(err)
				}
			})
		}
		if err := os.Truncate(w.backing, 3<<20); err != nil {
			t.Fatal(err)
		}
		open := func(o serveOptions) (err error) {
			t.Run("open", func(t *testing.T) { _, err = serverOn(t, w.pmem, w.backing).open(&o) })
			return err
		}
		goOn := "no dirty data, so begin with a new one: --format)"
		if dirty {
			goOn = "685056 bytes of dirty data first; or give them up: --format --force)"
		}
		same := unchanged(t, w.pmem)
		fails(t, open(serveOptions{}), w.backing, "3145728", "4194304", "right device", goOn)
		fails(t, open(serveOptions{Existing: true}), w.backing, "ublk-pcache format --force "+w.pmem)
		err := open(serveOptions{Recover: true})
		if fails(t, err, w.backing, "right device"); err != nil && strings.Contains(err.Error(), "format") {
			t.Error(err)
		}
		_, err = execute(newWritebackCmd(), w.pmem, "-b", w.backing)
		fails(t, err, w.backing, "right device")
		if dirty {
			fails(t, open(serveOptions{Format: true}), "dirty data")
		}
		same()
		if err := open(serveOptions{Format: true, Force: dirty}); err != nil {
			t.Errorf("dirty %t: %v", dirty, err)
		}
	}
}
