package estimate

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
)

// TestRegion: it is a region like any, and zeros take no memory.
func TestRegion(t *testing.T) {
	const size = 16 * pageSize
	r, plain := newRegion(size), make([]byte, size)
	dice := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		off := dice.Int64N(size+1) &^ 7
		n := dice.Int64N(min(size-off, 3*pageSize)+1) &^ 7
		p := plain[off:][:n]
		switch dice.IntN(4) {
		case 0:
			for i := range p {
				p[i] = byte(dice.Uint32())
			}
			if _, err := r.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		case 1:
			clear(p)
			if _, err := r.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		case 2:
			clear(p)
			if err := r.Zero(off, n); err != nil {
				t.Fatal(err)
			}
		default:
			got := bytes.Repeat([]byte{1}, int(n))
			if _, err := r.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
				t.Fatalf("%d bytes at %d are others: %v", n, off, err)
			}
		}
		for number := range r.mu.pages {
			if bytes.Equal(plain[number*pageSize:][:pageSize], zeros[:]) {
				t.Fatalf("page %d is kept for zeros", number)
			}
		}
	}
	if n, err := r.ReadAt(make([]byte, 16), size-8); n != 8 || err != io.EOF {
		t.Error(n, err)
	}
	for _, off := range []int64{-8, size + 8} {
		if _, err := r.ReadAt(make([]byte, 8), off); err == nil {
			t.Errorf("it is read at %d", off)
		}
		if _, err := r.WriteAt(make([]byte, 8), off); err == nil {
			t.Errorf("it is written at %d", off)
		}
	}
	if err := r.Zero(size-8, 16); err == nil {
		t.Error("it is zeroed behind its end")
	}
	before := r.stored.Load()
	r.WriteAt(make([]byte, 24), 0)
	r.Zero(0, 8)
	if n := r.stored.Load() - before; n != 32 {
		t.Errorf("%d bytes are counted of 32", n)
	}
}
