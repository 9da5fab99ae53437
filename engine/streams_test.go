package engine

import (
	"bytes"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestStretches: how long the stretch is that a read makes longer.
func TestStretches(t *testing.T) {
	for name, reads := range map[string][][3]int64{ // offset, length, of the stretch
		"forwards":          {{0, 4, 4}, {4, 4, 8}, {8, 1, 9}},
		"backwards":         {{8, 4, 4}, {4, 4, 8}, {0, 4, 12}},
		"apart":             {{0, 4, 4}, {5, 4, 4}, {10, 4, 4}},
		"exchanged":         {{0, 4, 4}, {8, 4, 4}, {4, 4, 12}, {12, 4, 16}},
		"two meet":          {{0, 4, 4}, {4, 4, 8}, {12, 4, 4}, {16, 4, 8}, {8, 4, 20}},
		"overlaps":          {{0, 4, 4}, {2, 4, 6}, {5, 2, 7}},
		"within":            {{0, 4, 4}, {4, 4, 8}, {2, 2, 2}, {8, 4, 12}},
		"once more":         {{0, 4, 4}, {4, 4, 8}, {8, 4, 12}, {0, 4, 4}, {4, 4, 8}, {8, 4, 12}, {12, 4, 16}},
		"the same":          {{0, 4, 4}, {0, 4, 4}, {0, 4, 4}},
		"two, one by one":   {{0, 4, 4}, {100, 4, 4}, {4, 4, 8}, {104, 4, 8}, {8, 4, 12}, {96, 4, 12}},
		"more than it ends": {{4, 4, 4}, {0, 12, 12}},
	} {
		var x streams
		for i, r := range reads {
			if got := x.missed(r[0], r[1]); got.bytes() != r[2] {
				t.Errorf("%s: read %d makes a stretch of %d, want %d", name, i, got.bytes(), r[2])
			}
		}
	}
}

// TestStretchesAreRemembered: as many streams as there are places for are known apart, while others
// read at random, and streams that have ended make room.
func TestStretchesAreRemembered(t *testing.T) {
	var x streams
	dice := rand.New(rand.NewPCG(1, 1))
	others := func() {
		for range 40 {
			x.missed(1<<50+dice.Int64N(1<<40)<<12, 4096)
		}
	}
	for generation := range int64(3) {
		for read := range int64(20) {
			for s := range int64(streamsLong) {
				off := (generation*streamsLong + s) << 40
				if read == 0 { // two in a row are what it takes to be known
					x.missed(off, 4096)
				}
				if got := x.missed(off+(read+1)*4096, 4096); got.bytes() != (read+2)*4096 {
					t.Fatalf("generation %d: read %d of stream %d makes a stretch of %d", generation, read+1, s, got.bytes())
				}
				others()
			}
		}
	}
}

// TestStretchesAreTrue holds random reads against all that were made: what is said to be a stretch has
// been read without a gap, and ends where the read does or begins where it does.
func TestStretchesAreTrue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var x streams
		var seen [64]bool
		for range rapid.IntRange(1, 200).Draw(t, "reads") {
			off := rapid.Int64Range(0, 55).Draw(t, "off")
			n := rapid.Int64Range(1, 8).Draw(t, "n")
			for i := range n {
				seen[off+i] = true
			}
			from, to := off, off+n
			for from > 0 && seen[from-1] {
				from--
			}
			for to < 64 && seen[to] {
				to++
			}
			got := x.missed(off, n)
			around, _ := x.around(off, n, got.place)
			if got.from > off || got.to < off+n || got.from < from || got.to > to || around < got.bytes() || around > to-from {
				t.Fatalf("%d sectors at %d make a stretch from %d to %d, around are %d, and only %d to %d have been read", n, off, got.from, got.to, around, from, to)
			}
		}
	})
}

// TestStreamPassesBy: what a stream reads beyond the cutoff is not kept, whichever queues it
// comes by and in which order; what is cached of it is served, and what others read meanwhile
// is kept.
func TestStreamPassesBy(t *testing.T) {
	const cutoff, piece, size = 1 << 20, 64 << 10, 16 << 20
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 12, true, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	content := make([]byte, 64<<20)
	fillStamp(content, 0, 1)
	disk.WriteAt(content, 0)
	var holding atomic.Bool
	disk.Script(func(op backing.Op) (f backing.Fault) {
		f.Hold = holding.Load()
		return f
	})
	r := newRig(t, mem, disk, 2)
	set(t, r.Cache, func(s *Settings) { s.SeqCutoff = cutoff })
	r.write(t, 8<<20, stamped(8<<20>>sectorShift, piece>>sectorShift, 2))
	copy(content[8<<20:], stamped(8<<20>>sectorShift, piece>>sectorShift, 2))

	begin := func(queue int, off int64) (wait func()) {
		p := make([]byte, piece)
		answered := r.begin(queue, &Request{Op: Read, Off: off, Buf: p})
		return func() {
			t.Helper()
			if err := answered(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, content[off:off+piece]) {
				t.Fatalf("wrong data at %d", off)
			}
		}
	}
	read := func(queue int, off int64) { begin(queue, off)() }
	for off := int64(0); off < size; off += 2 * piece {
		// The later one first, and the disk has not answered when the other comes.
		holding.Store(off != 8<<20)
		wait := begin(1, off+piece)
		for holding.Load() && disk.Held() == 0 {
			time.Sleep(100 * time.Microsecond)
		}
		other := begin(0, off)
		for holding.Load() && disk.Held() < 2 {
			time.Sleep(100 * time.Microsecond)
		}
		holding.Store(false)
		disk.Release()
		wait()
		other()
		if off%(8*piece) == 0 {
			read(0, 32<<20+off*2) // not of a stream
		}
	}
	kept := 0
	for off := int64(0); off < size; off += piece {
		switch cached := r.Cached(off, piece); {
		case off+piece <= cutoff && !cached, off == 8<<20 && !cached:
			t.Errorf("%d is not cached", off)
		case cached:
			kept++
		}
		if off%(8*piece) == 0 && !r.Cached(32<<20+off*2, piece) {
			t.Errorf("what others read at %d is not cached", 32<<20+off*2)
		}
	}
	s := r.Status()
	passed := (size/piece - int64(kept)) * piece
	// A stretch begins anew behind the piece that was a hit.
	if most := int64(2*cutoff + 4*piece); int64(kept*piece) > most || int64(s.Bypassed) != passed {
		t.Errorf("%d bytes are kept, at most %d should be; %d were not, and %d are counted", kept*piece, most, passed, s.Bypassed)
	}
	// Once more it is a stream from its first miss on; without a cutoff it is kept.
	for off := int64(0); off < size; off += piece {
		read(0, off)
	}
	if again := r.Status().Bypassed; int64(again-s.Bypassed) < passed-2*cutoff-4*piece {
		t.Errorf("of the second pass %d bytes are not kept, after %d of the first", again-s.Bypassed, passed)
	}
	set(t, r.Cache, func(s *Settings) { s.SeqCutoff = 0 })
	before := r.Status().Bypassed
	for off := int64(0); off < size; off += piece {
		read(int(off/piece)%2, off)
	}
	for off := int64(0); off < size; off += piece {
		if !r.Cached(off, piece) {
			t.Errorf("without a cutoff, %d is not cached", off)
		}
	}
	if now := r.Status().Bypassed; now != before {
		t.Errorf("without a cutoff, %d bytes are counted", now-before)
	}
	if err := r.kill(); err != nil {
		t.Fatal(err)
	}
}

// TestStreamAmongOthers: where others miss as much beside it, a stream is kept like the rest.
func TestStreamAmongOthers(t *testing.T) {
	const piece, cutoff = 64 << 10, 1 << 20
	for _, c := range []struct {
		every int64 // so many pieces of the stream, one of others
		kept  bool
	}{{1, true}, {3, true}, {6, false}} {
		var x streams
		for i := range int64(100) {
			f := x.missed(i*piece, piece)
			if i%c.every == 0 {
				x.missed(1<<40+i*1<<30, piece)
			}
			if got := isStream(f.bytes(), f.others, cutoff); got != (!c.kept && (i+1)*piece > cutoff) {
				t.Errorf("one of others with %d of the stream: after %d it is %t that it is one", c.every, i+1, got)
				break
			}
		}
	}
}

// TestStreamLeavesGhosts: a block that left the window lately is still known after a stream
// has come by.
func TestStreamLeavesGhosts(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	set(t, r.Cache, func(s *Settings) { s.SeqCutoff = 8 << 10 })
	r.missedBefore(64<<10, 4096)
	for off := int64(0); off < 128<<10; off += 4096 {
		r.read(t, off, 4096)
	}
	if s := r.Status(); s.GhostHits != 0 || s.Bypassed != 30*4096 {
		t.Errorf("%d ghosts were hit, %d bytes passed by", s.GhostHits, s.Bypassed)
	}
	r.read(t, 64<<10, 4096)
	if s := r.Status(); s.GhostHits != 1 || !r.Cached(64<<10, 4096) {
		t.Errorf("%d ghosts were hit", s.GhostHits)
	}
	r.kill()
}
