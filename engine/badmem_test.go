package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// scene is a cache with something of everything in it, in front of a disk that
// refuses what is to stay dirty.
type scene struct {
	crc, durable bool
	mem          stillMemory
	disk         *backing.Fake
}

const (
	sceneSegments = 8
	sceneWritten  = 0         // sectors: 256 of version 1, written back
	sceneRead     = 16 << 11  // 256 of version 7, from the disk
	sceneDirty    = 1 << 11   // 256 of version 2, in writes of 32
	sceneLoad     = 32 << 11  // blocks of loadBlock, for load
	loadBlock     = 128       // sectors
	loadBlocks    = 32 << 4   // more than two segments of them
	sceneSize     = 128 << 20 // bytes
)

func newScene(t *testing.T, crc, durable bool) *scene {
	s := &scene{crc: crc, durable: durable, mem: stillMemory{pmem.NewFake(ondisk.MinSize), durable}}
	formatSmall(t, s.mem, sceneSegments, crc, 70)
	if err := ondisk.WriteIdentity(s.mem, ondisk.Replica{}, &ondisk.Identity{BackingSize: sceneSize}); err != nil {
		t.Fatal(err)
	}
	s.disk = backing.NewFake(sceneSize, sectorSize, 1)
	t.Cleanup(func() { s.disk.Close() })
	s.disk.WriteAt(stamped(sceneRead, 256, 7), sceneRead*sectorSize)
	badBlocks(s.disk, sceneDirty, 256)
	for range 2 { // so that every record has two copies
		r := newRig(t, s.mem, s.disk, 1)
		r.write(t, sceneWritten*sectorSize, stamped(sceneWritten, 256, 1))
		r.missedBefore(sceneRead*sectorSize, 256*sectorSize)
		r.read(t, sceneRead*sectorSize, 256*sectorSize)
		if err := r.Flush(context.Background()); err != nil && !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		for i := int64(0); i < 256; i += 32 {
			r.write(t, (sceneDirty+i)*sectorSize, stamped(sceneDirty+i, 32, 2))
		}
		if err := r.do(0, &Request{Op: Flush}); err != nil {
			t.Fatal(err)
		}
		if err := r.kill(); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// verify reads every sector of the scene by itself, and returns those that are
// errors.
func (s *scene) verify(t *testing.T, r *rig, when string) (lost []int64) {
	t.Helper()
	for _, part := range []struct {
		lba     int64
		version uint64
	}{{sceneWritten, 1}, {sceneRead, 7}, {sceneDirty, 2}} {
		for lba := part.lba; lba < part.lba+256; lba++ {
			p := make([]byte, sectorSize)
			if err := r.do(0, &Request{Op: Read, Off: lba * sectorSize, Buf: p}); err != nil {
				lost = append(lost, lba)
			} else if v, err := stamp(p, lba); v != part.version || err != nil {
				t.Errorf("%s: sector %d has version %d, %v", when, lba, v, err)
			}
		}
	}
	return lost
}

// named waits until the log of a cache has a line with a text.
func (r *rig) named(t *testing.T, text string) {
	t.Helper()
	log := r.log.(*testLog)
	within(t, "a line with "+text, func() {
		for {
			log.mu.Lock()
			ok := slices.ContainsFunc(log.lines, func(line string) bool { return strings.Contains(line, text) })
			log.mu.Unlock()
			if ok {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// copies returns the places of both copies of every record.
func (s *scene) copies(l *ondisk.Layout) map[string][2]int64 {
	var buf [256]byte
	m := map[string][2]int64{}
	for slot := range uint8(2) {
		at := ondisk.Replica{Slot: slot}
		add := func(what string, off int64) {
			two := m[what]
			two[slot] = off
			m[what] = two
		}
		add("identity record", ondisk.EncodeIdentity(buf[:], at, l.Identity))
		if !s.durable {
			add("sync mark", ondisk.EncodeSyncMark(buf[:], at, 1))
		}
		add("fingerprint", ondisk.EncodeFingerprint(buf[:], at, &ondisk.Fingerprint{}))
		add("cache_info", ondisk.EncodeInfo(buf[:], at, l.Info))
		add("key_tail", ondisk.EncodePosition(buf[:], ondisk.KeyTail, at, l.KeyTail))
		add("dirty_tail", ondisk.EncodePosition(buf[:], ondisk.DirtyTail, at, l.DirtyTail))
		for _, seg := range []uint32{0, 1, sceneSegments - 1} {
			add(fmt.Sprintf("generation of segment %d", seg), l.EncodeGeneration(buf[:], seg, at, 0))
			add(fmt.Sprintf("segment_info of segment %d", seg), ondisk.SegmentsOff+int64(seg)*ondisk.SegmentSize+int64(slot)*4096)
		}
	}
	return m
}

// TestBadMemoryAtRest takes each structure away from a cache that is then
// opened. What the cache says and what check says name the same place.
func TestBadMemoryAtRest(t *testing.T) {
	for _, crc := range []bool{false, true} {
		for _, durable := range []bool{false, true} {
			t.Run(fmt.Sprintf("crc=%t,durable=%t", crc, durable), func(t *testing.T) { newScene(t, crc, durable).atRest(t) })
		}
	}
}

func (s *scene) atRest(t *testing.T) {
	l, keys, _, _, err := readLog(s.mem)
	if err != nil {
		t.Fatal(err)
	}
	var dirty, clean []loggedKey
	for _, k := range keys {
		if k.dirty && k.Flags&ondisk.KeyClean == 0 && k.Off >= sceneDirty*sectorSize {
			dirty = append(dirty, k)
		} else if k.Off == sceneRead*sectorSize {
			clean = append(clean, k)
		}
	}
	if len(dirty) < 8 || len(clean) == 0 {
		t.Fatalf("%d dirty and %d clean keys", len(dirty), len(clean))
	}
	var ksets []ondisk.Position
	end, _ := l.WalkLog(s.mem, l.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		ksets = append(ksets, at)
		return nil
	})

	// One copy of a record: the other one does, and it says so.
	for what, two := range s.copies(l) {
		for slot, off := range two {
			name := fmt.Sprintf("%s, copy %d", what, slot)
			s.opens(t, name, []int64{off}, func(r *rig) {
				text := fmt.Sprintf("copy %d at byte %d is damaged (unreadable)", slot, off)
				r.named(t, text)
				if !slices.ContainsFunc(r.Status().BadPlaces, func(p BadPlace) bool { return p.Off == off }) {
					t.Errorf("%s: status names %v", name, r.Status().BadPlaces)
				}
			}, fmt.Sprintf("copy %d at byte %d is damaged (unreadable)", slot, off), nil)
		}
		if what != "sync mark" && what != "fingerprint" && what != "identity record" {
			s.refuses(t, what, two[:], fmt.Sprintf("at bytes %d and %d: both copies are lost", two[0], two[1]))
		}
	}
	s.refuses(t, "superblock", []int64{ondisk.SuperblockOff}, "superblock cannot be read")
	for i, at := range ksets {
		s.refuses(t, fmt.Sprintf("kset %d of the log", i), []int64{l.Offset(at.Seg, at.Off)}, fmt.Sprintf("the log is damaged at %v", at))
	}
	s.refuses(t, "end of the log", []int64{l.Offset(end.Pos.Seg, end.Pos.Off)}, fmt.Sprintf("the log is damaged at %v", end.Pos))
	s.opens(t, "free memory", []int64{l.Offset(sceneSegments-1, 4096)}, func(*rig) {}, "", nil)

	at := l.Offset(clean[0].Seg, clean[0].SegOff+512)
	s.opens(t, "clean data", []int64{at}, func(r *rig) {
		s.names(t, r, "clean data", at, sceneRead+1)
	}, fmt.Sprintf("cannot be read: media error in a fake region at byte %d", at), nil)
	k := dirty[len(dirty)-1]
	at = l.Offset(k.Seg, k.SegOff+4096+512)
	from, n := int64(k.Off/sectorSize)+9, int64(1)
	if s.crc {
		from, n = int64(k.Off/sectorSize), int64(k.Len/sectorSize)
	}
	lost := []int64{}
	for i := range n {
		lost = append(lost, from+i)
	}
	s.opens(t, "dirty data", []int64{at}, func(r *rig) {
		s.names(t, r, "dirty data", at, int64(k.Off/sectorSize)+9)
		if seg := r.Status().BadSegments; !slices.Equal(seg, []uint32{k.Seg}) {
			t.Errorf("segments %v are bad, not %d", seg, k.Seg)
		}
	}, fmt.Sprintf("dirty data of offset %d, length %d cannot be read: media error in a fake region at byte %d", k.Off, k.Len, at), lost)
}

// names checks that the status has the place of lost data and what it was, and
// the log too.
func (s *scene) names(t *testing.T, r *rig, what string, at, lba int64) {
	t.Helper()
	st := r.Status()
	i := slices.IndexFunc(st.BadPlaces, func(p BadPlace) bool {
		return p.What == what && p.Off <= at && at < p.Off+p.Len && p.DiskOff <= lba*sectorSize && lba*sectorSize < p.DiskOff+p.DiskLen
	})
	if i < 0 || st.State != Degraded || len(st.BadSegments) == 0 {
		t.Errorf("%s: status names %v and the segments %v, %s: %s", what, st.BadPlaces, st.BadSegments, st.State, st.Error)
		return
	}
	r.named(t, st.BadPlaces[i].String())
}

// opens opens the cache with bad memory in 8 bytes at each of the places, of
// every kind, looks at every sector, and then at the rest.
func (s *scene) opens(t *testing.T, name string, places []int64, look func(r *rig), check string, lost []int64) {
	t.Helper()
	for _, punch := range []bool{false, true} {
		mem, all := s.spoiled(places, punch)
		if check != "" && !strings.Contains(all, check) || check == "" && all != "" {
			t.Errorf("%s: check says %q, not %q", name, all, check)
		}
		r, err := openRig(mem, s.disk, 1)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := s.verify(t, r, name); !slices.Equal(got, lost) {
			t.Errorf("%s: sectors %v are lost, not %v", name, got, lost)
		}
		look(r)
		if err := r.kill(); err != nil && r.Status().State != Failed {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func (s *scene) refuses(t *testing.T, name string, places []int64, text string) {
	t.Helper()
	mem, all := s.spoiled(places, false)
	r, err := openRig(mem, s.disk, 1)
	if err == nil {
		r.kill()
		t.Errorf("%s: opened", name)
	} else if !strings.Contains(err.Error(), text) || !strings.Contains(all, text) {
		t.Errorf("%s: refused with %q, and check says %q; neither may lack %q", name, err, all, text)
	}
}

func (s *scene) spoiled(places []int64, punch bool) (mem stillMemory, check string) {
	mem = stillMemory{s.mem.Clone(), s.durable}
	for _, off := range places {
		if off &^= 7; punch {
			mem.Punch(off, 8)
		} else {
			mem.Poison(off, 8)
		}
	}
	if err := errors.Join(ondisk.Check(mem, mem.Size(), true).Problems...); err != nil {
		check = err.Error()
	}
	return mem, check
}

// load writes blocks and reads them again, one after the other, while the cache
// takes it.
type load struct {
	mu           sync.Mutex
	acked, begun [loadBlocks]uint64
	version      uint64
}

func (l *load) write(r *rig, i int, version uint64) error {
	l.mu.Lock()
	l.begun[i] = version
	l.mu.Unlock()
	lba := int64(sceneLoad + i*loadBlock)
	err := r.do(0, &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, loadBlock, version), FUA: version%16 == 0})
	if err == nil {
		l.mu.Lock()
		l.acked[i] = version
		l.mu.Unlock()
	}
	return err
}

// run works at random until it is told to stop. A write may only fail with the
// whole cache.
func (l *load) run(r *rig, dice *rand.Rand, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		l.version++
		if err := l.write(r, dice.IntN(loadBlocks), l.version); err != nil {
			if why := r.failure(); why == nil {
				return fmt.Errorf("write: %w", err)
			}
			return nil
		}
		if err := l.read(r, dice.IntN(loadBlocks), r.Status().BadPlaces); err != nil {
			return err
		}
	}
}

// read reads a block, by its sectors when that is an error. Those that are must
// be known to be lost.
func (l *load) read(r *rig, i int, known []BadPlace) error {
	l.mu.Lock()
	low, high := l.acked[i], l.begun[i]
	l.mu.Unlock()
	lba, p := int64(sceneLoad+i*loadBlock), make([]byte, loadBlock*sectorSize)
	whole := r.do(0, &Request{Op: Read, Off: lba * sectorSize, Buf: p})
	for ; len(p) > 0; lba, p = lba+1, p[sectorSize:] {
		off := lba * sectorSize
		if whole != nil {
			if err := r.do(0, &Request{Op: Read, Off: off, Buf: p[:sectorSize]}); err != nil {
				st := r.Status()
				if !slices.ContainsFunc(append(known, st.BadPlaces...), func(b BadPlace) bool {
					return b.What == "dirty data" && b.DiskOff <= off && off < b.DiskOff+b.DiskLen
				}) && st.MoreBad == 0 {
					return fmt.Errorf("sector %d: %w, but lost are %v", lba, err, st.BadPlaces)
				}
				continue
			}
		}
		if v, err := stamp(p[:sectorSize], lba); err != nil || v < low || v > high {
			return fmt.Errorf("sector %d has version %d, %v; acknowledged is %d", lba, v, err, low)
		}
	}
	return nil
}

// TestRefusedStore: a segment of which the memory refuses a store keeps the
// references of what it holds already, and no others.
func TestRefusedStore(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(16<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	defer r.kill()
	r.mustRest(t)
	r.write(t, 0, stamped(0, 8, 1))
	e := r.extents(0, 8)[0]
	at := r.layout.Offset(e.seg, uint32(e.pos+e.n)<<sectorShift)
	mem.Punch(at, r.layout.Offset(e.seg, 0)+ondisk.SegmentData-at)
	r.write(t, 4096, stamped(8, 8, 1))
	if now := r.extents(8, 8)[0]; now.seg == e.seg {
		t.Fatal("stored where memory refuses it")
	}
	if n := r.segments.all[e.seg].refs.Load(); n != 1 {
		t.Errorf("%d references to a segment with one key", n)
	}
}

// TestBadMemoryUnderLoad takes each structure away from a cache that works.
func TestBadMemoryUnderLoad(t *testing.T) {
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-storm.seed)", seed)
	all := int64(ondisk.MinSize)
	segment := func(i int64) int64 { return ondisk.SegmentsOff + i*ondisk.SegmentSize }
	copies := func(what string) func(*scene, *rig) (int64, int64) {
		return func(s *scene, r *rig) (int64, int64) {
			two := s.copies(r.layout)[what]
			s.mem.Punch(two[0], 8)
			return two[1], 8
		}
	}
	at := func(off, n int64) func(*scene, *rig) (int64, int64) {
		return func(*scene, *rig) (int64, int64) { return off, n }
	}
	log := func(skip int64, pos func(r *rig) ondisk.Position) func(*scene, *rig) (int64, int64) {
		return func(s *scene, r *rig) (int64, int64) {
			r.journal.mu.Lock() // what it is must not move on before it is bad
			defer r.journal.mu.Unlock()
			off := r.offset(pos(r)) + skip
			s.mem.Punch(off, 64)
			return off, 64
		}
	}
	head := func(r *rig) ondisk.Position { return r.journal.mu.head }
	for _, c := range []struct {
		name  string
		place func(*scene, *rig) (off, n int64)
		want  State
		why   error  // of Failed
		names string // what the status calls it
	}{
		{"superblock", at(ondisk.SuperblockOff, 24), Healthy, nil, ""},
		{"identity record", copies("identity record"), Healthy, nil, ""},
		{"fingerprint", copies("fingerprint"), Degraded, nil, "fingerprint of the backing device"},
		{"sync mark", copies("sync mark"), Failed, nil, "sync mark"},
		{"cache_info", copies("cache_info"), Degraded, nil, "cache_info"},
		{"key_tail", copies("key_tail"), Failed, nil, "key_tail"},
		{"dirty_tail", copies("dirty_tail"), Failed, nil, "dirty_tail"},
		{"segment_info", copies("segment_info of segment 1"), Healthy, nil, ""},
		{"generations", func(s *scene, r *rig) (int64, int64) {
			for i := range int64(sceneSegments) {
				if i%3 == 1 {
					s.mem.Punch(segment(i)+8<<10, 32)
				}
			}
			return segment(1) + 8<<10, 32
		}, Degraded, nil, "generation"},
		{"beginning of the log", log(0, func(r *rig) ondisk.Position { return r.tails.keyTail() }), Degraded, nil, "log"},
		{"dirty part of the log", log(0, func(r *rig) ondisk.Position { pos, _ := r.tails.dirtyTail(); return pos }), Degraded, nil, "log"},
		{"behind the end of the log", log(32, head), Degraded, nil, "log"},
		{"end of the log", log(0, head), Failed, ErrBadHead, "log"},
		{"free segments", func(s *scene, r *rig) (int64, int64) {
			r.segments.mu.Lock()
			defer r.segments.mu.Unlock()
			free := int64(r.segments.mu.freeList[0])
			s.mem.Punch(segment(free)+ondisk.SegmentHeader, ondisk.SegmentData)
			return segment(free) + ondisk.SegmentHeader, 8
		}, Degraded, nil, "data to be stored"},
		{"data", func(s *scene, r *rig) (int64, int64) {
			e := r.extents(sceneLoad+63*loadBlock, loadBlock)[0]
			return r.layout.Offset(e.seg, uint32(e.pos)<<sectorShift), 4096
		}, Degraded, nil, "data"},
		{"the last segments", at(segment(5), all-segment(5)), Degraded, nil, ""},
		{"most segments", at(segment(3), all-segment(3)), Failed, ErrBadSegments, ""},
	} {
		for _, durable := range []bool{false, true} {
			if c.name == "sync mark" && durable {
				continue
			}
			t.Run(fmt.Sprintf("%s,durable=%t", c.name, durable), func(t *testing.T) {
				s := newScene(t, !durable, durable)
				s.disk.Script(nil)
				r := newRig(t, s.mem, s.disk, 1)
				l := &load{version: 7}
				for i := range 64 {
					if err := l.write(r, i, 1); err != nil {
						t.Fatal(err)
					}
				}
				stop, ended := make(chan struct{}), make(chan error, 1)
				go func() { ended <- l.run(r, rand.New(rand.NewPCG(seed, 0)), stop) }()
				s.mem.Punch(c.place(s, r))
				// Everything is used: all of the log is written back and collected, and
				// every segment gets its turn.
				r.setGC(0)
				flushed := r.Flush(context.Background())
				if c.want != Failed && flushed != nil && !slices.ContainsFunc(r.Status().BadPlaces, func(p BadPlace) bool { return p.What == "dirty data" }) {
					t.Errorf("flush: %v", flushed)
				}
				within(t, "what the cache comes to", func() {
					for head := r.Status().Writes; ; time.Sleep(time.Millisecond) {
						st := r.Status()
						named := c.names == "" || slices.ContainsFunc(st.BadPlaces, func(p BadPlace) bool { return strings.Contains(p.What, c.names) })
						if st.State == c.want && named && r.logDamage.Load() == nil && (c.want == Failed || st.Writes > head+300) {
							return
						}
						if len(ended) > 0 && c.want != Failed {
							return
						}
					}
				})
				close(stop)
				if err := <-ended; err != nil {
					t.Error(err)
				}
				st := r.Status()
				if st.State != c.want || c.why != nil && !errors.Is(r.failure(), c.why) {
					t.Errorf("%s: %s", st.State, st.Error)
				}
				for i := range loadBlocks {
					if err := l.read(r, i, nil); err != nil {
						t.Fatalf("afterwards: %v", err)
					}
				}
				if lost := s.verify(t, r, "afterwards"); len(lost) > 0 && len(st.BadSegments) < 2 && c.names != "data" {
					t.Errorf("sectors %v are lost", lost)
				}
				r.segments.mu.Lock()
				for _, seg := range r.segments.mu.freeList {
					if slices.Contains(st.BadSegments, seg) {
						t.Errorf("segment %d is bad and free", seg)
					}
				}
				r.segments.mu.Unlock()
				known := r.Status().BadPlaces
				if err := r.kill(); err != nil && c.want != Failed {
					t.Error(err)
				}
				// Memory that is as it was before has everything.
				s.mem.Mend()
				r = newRig(t, s.mem, s.disk, 1)
				for i := range loadBlocks {
					if err := l.read(r, i, known); err != nil {
						t.Fatalf("after a restart: %v", err)
					}
				}
				r.kill()
			})
		}
	}
}

// TestHiddenKeys: what keys that cannot be read named is not served from segments
// that have been used again since, and these are, all but the bad one.
func TestHiddenKeys(t *testing.T) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.write(t, 0, stamped(0, 256, 1))
	if err := r.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	mem.Punch(r.offset(r.tails.keyTail()), 64)
	for range 2 {
		within(t, "filling the cache four times", func() {
			for i := range int64(4 * 6 * 16) {
				off := (16 + i%32) << 20
				r.write(t, off, stamped(off/sectorSize, 2048, uint64(i)))
			}
		})
		for lba := range int64(256) {
			if v := r.version(t, lba); v != 1 {
				t.Fatalf("sector %d has version %d", lba, v)
			}
		}
		// The place is passed, so the cache opens as it is.
		if err := r.kill(); err != nil {
			t.Fatal(err)
		}
		r = newRig(t, mem, disk, 1)
	}
	r.kill()
}

// TestTruncatedFile lets a file be truncated under its mapping, so the faults
// are real ones.
func TestTruncatedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pmem")
	region, err := pmem.Open(fmt.Sprintf("%s,size=%d,volatile", path, ondisk.MinSize), pmem.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer region.Close()
	formatSmall(t, region, sceneSegments, true, 70)
	disk := backing.NewFake(sceneSize, sectorSize, 1)
	defer disk.Close()
	r := newRig(t, region, disk, 1)
	l := &load{version: 7}
	for i := range 400 { // some of it in the third segment of data
		if err := l.write(r, i, 1); err != nil {
			t.Fatal(err)
		}
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- l.run(r, rand.New(rand.NewPCG(1, 0)), stop) }()
	if err := os.Truncate(path, ondisk.SegmentsOff+5*ondisk.SegmentSize+1<<20); err != nil {
		t.Fatal(err)
	}
	r.Flush(context.Background())
	before := r.Status().Writes
	within(t, "a thousand writes, and meeting what is gone", func() {
		for st := r.Status(); len(ended) == 0 && (st.Writes < before+1000 || len(st.BadSegments) == 0); st = r.Status() {
			time.Sleep(time.Millisecond)
		}
	})
	close(stop)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	st := r.Status()
	if st.State != Degraded || len(st.BadSegments) == 0 || slices.Min(st.BadSegments) < 5 || !strings.Contains(st.Error, path) {
		t.Errorf("%s: %s; bad are %v", st.State, st.Error, st.BadSegments)
	}
	for i := range loadBlocks {
		if err := l.read(r, i, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.kill(); err != nil {
		t.Error(err)
	}
}

// onceBad is memory of which one store fails, and the next in the same place does not.
type onceBad struct {
	*pmem.Fake
	fails atomic.Bool
}

func (m *onceBad) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 4096 && m.fails.CompareAndSwap(true, false) {
		return 0, &pmem.FaultError{Path: "a fake region", Off: off}
	}
	return m.Fake.WriteAt(p, off)
}

// TestBadSegmentIsLeft: what a queue stores after its segment has turned out to be bad
// goes to another, and a store that fails has it turn out so.
func TestBadSegmentIsLeft(t *testing.T) {
	mem := &onceBad{Fake: pmem.NewFake(ondisk.MinSize)}
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, sectorSize, 1)
	defer disk.Close()
	d, err := newDriver(mem, disk, Options{Queues: 1})
	if err != nil {
		t.Fatal(err)
	}
	head := &d.Queue(0).head
	for i := range int64(3) {
		was := head.seg
		switch i {
		case 1:
			d.retire(was)
		case 2:
			mem.fails.Store(true)
		}
		if err := d.do(&Request{Op: Write, Off: i * 4096, Buf: make([]byte, 4096)}); err != nil {
			t.Fatal(err)
		}
		if i > 0 && head.seg == was {
			t.Errorf("write %d goes to segment %d, which is bad", i, was)
		}
		if i > 0 && !d.segments.all[was].bad.Load() {
			t.Errorf("segment %d is not retired", was)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
