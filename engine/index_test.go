package engine

import (
	"testing"

	"pgregory.net/rapid"
)

// checkTree walks the whole tree of a stripe and fails on a broken invariant.
func checkTree(t interface{ Fatalf(string, ...any) }, s *slab, root uint32) (extents, nodes int) {
	last, leafDepth := -1, -1
	var walk func(id uint32, depth, lo, hi int)
	walk = func(id uint32, depth, lo, hi int) {
		nd := s.at(id)
		nodes++
		if nd.n == 0 {
			t.Fatalf("empty node")
		}
		if !nd.inner {
			if leafDepth == -1 {
				leafDepth = depth
			} else if leafDepth != depth {
				t.Fatalf("leaves at depths %d and %d", leafDepth, depth)
			}
		}
		for i := range int(nd.n) {
			e := nd.e[i]
			if nd.inner {
				l, h := lo, hi
				if i > 0 {
					l = int(e.off)
				}
				if i+1 < int(nd.n) {
					h = int(nd.e[i+1].off)
				}
				if l >= h {
					t.Fatalf("separators out of order: %d >= %d", l, h)
				}
				walk(e.seg, depth+1, l, h)
				continue
			}
			extents++
			if int(e.off) < lo || int(e.off) >= hi {
				t.Fatalf("extent at %d outside its separators [%d,%d)", e.off, lo, hi)
			}
			if e.n == 0 || int(e.off) < last {
				t.Fatalf("extent [%d,+%d) begins before %d", e.off, e.n, last)
			}
			last = int(e.end())
		}
	}
	if root != 0 {
		walk(root, 0, 0, 1<<16)
	}
	return extents, nodes
}

// TestIndexAgainstArray drives one stripe with random sets, cuts, forgets and
// cleans, mirrored in a plain array with one entry per sector.
func TestIndexAgainstArray(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := newIndex(3 * stripeSectors << sectorShift)
		base := int64(stripeSectors) * rapid.Int64Range(0, 2).Draw(t, "stripe")
		type sector struct {
			seg   uint32
			pos   uint16
			flags uint16
			set   bool
		}
		var model [stripeSectors]sector
		grain := rapid.SampledFrom([]int{1, 1, 8, 64}).Draw(t, "grain")
		maxLen := rapid.SampledFrom([]int{1, 4, 64, 2048}).Draw(t, "maxLen")
		draw := func(name string) span {
			off := rapid.IntRange(0, (stripeSectors-1)/grain).Draw(t, name) * grain
			n := min(rapid.IntRange(1, maxLen).Draw(t, name+"Len")*grain, stripeSectors-off)
			return x.span(base+int64(off), n)
		}
		var next uint32
		// Every second sector makes a tree of three levels.
		if rapid.Bool().Draw(t, "deep") {
			for i := 0; i < stripeSectors; i += 2 {
				s := x.span(base+int64(i), 1)
				s.setLocked(extent{seg: 1, pos: s.off})
				model[i] = sector{1, s.off, 0, true}
			}
			next = 8
		}
		for range rapid.IntRange(1, 600).Draw(t, "ops") {
			s := draw("at")
			switch rapid.IntRange(0, 9).Draw(t, "op") {
			default:
				e := extent{seg: next / 4, pos: s.off, flags: rapid.SampledFrom([]uint16{0, extDirty, extZero, extZero | extDirty}).Draw(t, "state")}
				next++
				s.sh.Lock()
				s.setLocked(e)
				s.sh.Unlock()
				for i := s.off; i < s.end(); i++ {
					model[i] = sector{e.seg, e.pos + i - s.off, e.flags, true}
				}
			case 0, 1:
				s.sh.Lock()
				s.cutLocked()
				s.sh.Unlock()
				for i := s.off; i < s.end(); i++ {
					model[i] = sector{}
				}
			case 2, 3:
				seg := uint32(rapid.IntRange(0, int(next/4)).Draw(t, "seg"))
				x.forget(s, s.place(seg, s.off), nil)
				for i := s.off; i < s.end(); i++ {
					if model[i].set && model[i].seg == seg && model[i].flags&extDirty == 0 {
						model[i] = sector{}
					}
				}
			case 4:
				seg := uint32(rapid.IntRange(0, int(next/4)).Draw(t, "seg"))
				x.clean(s, s.place(seg, s.off), nil)
				for i := s.off; i < s.end(); i++ {
					if model[i].seg == seg {
						model[i].flags &^= extDirty
					}
				}
			}
		}
		s := x.span(base, stripeSectors)
		extents, nodes := checkTree(t, &s.sh.slab, *s.root)
		if extents != int(s.sh.extents) || nodes != s.sh.slab.used {
			t.Fatalf("tree holds %d extents in %d nodes, counted %d in %d", extents, nodes, s.sh.extents, s.sh.slab.used)
		}
		var got [stripeSectors]sector
		var count [3]int64
		var prev extent
		for _, e := range s.partsLocked(nil, func(extent) bool { return true }) {
			if prev.n > 0 && prev.abuts(e) {
				t.Fatalf("%+v and %+v are not joined", prev, e)
			}
			prev = e
			switch e.flags {
			case extZero:
			case extZero | extDirty:
				count[2] += int64(e.n)
			default:
				count[e.flags] += int64(e.n)
			}
			for i := range e.n {
				got[e.off+i] = sector{e.seg, e.pos + i, e.flags, true}
			}
		}
		for i := range got {
			if got[i] != model[i] {
				t.Fatalf("sector %d: %+v, want %+v", i, got[i], model[i])
			}
		}
		if count != s.sh.sectors {
			t.Fatalf("counted %v sectors, kept %v", count, s.sh.sectors)
		}
		for i := 0; i < stripeSectors; i += 61 {
			c := s.seekLocked(uint16(i))
			for c.ok() && int(c.at().off) <= i && int(c.at().end()) <= i {
				t.Fatalf("seek(%d) stopped at %+v", i, *c.at())
			}
			if c.ok() != false && model[i].set && !(int(c.at().off) <= i && i < int(c.at().end())) {
				t.Fatalf("seek(%d) found %+v", i, *c.at())
			}
		}
	})
}
