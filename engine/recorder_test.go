package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// recorder is a region that knows what a power cut could leave of it.
//
// A region on DAX (durable) loses stores word by word: each aligned 8 bytes
// arrive by themselves and in any order until the goroutine that stored them
// has gone through a fence. A fence of another goroutine does nothing for
// them. That no word is stored to by two goroutines without a fence between
// is not modelled but demanded.
//
// A region in the page cache loses whatever was stored since the last sync:
// the kernel writes pages when it likes, so each is found as it was at some
// moment since then, and so is each sector of a page whose write was cut short.
type recorder struct {
	durable bool
	hook    func(event) // called by the storing goroutine, without the lock

	mu struct {
		sync.Mutex
		live   *pmem.Fake // what everybody reads
		sure   *pmem.Fake // what no power cut takes
		sum    uint64     // of sure, see wordSum
		open   []stored   // what it may take, oldest first
		serial uint64
	}
}

// event is what is about to happen, or for a store has just happened.
type event int

const (
	afterStore event = iota
	beforeFence
	beforeSync
)

// nobody is the owner of what a dead server has stored.
const nobody = 0

// stored is one store. Its data is not changed any more.
type stored struct {
	serial uint64
	owner  uint64 // goroutine
	off    int64
	data   []byte
}

func (s *stored) end() int64 { return s.off + int64(len(s.data)) }

// moment is a recorder's content at one moment.
type moment struct {
	durable bool
	sure    *pmem.Fake
	sum     uint64
	open    []stored
}

// newRecorder makes a region with the content of from, all of it sure.
func newRecorder(from *pmem.Fake, sum uint64, durable bool) *recorder {
	m := &recorder{durable: durable, hook: func(event) {}}
	m.mu.live, m.mu.sure, m.mu.sum = from, from.Clone(), sum
	return m
}

// freeze calls f with the present moment while nothing is stored.
func (m *recorder) freeze(f func(moment)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(moment{m.durable, m.mu.sure.Clone(), m.mu.sum, slices.Clone(m.mu.open)})
}

// orphan is called when the server has died. What it had not fenced a power cut
// may still take, but it has left the processors and comes before all that is
// stored later.
func (m *recorder) orphan() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.mu.open {
		m.mu.open[i].owner = nobody
	}
}

func (m *recorder) Durable() bool { return m.durable }

func (m *recorder) Size() int64 { return m.mu.live.Size() }

func (m *recorder) ReadAt(p []byte, off int64) (int, error) { return m.mu.live.ReadAt(p, off) }

func (m *recorder) WriteAt(p []byte, off int64) (int, error) {
	err := m.store(off, slices.Clone(p))
	m.hook(afterStore)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Zero leaves out pieces that are zeros for sure.
func (m *recorder) Zero(off, n int64) error {
	const piece = 64 << 10
	for ; n > 0; off, n = off+piece, n-piece {
		if zero := make([]byte, min(n, piece)); n <= piece || !m.zeros(off) {
			if err := m.store(off, zero); err != nil {
				return err
			}
		}
	}
	m.hook(afterStore)
	return nil
}

func (m *recorder) zeros(off int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	var page [ondisk.SectorSize]byte
	for _, f := range []*pmem.Fake{m.mu.live, m.mu.sure} {
		for end := off + 64<<10; off < end; off += int64(len(page)) {
			if f.ReadAt(page[:], off); page != [ondisk.SectorSize]byte{} {
				return false
			}
		}
	}
	return true
}

func (m *recorder) store(off int64, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, err := m.mu.live.WriteAt(data, off)
	if fault := (*pmem.FaultError)(nil); errors.As(err, &fault) {
		data = data[:(fault.Off-off)&^7]
	}
	if len(data) == 0 {
		return err
	}
	m.mu.serial++
	s := stored{m.mu.serial, goroutine(), off, data}
	for i := range m.mu.open {
		if o := &m.mu.open[i]; m.durable && o.owner != s.owner && o.owner != nobody && o.off < s.end() && s.off < o.end() {
			panic(fmt.Sprintf("%s is stored over %s of another goroutine, which has not fenced it", s, *o))
		}
	}
	m.mu.open = append(m.mu.open, s)
	return err
}

func (m *recorder) Fence() {
	m.hook(beforeFence)
	if me := goroutine(); m.durable {
		m.secure(func(s *stored) bool { return s.owner == me })
	}
}

func (m *recorder) Settle(iter.Seq2[int64, int64]) error { return nil }

func (m *recorder) Sync() error {
	if m.durable {
		return nil
	}
	m.mu.Lock()
	until := m.mu.serial
	m.mu.Unlock()
	m.hook(beforeSync)
	m.secure(func(s *stored) bool { return s.serial <= until })
	return nil
}

// secure makes the stores sure that are.
func (m *recorder) secure(are func(*stored) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rest := m.mu.open[:0:0]
	for _, s := range m.mu.open {
		if !are(&s) {
			rest = append(rest, s)
			continue
		}
		m.mu.sum += s.apply(m.mu.sure, func(int64) bool { return true })
	}
	m.mu.open = rest
}

// apply stores the words of s that keep wants, and returns what that adds to
// the sum.
func (s *stored) apply(to *pmem.Fake, keep func(off int64) bool) (added uint64) {
	buf := make([]byte, len(s.data))
	to.ReadAt(buf, s.off)
	changed := false
	for i := 0; i < len(buf); i += 8 {
		before, after := binary.LittleEndian.Uint64(buf[i:]), binary.LittleEndian.Uint64(s.data[i:])
		if off := s.off + int64(i); before != after && keep(off) {
			binary.LittleEndian.PutUint64(buf[i:], after)
			added += wordSum(off, after) - wordSum(off, before)
			changed = true
		}
	}
	if changed {
		to.WriteAt(buf, s.off)
	}
	return added
}

// wordSum is what a word adds to the sum of a region: two contents with the
// same sum are taken for the same.
func wordSum(off int64, word uint64) uint64 {
	if word == 0 {
		return 0
	}
	hi, lo := bits.Mul64(word^0x9e3779b97f4a7c15, uint64(off)|1<<63|1)
	hi, lo = bits.Mul64(hi^lo, 0xd6e8feb86659fd93)
	return hi ^ lo
}

// goroutine returns the number of the calling goroutine.
func goroutine() (id uint64) {
	var buf [32]byte
	for _, c := range buf[len("goroutine "):runtime.Stack(buf[:], false)] {
		if c < '0' || c > '9' {
			break
		}
		id = id*10 + uint64(c-'0')
	}
	return id
}

// choice is what a power cut keeps of the open stores: of number i the words
// at off that keep says.
type choice struct {
	name string
	keep func(i int, off int64) bool
}

// leave returns the region as the power cut leaves it, and its sum.
func (m *moment) leave(c choice) (*pmem.Fake, uint64) {
	region, sum := m.sure.Clone(), m.sum
	for i := range m.open {
		sum += m.open[i].apply(region, func(off int64) bool { return c.keep(i, off) })
	}
	return region, sum
}

// words is how many words are open.
func (m *moment) words() (n int) {
	for i := range m.open {
		n += len(m.open[i].data) / 8
	}
	return n
}

// choices draws what the power cut may keep: everything possible where that is
// at most so many, and otherwise most things that are simple, for mistakes are.
func (m *moment) choices(dice *rand.Rand, most int) []choice {
	all := []choice{
		{"nothing", func(int, int64) bool { return false }},
		{"everything", func(int, int64) bool { return true }},
	}
	switch {
	case len(m.open) == 0:
		return all[:1]
	case !m.durable:
		for len(all) < most {
			all = append(all, m.somePages(dice))
		}
	case m.words() < 32 && 1<<m.words() <= most:
		all = all[:0]
		first := make([]int64, len(m.open)) // number of each store's first word
		for i := 1; i < len(first); i++ {
			first[i] = first[i-1] + int64(len(m.open[i-1].data)/8)
		}
		for mask := range 1 << m.words() {
			all = append(all, choice{fmt.Sprintf("words %b", mask), func(i int, off int64) bool {
				return mask>>(first[i]+(off-m.open[i].off)/8)&1 != 0
			}})
		}
	default:
		for len(all) < most {
			all = append(all, m.someWords(dice))
		}
	}
	return all
}

// someWords tears one store, small ones rather than large ones, and decides
// about the others as a whole.
func (m *moment) someWords(dice *rand.Rand) choice {
	torn := dice.IntN(len(m.open))
	for range 2 {
		if other := dice.IntN(len(m.open)); len(m.open[other].data) < len(m.open[torn].data) {
			torn = other
		}
	}
	name, tear := m.open[torn].tear(dice)
	others, mask, owner := dice.IntN(5), dice.Uint64(), m.open[dice.IntN(len(m.open))].owner
	if others == 4 {
		chance := dice.Uint64N(256)
		return choice{fmt.Sprintf("each word with a chance of %d in 256", chance), func(i int, off int64) bool {
			return wordSum(off+int64(i), mask)>>56 < chance
		}}
	}
	return choice{
		fmt.Sprintf("%s of store %d, and of the others %s", name, torn,
			[]string{"none", "all", "some", fmt.Sprintf("all but those of goroutine %d", owner)}[others]),
		func(i int, off int64) bool {
			switch {
			case i == torn:
				return tear(off)
			case others == 0:
				return false
			case others == 1:
				return true
			case others == 2:
				return mask>>(i%64)&1 != 0
			default:
				return m.open[i].owner != owner
			}
		},
	}
}

// tear draws a part of a store.
func (s *stored) tear(dice *rand.Rand) (name string, keep func(off int64) bool) {
	at := s.off + 8*dice.Int64N(int64(len(s.data)/8))
	bit := dice.Uint64()
	switch dice.IntN(9) {
	case 0:
		return "nothing", func(int64) bool { return false }
	case 1:
		return "everything", func(int64) bool { return true }
	case 2:
		return fmt.Sprintf("what lies before %d", at), func(off int64) bool { return off < at }
	case 3:
		return fmt.Sprintf("what lies from %d on", at), func(off int64) bool { return off >= at }
	case 4:
		return fmt.Sprintf("all but the word at %d", at), func(off int64) bool { return off != at }
	case 5:
		return fmt.Sprintf("the word at %d", at), func(off int64) bool { return off == at }
	case 6:
		return fmt.Sprintf("all but the line of %d", at), func(off int64) bool { return off/64 != at/64 }
	case 7:
		return fmt.Sprintf("the line of %d", at), func(off int64) bool { return off/64 == at/64 }
	default:
		return "half", func(off int64) bool { return wordSum(off, bit)>>63 != 0 }
	}
}

// somePages finds each page, or sector, as it was at some moment.
func (m *moment) somePages(dice *rand.Rand) choice {
	unit := int64(pageSize)
	if dice.IntN(4) == 0 {
		unit = sectorSize
	}
	bit := dice.Uint64()
	draw := func(page int64) uint64 { return wordSum(page*unit, bit) >> 32 }
	stores := uint64(len(m.open))
	page := m.open[dice.IntN(len(m.open))].off / unit
	switch dice.IntN(5) {
	case 0:
		return choice{fmt.Sprintf("units of %d, each at its own moment", unit), func(i int, off int64) bool {
			return uint64(i) < draw(off/unit)%(stores+1)
		}}
	case 1:
		until := dice.IntN(len(m.open))
		return choice{fmt.Sprintf("the first %d stores", until), func(i int, off int64) bool { return i < until }}
	case 2:
		return choice{fmt.Sprintf("unit %d of %d alone", page, unit), func(_ int, off int64) bool { return off/unit == page }}
	case 3:
		return choice{fmt.Sprintf("all but unit %d of %d", page, unit), func(_ int, off int64) bool { return off/unit != page }}
	default:
		chance := dice.Uint64N(256)
		return choice{fmt.Sprintf("units of %d, each with a chance of %d in 256", unit, chance), func(_ int, off int64) bool {
			return draw(off/unit)%256 < chance
		}}
	}
}

// String says where s is, by the format of the region.
func (s stored) String() string {
	what := "the front"
	switch {
	case s.off >= ondisk.SegmentsOff:
		at := s.off - ondisk.SegmentsOff
		what = fmt.Sprintf("segment %d", at/ondisk.SegmentSize)
		if at %= ondisk.SegmentSize; at < ondisk.SegmentHeader {
			what = fmt.Sprintf("header of %s, byte %d", what, at)
		} else {
			what = fmt.Sprintf("%s, data byte %d", what, at-ondisk.SegmentHeader)
		}
	case s.off >= ondisk.CtrlOff:
		what = fmt.Sprintf("the tails, byte %d", s.off-ondisk.CtrlOff)
	}
	return fmt.Sprintf("store of %d bytes at %d (%s)", len(s.data), s.off, what)
}

// describe lists the open stores and which of their words c keeps.
func (m *moment) describe(c choice) string {
	var b strings.Builder
	fmt.Fprintf(&b, "kept: %s\n", c.name)
	for i := range m.open {
		s := &m.open[i]
		fmt.Fprintf(&b, "  %d: goroutine %d, %s, kept ", i, s.owner, s)
		var line []byte
		for off := s.off; off < s.end() && len(line) < 160; off += 8 {
			if c.keep(i, off) {
				line = append(line, '1')
			} else {
				line = append(line, '0')
			}
		}
		fmt.Fprintf(&b, "%s\n", line)
	}
	return b.String()
}
