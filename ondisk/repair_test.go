package ondisk_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// These tests damage caches that hold data of every kind, repair them, and open
// them in package engine: every sector whose key and data were spared must be
// as it was acknowledged.

const (
	diskSize = 5 << 20 // more than a stripe
	infoGap  = 4 << 10 // between the copies of cache_info and of a segment_info
	genPlace = 8 << 10 // of the generations in a segment
	copyGap  = 2 << 10 // between the copies in the first 4 KiB
)

// patient is a cache, and all that is known about it.
type patient struct {
	mem   *pmem.Fake
	disk  []byte
	model []byte // what the device reads
	log   []logKset
	l     *ondisk.Layout
	crc   bool
}

// logKset is a kset from key_tail on.
type logKset struct {
	at   ondisk.Position
	off  int64 // bytes on the region
	size int64
	keys []ondisk.Key
	last bool
}

type fakeDisk struct{ *backing.Fake }

func (fakeDisk) Buffer(n int) []byte { return make([]byte, n) }

type silence struct{}

func (silence) Info(engine.Event, string, error)  {}
func (silence) Error(engine.Event, string, error) {}

// server is an open cache with one queue, served by the test.
type server struct {
	*engine.Cache
	woken chan struct{}
}

func open(mem engine.Memory, disk *backing.Fake) (*server, error) {
	c, err := engine.Open(mem, fakeDisk{disk}, engine.Options{Queues: 1, WritebackDepth: 1, Log: silence{}})
	if err != nil {
		return nil, err
	}
	s := &server{c, make(chan struct{}, 1)}
	c.Queue(0).OnWake(func() {
		select {
		case s.woken <- struct{}{}:
		default:
		}
	})
	return s, nil
}

// do carries out requests in one turn.
func (s *server) do(rs ...*engine.Request) error {
	q := s.Queue(0)
	for _, r := range rs {
		q.Submit(r)
	}
	for left := len(rs); left > 0; {
		left -= len(q.Turn())
		if left > 0 {
			select {
			case <-s.woken:
			case <-time.After(30 * time.Second):
				return errors.New("requests do not finish")
			}
		}
	}
	var errs []error
	for _, r := range rs {
		errs = append(errs, r.Err)
	}
	return errors.Join(errs...)
}

func diskOf(content []byte) *backing.Fake {
	f := backing.NewFake(int64(len(content)), 512, 1)
	f.WriteAt(content, 0)
	return f
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newPatient makes a cache with a life behind it: the log begins far from where
// it was when the cache was made, goes through two segments, and has clean keys
// in front of dirty_tail and keys of all kinds behind it.
func newPatient(t testing.TB, crc bool, seed uint64) *patient {
	t.Helper()
	mem := pmem.NewFake(ondisk.MinSize)
	for range 2 { // the second one raises the generations
		must(t, ondisk.Format(mem, ondisk.FormatOptions{DataCRC: crc, GCPercent: 70}))
	}
	forgeOldLog(t, mem, crc)
	id := &ondisk.Identity{BackingSize: diskSize, Serial: "serial"}
	must(t, ondisk.WriteIdentity(mem, ondisk.Replica{}, id))

	rnd := rand.New(rand.NewPCG(seed, 0))
	p := &patient{mem: mem, model: make([]byte, diskSize), crc: crc}
	rnd2 := rand.NewChaCha8([32]byte{byte(seed)})
	rnd2.Read(p.model)
	// As the old log has it.
	clear(p.model[:512])
	disk := diskOf(p.model)
	defer disk.Close()
	turns := func(s *server, n int) {
		for range n {
			var rs []*engine.Request
			for range 1 + rnd.IntN(6) {
				off := int64(rnd.IntN(diskSize/512)) * 512
				n := min(int64(1+rnd.IntN(16))*512, diskSize-off, 4<<20-off%(4<<20))
				switch r := (&engine.Request{Op: engine.Write, Off: off}); rnd.IntN(8) {
				case 0:
					must(t, s.do(rs...))
					rs = nil
					r.Op, r.Len = engine.Zero, int(n)
					clear(p.model[off : off+n])
					must(t, s.do(r))
				case 1:
					r.Op, r.Buf = engine.Read, make([]byte, n)
					must(t, s.do(r))
				default:
					r.Buf = make([]byte, n)
					rnd2.Read(r.Buf)
					copy(p.model[off:], r.Buf)
					rs = append(rs, r)
				}
			}
			must(t, s.do(rs...))
		}
	}
	for range 2 {
		s, err := open(mem, disk)
		must(t, err)
		turns(s, 15)
		must(t, s.Flush(context.Background()))
		must(t, s.Set(context.Background(), func(s *engine.Settings) error {
			s.SeqCutoff += 4 << 20
			return nil
		}))
		must(t, s.Close())
	}
	p.disk = make([]byte, diskSize)
	disk.ReadAt(p.disk, 0)
	s, err := open(mem, disk)
	must(t, err)
	turns(s, 45)
	must(t, s.Close())
	p.readLog(t)
	if p.l.KeyTail == p.l.DirtyTail || len(p.log) < 50 || p.log[len(p.log)-1].at.Seg == p.l.KeyTail.Seg {
		t.Fatalf("the cache has %d ksets from %v, dirty ones from %v to %v", len(p.log), p.l.KeyTail, p.l.DirtyTail, p.log[len(p.log)-1].at)
	}
	return p
}

// forgeOldLog fills most of segment 0 with ksets of dead keys, and leaves the
// tails at the last one, which has a key that is alive.
func forgeOldLog(t testing.TB, mem *pmem.Fake, crc bool) {
	t.Helper()
	l, err := ondisk.ReadLayout(mem, mem.Size())
	must(t, err)
	buf := make([]byte, ondisk.MaxKsetSize)
	dead := make([]ondisk.Key, ondisk.MaxKeys)
	for i := range dead {
		dead[i] = ondisk.Key{Off: uint64(i) * 512, Len: 512, Seg: 7}
	}
	seq, at := uint64(1<<47), ondisk.Position{}
	for ; at.Off < ondisk.SegmentData-16_000; at.Off += ondisk.MaxKsetSize {
		mem.WriteAt(ondisk.EncodeKset(buf, seq, dead), l.Offset(0, at.Off))
		seq++
	}
	alive := ondisk.Key{Len: 512, Seg: 30, Gen: 1, Flags: ondisk.KeyClean}
	if crc {
		alive.CRC = ondisk.Checksum(make([]byte, 512))
	}
	mem.WriteAt(ondisk.EncodeKset(buf, seq, []ondisk.Key{alive}), l.Offset(0, at.Off))
	storeTail(mem, ondisk.KeyTail, at)
	storeTail(mem, ondisk.DirtyTail, at)
}

// storeTail stores both copies of a tail.
func storeTail(mem *pmem.Fake, tail ondisk.Tail, at ondisk.Position) {
	var buf [ondisk.PositionSize]byte
	for slot := range uint8(2) {
		off := ondisk.EncodePosition(buf[:], tail, ondisk.Replica{Slot: slot, Seq: slot}, at)
		mem.WriteAt(buf[:], off)
	}
}

func (p *patient) readLog(t testing.TB) {
	t.Helper()
	var err error
	p.l, err = ondisk.ReadLayout(p.mem, p.mem.Size())
	must(t, err)
	end, err := p.l.WalkLog(p.mem, p.l.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		p.log = append(p.log, logKset{at, p.l.Offset(at.Seg, at.Off), int64(k.Size()), slices.Clone(k.Keys), k.Last})
		return nil
	})
	must(t, err)
	if end.Damage != nil {
		t.Fatal(end.Damage)
	}
}

// dirtyFrom is the first kset that may be dirty.
func (p *patient) dirtyFrom() int {
	return slices.IndexFunc(p.log, func(k logKset) bool { return k.at == p.l.DirtyTail })
}

// A blow is a piece of damage.
type blow struct {
	name   string
	off, n int64
	kind   string // flip, zero, poison
}

var blowKinds = []string{"flip", "zero", "poison"}

func (b blow) String() string {
	return fmt.Sprintf("%s %s: %d bytes at %d", b.kind, b.name, b.n, b.off)
}

func (b blow) hit(mem *pmem.Fake) {
	from, to := b.off&^7, (b.off+b.n+7)&^7
	buf := make([]byte, to-from)
	mem.ReadAt(buf, from)
	switch b.kind {
	case "flip":
		for i := b.off; i < b.off+b.n; i++ {
			buf[i-from] ^= 0x41
		}
		mem.WriteAt(buf, from)
	case "zero":
		clear(buf[b.off-from:][:b.n])
		mem.WriteAt(buf, from)
	case "poison":
		mem.Poison(b.off, b.n)
	}
}

func (b blow) hits(off, n int64) bool { return off < b.off+b.n && b.off < off+n }

// places are all structures, by the names of the table.
func (p *patient) places() map[string][]blow {
	segment := func(id uint32) int64 { return p.l.Offset(id, 0) - ondisk.SegmentHeader }
	logSeg, dataSeg, freeSeg := p.l.KeyTail.Seg, p.log[len(p.log)-1].keys[0].Seg, uint32(20)
	m := map[string][]blow{
		"superblock":  {{off: ondisk.SuperblockOff, n: ondisk.SuperblockSize}},
		"identity":    {{off: 0, n: ondisk.IdentitySize}, {off: copyGap, n: ondisk.IdentitySize}},
		"settings":    {{off: 512, n: ondisk.SettingsSize}, {off: 512 + copyGap, n: ondisk.SettingsSize}},
		"fingerprint": {{off: 1536, n: ondisk.FingerprintSize}, {off: 1536 + copyGap, n: ondisk.FingerprintSize}},
		"cache_info":  {{off: ondisk.InfoOff, n: ondisk.InfoSize}, {off: ondisk.InfoOff + infoGap, n: ondisk.InfoSize}},
		"key_tail":    {{off: ondisk.CtrlOff, n: 16}, {off: ondisk.CtrlOff + 16, n: 16}},
		"dirty_tail":  {{off: ondisk.CtrlOff + 32, n: 16}, {off: ondisk.CtrlOff + 48, n: 16}},
	}
	for name, id := range map[string]uint32{"of the log": logSeg, "with data": dataSeg, "free": freeSeg, "first": 0, "last": uint32(len(p.l.Chain) - 1)} {
		m["segment_info, "+name] = []blow{{off: segment(id), n: 16}, {off: segment(id) + infoGap, n: 16}}
		m["generation, "+name] = []blow{{off: segment(id) + genPlace, n: 16}, {off: segment(id) + genPlace + 16, n: 16}}
	}
	for name, blows := range m {
		for i := range blows {
			blows[i].name = name
		}
	}
	return m
}

// lost returns the ksets that the blows make useless, each alone.
func (p *patient) lost(blows []blow) map[int]bool {
	m := map[int]bool{}
	for i, k := range p.log {
		for _, b := range blows {
			if b.hits(k.off, k.size) {
				m[i] = true
			}
		}
	}
	return m
}

// spared returns for each sector whether it must read as acknowledged: its last
// key is not given up, and its data is not hit.
func (p *patient) spared(blows []blow, givenUp func(kset int) bool) []bool {
	ok := make([]bool, diskSize/512)
	for i := range ok {
		ok[i] = true
	}
	for i, k := range p.log {
		for _, key := range k.keys {
			hit := givenUp(i) && key.Flags&ondisk.KeyClean == 0
			for s := range key.Len / 512 {
				place := p.l.Offset(key.Seg, key.SegOff+s*512)
				bad := hit
				for _, b := range blows {
					switch {
					case p.crc: // one bad byte is all of it
						bad = bad || b.hits(p.l.Offset(key.Seg, key.SegOff), int64(key.Len))
					case b.kind == "poison": // it takes a page away
						bad = bad || b.hits(place&^4095, 4096)
					default:
						bad = bad || b.hits(place, 512)
					}
				}
				ok[key.Off/512+uint64(s)] = !bad
			}
		}
	}
	return ok
}

// mustRead opens a cache and compares every sector that must be right; writes to
// it, so that the log goes on, and opens it once more.
func (p *patient) mustRead(t testing.TB, what string, mem engine.Memory, spared []bool) {
	t.Helper()
	disk := diskOf(p.disk)
	defer disk.Close()
	for round := range 2 {
		s, err := open(mem, disk)
		if err != nil {
			t.Errorf("%s: the repaired cache does not open: %v", what, err)
			return
		}
		wrong := 0
		for i := 0; i < len(spared); i++ {
			n := 0
			for n < 128 && i+n < len(spared) && spared[i+n] && (n == 0 || (i+n)%8192 != 0) {
				n++
			}
			if n == 0 {
				continue
			}
			off, buf := int64(i)*512, make([]byte, n*512)
			err := s.do(&engine.Request{Op: engine.Read, Off: off, Buf: buf})
			for j := range n {
				if err != nil || !bytes.Equal(buf[j*512:][:512], p.model[off+int64(j)*512:][:512]) {
					if wrong++; wrong < 5 {
						t.Errorf("%s, opened %d times: sector %d is wrong (%v)", what, round+1, i+j, err)
					}
				}
			}
			i += n - 1
		}
		if wrong > 0 {
			t.Errorf("%s: %d sectors are wrong", what, wrong)
		}
		if round == 0 {
			for i := range 40 {
				buf := bytes.Clone(p.model[i*512 : (i+1)*512])
				must(t, s.do(&engine.Request{Op: engine.Write, Off: int64(i) * 512, Buf: buf}))
			}
		}
		must(t, s.Close())
	}
}

// mustWriteBack writes back from the repaired cache and compares the disk alone.
func (p *patient) mustWriteBack(t testing.TB, what string, mem engine.Memory, spared []bool) {
	t.Helper()
	disk := diskOf(p.disk)
	defer disk.Close()
	s, err := open(mem, disk)
	if err != nil {
		t.Errorf("%s: the repaired cache does not open: %v", what, err)
		return
	}
	var flushed error
	for range 12 { // what is refused is halved each time
		if flushed = s.Flush(context.Background()); flushed == nil {
			break
		}
	}
	var left ondisk.Ranges
	s.Dirty(left.Add)
	must(t, s.Close())
	if (flushed == nil) != (left.Bytes() == 0) {
		t.Errorf("%s: flush says %v, %v are left", what, flushed, &left)
	}
	got := make([]byte, diskSize)
	disk.ReadAt(got, 0)
	for i, ok := range spared {
		if off := i * 512; ok && !bytes.Equal(got[off:off+512], p.model[off:off+512]) {
			t.Errorf("%s: written back, sector %d is wrong", what, i)
			return
		}
	}
}

// repaired runs a repair and checks what holds for every one.
func repaired(t testing.TB, what string, mem *pmem.Fake, o ondisk.RepairOptions) *ondisk.Repaired {
	t.Helper()
	rep := ondisk.Repair(mem, mem.Size(), o)
	rep.Verify()
	again := ondisk.Repair(rep, rep.Size(), o)
	if len(again.Mended) > 0 {
		t.Errorf("%s: repaired again, it finds %q after %q", what, again.Mended, rep.Mended)
	}
	return rep
}

// copied returns the copy that the repair makes.
func copied(t testing.TB, rep *ondisk.Repaired) *pmem.Fake {
	t.Helper()
	f := pmem.NewFake(rep.Size())
	must(t, rep.Copy(f))
	buf, got := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < rep.Size(); off += 1 << 20 {
		n := min(1<<20, rep.Size()-off)
		f.ReadAt(got[:n], off)
		if _, err := rep.ReadAt(buf[:n], off); (err == nil || err == io.EOF) && !bytes.Equal(buf[:n], got[:n]) {
			t.Fatalf("the copy differs in the MiB at %d", off)
		}
	}
	return f
}

// durable is an overlay as the engine wants it.
type durable struct{ *ondisk.Overlay }

func (durable) Durable() bool { return true }

// onto returns the repaired cache as memory that is as good as new.
func onto(rep *ondisk.Repaired) durable { return durable{ondisk.NewOverlay(rep, rep.Size())} }

func none(int) bool { return false }

// TestRepairRecords damages every record in every way, one copy and both: nothing
// is lost but what the clean keys in front of dirty_tail had.
func TestRepairRecords(t *testing.T) {
	for _, crc := range []bool{false, true} {
		p := newPatient(t, crc, 1)
		all := p.spared(nil, none)
		for name, copies := range p.places() {
			for _, kind := range blowKinds {
				for which := range 1<<len(copies) - 1 {
					var blows []blow
					mem := p.mem.Clone()
					for i, b := range copies {
						if (which+1)>>i&1 != 0 {
							if b.kind = kind; kind == "flip" {
								b.off, b.n = b.off+b.n/2, 1
							}
							b.hit(mem)
							blows = append(blows, b)
						}
					}
					if kind == "zero" && len(blows) < len(copies) {
						continue // as if never written
					}
					if !crc && kind != "flip" {
						continue
					}
					what := fmt.Sprintf("crc %t, %v", crc, blows)
					before := ondisk.Check(mem, mem.Size(), true)
					if len(before.Problems) == 0 && !(kind == "zero" && (name == "identity" || name == "fingerprint" || name == "settings")) {
						t.Errorf("%s: check finds nothing", what)
					}
					rep := repaired(t, what, mem, ondisk.RepairOptions{Durable: true})
					if !rep.Done() || rep.LostLog {
						t.Errorf("%s: %q, %v, %v remain", what, rep.Mended, rep.Left, rep.Report.Problems)
						continue
					}
					if unbound := name == "identity" && len(blows) == 2 && kind != "zero"; rep.Unbound != unbound {
						t.Errorf("%s: unbound %t", what, rep.Unbound)
					}
					if got := rep.Report.Layout.Info.Flags.DataCRC(); got != crc {
						t.Errorf("%s: data crc %t", what, got)
					}
					if kept := rep.Report.Layout.Settings == p.l.Settings; name != "settings" && !kept || kept && name == "settings" && len(blows) == 2 {
						t.Errorf("%s: settings %+v", what, rep.Report.Layout.Settings)
					}
					p.mustRead(t, what, onto(rep), all)
				}
			}
		}
	}
}

// TestRepairBothTails takes the 64 bytes of all four positions at once, as one
// media error does.
func TestRepairBothTails(t *testing.T) {
	p := newPatient(t, true, 2)
	for _, kind := range blowKinds {
		mem := p.mem.Clone()
		blow{"tails", ondisk.CtrlOff, 64, kind}.hit(mem)
		rep := repaired(t, kind, mem, ondisk.RepairOptions{Durable: true})
		if !rep.Done() {
			t.Errorf("%s: %v, %v remain", kind, rep.Left, rep.Report.Problems)
			continue
		}
		c := copied(t, rep)
		if left := ondisk.Check(c, c.Size(), true); len(left.Problems) > 0 || left.Dead > 0 {
			t.Errorf("%s: check of the copy: %v, %d dead keys", kind, left.Problems, left.Dead)
		}
		p.mustWriteBack(t, kind, c.Clone(), p.spared(nil, none))
		p.mustRead(t, kind, c, p.spared(nil, none))
	}
	// A second log that may be the one: a segment that begins with living keys.
	mem := p.mem.Clone()
	key := ondisk.Key{Len: 512, Seg: 30, Gen: p.l.Gens[30]}
	mem.WriteAt(ondisk.EncodeKset(make([]byte, ondisk.MaxKsetSize), 5, []ondisk.Key{key}), p.l.Offset(20, 0))
	mem.Zero(ondisk.CtrlOff, 64)
	rep := repaired(t, "two logs", mem, ondisk.RepairOptions{Durable: true, GiveUpLog: true})
	if rep.Done() || !errors.Is(errors.Join(rep.Left...), ondisk.ErrLogLost) {
		t.Errorf("two logs: %q, %v", rep.Mended, rep.Left)
	}
}

// TestRepairOlderTail loses the newer copy of a tail, so that the older one is
// read: a key_tail from which on keys are dead, a dirty_tail before key_tail.
func TestRepairOlderTail(t *testing.T) {
	p := newPatient(t, true, 8)
	for _, tail := range []ondisk.Tail{ondisk.KeyTail, ondisk.DirtyTail} {
		mem := p.mem.Clone()
		base := int64(ondisk.CtrlOff) + 32*int64(tail)
		at := p.l.KeyTailCopies.Newest
		if tail == ondisk.DirtyTail {
			at = p.l.DirtyTailCopies.Newest
		}
		// The beginning of the old log, which is all dead keys.
		var buf [ondisk.PositionSize]byte
		off := ondisk.EncodePosition(buf[:], tail, ondisk.Replica{Slot: at.Slot ^ 1, Seq: at.Seq - 1}, ondisk.Position{})
		mem.WriteAt(buf[:], off)
		blow{"tail", base + int64(at.Slot)*ondisk.PositionSize, 16, "flip"}.hit(mem)
		rep := repaired(t, tail.String(), mem, ondisk.RepairOptions{Durable: true})
		l := rep.Report.Layout
		if !rep.Done() || rep.Report.Dead > 0 || tail == ondisk.DirtyTail && l.DirtyTail != p.l.KeyTail || tail == ondisk.KeyTail && l.DirtyTail != p.l.DirtyTail {
			t.Errorf("%v: %q, %v remain, %d dead keys, tails at %v and %v", tail, rep.Mended, rep.Report.Problems, rep.Report.Dead, l.KeyTail, l.DirtyTail)
		}
		p.mustRead(t, tail.String(), onto(rep), p.spared(nil, none))
	}
}

// TestRepairLog damages each kset alone, and some in a row. Damage before
// dirty_tail costs nothing. Behind it, nothing is given up unless that is
// asked for, and then only the keys of the damaged ksets.
func TestRepairLog(t *testing.T) {
	p := newPatient(t, true, 3)
	dirty := p.dirtyFrom()
	wounds := [][2]int{{slices.IndexFunc(p.log, func(k logKset) bool { return k.last }), 1}} // the first kset, how many
	for i := 0; i+3 < len(p.log); i += 2 {
		wounds = append(wounds, [2]int{i, 1 + i/3%3})
	}
	for _, w := range wounds {
		i, row := w[0], w[1]
		kind := blowKinds[i%3]
		first, last := p.log[i], p.log[i+row-1]
		if first.at.Seg != last.at.Seg {
			continue
		}
		b := blow{"kset", first.off, last.off + last.size - first.off, kind}
		what := fmt.Sprintf("ksets %d to %d of %d, dirty from %d, %v", i, i+row-1, len(p.log), dirty, b)
		mem := p.mem.Clone()
		b.hit(mem)
		lost := p.lost([]blow{b})
		before := ondisk.Check(mem, mem.Size(), true)
		if len(before.Problems) == 0 && i > 0 {
			t.Errorf("%s: check finds nothing", what)
		}
		rep := repaired(t, what, mem, ondisk.RepairOptions{Durable: true})
		onlyLast := row == 1 && first.last
		switch {
		case i+row <= dirty || onlyLast:
			if !rep.Done() || rep.LostLog {
				t.Errorf("%s: %q, %v remain", what, rep.Mended, rep.Report.Problems)
			}
			p.mustRead(t, what, onto(rep), p.spared(nil, none))
			continue
		case rep.Done() || rep.LostLog || kind == "poison" == (rep.Copyable() == nil):
			t.Errorf("%s: without the flag: done %t, %q, copyable %v", what, rep.Done(), rep.Mended, rep.Copyable())
		}
		rep = repaired(t, what, mem, ondisk.RepairOptions{Durable: true, GiveUpLog: true})
		if !rep.Done() || !rep.LostLog && !onlyLast {
			t.Errorf("%s: with the flag: %q, %v, %v remain", what, rep.Mended, rep.Left, rep.Report.Problems)
		}
		if strings.Contains(strings.Join(rep.Mended, ""), "cut off") {
			t.Errorf("%s: %q", what, rep.Mended)
		}
		spared := p.spared([]blow{b}, func(kset int) bool { return lost[kset] })
		p.mustRead(t, what, onto(rep), spared)
		p.mustWriteBack(t, what, onto(rep), spared)
	}
}

// TestRepairTwoWounds takes a kset in front of dirty_tail, so that the log seems to
// begin at dirty_tail, and with it the one there, or all from there to the LAST.
// The place then looks like the end of a log, and must not be taken for it.
func TestRepairTwoWounds(t *testing.T) {
	p := newPatient(t, true, 9)
	last := slices.IndexFunc(p.log, func(k logKset) bool { return k.last })
	for dirty := 2; dirty <= last; dirty += 7 {
		moved := &patient{mem: p.mem.Clone(), log: p.log, l: p.l, crc: true, model: p.model, disk: slices.Clone(p.disk)}
		// What is too new on the disk a younger key covers.
		for _, k := range p.log[:dirty] {
			for _, key := range k.keys {
				copy(moved.disk[key.Off:][:key.Len], p.model[key.Off:])
			}
		}
		storeTail(moved.mem, ondisk.DirtyTail, p.log[dirty].at)
		var f [ondisk.FingerprintSize]byte
		off := ondisk.EncodeFingerprint(f[:], p.l.FingerprintCopies.Newest.Next(), &ondisk.Fingerprint{})
		moved.mem.WriteAt(f[:], off)
		for _, to := range []int{dirty, last} {
			front := blow{"kset", p.log[dirty/2].off, 8, "zero"}
			from, end := p.log[dirty], p.log[to]
			blows := []blow{front, {"kset", from.off, end.off + end.size - from.off, "zero"}}
			what := fmt.Sprintf("ksets %d and %d to %d", dirty/2, dirty, to)
			mem := moved.mem.Clone()
			for _, b := range blows {
				b.hit(mem)
			}
			if rep := repaired(t, what, mem, ondisk.RepairOptions{Durable: true}); rep.Done() && dirty != last {
				t.Errorf("%s: without the flag: %q", what, rep.Mended)
			}
			rep := repaired(t, what, mem, ondisk.RepairOptions{Durable: true, GiveUpLog: true})
			if !rep.Done() {
				t.Errorf("%s: with the flag: %q, %v, %v remain", what, rep.Mended, rep.Left, rep.Report.Problems)
			}
			lost := moved.lost(blows)
			spared := moved.spared(blows, func(kset int) bool { return lost[kset] })
			moved.mustRead(t, what, onto(rep), spared)
			moved.mustWriteBack(t, what, onto(rep), spared)
			if t.Failed() {
				t.Fatalf("%q", rep.Mended)
			}
		}
	}
}

// TestRepairCut: where nothing can bridge the damage, the log ends in front of
// it, and nothing behind comes back to life.
func TestRepairCut(t *testing.T) {
	p := newPatient(t, true, 4)
	i := p.dirtyFrom() + 5
	hit, behind := p.log[i], p.log[i+1]
	mem := p.mem.Clone()
	// A kset of a size that no number of keys has.
	buf := make([]byte, behind.size)
	mem.ReadAt(buf, behind.off)
	mem.Zero(hit.off, hit.size+behind.size)
	mem.WriteAt(buf[:], hit.off+hit.size+8)
	rep := repaired(t, "cut", mem, ondisk.RepairOptions{Durable: true, GiveUpLog: true})
	if !rep.Done() || !rep.LostLog || !strings.Contains(strings.Join(rep.Mended, ""), "cut off") {
		t.Errorf("%q, %v, %v remain", rep.Mended, rep.Left, rep.Report.Problems)
	}
	p.mustRead(t, "cut", onto(rep), p.spared(nil, func(kset int) bool { return kset >= i }))
	if end, _ := rep.Report.Layout.WalkLog(rep, rep.Report.Layout.KeyTail, func(ondisk.Position, *ondisk.Kset) error { return nil }); end.Pos != hit.at {
		t.Errorf("the log ends at %v, not at %v", end.Pos, hit.at)
	}
}

// crasher is a medium that stops after some stores.
type crasher struct {
	*pmem.Fake
	left int
}

var errCrash = errors.New("crash")

func (c *crasher) WriteAt(p []byte, off int64) (int, error) {
	if c.left == 0 {
		// A store cut in half.
		c.Fake.WriteAt(p[:len(p)/16*8], off)
	}
	if c.left--; c.left < 0 {
		return 0, errCrash
	}
	return c.Fake.WriteAt(p, off)
}

// TestRepairCrash cuts a repair in place off at every store, and repairs again.
func TestRepairCrash(t *testing.T) {
	p := newPatient(t, true, 5)
	i := p.dirtyFrom() + 3
	kset := blow{"kset", p.log[i].off, p.log[i+1].off + p.log[i+1].size - p.log[i].off, "flip"}
	places := p.places()
	for what, blows := range map[string][]blow{
		"records": slices.Concat(places["superblock"], places["cache_info"], places["segment_info, with data"], places["generation, with data"], places["key_tail"]),
		"log":     slices.Concat(places["dirty_tail"], []blow{kset}),
		"tails":   {{"tails", ondisk.CtrlOff, 64, "flip"}},
	} {
		damaged := p.mem.Clone()
		for _, b := range blows {
			if b.kind = "flip"; b.n < 64 {
				b.off, b.n = b.off+b.n/2, 1
			}
			b.hit(damaged)
		}
		lost := p.lost(blows)
		spared := p.spared(blows, func(kset int) bool { return lost[kset] })
		o := ondisk.RepairOptions{Durable: true, GiveUpLog: true}
		for n := 0; ; n++ {
			m := &crasher{damaged.Clone(), n}
			err := repaired(t, what, m.Fake, o).Store(m)
			rep := repaired(t, fmt.Sprintf("%s, cut off after %d stores", what, n), m.Fake, o)
			if !rep.Done() {
				t.Errorf("%s, cut off after %d stores: %v, %v remain", what, n, rep.Left, rep.Report.Problems)
			}
			if err == nil && len(rep.Mended) > 0 {
				t.Errorf("%s, stored whole: %q", what, rep.Mended)
			}
			p.mustRead(t, fmt.Sprintf("%s, cut off after %d stores", what, n), onto(rep), spared)
			if err == nil {
				break
			}
		}
	}
}

// TestRepairMemory: a place that stays unreadable is named, and the rest is mended.
func TestRepairMemory(t *testing.T) {
	p := newPatient(t, false, 6)
	mem := p.mem.Clone()
	bad, good := p.places()["cache_info"][0], p.places()["generation, free"][1]
	bad.kind, good.kind = "poison", "flip"
	bad.hit(mem)
	good.hit(mem)
	err := repaired(t, "bad memory", mem, ondisk.RepairOptions{Durable: true}).Store(mem)
	if !errors.Is(err, ondisk.ErrUnreadable) || !strings.Contains(err.Error(), fmt.Sprint(bad.off)) {
		t.Errorf("bad memory: %v", err)
	}
	if left := ondisk.Check(mem, mem.Size(), true); len(left.Problems) != 1 {
		t.Errorf("bad memory: %v", left.Problems)
	}

	// Unreadable data of a cache without checksums would be zeros in a copy.
	mem = p.mem.Clone()
	key := p.log[len(p.log)-1].keys[0]
	mem.Poison(p.l.Offset(key.Seg, key.SegOff), 8)
	rep := repaired(t, "bad data", mem, ondisk.RepairOptions{Durable: true})
	if rep.Done() || rep.Copyable() == nil || rep.Report.Damaged.Bytes() != int64(key.Len) {
		t.Errorf("bad data: done %t, copyable %v, damaged %v", rep.Done(), rep.Copyable(), &rep.Report.Damaged)
	}
	p.mustWriteBack(t, "bad data", onto(rep), p.spared([]blow{{"data", p.l.Offset(key.Seg, key.SegOff), int64(key.Len), "poison"}}, none))
}

// TestRepairGolden: what the kernel leaves of its records is less, and its ksets
// have no numbers.
func TestRepairGolden(t *testing.T) {
	for _, name := range []string{"small-crc", "small-nocrc"} {
		img := ondisk.Golden(t, name+".pmem")
		p := &patient{mem: pmem.NewFake(img.Size()), crc: name == "small-crc", disk: make([]byte, 16<<20), model: make([]byte, 16<<20)}
		must(t, ondisk.NewOverlay(img, img.Size()).Copy(p.mem))
		ondisk.Golden(t, name+".backing").ReadAt(p.disk, 0)
		p.readLog(t)
		copy(p.model, p.disk)
		for _, k := range p.log {
			for _, key := range k.keys {
				p.mem.ReadAt(p.model[key.Off:][:key.Len], p.l.Offset(key.Seg, key.SegOff))
			}
		}
		all := make([]bool, len(p.model)/512)
		for i := range all {
			all[i] = true
		}
		for place, blows := range p.places() {
			if place == "identity" || place == "fingerprint" {
				continue // it has none
			}
			for n, kind := range append(blowKinds, "flip", "flip") {
				if !p.crc && kind != "flip" {
					continue
				}
				mem := p.mem.Clone()
				for i, b := range blows {
					if b.kind = kind; n < len(blowKinds) || n == len(blowKinds)+i {
						b.hit(mem)
					}
				}
				what := fmt.Sprintf("%s, %s %s, case %d", name, kind, place, n)
				rep := repaired(t, what, mem, ondisk.RepairOptions{Durable: true})
				if !rep.Done() {
					t.Errorf("%s: %v, %v remain", what, rep.Left, rep.Report.Problems)
				} else if kind == "flip" {
					p.mustRead(t, what, onto(rep), all)
				}
			}
		}
	}
}

var (
	repairSeed  = flag.Uint64("repair.seed", 0, "seed of the random damage (default: from the clock)")
	repairCases = flag.Int("repair.cases", 40, "how many caches are damaged at random")
)

// TestRepairRandom damages a cache in several places at once. A repair never
// panics, and is done when it says so. If the cache opens, every sector that was
// spared is right.
func TestRepairRandom(t *testing.T) {
	seed := *repairSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	patients := []*patient{newPatient(t, false, seed), newPatient(t, true, seed+1)}
	done, opened := 0, 0
	for n := range *repairCases {
		rnd := rand.New(rand.NewPCG(seed, uint64(n)))
		p := patients[n%2]
		mem := p.mem.Clone()
		var all []blow
		for _, place := range p.places() {
			all = append(all, place...)
		}
		slices.SortFunc(all, func(a, b blow) int { return int(a.off - b.off) })
		var blows []blow
		for range 1 + rnd.IntN(4) {
			b := all[rnd.IntN(len(all))]
			switch rnd.IntN(4) {
			case 0: // in the log
				k := p.log[rnd.IntN(len(p.log))]
				b = blow{name: "kset", off: k.off + rnd.Int64N(k.size), n: 1 + rnd.Int64N(300)}
			case 1: // in data
				k := p.log[rnd.IntN(len(p.log))]
				if len(k.keys) == 0 {
					continue
				}
				key := k.keys[rnd.IntN(len(k.keys))]
				b = blow{name: "data", off: p.l.Offset(key.Seg, key.SegOff), n: 1 + rnd.Int64N(int64(key.Len))}
			}
			b.kind = blowKinds[rnd.IntN(3)]
			if b.kind == "flip" {
				b.n = 1
			}
			b.hit(mem)
			blows = append(blows, b)
		}
		what := fmt.Sprintf("seed %d, case %d, crc %t, %v", seed, n, p.crc, blows)
		ondisk.Check(mem, mem.Size(), true)
		repaired(t, what, mem, ondisk.RepairOptions{Durable: true})
		rep := repaired(t, what, mem, ondisk.RepairOptions{Durable: true, GiveUpLog: true})
		if rep.Done() {
			done++
		}
		disk := diskOf(p.disk)
		s, err := open(onto(rep), disk)
		if err != nil {
			disk.Close()
			if rep.Done() {
				t.Errorf("%s: done (%q), but it does not open: %v", what, rep.Mended, err)
			}
			continue
		}
		opened++
		must(t, s.Close())
		disk.Close()
		lost := p.lost(blows)
		first := len(p.log)
		for kset := range lost {
			first = min(first, kset)
		}
		text := strings.Join(rep.Mended, "\n")
		cut := strings.Contains(text, "cut off") || strings.Contains(text, "log: begins")
		spared := p.spared(blows, func(kset int) bool { return lost[kset] || cut && kset >= first })
		if t.Failed() {
			t.Fatalf("%q", rep.Mended)
		}
		p.mustRead(t, what, onto(rep), spared)
		p.mustWriteBack(t, what, onto(rep), spared)
		if t.Failed() {
			t.Fatalf("%q, remain %v, %v", rep.Mended, rep.Left, rep.Report.Problems)
		}
	}
	t.Logf("of %d caches %d were repaired, %d opened", *repairCases, done, opened)
}
