package engine

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"pgregory.net/rapid"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// driver serves every queue of a cache from one goroutine. What is submitted
// together, and in which order the queues end their turns, is then the test's
// decision and the same each time; only the cache's own goroutines are not.
type driver struct {
	*Cache
	woken chan struct{}
	dice  *rand.Rand
	under map[*Request]bool // submitted and not finished
}

func newDriver(mem Memory, disk *backing.Fake, o Options) (*driver, error) {
	o.Log = &testLog{}
	c, err := Open(mem, fakeDisk{disk}, o)
	if err != nil {
		return nil, err
	}
	d := &driver{Cache: c, woken: make(chan struct{}, 1), dice: rand.New(rand.NewPCG(1, 1)), under: map[*Request]bool{}}
	for _, q := range c.queues {
		q.OnWake(func() {
			select {
			case d.woken <- struct{}{}:
			default:
			}
		})
	}
	return d, nil
}

func (d *driver) submit(queue int, r *Request) {
	d.under[r] = true
	d.Queue(queue % len(d.queues)).Submit(r)
}

// checkPins fails if a segment is pinned and nobody reads.
func (d *driver) checkPins(t rapid.TB) {
	t.Helper()
	for i := range d.segments.all {
		if n := d.segments.all[i].pins.Load(); n != 0 && len(d.under) == 0 {
			t.Errorf("segment %d has %d pins", i, n)
		}
	}
}

// turn ends a turn of every queue.
func (d *driver) turn() {
	for _, q := range d.queues {
		d.toggleSome(d.dice)
		for _, r := range q.Turn() {
			delete(d.under, r)
		}
	}
}

// errNotFinished: a request was not finished in a time that is enough for anything.
var errNotFinished = errors.New("requests do not finish")

// await takes turns until done, whenever a queue asks for one.
func (d *driver) await(done func() bool) error {
	timeout := time.NewTimer(5 * time.Minute)
	defer timeout.Stop()
	for d.turn(); !done(); d.turn() {
		select {
		case <-d.woken:
		case <-timeout.C:
			return fmt.Errorf("%w: %+v", errNotFinished, d.Status())
		}
	}
	return nil
}

// do carries out requests in one turn.
func (d *driver) do(rs ...*Request) error {
	for i, r := range rs {
		d.submit(i, r)
	}
	err := d.await(func() bool {
		for _, r := range rs {
			if d.under[r] {
				return false
			}
		}
		return true
	})
	for _, r := range rs {
		err = errors.Join(err, r.Err)
	}
	return err
}

// medium is a region that can fail, and stop taking stores at any moment, as
// it looks when the server is killed in the middle of something.
type medium struct {
	*pmem.Fake
	fenced bool // a Fence makes durable what was stored
	mu     struct {
		sync.Mutex
		stopped bool
		fail    [2]int // the store that fails, counted down: of records, of data and log
		open    []opened
		bad     map[int64]bool // sectors that cannot be read until something is stored there
	}
}

// opened is a store that no fence has closed yet. Of what is longer than any
// part of the log the old content is not kept, since it is data then, in a
// place that nothing names.
type opened struct {
	off int64
	n   int
	old []byte
}

func newMedium(durable bool) *medium {
	m := &medium{Fake: pmem.NewFake(ondisk.MinSize), fenced: durable}
	m.mu.bad = map[int64]bool{}
	return m
}

func (m *medium) Durable() bool { return m.fenced }

// storeLocked is told of every store before it is made, and may refuse it.
func (m *medium) storeLocked(off int64, n int) error {
	if fail := &m.mu.fail[storeArea(off)]; *fail > 0 {
		if *fail--; *fail == 0 {
			return &pmem.FaultError{Path: "a failing region", Off: off}
		}
	}
	if m.fenced {
		o := opened{off: off, n: n}
		if n <= ondisk.MaxKsetSize {
			o.old = make([]byte, n)
			m.Fake.ReadAt(o.old, off)
		}
		m.mu.open = append(m.mu.open, o)
	}
	for at := range m.mu.bad {
		if off < at+sectorSize && at < off+int64(n) {
			delete(m.mu.bad, at)
		}
	}
	return nil
}

func (m *medium) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := range m.mu.bad {
		if at < off+int64(len(p)) && off < at+sectorSize {
			return 0, &pmem.FaultError{Path: "a failing region", Off: at}
		}
	}
	return m.Fake.ReadAt(p, off)
}

func (m *medium) ReadEach(bufs [][]byte, offs []int64) (int, error) { return readEach(m, bufs, offs) }

// poison makes a sector unreadable.
func (m *medium) poison(off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.bad[off] = true
}

func (m *medium) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.stopped {
		return len(p), nil
	}
	if err := m.storeLocked(off, len(p)); err != nil {
		m.Fake.WriteAt(p[:len(p)/2&^7], off)
		return 0, err
	}
	return m.Fake.WriteAt(p, off)
}

func (m *medium) Zero(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.stopped {
		return nil
	}
	if err := m.storeLocked(off, int(n)); err != nil {
		return err
	}
	return m.Fake.Zero(off, n)
}

// Fence closes the stores of all threads. A real one is for those of its own,
// so this one forgives a fence on the wrong thread.
func (m *medium) Fence() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.open = m.mu.open[:0]
}

// storeArea is 1 for the data areas of segments, which queues store to, and 0 for
// everything that the cache's own goroutines do.
func storeArea(off int64) int {
	if off < ondisk.SegmentsOff || (off-ondisk.SegmentsOff)%ondisk.SegmentSize < ondisk.SegmentHeader {
		return 0
	}
	return 1
}

// failStore makes the nth store to an area from now fail, half done; 0 is none.
func (m *medium) failStore(area, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.fail[area] = n
}

// crash ends all stores, as a kill does. If lost is not nil it is a power cut:
// of the stores that were not fenced, each may be missing, or any 8 bytes of
// it. meanwhile is called at that very moment, before anybody can act on a
// store that was not made.
func (m *medium) crash(lost *rand.Rand, meanwhile func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.stopped = true
	meanwhile()
	if lost == nil {
		return
	}
	for i := len(m.mu.open) - 1; i >= 0; i-- {
		o, old, percent := m.mu.open[i], []byte("anything"), 50*lost.IntN(3)
		for at := 0; at < o.n; at += 8 {
			if o.old != nil {
				old = o.old[at : at+8]
			}
			if lost.IntN(100) < percent {
				m.Fake.WriteAt(old, o.off+int64(at))
			}
		}
	}
}

// restarted returns the region as the next server finds it: mended.
func (m *medium) restarted() *medium {
	after := &medium{Fake: m.Fake, fenced: m.fenced}
	after.mu.bad = map[int64]bool{}
	return after
}

// diskFate decides on the operations of a disk.
type diskFate struct {
	mu struct {
		sync.Mutex
		fail [4]int  // how many more operations of a kind fail
		hold [4]bool // whether those of a kind are held
		bad  int64   // no write of a sector that is a multiple of it succeeds; 0 for none
	}
	held chan struct{} // gets one when an operation is held
}

func newFate() *diskFate { return &diskFate{held: make(chan struct{}, 1)} }

func (f *diskFate) script(op backing.Op) (x backing.Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.fail[op.Kind] > 0 {
		f.mu.fail[op.Kind]--
		x.Err = syscall.EIO
	}
	if bad := f.mu.bad * sectorSize; bad > 0 && (op.Kind == backing.OpWrite || op.Kind == backing.OpZero) && (op.Off+bad-1)/bad*bad < op.Off+op.Len {
		x.Err = syscall.EIO
	}
	if f.mu.hold[op.Kind] {
		x.Hold = true
		select {
		case f.held <- struct{}{}:
		default:
		}
	}
	return x
}

func (f *diskFate) fail(kind backing.Kind, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.fail[kind] = n
}

func (f *diskFate) hold(kind backing.Kind, hold bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.hold[kind] = hold
}

// heal lets everything succeed from now on.
func (f *diskFate) heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.mu.fail[:])
	clear(f.mu.hold[:])
	f.mu.bad = 0
}

// refuse makes the disk refuse sectors until it heals.
func (f *diskFate) refuse(every int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.bad = every
}

// loggedKey is a key of a log whose generation is current.
type loggedKey struct {
	ondisk.Key
	dirty bool
}

// readLog returns the layout of a cache and the keys of its log, and which
// segments they and the log take.
func readLog(mem Memory) (l *ondisk.Layout, keys []loggedKey, log, data map[uint32]bool, err error) {
	if l, err = ondisk.ReadLayout(mem, mem.Size()); err != nil {
		return nil, nil, nil, nil, err
	}
	log, data = map[uint32]bool{l.KeyTail.Seg: true}, map[uint32]bool{}
	dirty := false
	end, err := l.WalkLog(mem, l.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		dirty = dirty || at == l.DirtyTail
		if k.Last {
			log[k.Next] = true
		}
		for _, key := range k.Keys {
			if key.Gen == l.Gens[key.Seg] {
				keys = append(keys, loggedKey{key, dirty})
				data[key.Seg] = true
			}
		}
		return nil
	})
	if err == nil && end.Damage != nil {
		err = end.Damage
	}
	return l, keys, log, data, err
}

// relogging says how relog shapes a log.
type relogging struct {
	PerKset  int    // keys in a kset, 1 to 128
	Room     uint32 // bytes in the first segment, rounded to where a kset can begin
	Numbered int    // keys whose ksets have log sequence numbers; the others have none, as the kernel writes them
}

// maxRoom is room for two of the largest ksets and some small ones, so that a
// log comes to its segment's end on any of them, or soon goes on to the next.
const maxRoom = 2*ondisk.MaxKsetSize + 2000

// relog writes the log of a closed cache again: the same keys in the same
// order, but in other ksets and at other places, as another writer of the
// format could have left them. All of it counts as synced, since none of it is
// new: with a mark of the numbers before, chance would say what is.
func relog(mem Memory, how relogging) error {
	l, keys, log, data, err := readLog(mem)
	if err != nil {
		return err
	}
	var free []uint32
	for seg := range uint32(len(l.Chain)) {
		if log[seg] || !data[seg] {
			free = append(free, seg)
		}
	}
	at := ondisk.Position{Seg: free[0]}
	if len(free) > 1 {
		at.Off = ondisk.SegmentData - ondisk.KsetHeaderSize - min(how.Room, ondisk.SegmentData-ondisk.KsetHeaderSize)&^7
	}
	free = free[1:]
	seq, buf := ondisk.FirstSeq(), make([]byte, ondisk.MaxKsetSize)
	put := func(p []byte) error {
		_, err := mem.WriteAt(p, l.Offset(at.Seg, at.Off))
		return err
	}
	number := func(done int) (n uint64) {
		if done < how.Numbered {
			n, seq = seq, ondisk.NextSeq(seq)
		}
		return n
	}
	tail := func(t ondisk.Tail, copies ondisk.Copies) error {
		p := make([]byte, ondisk.PositionSize)
		off := ondisk.EncodePosition(p, t, copies.Newest.Next(), at)
		_, err := mem.WriteAt(p, off)
		return err
	}
	errs := tail(ondisk.KeyTail, l.KeyTailCopies)
	for done, dirty := 0, false; ; {
		if !dirty && (done == len(keys) || keys[done].dirty) {
			dirty = true
			errs = errors.Join(errs, tail(ondisk.DirtyTail, l.DirtyTailCopies))
		}
		if done == len(keys) {
			break
		}
		var kset []ondisk.Key
		for len(kset) < how.PerKset && done+len(kset) < len(keys) && keys[done+len(kset)].dirty == keys[done].dirty {
			kset = append(kset, keys[done+len(kset)].Key)
		}
		size := ondisk.KsetSize(len(kset))
		if at.Off+size > ondisk.SegmentData-ondisk.KsetHeaderSize {
			errs = errors.Join(errs, put(ondisk.EncodeLast(buf, number(done), free[0])))
			at, free = ondisk.Position{Seg: free[0]}, free[1:]
		}
		errs = errors.Join(errs, put(ondisk.EncodeKset(buf, number(done), kset)))
		at.Off += size
		done += len(kset)
	}
	if l.SyncMark != 0 && len(keys) > 0 && how.Numbered > 0 {
		p := make([]byte, ondisk.SyncMarkSize)
		_, err := mem.WriteAt(p, ondisk.EncodeSyncMark(p, l.SyncMarkCopies.Newest.Next(), ondisk.PrevSeq(seq)))
		errs = errors.Join(errs, err)
	}
	return errors.Join(errs, mem.Zero(l.Offset(at.Seg, at.Off), ondisk.KsetHeaderSize))
}

// holds reports whether operations of a kind are held.
func (f *diskFate) holds(kind backing.Kind) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.hold[kind]
}
