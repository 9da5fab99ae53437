package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ublk-pcache/ondisk"
)

// TestRepairSays: for each kind of result and each place to put it, what is done, what
// is said, and the exit code agree.
func TestRepairSays(t *testing.T) {
	w := newWard(t)
	// As many clean keys as dirty ones: dirty_tail behind the first hundred.
	tail := func(path string) {
		var buf [ondisk.PositionSize]byte
		for slot := range uint8(2) {
			off := ondisk.EncodePosition(buf[:], ondisk.DirtyTail, ondisk.Replica{Slot: slot, Seq: 8 + slot}, ondisk.Position{Off: uint32(w.ksets[100] - w.ksets[0])})
			overwrite(t, path, off, buf[:])
		}
	}
	superblock := func(path string) { spoil(t, path, ondisk.SuperblockOff+16, 4) }
	const (
		order  = "in order, nothing to mend"
		clean  = "nothing to mend: what remains is clean data"
		mended = ": mended"
		asked  = "nothing was changed (give a file for the mended copy, or --in-place)"
		log    = "the log is still damaged (to give up what the damaged part held: --give-up-log-damage"
		data   = "damaged dirty data remains, an I/O error until it is written again: sectors 4000-4007"
		never  = "cannot be mended"
	)
	for _, c := range []struct {
		name   string
		damage func(path string)
		flags  string
		lines  bool   // something is mended
		left   string // in the lines of what remains
		says   string // the last line on stdout, empty for an error
		err    string // likewise
		copied bool
		opens  bool // and so does the original, once mended in place
	}{
		{name: "in order", damage: func(string) {}, says: order, copied: true, opens: true},
		{name: "mendable", damage: superblock, lines: true, says: mended, copied: true, opens: true},
		{name: "clean data damaged", damage: func(p string) { tail(p); spoil(t, p, w.firstData, 1) }, left: "clean data", says: clean, copied: true, opens: true},
		{name: "dirty data damaged", damage: func(p string) { spoil(t, p, w.data+1000, 1) }, left: "dirty data", err: data, copied: true, opens: true},
		{name: "dirty data damaged, rest mendable", damage: func(p string) { superblock(p); spoil(t, p, w.data+1000, 1) }, lines: true, left: "dirty data", err: data, copied: true, opens: true},
		{name: "log damaged", damage: func(p string) { spoil(t, p, w.ksets[100]+30, 8) }, left: "the log is damaged", err: log},
		{name: "log damaged, rest mendable", damage: func(p string) { superblock(p); spoil(t, p, w.ksets[100]+30, 8) }, lines: true, left: "the log is damaged", err: log},
		{name: "log given up", damage: func(p string) { spoil(t, p, w.ksets[100]+30, 8) }, flags: "--give-up-log-damage", lines: true, says: mended, copied: true, opens: true},
		{name: "not a cache any more", damage: func(p string) { erase(t, p, 0, 1<<20) }, lines: true, left: "where the log begins is lost", err: never},
		{name: "blank", damage: func(p string) { sparse(t, p) }, left: "too little of a cache", err: never},
	} {
		for _, to := range []string{"", "COPY", "--in-place"} {
			t.Run(c.name+" "+to, func(t *testing.T) {
				path, fresh := filepath.Join(t.TempDir(), "pmem"), filepath.Join(t.TempDir(), "copy")
				copySparse(t, w.pmem, path)
				c.damage(path)
				same := unchanged(t, path)
				args := strings.Fields(path + " " + strings.ReplaceAll(to, "COPY", fresh) + " " + c.flags)
				out, err := execute(newRepairCmd(), args...)
				lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
				mends := 0
				for _, l := range lines {
					if l != "" && !strings.HasPrefix(l, "remains: ") && !strings.HasPrefix(l, path+": ") {
						mends++
					}
				}
				if mends > 0 != c.lines {
					t.Errorf("lines %q", lines)
				}
				if !strings.Contains(out, c.left) || c.left == "" && strings.Contains(out, "remains: ") {
					t.Errorf("what remains: %q", lines)
				}
				last := lines[len(lines)-1]
				switch {
				case c.lines && to == "":
					fails(t, err, path, asked, c.err)
				case c.err != "":
					if fails(t, err, path, c.err); strings.Contains(out, "nothing to mend") || strings.Contains(out, mended) {
						t.Errorf("lines %q", lines)
					}
				case err != nil || !strings.Contains(last, path) || !strings.Contains(last, c.says) || strings.Contains(last, fresh) != (to == "COPY"):
					t.Errorf("lines %q, %v", lines, err)
				}
				if to != "--in-place" || !c.lines {
					same()
				}
				_, statErr := os.Stat(fresh)
				if copied := statErr == nil; copied != (c.copied && to == "COPY") {
					t.Errorf("a copy: %t", copied)
				}
				if to == "COPY" && !c.copied {
					fails(t, err, fresh+" was not made")
				}
				result := map[string]string{"COPY": fresh, "--in-place": path}[to]
				if c.opens && result != "" {
					if err := (&ward{pmem: result, backing: w.backing}).add(t, serveOptions{}); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}
