package estimate

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"ublk-pcache/internal/trace"
)

// traceOf takes in lines of a trace.
func traceOf(t *testing.T, lines string) *Trace {
	t.Helper()
	made, err := load("made", trace.Read(strings.NewReader(lines), "made"))
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// large is a size of a block with which a small trace fills a cache: the smallest has room
// for 496 of them.
const (
	large = 1 << 20
	room  = 31 * 16
)

func play(t *testing.T, trace *Trace, size Size, scaled int) Result {
	t.Helper()
	r, err := trace.Play(size, scaled)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestLoad: blocks are counted that are touched in part, too, and each access of them.
func TestLoad(t *testing.T) {
	made := traceOf(t, "R 4095 2\nW 8192 4096\nR 0 4096\nW 40960 8193\n")
	if made.Blocks != 7 || made.Touched != 6 || made.end != 13 {
		t.Errorf("%+v", made)
	}
	for lines, says := range map[string]string{
		"R 0 4096\nR 0 9223372036854775807\n": "made touches more than 1073741824 different blocks",
		"R 0 4096\nhello\n":                   "made: line 2: ",
	} {
		if _, err := load("made", trace.Read(strings.NewReader(lines), "made")); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", lines, err)
		}
	}
}

// TestFits: what fits into the cache is missed once.
func TestFits(t *testing.T) {
	// Three rounds over 130 blocks, in pieces that requests and stripes cut, half of them writes.
	var lines strings.Builder
	for round := range 3 {
		for first := 0; first < 130; first += 13 {
			fmt.Fprintf(&lines, "%c %d %d\n", "RW"[(round+first/13)%2], first*blockSize, 13*blockSize)
		}
	}
	made := traceOf(t, lines.String())
	for _, scaled := range []int{4 << 10, 64 << 10, 512 << 10, large} {
		got := play(t, made, Size{Percent: 100}, scaled)
		want := Result{
			Segments: 31, Scale: scaled / blockSize, Raised: true, Missed: 130, FIFO: 130, LRU: 130, S3FIFO: 130, ReadBlocks: 195, ReadMissed: 65,
			Stored: got.Stored,
		}
		// 195 blocks are written and 65 are filled, and to each belongs at most some KiB of log.
		if data := int64(260 * scaled); got != want || got.Stored < data || got.Stored > data+260*8<<10 {
			t.Errorf("blocks of %d: %+v", scaled, got)
		}
	}
}

// TestFull: of blocks that are read in a circle of twice the cache, LRU keeps none that is
// read again, but for the one that is read all the time; and nothing keeps more than there is
// room for.
func TestFull(t *testing.T) {
	var lines strings.Builder
	const around = 2 * room
	for range 3 {
		for b := range around {
			fmt.Fprintf(&lines, "R %d %d\nR %d 1\n", b*blockSize, blockSize, around*blockSize)
		}
	}
	got := play(t, traceOf(t, lines.String()), Size{Percent: 10}, large)
	if got.LRU != 3*around+1 || got.FIFO < got.LRU+4 || got.FIFO > got.LRU+6 {
		t.Errorf("%+v", got)
	}
	if got.Missed < 3*around-2*room || got.Missed > got.FIFO+4 || got.ReadMissed != got.Missed {
		t.Errorf("%+v", got)
	}
}

// TestSame: whatever is asked, and however fast, the outcome is nearly the same when it is asked
// again. What is promoted depends on whether the collector or write-back was faster.
func TestSame(t *testing.T) {
	dice := rand.New(rand.NewPCG(3, 4))
	zipf := rand.NewZipf(dice, 1.1, 10, 4*room)
	var lines strings.Builder
	for range 8 * room {
		fmt.Fprintf(&lines, "%c %d %d\n", "RW"[dice.IntN(2)], zipf.Uint64()*blockSize, blockSize*(1+dice.IntN(3)))
	}
	made := traceOf(t, lines.String())
	first := play(t, made, Size{Percent: 1}, large)
	if first.Missed < int64(made.Touched) || first.Missed == made.Blocks || first.ReadMissed == 0 || first.ReadMissed >= first.Missed {
		t.Errorf("%+v", first)
	}
	for range 3 {
		again := play(t, made, Size{Percent: 1}, large)
		again.Stored = first.Stored // there is a record for each round of write-back, and time makes some
		missed := again.Missed
		again.Missed, again.ReadMissed = first.Missed, first.ReadMissed
		if again != first || math.Abs(float64(missed-first.Missed)) > 0.02*float64(first.Missed) {
			t.Errorf("%+v, then %+v, missed %d", first, again, missed)
		}
	}
}

// TestSegments: how many a cache of some size has.
func TestSegments(t *testing.T) {
	made := &Trace{Touched: 1 << 20} // 4 GiB
	for _, c := range []struct {
		size   Size
		scaled int
		want   int
		raised bool
	}{
		{Size{Percent: 25}, 4 << 10, 64, false},
		{Size{Percent: 25.01}, 4 << 10, 65, false},
		{Size{Percent: 25}, 64 << 10, 1024, false},
		{Size{Percent: 5}, 4 << 10, 31, true},
		{Size{Bytes: 1 << 30}, 4 << 10, 63, false}, // less what stands in front of them
		{Size{Bytes: 512 << 20}, 4 << 10, 31, false},
		{Size{Bytes: 256 << 20}, 4 << 10, 31, true},
	} {
		if got, raised := made.segments(c.size, c.scaled); got != c.want || raised != c.raised {
			t.Errorf("%v of %d: %d segments, %t", c.size, c.scaled, got, raised)
		}
	}
}

// TestScaled: a block is as large as it takes for many segments, and no larger.
func TestScaled(t *testing.T) {
	for _, c := range []struct {
		touched int
		size    Size
		want    int
	}{
		{1 << 20, Size{Percent: 50}, 4 << 10}, // 2 GiB
		{1 << 20, Size{Percent: 25}, 8 << 10},
		{1 << 20, Size{Percent: 5}, 64 << 10},
		{1 << 10, Size{Percent: 5}, 64 << 10},
		{1 << 10, Size{Bytes: 4 << 30}, 4 << 10},
	} {
		if got := (&Trace{Touched: c.touched}).Scaled(c.size); got != c.want {
			t.Errorf("%v of %d blocks: %d bytes", c.size, c.touched, got)
		}
	}
	// Bytes are the trace's, whatever else is asked for.
	if got := play(t, traceOf(t, "R 0 4096\n"), Size{Bytes: 1 << 30}, large); got.Segments != 63 || got.Scale != 1 {
		t.Errorf("%+v", got)
	}
}

// TestRefused: what cannot be played.
func TestRefused(t *testing.T) {
	made := traceOf(t, "R 1125899906842624 1\n")
	if _, err := made.Play(Size{Percent: 5}, 4<<10); err == nil || !strings.Contains(err.Error(), "made goes up to places that are further than 1 PiB") {
		t.Error(err)
	}
	for _, scaled := range []int{0, -4096, 512, 6000, 12 << 10, 2 << 20} {
		if _, err := traceOf(t, "R 0 1\n").Play(Size{Percent: 5}, scaled); err == nil || !strings.Contains(err.Error(), "a power of 2 from 4096 to 1048576") {
			t.Errorf("blocks of %d: %v", scaled, err)
		}
	}
}
