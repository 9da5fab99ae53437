// Package stamp writes data that says where it belongs and when it was written, and remembers what a device must hold.
//
// Every 512-byte sector carries its own address and a generation, repeated through all of its 64 words. A checksum would
// only say that a sector is wrong; a stamp says how: from another place, from an earlier write, put together from two
// writes, or never written.
package stamp

import (
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
)

const sectorSize = 512

// A mark tells one word of a sector from every other word of every other sector and generation. It is a bijection of
// (sector, generation) for sectors below 2^40 and generations below 2^24, plus the word's position: cheap, because a
// test writes and compares gigabytes of it on an emulated processor.
func mark(sector int64, generation uint32) uint64 {
	return (uint64(sector)<<24 | uint64(generation)) * 0x9E3779B97F4A7C15
}

// unmark finds the sector and generation a word came from, by the inverse of the multiplier modulo 2^64.
func unmark(word uint64, position int) (sector int64, generation uint32) {
	v := (word - uint64(position)) * 0xF1DE83E19937733D
	return int64(v >> 24), uint32(v & 0xFFFFFF)
}

// fill stamps a buffer of whole sectors.
func fill(buf []byte, sector int64, generation uint32) {
	for ; len(buf) > 0; buf, sector = buf[sectorSize:], sector+1 {
		m := mark(sector, generation)
		for i := 0; i < sectorSize/8; i++ {
			binary.LittleEndian.PutUint64(buf[i*8:], m+uint64(i))
		}
	}
}

// zeroed marks a generation that is not of a write, but of a zeroing.
const zeroed = 1 << 31

// A Device is what a block device (or any ReadWriterAt) must hold: for each sector the generation that was last
// acknowledged, 0 for never written and therefore zero.
//
// A reader or writer has its range for itself, so what a read must return is always one exact
// answer. Overlapping requests still follow each other as closely as they can, which is where caches go wrong.
// All methods may be called from any goroutine.
type Device struct {
	io      ReadWriterAt
	base    int64    // bytes; sector 0 is there
	journal *Journal // may be nil

	mu struct {
		sync.Mutex
		free        *sync.Cond // some range was given back
		busy        []span
		generations []uint32
		last        uint32
	}
}

// ReadWriterAt is an *os.File opened with O_DIRECT.
type ReadWriterAt interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Sync() error
}

// A span is a range of sectors and what is being done with it: the generation of a change, 0 for reading.
type span struct {
	from, to   int64
	generation uint32
}

// New describes size bytes from base on, all of which must be zero.
func New(io ReadWriterAt, base, size int64) *Device {
	d := &Device{io: io, base: base}
	d.mu.free = sync.NewCond(&d.mu)
	d.mu.generations = make([]uint32, size/sectorSize)
	return d
}

// On describes the same contents found on another device, at the same place. What is written there goes to no journal.
func (d *Device) On(io ReadWriterAt) *Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	other := New(io, d.base, int64(len(d.mu.generations))*sectorSize)
	copy(other.mu.generations, d.mu.generations)
	return other
}

// Size is in bytes.
func (d *Device) Size() int64 { return int64(len(d.mu.generations)) * sectorSize }

// claim waits until no one else has any sector of the span.
func (d *Device) claimLocked(s span) {
	for {
		overlaps := false
		for _, b := range d.mu.busy {
			overlaps = overlaps || s.from < b.to && b.from < s.to
		}
		if !overlaps {
			d.mu.busy = append(d.mu.busy, s)
			return
		}
		d.mu.free.Wait()
	}
}

func (d *Device) release(s span) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, b := range d.mu.busy {
		if b == s {
			d.mu.busy = append(d.mu.busy[:i], d.mu.busy[i+1:]...)
			break
		}
	}
	d.mu.free.Broadcast()
}

// Write stamps buf with a new generation and writes it off bytes from the base. Nil means it was acknowledged and must
// be there from now on. After an error the range's contents are unknown and the device of no further use.
func (d *Device) Write(buf []byte, off int64) error {
	return d.write(d.io, buf, off, 0)
}

// WriteDurable is a Write through another way to the same device, O_DSYNC for example, after which no power cut may take
// it.
func (d *Device) WriteDurable(io ReadWriterAt, buf []byte, off int64) error {
	return d.write(io, buf, off, stateDurable)
}

func (d *Device) write(io ReadWriterAt, buf []byte, off int64, flag uint32) error {
	return d.change(off, int64(len(buf)), flag, func(s span) error {
		fill(buf, s.from, s.generation)
		_, err := io.WriteAt(buf, d.base+off)
		return err
	})
}

// Zero is a Write of zeros, for as long as it takes the caller's zero to make a range read as such: n bytes, off bytes
// from the beginning of what the Device is on.
func (d *Device) Zero(off, n int64, zero func(off, n int64) error) error {
	return d.change(off, n, zeroed, func(span) error { return zero(d.base+off, n) })
}

// change makes a request that changes a range. What the range holds then is the request's generation, zeroed if the flag
// is.
func (d *Device) change(off, n int64, flag uint32, request func(s span) error) error {
	s := span{from: off / sectorSize, to: (off + n) / sectorSize}
	d.mu.Lock()
	d.claimLocked(s)
	d.mu.last++
	s.generation = d.mu.last
	d.mu.busy[len(d.mu.busy)-1] = s
	d.mu.Unlock()
	defer d.release(s)

	if err := d.journal.issue(s, flag); err != nil {
		return err
	}
	if err := request(s); err != nil {
		return fmt.Errorf("change %d bytes at %d: %w", n, d.base+off, err)
	}
	if err := d.journal.acknowledge(s, flag); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := s.from; i < s.to; i++ {
		d.mu.generations[i] = s.generation | flag&zeroed
	}
	return nil
}

// Flush flushes the device.
func (d *Device) Flush() error {
	d.mu.Lock()
	all := d.mu.last
	for _, b := range d.mu.busy {
		if b.generation != 0 {
			all = min(all, b.generation-1)
		}
	}
	d.mu.Unlock()
	if err := d.io.Sync(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return d.journal.flush(all)
}

// Read reads into buf and compares every sector with what was acknowledged last.
func (d *Device) Read(buf []byte, off int64) error {
	s := span{from: off / sectorSize, to: (off + int64(len(buf))) / sectorSize}
	d.mu.Lock()
	d.claimLocked(s)
	want := append([]uint32(nil), d.mu.generations[s.from:s.to]...)
	d.mu.Unlock()
	defer d.release(s)

	if _, err := d.io.ReadAt(buf, d.base+off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(buf), d.base+off, err)
	}
	var wrong []string
	for i, generation := range want {
		if w := compare(buf[i*sectorSize:][:sectorSize], s.from+int64(i), generation); w != "" {
			wrong = append(wrong, w)
		}
	}
	return describe(wrong)
}

// shown is how many wrong sectors an error describes one by one; the first few tell the story.
const shown = 8

func describe(wrong []string) error {
	switch {
	case len(wrong) == 0:
		return nil
	case len(wrong) > shown:
		return fmt.Errorf("%d wrong sectors: %s; …", len(wrong), strings.Join(wrong[:shown], "; "))
	}
	return fmt.Errorf("%d wrong sectors: %s", len(wrong), strings.Join(wrong, "; "))
}

// compare says what is wrong with a sector, "" if nothing is.
func compare(buf []byte, sector int64, generation uint32) string {
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(buf[i*8:]) }
	var step, m uint64
	if generation != 0 && generation&zeroed == 0 {
		step, m = 1, mark(sector, generation)
	}
	for i := 0; i < sectorSize/8; i++ {
		if word(i) != m+step*uint64(i) {
			return explain(word, sector, generation, i)
		}
	}
	return ""
}

// explain looks at the word that differs and at the last one: they agree unless the sector was put together.
func explain(word func(int) uint64, sector int64, generation uint32, first int) string {
	const end = sectorSize/8 - 1
	must := "stamped"
	if generation&zeroed != 0 {
		must, generation = "zeroed", generation&^zeroed
	}
	at := fmt.Sprintf("sector %d, %s in generation %d: ", sector, must, generation)
	name := func(i int) string {
		if word(i) == 0 {
			return "zeros"
		}
		s, g := unmark(word(i), i)
		return fmt.Sprintf("generation %d of sector %d", g, s)
	}
	got, tail := name(first), name(end)
	if first > 0 || got != tail {
		return fmt.Sprintf("%storn: %s from word %d, %s at the end", at, got, first, tail)
	}
	s, g := unmark(word(first), first)
	switch {
	case word(first) == 0:
		return at + "lost: zeros"
	case s == sector && g < generation:
		return at + "stale: " + got
	case s == sector:
		return at + "never acknowledged: " + got
	default:
		return at + "foreign: " + got
	}
}

// Verify reads the whole device through buf, from the front, and compares every sector.
func (d *Device) Verify(buf []byte) error {
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		if err := d.Read(buf[:min(int64(len(buf)), d.Size()-off)], off); err != nil {
			return err
		}
	}
	return nil
}
