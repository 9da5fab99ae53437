package engine

import (
	"context"
	"math/rand/v2"
	"runtime"
	"testing"
)

// What a thread executes between these is counted (tests/count).

//go:noinline
func countBegin() {}

//go:noinline
func countEnd() {}

// BenchmarkCount is what tests/count counts: each part does b.N operations in one
// thread, in an order that is always the same.
func BenchmarkCount(b *testing.B) {
	const size, set = 4096, 64 << 20
	order := func() []int64 {
		offs := make([]int64, set/size)
		for i, k := range rand.New(rand.NewPCG(1, 1)).Perm(len(offs)) {
			offs[i] = int64(k) * size
		}
		return offs
	}
	alone := func(f func()) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		countBegin()
		f()
		countEnd()
	}
	client := func(x *bench, batch int, op Op) *client {
		c := newClient(x, 0, batch, size, op)
		c.offs = order()
		return c
	}
	serve := func(name string, batch int, op Op, filled bool) {
		b.Run(name, func(b *testing.B) {
			x := newBench(b, benchSet, 1, false)
			defer x.end(b)
			if filled {
				client(x, 16, Write).run(set / size)
			}
			c := client(x, batch, op)
			alone(func() { c.run(b.N) })
		})
	}
	serve("write", 1, Write, true)
	serve("write-16", 16, Write, true)
	serve("hit", 1, Read, true)
	serve("hit-16", 16, Read, true)
	serve("miss", 1, Read, false)
	b.Run("enter", func(b *testing.B) {
		x := newIndex(set)
		offs := order()
		alone(func() {
			for i := range b.N {
				s := x.span(offs[i%len(offs)]>>sectorShift, size>>sectorShift)
				s.sh.Lock()
				s.setLocked(extent{seg: uint32(i), flags: extDirty}, nil)
				s.sh.Unlock()
			}
		})
	})
	b.Run("replay", func(b *testing.B) {
		x := newBench(b, benchSet, 1, false)
		client(x, 16, Write).run((b.N + 15) / 16 * 16)
		x.end(b)
		alone(func() {
			x.start(b, 1)
		})
		x.end(b)
	})
	b.Run("writeback", func(b *testing.B) {
		x := newBench(b, benchSet, 1, false)
		defer x.end(b)
		if _, err := x.Rest(context.Background()); err != nil {
			b.Fatal(err)
		}
		c := client(x, 16, Write)
		for left := b.N; left > 0; left -= len(c.offs) {
			c.run((min(left, len(c.offs)) + 15) / 16 * 16)
		}
		x.disk.open()
		x.workers.stop = make(chan struct{})
		_, written := x.journal.head()
		alone(func() {
			for x.writeback.at.ksets < written {
				if err := x.round(written); err != nil {
					b.Fatal(err)
				}
			}
		})
		close(x.workers.stop)
		x.Resume()
	})
}
