package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// What the thread of a queue does for a request is measured while the disk
// answers no write, so that write-back costs no part of it, and against what no
// cache can do without: the same stores, or loads, to the same memory.

// benchMemory is a plain mapping that takes a fence for durable, as DAX does.
type benchMemory struct{ *pmem.Region }

func (benchMemory) Durable() bool { return true }

const (
	benchSize = 2 << 30   // bytes of the region
	benchSet  = 256 << 20 // that are read and written; more than the caches of the CPU have
	benchFull = 1 << 30   // that are written until the cache is emptied, not timed
)

// benchRegion is used by one benchmark after the other, all of it touched.
var benchRegion = sync.OnceValue(func() benchMemory {
	m := benchMemory{pmem.Heap(benchSize)}
	m.Zero(0, benchSize)
	return m
})

// benchDisk has zeros and takes everything, but writes only while it is open.
type benchDisk struct {
	size int64
	mu   struct {
		sync.Mutex
		closed bool
		held   []func(error)
	}
}

func (d *benchDisk) Read(buf []byte, off int64, done func(error))  { clear(buf); done(nil) }
func (d *benchDisk) Write(buf []byte, off int64, done func(error)) { d.answer(done) }
func (d *benchDisk) Zero(off, n int64, done func(error))           { d.answer(done) }
func (d *benchDisk) Flush(done func(error))                        { d.answer(done) }
func (d *benchDisk) Size() int64                                   { return d.size }
func (d *benchDisk) BlockSize() int                                { return sectorSize }
func (d *benchDisk) Buffer(n int) []byte                           { return make([]byte, n) }

func (d *benchDisk) answer(done func(error)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.closed {
		d.mu.held = append(d.mu.held, done)
		return
	}
	done(nil)
}

func (d *benchDisk) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.closed = true
}

func (d *benchDisk) open() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.closed = false
	for _, done := range d.mu.held {
		done(nil)
	}
	d.mu.held = nil
}

// bench is a cache that is measured, or tested as fast as it goes.
type bench struct {
	*Cache
	disk    *benchDisk
	written int64 // bytes since the cache was empty
}

func newBench(b *testing.B, size int64, queues int, crc bool) *bench {
	m := benchRegion()
	if err := ondisk.Format(m, ondisk.FormatOptions{DataCRC: crc, GCPercent: 90}); err != nil {
		b.Fatal(err)
	}
	x := &bench{disk: &benchDisk{size: size}}
	x.start(b, queues)
	x.disk.close()
	return x
}

func (x *bench) start(b *testing.B, queues int) {
	b.Helper()
	c, err := Open(benchRegion(), x.disk, Options{Queues: queues, Log: &testLog{}})
	if err != nil {
		b.Fatal(err)
	}
	x.Cache = c
}

func (x *bench) end(b testing.TB) {
	b.Helper()
	x.disk.open()
	if err := x.Close(); err != nil {
		b.Fatal(err)
	}
}

// empty has everything written back and collected.
func (x *bench) empty(b testing.TB) {
	b.Helper()
	x.disk.open()
	if err := x.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	if err := x.setGC(0); err != nil {
		b.Fatal(err)
	}
	for begin := time.Now(); x.Status().Extents > 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > time.Minute {
			b.Fatalf("%d extents are never collected", x.Status().Extents)
		}
	}
	if err := x.setGC(90); err != nil {
		b.Fatal(err)
	}
	x.written = 0
	x.disk.close()
}

// client is the thread of a queue.
type client struct {
	q    *Queue
	reqs []Request
	offs []int64
	i    int
}

func newClient(x *bench, queue, batch, size int, op Op) *client {
	c := &client{q: x.Queue(queue), reqs: make([]Request, batch), offs: make([]int64, benchSet/size)}
	for i := range c.offs {
		c.offs[i] = int64(i * size)
	}
	rand.Shuffle(len(c.offs), func(i, j int) { c.offs[i], c.offs[j] = c.offs[j], c.offs[i] })
	for i := range c.reqs {
		c.reqs[i] = Request{Op: op, Buf: stamped(int64(i), size/sectorSize, 1)}
	}
	return c
}

// run makes n requests, whole batches of them.
func (c *client) run(n int) {
	for ; n > 0; n -= len(c.reqs) {
		for i := range c.reqs {
			c.reqs[i].Off = c.offs[c.i%len(c.offs)]
			c.i++
			c.q.Submit(&c.reqs[i])
		}
		for left := len(c.reqs); left > 0; {
			for _, r := range c.q.Turn() {
				if r.Err != nil {
					panic(r.Err)
				}
				left--
			}
		}
	}
}

// threads runs n operations, shared by as many threads as there are functions.
func threads(n int, each []func(n int)) {
	var wg sync.WaitGroup
	for _, run := range each {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			run(n / len(each))
		})
	}
	wg.Wait()
}

// shapes calls measure for each kind of load.
func shapes(b *testing.B, measure func(b *testing.B, size, batch, threads int)) {
	for _, size := range []int{512, 4 << 10, 64 << 10, 1 << 20} {
		for _, batch := range []int{1, 16} {
			for threads := 1; threads <= 2; threads++ {
				b.Run(fmt.Sprintf("size=%d/batch=%d/threads=%d", size, batch, threads), func(b *testing.B) {
					b.SetBytes(int64(size))
					b.ReportAllocs()
					measure(b, size, batch, threads)
				})
			}
		}
	}
}

// whole rounds up to what is a number of batches for each thread.
func whole(n, batch, threads int) int {
	unit := batch * threads
	return (n + unit - 1) / unit * unit
}

func withAndWithoutSums(b *testing.B, measure func(b *testing.B, crc bool)) {
	for _, crc := range []bool{false, true} {
		b.Run(fmt.Sprintf("crc=%t", crc), func(b *testing.B) { measure(b, crc) })
	}
}

// BenchmarkWrite writes over the same set at random, in turns of a batch.
func BenchmarkWrite(b *testing.B) {
	withAndWithoutSums(b, func(b *testing.B, crc bool) {
		shapes(b, func(b *testing.B, size, batch, n int) {
			x := newBench(b, benchSet, n, crc)
			defer x.end(b)
			var each []func(int)
			for i := range n {
				each = append(each, newClient(x, i, batch, size, Write).run)
			}
			b.ResetTimer()
			for left := whole(b.N, batch, n); left > 0; {
				round := min(left, whole(int(benchFull-x.written)/size, batch, n))
				threads(round, each)
				left -= round
				if x.written += int64(round * size); x.written >= benchFull {
					b.StopTimer()
					x.empty(b)
					b.StartTimer()
				}
			}
			b.StopTimer()
		})
	})
}

// BenchmarkRead reads at random what is all in the cache.
func BenchmarkRead(b *testing.B) {
	withAndWithoutSums(b, func(b *testing.B, crc bool) {
		shapes(b, func(b *testing.B, size, batch, n int) {
			x := newBench(b, benchSet, n, crc)
			defer x.end(b)
			fill := newClient(x, 0, batch, size, Write)
			fill.run(len(fill.offs))
			var each []func(int)
			for i := range n {
				each = append(each, newClient(x, i, batch, size, Read).run)
			}
			b.ResetTimer()
			threads(whole(b.N, batch, n), each)
			b.StopTimer()
			if misses := x.Status().Misses; misses > 0 {
				b.Fatalf("%d misses", misses)
			}
		})
	})
}

// BenchmarkBareStore is what a write cannot do without: its data stored, one
// place after the other as the segments are filled, and one fence for a batch.
func BenchmarkBareStore(b *testing.B) {
	shapes(b, func(b *testing.B, size, batch, n int) {
		m := benchRegion()
		var each []func(int)
		for i := range n {
			at, bufs := i*(benchFull/n), make([][]byte, batch)
			for k := range bufs {
				bufs[k] = stamped(int64(k), size/sectorSize, 1)
			}
			each = append(each, func(n int) {
				for ; n > 0; n -= batch {
					for k := range bufs {
						if _, err := m.WriteAt(bufs[k], int64(at)); err != nil {
							panic(err)
						}
						if at += size; at%(benchFull/2) == 0 {
							at -= benchFull / 2
						}
					}
					m.Fence()
				}
			})
		}
		b.ResetTimer()
		threads(whole(b.N, batch, n), each)
	})
}

// BenchmarkBareLoad is what a read cannot do without.
func BenchmarkBareLoad(b *testing.B) {
	shapes(b, func(b *testing.B, size, batch, n int) {
		m := benchRegion()
		var each []func(int)
		for range n {
			offs, buf, at := rand.Perm(benchSet/size), make([]byte, batch*size), 0
			each = append(each, func(n int) {
				for i := range n {
					p := buf[i%batch*size:][:size]
					if _, err := m.ReadAt(p, int64(offs[at%len(offs)]*size)); err != nil {
						panic(err)
					}
					at++
				}
			})
		}
		b.ResetTimer()
		threads(whole(b.N, batch, n), each)
	})
}

// BenchmarkDrain writes back dirty blocks of 4 KiB that lie at random, to a disk
// that takes no time; an operation is a block.
func BenchmarkDrain(b *testing.B) {
	withAndWithoutSums(b, func(b *testing.B, crc bool) {
		const size = 4096
		x := newBench(b, 2*benchSet, 1, crc)
		defer x.end(b)
		c := newClient(x, 0, 16, size, Write)
		for i := range c.offs {
			c.offs[i] *= 2 // none touches another
		}
		b.SetBytes(size)
		b.ResetTimer()
		for left := b.N; left > 0; left -= len(c.offs) {
			b.StopTimer()
			x.empty(b)
			c.run(whole(min(left, len(c.offs)), 16, 1))
			b.StartTimer()
			x.disk.open()
			if err := x.Flush(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
	})
}

// BenchmarkReplay opens a cache whose log has a GiB of the device in random order, in whole
// blocks, or every second sector of it; an operation is a key.
func BenchmarkReplay(b *testing.B) {
	withAndWithoutSums(b, func(b *testing.B, crc bool) {
		for _, size := range []int{sectorSize, 4096} {
			b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
				const device, batch = 1 << 30, 128
				apart := max(size, 2*sectorSize)
				keys := device / apart
				x := newBench(b, device, 1, crc)
				c := newClient(x, 0, batch, size, Write)
				c.offs = make([]int64, keys)
				for i, k := range rand.Perm(keys) {
					c.offs[i] = int64(k * apart)
				}
				c.run(keys)
				x.end(b)
				b.ResetTimer()
				for left := b.N; left > 0; left -= keys {
					x.start(b, 1)
					b.StopTimer()
					x.end(b)
					b.StartTimer()
				}
				b.StopTimer()
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(whole(b.N, keys, 1)), "ns/key")
			})
		}
	})
}

// indexed is an index of n extents of 4 KiB, none of which touches another, that
// lie at random in the region.
func indexed(n int) *index {
	x := newIndex(int64(n) * 8192)
	dice := rand.New(rand.NewPCG(1, 2))
	for _, i := range dice.Perm(n) {
		s := x.span(int64(i)*16, 8)
		s.sh.Lock()
		s.setLocked(extent{seg: uint32(dice.IntN(benchFull / ondisk.SegmentSize)), pos: uint16(dice.IntN(4000) * 8)}, nil)
		s.sh.Unlock()
	}
	return x
}

// collect has the Go runtime collect without a pause until the function that it
// returns is called.
func collect() (stop func()) {
	var end atomic.Bool
	var ended sync.WaitGroup
	ended.Go(func() {
		for !end.Load() {
			runtime.GC()
		}
	})
	return func() {
		end.Store(true)
		ended.Wait()
	}
}

// BenchmarkIndex has all that an index is asked at 10^4 to 10^7 extents.
func BenchmarkIndex(b *testing.B) {
	for _, n := range []int{1e4, 1e5, 1e6, 1e7} {
		x := indexed(n)
		var places [1 << 16]int64
		for i := range places {
			places[i] = rand.Int64N(int64(n)) * 16
		}
		find := func(i int) slot {
			s := x.span(places[i%len(places)], 8)
			s.sh.Lock()
			defer s.sh.Unlock()
			return s.hitLocked()
		}
		sub := func(name string, op func(i int)) {
			b.Run(fmt.Sprintf("%s/extents=%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for i := range b.N {
					op(i)
				}
			})
		}
		sub("lookup", func(i int) { find(i) })
		// However few extents there are, what is copied is from all of the GiB, or it would
		// be in the processor's cache with few and not with many.
		m, buf := benchRegion(), make([]byte, 4096)
		const apart = 7919 * 4096
		hit := func(i int) {
			v := find(i)
			at := (int64(v.seg())*ondisk.SegmentSize + int64(v.pos())<<sectorShift + int64(i)*apart) % benchFull
			if _, err := m.ReadAt(buf, at); err != nil {
				panic(err)
			}
		}
		sub("lookup+copy", hit)
		for _, batch := range []int{1, 16} {
			b.Run(fmt.Sprintf("hit/batch=%d/extents=%d", batch, n), func(b *testing.B) {
				served := newBench(b, int64(n)*8192, 1, false)
				served.index = x
				c := newClient(served, 0, batch, 4096, Read)
				c.offs = c.offs[:0]
				for _, at := range places {
					c.offs = append(c.offs, at<<sectorShift)
				}
				n := whole(b.N, batch, 1)
				b.ResetTimer()
				c.run(n)
				b.StopTimer()
				served.end(b)
			})
		}
		b.Run(fmt.Sprintf("collection/extents=%d", n), func(b *testing.B) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range b.N {
				runtime.GC()
			}
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.PauseTotalNs-before.PauseTotalNs)/float64(b.N), "pause-ns")
		})
		for _, collecting := range []bool{false, true} {
			b.Run(fmt.Sprintf("tail/collecting=%t/extents=%d", collecting, n), func(b *testing.B) {
				if collecting {
					defer collect()()
				}
				times := make([]time.Duration, b.N)
				b.ResetTimer()
				for i := range times {
					begin := time.Now()
					hit(i)
					times[i] = time.Since(begin)
				}
				slices.Sort(times)
				b.ReportMetric(float64(times[len(times)*999/1000]), "p999-ns")
			})
		}
		sub("insert", func(i int) {
			s := x.span(places[i%len(places)], 8)
			s.sh.Lock()
			s.setLocked(extent{seg: 1, pos: uint16(i % 4000 * 8)}, nil)
			s.sh.Unlock()
		})
		runtime.KeepAlive(x)
	}
}

// BenchmarkIndexBytes computes what an extent takes, in the least costly of the ways of
// TestIndexBytes and in the worst.
func BenchmarkIndexBytes(b *testing.B) {
	for b.Loop() {
		dice, least, worst := rand.New(rand.NewPCG(1, 0)), 0.0, 0.0
		for _, c := range costlyIndexes {
			each, _ := c.bytesEach(dice)
			if worst = max(worst, each); c.name == dense {
				least = each
			}
		}
		b.ReportMetric(least, "dense-B/extent")
		b.ReportMetric(worst, "worst-B/extent")
	}
}

// BenchmarkCollections counts the collections of the Go runtime under a steady load, in front
// of a region that is not on its heap, which it would reckon with.
func BenchmarkCollections(b *testing.B) {
	region, err := pmem.Open(fmt.Sprintf("%s,size=%d,volatile", filepath.Join(b.TempDir(), "region"), ondisk.MinSize), pmem.ReadWrite)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { region.Close() })
	w := steadyClient(b, benchMemory{region})
	w.run(1 << 17) // until buffers have grown
	const load = 12 * time.Second
	for b.Loop() {
		var before, after debug.GCStats
		debug.ReadGCStats(&before)
		begin := time.Now()
		for time.Since(begin) < load {
			w.run(1 << 14)
		}
		debug.ReadGCStats(&after)
		b.ReportMetric(float64(after.NumGC-before.NumGC)*float64(time.Minute/load), "collections/min")
	}
}

// BenchmarkJournal has how long the journal is locked for a kset of so many keys, and from
// that, and from what a write of one block takes in all, how many such writes a second queues
// can make that each have one under way at a time: with a kset for each, and with one for
// all that wait. For that each queue has a processor, and driver and client need
// elsewhere microseconds for each request.
func BenchmarkJournal(b *testing.B) {
	held := map[int]float64{}
	for _, n := range []int{1, 2, 4, 8, 16} {
		b.Run(fmt.Sprintf("held/keys=%d", n), func(b *testing.B) {
			x := newBench(b, benchSet, 1, false)
			defer x.end(b)
			if _, err := x.Rest(context.Background()); err != nil {
				b.Fatal(err)
			}
			keys := make([]ondisk.Key, n)
			e := &x.queues[0].publisher
			b.ResetTimer()
			for i := range b.N {
				for k := range keys {
					keys[k] = ondisk.Key{Off: uint64(i*n+k) * 7919 % (benchSet >> 12) << 12, Len: 4096}
				}
				x.journal.mu.Lock()
				if err := x.appendLocked(keys, 0); err != nil {
					b.Fatal(err)
				}
				e.lockShards(x.index, keys)
				x.journal.mu.Unlock()
				for _, k := range e.first {
					shard := shardOf(keys[k-1].Off)
					e.last[shard] = 0
					x.index.shards[shard].Unlock()
				}
				e.first = e.first[:0]
			}
			b.StopTimer()
			held[n] = float64(b.Elapsed().Nanoseconds()) / float64(b.N)
		})
	}
	if len(held) < 5 {
		return // not all were asked for
	}
	each := (held[16] - held[1]) / 15
	for _, elsewhere := range []time.Duration{0, 5 * time.Microsecond} {
		for _, queues := range []int{1, 2, 4, 8, 16, 32} {
			for _, together := range []bool{false, true} {
				b.Run(fmt.Sprintf("simulated/elsewhere=%v/queues=%d/together=%t", elsewhere, queues, together), func(b *testing.B) {
					most := 1
					if together {
						most = ondisk.MaxKeys
					}
					rate := simulate(queues, most, elsewhere+benchOutside, func(keys int) float64 { return held[1] + float64(keys-1)*each })
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(rate/1e6, "Mwrites/s")
				})
			}
		}
	}
}

// benchOutside is what a write of one block takes its queue's thread beside the
// journal's lock.
const benchOutside = 500 * time.Nanosecond

// simulate returns how many requests a second queues make that are outside for a while,
// about, and then wait for a lock that is held for so many ns for up to most of them.
func simulate(queues, most int, outside time.Duration, held func(keys int) float64) float64 {
	const rounds = 100_000
	dice := rand.New(rand.NewPCG(1, 0))
	until := make([]float64, queues) // when each comes to the lock
	think := func() float64 { return float64(outside) * (0.5 + dice.Float64()) }
	for i := range until {
		until[i] = think()
	}
	now, done := 0.0, 0
	for range rounds {
		slices.Sort(until)
		now = max(now, until[0])
		n := 0
		for n < min(most, queues) && until[n] <= now {
			n++
		}
		now += held(n)
		for i := range n {
			until[i] = now + think()
		}
		done += n
	}
	return float64(done) / now * 1e9
}
