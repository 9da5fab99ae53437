package pmem

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
)

// TestFake compares a Fake and clones of clones with plain slices, from
// several goroutines, each with a range of its own that begins and ends
// inside a page.
func TestFake(t *testing.T) {
	const size = 5*fakeChunkSize/2 + 8
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	dice := rand.New(rand.NewPCG(seed, 0))
	type pair struct {
		f    *Fake
		want []byte
	}
	all := []pair{{NewFake(size), make([]byte, size)}}
	for range 30 {
		from := all[dice.IntN(len(all))]
		all = append(all, pair{from.f.Clone(), append([]byte{}, from.want...)})
		var stores sync.WaitGroup
		const goroutines = 4
		share := int64(size/8/goroutines) * 8
		for g := range int64(goroutines) {
			seed := dice.Uint64()
			stores.Go(func() {
				dice := rand.New(rand.NewPCG(seed, 0))
				for range 10 {
					p := all[dice.IntN(len(all))]
					n := dice.Int64N(share/8+1) * 8
					if dice.IntN(2) == 0 {
						n = dice.Int64N(64) * 8
					}
					off := g*share + dice.Int64N((share-n)/8+1)*8
					if dice.IntN(4) == 0 {
						clear(p.want[off : off+n])
						p.f.Zero(off, n)
						continue
					}
					data := bytes.Repeat([]byte{byte(1 + dice.IntN(255))}, int(n))
					copy(p.want[off:], data)
					if got, err := p.f.WriteAt(data, off); got != len(data) || err != nil {
						t.Errorf("write: %d, %v", got, err)
					}
				}
			})
		}
		stores.Wait()
	}
	got := make([]byte, size)
	for i, p := range all {
		if n, err := p.f.ReadAt(got, 0); n != size || err != nil {
			t.Fatalf("read: %d, %v", n, err)
		}
		if !bytes.Equal(got, p.want) {
			t.Errorf("clone %d differs", i)
		}
	}
}

func TestFakeBounds(t *testing.T) {
	f := NewFake(MinSize)
	p := make([]byte, 16)
	for _, c := range []struct {
		off int64
		n   int
	}{{4, 8}, {0, 12}, {-8, 8}, {MinSize - 8, 16}, {1<<63 - 8, 16}} {
		for name, store := range map[string]func(){
			"write": func() { f.WriteAt(p[:c.n], c.off) },
			"zero":  func() { f.Zero(c.off, int64(c.n)) },
		} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s of %d at %d: no panic", name, c.n, c.off)
					}
				}()
				store()
			}()
		}
	}
	if n, err := f.ReadAt(p, MinSize-6); n != 6 || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if _, err := f.ReadAt(p, -1); !errors.Is(err, ErrRange) {
		t.Errorf("read at -1: %v", err)
	}
}

func TestFakePoison(t *testing.T) {
	f := NewFake(MinSize)
	f.Poison(4900, 8)
	f.Poison(5000, 100)
	f = f.Clone()
	p := make([]byte, 64)
	for _, c := range []struct{ off, bad int64 }{
		{4836, -1}, {4837, 4900}, {4907, 4907}, {4908, -1}, {4936, -1}, {4937, 5000}, {5050, 5050}, {5099, 5099}, {5100, -1},
	} {
		n, err := f.ReadAt(p, c.off)
		var fault *FaultError
		switch {
		case c.bad < 0:
			if n != len(p) || err != nil {
				t.Errorf("read at %d: %d, %v", c.off, n, err)
			}
		case !errors.As(err, &fault) || !errors.Is(err, syscall.EIO) || fault.Off != c.bad:
			t.Errorf("read at %d: %d, %v", c.off, n, err)
		}
	}
	long := make([]byte, 8192)
	var fault *FaultError
	if _, err := f.ReadAt(long, 0); !errors.As(err, &fault) || fault.Off != 4900 {
		t.Errorf("read over both: %v", err)
	}
	if _, err := f.WriteAt(p, 5040); err != nil {
		t.Errorf("store to bad memory: %v", err)
	}
}

func TestFakePunch(t *testing.T) {
	f := NewFake(MinSize)
	old, p := bytes.Repeat([]byte{1}, 64), bytes.Repeat([]byte{2}, 64)
	f.WriteAt(old, 4096)
	f.Punch(4128, 8)
	f.Punch(4120, 16)
	f = f.Clone()
	for name, store := range map[string]func(off int64) error{
		"write": func(off int64) error { n, err := f.WriteAt(p, off); return counted(n, len(p), err) },
		"zero":  func(off int64) error { return f.Zero(off, int64(len(p))) },
	} {
		for off, bad := range map[int64]int64{4048: -1, 4056: -1, 4064: 4120, 4120: 4120, 4128: 4128, 4136: -1} {
			err := store(off)
			var fault *FaultError
			if bad < 0 && err != nil || bad >= 0 && (!errors.As(err, &fault) || fault.Off != bad) {
				t.Errorf("%s at %d: %v", name, off, err)
			}
		}
	}
	if err := f.Zero(4096, 64); err == nil {
		t.Error("a hole takes zeros")
	}
	f.Mend()
	got := make([]byte, 64)
	if _, err := f.ReadAt(got, 4096); err != nil {
		t.Fatal(err)
	}
	want := append(make([]byte, 24), old[24:40]...)
	if !bytes.Equal(got[:40], want) {
		t.Errorf("in front of the hole and in it: %v, want %v", got[:40], want)
	}
}

func BenchmarkFakeClone(b *testing.B) {
	f := NewFake(MinSize)
	for i := range int64(8) {
		f.WriteAt(make([]byte, 1<<20), i*16<<20)
	}
	p := make([]byte, 8)
	for b.Loop() {
		c := f.Clone()
		for i := range int64(8) {
			c.WriteAt(p, i*16<<20)
		}
	}
}
