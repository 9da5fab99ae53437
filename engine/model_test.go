package engine

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

var modelCases = flag.Int("model.cases", 20, "cases of the model test; -rapid.seed is their seed")

// model is a cache and what a device of plain memory would hold. A case is a
// sequence of actions that rapid draws, and shrinks when it fails. So the
// device is small, and one goroutine drives all queues: only where an action
// says so is anything under way while the next one runs.
type model struct {
	mem       *medium
	disk      *backing.Fake
	fate      *diskFate
	dice      *rand.Rand // for what a power cut takes
	crc       bool
	cache     *driver
	want      []uint64 // the version of each sector
	last      uint64   // version
	reads     map[*Request]*modelRead
	flush     chan error // of a Flush under way, else nil
	mode      ondisk.Mode
	faulty    bool // faults of the disk may still show
	unsettled bool // nobody has looked yet what came of a write
}

// modelRead is a read that is under way, and for each of its sectors the
// versions that it may find.
type modelRead struct {
	lba int64
	may [][]uint64
}

const (
	// modelSectors are two stripes and a bit.
	modelSectors = 2*stripeSectors + 1000
	// modelSegments is as few as three queues can do with: a log, a segment
	// for each of them, one to spare, and the reserve: few writes of 4 MiB fill it.
	modelSegments = 7
	modelQueues   = 3
)

func TestModel(t *testing.T) {
	checkCases(t, *modelCases, func(t *rapid.T) {
		m := newModel(t)
		defer m.close()
		t.Repeat(map[string]func(*rapid.T){
			"requests":   m.requests,
			"scatter":    m.scatter,
			"fill":       m.fill,
			"discard":    m.discard,
			"hold read":  m.holdRead,
			"release":    m.release,
			"writeback":  m.writeback,
			"hold flush": m.holdFlush,
			"collect":    m.collect,
			"knobs":      m.turnKnobs,
			"mode":       m.setMode,
			"fail disk":  m.failDisk,
			"bad disk":   m.badDisk,
			"fail store": m.failStore,
			"damage":     m.damage,
			"spoil":      m.damageDirty,
			"restart":    m.restart,
			"check":      m.check,
			"": func(t *rapid.T) { // after each of them
				m.cache.checkOverwritten(t)
				m.cache.checkPins(t)
			},
		})
		m.finish(t)
	})
}

// checkCases is rapid.Check with a number of cases, and a seed that is shown
// although nothing fails.
func checkCases(t *testing.T, cases int, prop func(*rapid.T)) {
	seed := flag.Lookup("rapid.seed").Value
	drawn := seed.String()
	if drawn == "0" {
		drawn = strconv.FormatUint(rand.Uint64()>>1|1, 10)
	}
	for name, value := range map[string]string{"rapid.seed": drawn, "rapid.checks": strconv.Itoa(cases), "rapid.steps": "20"} {
		v := flag.Lookup(name).Value
		before := v.String()
		if err := v.Set(value); err != nil {
			t.Fatal(err)
		}
		defer v.Set(before)
	}
	t.Logf("seed %s (-rapid.seed)", drawn)
	rapid.Check(t, prop)
}

func newModel(t *rapid.T) *model {
	m := &model{
		mem: newMedium(rapid.Bool().Draw(t, "durable")), crc: rapid.Bool().Draw(t, "crc"),
		fate: newFate(), dice: rand.New(rand.NewPCG(1, 1)),
		want: make([]uint64, modelSectors), reads: map[*Request]*modelRead{},
	}
	formatSmall(t, m.mem, modelSegments, m.crc, rapid.IntRange(0, 90).Draw(t, "percent"))
	m.disk = backing.NewFake(modelSectors*sectorSize, sectorSize, 1)
	m.disk.Script(m.fate.script)
	m.open(t)
	m.setMode(t)
	return m
}

func (m *model) open(t *rapid.T) {
	if err := relog(m.mem, relogging{
		PerKset:  rapid.IntRange(1, ondisk.MaxKeys).Draw(t, "keys per kset"),
		Room:     rapid.Uint32Range(0, maxRoom).Draw(t, "room"),
		Numbered: rapid.IntRange(0, 1000).Draw(t, "numbered"),
	}); err != nil {
		t.Fatal(err)
	}
	var err error
	if m.cache, err = newDriver(m.mem, m.disk, Options{Queues: rapid.IntRange(1, modelQueues).Draw(t, "queues")}); err != nil {
		t.Fatalf("open: %v", err)
	}
	if rapid.IntRange(0, 3).Draw(t, "narrow") == 0 {
		// Each round picks anew what the last was cut short of, so a step that is
		// shorter than that takes would make a flush quadratic in the length of the log.
		m.cache.narrow(t, rapid.SampledFrom([]int{0, 1, 8}).Draw(t, "most"), rapid.SampledFrom([]time.Duration{time.Millisecond, roundTime}).Draw(t, "step"))
	}
}

func (m *model) close() {
	m.fate.heal()
	m.disk.Release()
	if m.cache != nil {
		m.cache.Close()
	}
	m.disk.Close()
}

// drawRange draws sectors of one stripe; most are few, and near its start, so
// that they meet others.
func drawRange(t *rapid.T) (lba int64, n int) {
	stripe := rapid.Int64Range(0, 2).Draw(t, "stripe") * stripeSectors
	room := int(min(stripeSectors, modelSectors-stripe))
	offs, lens := 64, 64
	switch rapid.SampledFrom([]string{"near", "near", "near", "near", "far", "long"}).Draw(t, "range") {
	case "far":
		offs, lens = room, 2048
	case "long":
		offs, lens = room, room
	}
	off := rapid.IntRange(0, offs-1).Draw(t, "off")
	return stripe + int64(off), rapid.IntRange(1, min(lens, room-off)).Draw(t, "sectors")
}

func (m *model) newWrite(lba int64, n int) *Request {
	m.last++
	return &Request{Op: Write, Off: lba * sectorSize, Buf: stamped(lba, n, m.last)}
}

func newRead(lba int64, n int) *Request {
	return &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, n*sectorSize)}
}

// drawZero draws a Zero, which may cover any number of stripes.
func drawZero(t *rapid.T) *Request {
	lba, n := drawRange(t)
	if rapid.SampledFrom([]bool{false, false, true}).Draw(t, "long") {
		n = rapid.IntRange(1, int(modelSectors-lba)).Draw(t, "sectors")
	}
	return &Request{Op: Zero, Off: lba * sectorSize, Len: n * sectorSize}
}

// requests submits a few requests, on any queues, in one turn of each. Those
// that overlap are under way together, so either may win, but the same one
// for ever.
func (m *model) requests(t *rapid.T) {
	var rs []*Request
	var queues []int
	for range rapid.IntRange(1, 4).Draw(t, "requests") {
		r := &Request{Op: Flush}
		switch rapid.SampledFrom([]Op{Write, Write, Write, Read, Read, Zero, Flush}).Draw(t, "op") {
		case Write:
			r = m.newWrite(drawRange(t))
			r.FUA = rapid.Bool().Draw(t, "fua")
		case Read:
			r = newRead(drawRange(t))
		case Zero:
			r = drawZero(t)
			r.FUA = rapid.Bool().Draw(t, "fua")
		}
		rs = append(rs, r)
		queues = append(queues, rapid.IntRange(0, modelQueues-1).Draw(t, "queue"))
	}
	m.run(t, rs, queues)
}

// scatter writes single sectors, more than a kset takes.
func (m *model) scatter(t *rapid.T) {
	lba := rapid.Int64Range(0, modelSectors-1).Draw(t, "lba")
	step := rapid.Int64Range(1, 40).Draw(t, "step")
	var rs []*Request
	for range rapid.IntRange(1, 300).Draw(t, "writes") {
		rs = append(rs, m.newWrite(lba, 1))
		lba = (lba + step) % modelSectors
	}
	m.run(t, rs, make([]int, len(rs)))
}

// fill writes whole stripes, one after the other, until the cache is full
// some times over.
func (m *model) fill(t *rapid.T) {
	queue := rapid.IntRange(0, modelQueues-1).Draw(t, "queue")
	for i := range rapid.Int64Range(1, 10).Draw(t, "stripes") {
		m.run(t, []*Request{m.newWrite(i%2*stripeSectors, stripeSectors)}, []int{queue})
	}
}

// discard makes zeros of single sectors, up to what fills more than a segment.
func (m *model) discard(t *rapid.T) {
	lba := rapid.Int64Range(0, modelSectors-1).Draw(t, "lba")
	queue := rapid.IntRange(0, modelQueues-1).Draw(t, "queue")
	rs := make([]*Request, rapid.IntRange(1, 3).Draw(t, "times")*rapid.IntRange(1, modelSectors-1).Draw(t, "sectors"))
	for i := range rs {
		rs[i] = &Request{Op: Zero, Off: lba * sectorSize, Len: sectorSize}
		lba = (lba + 1) % modelSectors
	}
	for len(rs) > 0 { // no two of a turn at the same place
		n := min(len(rs), modelSectors)
		m.run(t, rs[:n], slices.Repeat([]int{queue}, n))
		rs = rs[n:]
	}
}

// effect returns which sectors a request changes, and to what version.
func effect(r *Request) (from, to int64, version uint64) {
	from = r.Off / sectorSize
	switch r.Op {
	case Write:
		version, _ = stamp(r.Buf, from)
	case Zero:
	default:
		return from, from, 0
	}
	return from, from + int64(r.size()/sectorSize), version
}

// run carries requests out. It waits for all of them but reads, when those of
// the disk are held.
func (m *model) run(t *rapid.T, rs []*Request, queues []int) {
	for _, r := range rs {
		if r.Op != Read {
			continue
		}
		read := &modelRead{lba: r.Off / sectorSize}
		for i := range len(r.Buf) / sectorSize {
			read.may = append(read.may, []uint64{m.want[read.lba+int64(i)]})
		}
		m.reads[r] = read
	}
	// What misses in a mode that keeps no reads is cached by nobody.
	kept := map[*Request][]bool{}
	if !keepsReads(m.mode) {
		for r := range m.reads {
			kept[r] = m.cached(r)
		}
	}
	contested := map[int64][]uint64{}
	for _, r := range rs {
		from, to, version := effect(r)
		for lba := from; lba < to; lba++ {
			contested[lba] = append(contested[lba], version)
		}
		for _, read := range m.reads {
			for lba := max(from, read.lba); lba < min(to, read.lba+int64(len(read.may))); lba++ {
				read.may[lba-read.lba] = append(read.may[lba-read.lba], version)
			}
		}
	}
	for i, r := range rs {
		m.cache.submit(queues[i], r)
	}
	m.await(t, rs)
	var failed []*Request
	for _, r := range rs {
		switch {
		case r.Op == Read || r.Err == nil:
			continue
		case !m.refused(r.Err):
			t.Fatalf("op %d: %v", r.Op, r.Err)
		}
		failed = append(failed, r)
		for lba, to, _ := effect(r); lba < to; lba++ {
			contested[lba] = append(contested[lba], m.want[lba])
		}
	}
	for lba, versions := range contested {
		m.want[lba] = versions[0]
		if len(versions) > 1 {
			m.want[lba] = m.oneOf(t, lba, versions)
		}
	}
	m.again(t, failed)
	if len(failed) == 0 {
		for _, r := range rs {
			if from, to, _ := effect(r); from < to {
				m.checkDisk(t, from, to-from)
			}
		}
	}
	for r, before := range kept {
		for i, now := range m.cached(r) {
			if lba := r.Off/sectorSize + int64(i); now && !before[i] && contested[lba] == nil && len(failed) == 0 {
				t.Fatalf("sector %d was missed in mode %v and is cached", lba, m.mode)
			}
		}
	}
}

// cached says which sectors of a read are in the cache.
func (m *model) cached(r *Request) []bool {
	cached := make([]bool, len(r.Buf)/sectorSize)
	for i := range cached {
		cached[i] = m.cache.Cached(r.Off+int64(i*sectorSize), sectorSize)
	}
	return cached
}

// oneOf reads a sector, which must have one of the versions. It may be on the disk
// alone already, and that may still owe a failure.
func (m *model) oneOf(t *rapid.T, lba int64, versions []uint64) uint64 {
	r := newRead(lba, 1)
	err := m.cache.do(r)
	if m.faulty && errors.Is(err, syscall.EIO) {
		err = m.cache.do(r)
	}
	if err != nil {
		t.Fatalf("sector %d: %v", lba, err)
	}
	v, err := stamp(r.Buf, lba)
	if err != nil || !slices.Contains(versions, v) {
		t.Fatalf("sector %d has version %d, %v; it may have %v", lba, v, err, versions)
	}
	return v
}

// await waits for requests, and lets held ones go when a write may be waiting
// for them.
func (m *model) await(t *rapid.T, rs []*Request) {
	m.cache.turn()
	left := func() (reads, others int) {
		for _, r := range rs {
			switch {
			case !m.cache.under[r]:
			case r.Op == Read:
				reads++
			default:
				others++
			}
		}
		return reads, others
	}
	if _, others := left(); others > 0 {
		m.letGo()
	}
	if err := m.cache.await(func() bool {
		reads, others := left()
		return others == 0 && (reads == 0 || m.fate.holds(backing.OpRead))
	}); err != nil {
		t.Fatal(err)
	}
	m.judge(t)
}

// judge looks at the reads that have finished.
func (m *model) judge(t *rapid.T) {
	for r, read := range m.reads {
		if m.cache.under[r] {
			continue
		}
		delete(m.reads, r)
		if r.Err != nil {
			if !m.faulty || !errors.Is(r.Err, syscall.EIO) {
				t.Fatalf("read of sector %d: %v", read.lba, r.Err)
			}
			continue
		}
		for i, may := range read.may {
			lba := read.lba + int64(i)
			if v, err := stamp(r.Buf[i*sectorSize:][:sectorSize], lba); err != nil || !slices.Contains(may, v) {
				t.Fatalf("sector %d is read as version %d, %v; it may have %v", lba, v, err, may)
			}
		}
	}
}

// letGo lets the disk finish what it holds.
func (m *model) letGo() {
	m.fate.hold(backing.OpRead, false)
	m.fate.hold(backing.OpWrite, false)
	m.fate.hold(backing.OpZero, false)
	m.disk.Release()
}

// holdRead begins a read, which stays under way if it misses anything, another
// one of a part of the same, and writes to a part as well: while the disk is
// still reading, or in the turn in which the answer is there.
func (m *model) holdRead(t *rapid.T) {
	m.fate.hold(backing.OpRead, true)
	lba, n := drawRange(t)
	queue := func() []int { return []int{rapid.IntRange(0, modelQueues-1).Draw(t, "queue")} }
	part := func() (int64, int) {
		skip := rapid.IntRange(0, n-1).Draw(t, "skip")
		return lba + int64(skip), rapid.IntRange(1, n-skip).Draw(t, "sectors")
	}
	m.run(t, []*Request{newRead(lba, n)}, queue())
	m.run(t, []*Request{newRead(part())}, queue())
	if rapid.Bool().Draw(t, "answered") && len(m.reads) > 0 {
		select {
		case <-m.cache.woken:
		default:
		}
		m.letGo()
		select {
		case <-m.cache.woken:
		case <-time.After(time.Second): // it had come before
		}
	}
	m.run(t, []*Request{m.newWrite(part())}, queue())
}

// release finishes everything that is under way.
func (m *model) release(t *rapid.T) {
	m.letGo()
	if err := m.cache.await(func() bool { return len(m.cache.under) == 0 }); err != nil {
		t.Fatal(err)
	}
	m.judge(t)
	if m.flush != nil {
		m.flushed(t, <-m.flush)
		m.flush = nil
	}
}

func (m *model) flushed(t *rapid.T, err error) {
	if err != nil && !m.explains(err) {
		t.Fatalf("write-back: %v", err)
	}
}

// explains reports whether an error may come of a fault that the disk or the
// memory has.
func (m *model) explains(err error) bool {
	var fault *pmem.FaultError
	return m.faulty && (errors.Is(err, syscall.EIO) || errors.Is(err, ErrDamaged) || errors.As(err, &fault))
}

// writeback writes everything back.
func (m *model) writeback(t *rapid.T) {
	m.release(t)
	err := m.cache.Flush(context.Background())
	m.flushed(t, err)
	if n := m.cache.Status().DirtyBytes; err == nil && n != 0 {
		t.Fatalf("%d bytes are dirty after write-back", n)
	}
}

// holdFlush begins to write back and stops in the middle.
func (m *model) holdFlush(t *rapid.T) {
	m.release(t)
	m.fate.hold(backing.OpWrite, true)
	m.fate.hold(backing.OpZero, true)
	select {
	case <-m.fate.held:
	default:
	}
	m.flush = make(chan error, 1)
	c := m.cache
	go func() { m.flush <- c.Flush(context.Background()) }()
	select {
	case <-m.fate.held:
	case err := <-m.flush:
		m.flush <- err
	}
}

// collect takes everything out of the cache.
func (m *model) collect(t *rapid.T) {
	m.heal(t)
	percent := m.cache.Settings().GCPercent
	if err := m.cache.setGC(0); err != nil {
		t.Fatal(err)
	}
	m.writeback(t)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		if s := m.cache.Status(); s.KeyTail == s.KeyHead {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the log is not collected: %+v", m.cache.Status())
		}
	}
	if err := m.cache.setGC(percent); err != nil {
		t.Fatal(err)
	}
}

func drawMode(t *rapid.T) ondisk.Mode {
	return ondisk.Mode(rapid.IntRange(0, int(ondisk.PassThrough)).Draw(t, "mode"))
}

// setMode changes the mode, or tries to and gives up where that takes time.
func (m *model) setMode(t *rapid.T) {
	m.release(t)
	wanted := drawMode(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if rapid.IntRange(0, 3).Draw(t, "break off") == 0 {
		cancel()
	}
	err := m.cache.Set(ctx, func(s *Settings) error { s.Mode = wanted; return nil })
	switch {
	case err == nil:
		m.mode = wanted
	case !errors.Is(err, context.Canceled) && !m.explains(err):
		t.Fatalf("mode %v: %v", wanted, err)
	}
	if now := m.cache.Settings().Mode; now != m.mode {
		t.Fatalf("the mode is %v, want %v (%v)", now, m.mode, err)
	}
	m.checkDisk(t, 0, modelSectors)
}

// checkDisk compares sectors of the disk as a power cut would leave it, where the mode
// promises that it has everything.
func (m *model) checkDisk(t *rapid.T, lba, n int64) {
	if promisesClean(m.mode) && !m.unsettled {
		buf := make([]byte, n*sectorSize)
		m.disk.CrashAt(buf, lba*sectorSize)
		m.compare(t, buf, lba, "the disk alone")
	}
}

// refused reports whether a write has failed as one may in a mode that answers from the
// disk.
func (m *model) refused(err error) bool {
	return err != nil && promisesClean(m.mode) && m.explains(err)
}

// again makes writes that have failed once more on a disk that has healed: until then it may
// have the old content or the new.
func (m *model) again(t *rapid.T, failed []*Request) {
	if len(failed) == 0 {
		return
	}
	m.heal(t)
	for _, r := range failed {
		again := &Request{Op: r.Op, Off: r.Off, Len: r.Len}
		if r.Op == Write {
			from, to, _ := effect(r)
			again = m.newWrite(from, int(to-from))
		}
		m.run(t, []*Request{again}, []int{0})
	}
}

// turnKnobs changes settings.
func (m *model) turnKnobs(t *rapid.T) {
	percent := rapid.IntRange(0, 90).Draw(t, "percent")
	cutoff := rapid.SampledFrom([]int64{0, sectorSize, 8 << 10, 4 << 20}).Draw(t, "cutoff")
	if err := m.cache.Set(context.Background(), func(s *Settings) error {
		s.GCPercent, s.SeqCutoff = percent, cutoff
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// failDisk makes the next operation of a kind fail.
func (m *model) failDisk(t *rapid.T) {
	kind := rapid.SampledFrom([]backing.Kind{backing.OpRead, backing.OpRead, backing.OpRead, backing.OpWrite, backing.OpFlush, backing.OpZero}).Draw(t, "kind")
	m.faulty = true
	m.fate.fail(kind, 1)
}

// badDisk makes the disk refuse a sector of each MiB or so, until it heals.
func (m *model) badDisk(t *rapid.T) {
	m.faulty = true
	m.fate.refuse(rapid.Int64Range(1500, 2500).Draw(t, "every"))
}

// heal ends the faults of the disk, and waits until write-back knows.
func (m *model) heal(t *rapid.T) {
	m.fate.heal()
	m.release(t)
	for range 3 {
		if m.cache.Flush(context.Background()) == nil {
			break
		}
	}
	m.faulty = false
}

// failStore lets a store of a write fail, which is made in another segment then.
// Only where a tail could not be stored, or the record that leads the log there,
// or there are too few segments, the write may have happened or not, and the
// cache has had enough.
func (m *model) failStore(t *rapid.T) {
	m.release(t)
	r := m.newWrite(drawRange(t))
	if rapid.Bool().Draw(t, "zero") {
		r = drawZero(t)
	}
	area := rapid.SampledFrom([]int{1, 1, 0}).Draw(t, "area")
	m.mem.failStore(area, rapid.IntRange(1, 4).Draw(t, "store"))
	err := m.cache.do(r)
	m.mem.failStore(area, 0)
	// The collector or write-back may have met it, and not have said so yet.
	m.cache.rest(context.Background())
	m.cache.Resume()
	s := m.cache.Status()
	why := m.cache.failure()
	if err != nil && why == nil && !m.refused(err) || why != nil && area == 1 && !errors.Is(why, ErrBadSegments) && !errors.Is(why, ErrBadHead) {
		t.Fatalf("write: %v; %s: %s, bad are %v", err, s.State, s.Error, s.BadSegments)
	}
	m.unsettled = true
	m.restartIfFailed(t)
	m.unsettled = false
	m.heal(t)
	from, to, version := effect(r)
	for lba := from; lba < to; lba++ {
		may := []uint64{version}
		if err != nil {
			may = append(may, m.want[lba])
		}
		m.want[lba] = m.oneOf(t, lba, may)
	}
	if err != nil {
		m.again(t, []*Request{r})
	}
	m.checkDisk(t, from, to-from)
}

// restartIfFailed opens the cache again if it has no use for the memory that it
// has met. It is mended then.
func (m *model) restartIfFailed(t *rapid.T) {
	if m.cache.Status().State == Failed {
		m.restart(t)
	}
}

// damage makes some clean data unreadable or, where that is noticed, wrong.
// The disk has it.
func (m *model) damage(t *rapid.T) {
	m.heal(t)
	if k, ok := m.spoil(t, false); ok {
		m.run(t, []*Request{newRead(int64(k.Off/sectorSize), int(k.Len/sectorSize))}, []int{0})
		m.release(t)
		m.restartIfFailed(t)
	}
}

// damageDirty does the same to dirty data. Nobody has it, so what was stored
// with it cannot be read, or can and is right, until it is written again. The
// key may be for a part of that alone, if it was logged again.
func (m *model) damageDirty(t *rapid.T) {
	m.release(t)
	m.faulty = true
	k, ok := m.spoil(t, true)
	if !ok {
		return
	}
	from, end := int64(k.Off/sectorSize), int64((k.Off+uint64(k.Len))/sectorSize)
	const around = maxSummed / sectorSize
	stripe := from / stripeSectors * stripeSectors
	for lba := max(stripe, from-around); lba < min(end+around, stripe+stripeSectors, modelSectors); lba++ {
		r := newRead(lba, 1)
		err := m.cache.do(r)
		if err == nil {
			m.compare(t, r.Buf, lba, "a damaged cache")
			continue
		}
		if !m.explains(err) {
			t.Fatalf("sector %d of a damaged cache: %v", lba, err)
		}
		from, end = min(from, lba), max(end, lba+1)
	}
	m.restartIfFailed(t)
	m.run(t, []*Request{m.newWrite(from, int(end-from))}, []int{0})
}

// spoil damages the data of a key, if there is one. How many there are depends
// on what write-back and the collector have done by now, and what is drawn
// must not, or nothing could be shrunk.
func (m *model) spoil(t *rapid.T, dirty bool) (k loggedKey, ok bool) {
	key := rapid.IntRange(0, 1<<20).Draw(t, "key")
	sector := rapid.Uint32Range(0, stripeSectors-1).Draw(t, "sector")
	wrong := rapid.Bool().Draw(t, "wrong") && m.crc
	m.cache.Rest(context.Background()) // nobody writes the data back or collects it before it is damaged
	defer m.cache.Resume()
	_, keys, _, _, err := readLog(m.mem)
	if err != nil {
		t.Fatal(err)
	}
	keys = slices.DeleteFunc(keys, func(k loggedKey) bool {
		return dirty != (k.dirty && k.Flags&ondisk.KeyClean == 0) || dirty && k.Flags&ondisk.KeyZero != 0
	})
	if len(keys) == 0 {
		return k, false
	}
	k = keys[key%len(keys)]
	at := m.cache.layout.Offset(k.Seg, k.SegOff+sector*sectorSize%k.Len)
	if wrong {
		b := make([]byte, 8)
		m.mem.ReadAt(b, at)
		b[3] ^= 1
		m.mem.Fake.WriteAt(b, at)
	} else {
		m.mem.poison(at)
	}
	return k, true
}

// restart closes the cache, or kills it with whatever is under way, and opens
// it again, after another writer of the format had it.
func (m *model) restart(t *rapid.T) {
	how := rapid.SampledFrom([]string{"close", "kill", "power cut", "loss"}).Draw(t, "how")
	lost := how == "loss" && promisesClean(m.mode)
	old := m.disk
	// Whatever the cache writes after its memory has stopped, no disk gets.
	stopped := func() { m.disk = old.Crash() }
	switch {
	case how == "close":
		m.heal(t)
	case how == "power cut" && m.mem.Durable():
		m.mem.crash(m.dice, stopped)
	default:
		m.mem.crash(nil, stopped)
	}
	m.fate.heal()
	old.Release()
	if err := m.cache.Close(); err != nil && how == "close" {
		t.Logf("close: %v", err)
	}
	if m.flush != nil {
		if err := <-m.flush; err != nil && !errors.Is(err, ErrStopped) {
			m.flushed(t, err)
		}
		m.flush = nil
	}
	if m.disk != old {
		old.Close()
		m.disk.Script(m.fate.script)
	}
	percent := m.cache.Settings().GCPercent
	m.cache, m.mem, m.faulty = nil, m.mem.restarted(), false
	clear(m.reads)
	if lost {
		m.mem, m.mode = newMedium(m.mem.Durable()), ondisk.WriteBack
		formatSmall(t, m.mem, modelSegments, m.crc, percent)
	}
	m.open(t)
	if now := m.cache.Settings().Mode; now != m.mode {
		t.Fatalf("the mode is %v after a restart, want %v", now, m.mode)
	}
	if lost {
		if !m.unsettled {
			m.check(t)
		}
		m.setMode(t)
	}
}

// check compares the whole device.
func (m *model) check(t *rapid.T) {
	m.heal(t)
	for lba := int64(0); lba < modelSectors; lba += stripeSectors {
		r := newRead(lba, int(min(stripeSectors, modelSectors-lba)))
		if err := m.cache.do(r); err != nil {
			t.Fatalf("read of stripe %d: %v", lba/stripeSectors, err)
		}
		m.compare(t, r.Buf, lba, "the cache")
	}
	m.cache.checkPlaces(t)
}

func (m *model) compare(t *rapid.T, buf []byte, lba int64, who string) {
	for ; len(buf) > 0; buf, lba = buf[sectorSize:], lba+1 {
		if v, err := stamp(buf[:sectorSize], lba); err != nil || v != m.want[lba] {
			t.Fatalf("sector %d of %s has version %d, %v; want %d", lba, who, v, err, m.want[lba])
		}
	}
}

// finish compares the whole device as it is, after a restart, and once
// everything is written back the disk without the cache.
func (m *model) finish(t *rapid.T) {
	m.check(t)
	m.restart(t)
	m.check(t)
	m.writeback(t)
	buf := make([]byte, modelSectors*sectorSize)
	crashed := m.disk.Crash()
	crashed.ReadAt(buf, 0)
	crashed.Close()
	m.compare(t, buf, 0, "the disk alone")
}
