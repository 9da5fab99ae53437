package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// Memory fails in places, and accesses of those are errors. The consequence
// depends on what is there:
//
//	clean data     is forgotten, and asked of the disk (read.go)
//	dirty data     is an error until it is overwritten, and write-back goes
//	               round it (deferred.go)
//	a store of it  is made in another segment (write.go)
//	a kset         is never read again: everything is written back by the
//	               index, and the tails pass it (logdamage.go)
//	a store of it  is made in another segment, if the head can still be left
//	               for one (log.go)
//	a generation   costs its segment, which is not used again
//	a fingerprint  is done without
//	cache_info,    keep their good copy, and the setting is refused
//	the settings
//	a tail, a      keeps its good copy, and the cache has failed
//	sync mark
//
// A segment in which anything of that has happened is retired: nothing is
// stored there any more, and once nothing names it, it is not free, or the data
// stored there next would be lost without a word. Storing mends some memory,
// and some it only seems to. The segment's content stays and is read as long as
// that works.
//
// Segments are retired until the cache is opened again. When so many are that
// the queues could wait for each other, the cache has failed.

// BadPlace is a part of the region that could not be read, or not be stored to.
type BadPlace struct {
	What    string // that is or was to be there
	Off     int64  // bytes in the region
	Len     int64
	Segment int   // cache_seg_id, -1 for a record
	DiskOff int64 // bytes of the device that the data belongs to
	DiskLen int64 // 0 for what is no data of the device
	Err     string
}

func (p BadPlace) String() string {
	s := p.What
	if p.DiskLen > 0 {
		s += fmt.Sprintf(" of offset %d, length %d", p.DiskOff, p.DiskLen)
	}
	if p.Segment >= 0 {
		s += fmt.Sprintf(" in segment %d", p.Segment)
	}
	return fmt.Sprintf("%s, byte %d of the cache: %s", s, p.Off, p.Err)
}

// maxPlaces bounds the list of places, each of which is a line of the log.
const maxPlaces = 100

type badMemory struct {
	mu struct {
		sync.Mutex
		places []BadPlace // the first maxPlaces
		more   int        // how many were met beyond
		fault  error      // the first that was not just a wrong checksum
	}
}

// known reports whether one of the places overlaps a range of the region.
func (b *badMemory) known(off, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.mu.places, func(p BadPlace) bool { return p.Off < off+n && off < p.Off+p.Len })
}

// bad takes note of a place, and retires its segment unless it is memory that
// can be read and has only the wrong content. Any goroutine.
func (c *Cache) bad(p BadPlace, err error) {
	c.errs.memory.Add(1)
	p.Err = err.Error()
	fault := !errors.Is(err, ErrDamaged)
	b := &c.badMemory
	b.mu.Lock()
	fresh := !slices.ContainsFunc(b.mu.places, func(q BadPlace) bool { return q.Off == p.Off && q.Len == p.Len })
	switch {
	case fresh && len(b.mu.places) < maxPlaces:
		b.mu.places = append(b.mu.places, p)
	case fresh:
		b.mu.more++
		fresh = false
	}
	if fault && b.mu.fault == nil {
		b.mu.fault = fmt.Errorf("bad memory: %v", p)
	}
	b.mu.Unlock()
	if fault && p.Segment >= 0 && c.retire(uint32(p.Segment)) || fresh {
		go c.log.Error(BadMemory, "bad memory: "+p.String(), nil)
	}
}

// badStore is bad for a store of what to a segment.
func (c *Cache) badStore(what string, seg, off uint32, n int, err error) {
	c.bad(BadPlace{What: what, Off: c.layout.Offset(seg, off), Len: int64(n), Segment: int(seg)}, err)
}

// badData is bad for each part of an extent that cannot be read, at off of the
// device. scratch is what readExtent wants.
func (c *Cache) badData(e extent, off int64, err error, scratch *[]byte) {
	at, n := c.layout.Offset(e.seg, uint32(e.pos)<<sectorShift), int64(e.n)<<sectorShift
	if c.badMemory.known(at, n) {
		c.errs.memory.Add(1)
		return
	}
	what := "clean data"
	if e.flags&extDirty != 0 {
		what = "dirty data"
	}
	for rest := e; rest.n > 0; {
		n, err := c.readable(rest, scratch)
		if skip := int64(rest.off-e.off) << sectorShift; err != nil {
			c.bad(BadPlace{
				What: what, Off: at + skip, Len: int64(n) << sectorShift, Segment: int(e.seg),
				DiskOff: off + skip, DiskLen: int64(n) << sectorShift,
			}, err)
		}
		rest = rest.from(rest.off + n)
	}
}

// faultSectors is how much a media error takes away, a page of memory.
const faultSectors = 4096 >> sectorShift

// readable returns how many sectors at the beginning of an extent can be read,
// or cannot; then err says why.
func (c *Cache) readable(e extent, scratch *[]byte) (n uint16, err error) {
	for rest := e; rest.n > 0; {
		unit := rest
		if end := c.unitEnd(rest); end < rest.pos+rest.n {
			unit = rest.to(rest.off + end - rest.pos)
		}
		got := c.readExtent(make([]byte, int(unit.n)<<sectorShift), unit, scratch)
		if n > 0 && (got == nil) != (err == nil) {
			break
		}
		n += unit.n
		err = cmp.Or(err, got)
		rest = rest.from(unit.end())
	}
	return n, err
}

// unitEnd returns where in its segment that ends which can only be read
// together with the first sector of e.
func (c *Cache) unitEnd(e extent) uint16 {
	if c.crc {
		if s, ok := c.segments.all[e.seg].sums.Load().find(e.pos); ok {
			return s.end()
		}
	}
	return (e.pos/faultSectors + 1) * faultSectors
}

// retire takes a segment out of use, and reports whether it was in use.
func (c *Cache) retire(seg uint32) bool {
	s := &c.segments
	if !s.all[seg].bad.CompareAndSwap(false, true) {
		return false
	}
	if n := int(s.bad.Add(1)); len(s.all)-n < s.needed {
		c.fail(fmt.Errorf("%w: %d of %d, and %d are needed", ErrBadSegments, n, len(s.all), s.needed))
	}
	return true
}

// storeRecord writes one copy of a record, and makes sure that it can be read:
// the next store will be to the other copy. It does not persist.
func (c *Cache) storeRecord(what string, seg int, p []byte, off int64) error {
	if err := c.storeSurely(p, off); err != nil {
		c.bad(BadPlace{What: what, Off: off, Len: int64(len(p)), Segment: seg}, err)
		return fmt.Errorf("write %s: %w", what, err)
	}
	return nil
}

// storeSurely stores p where it can be read again.
func (c *Cache) storeSurely(p []byte, off int64) error {
	if _, err := c.mem.WriteAt(p, off); err != nil {
		return err
	}
	_, err := c.mem.ReadAt(make([]byte, len(p)), off)
	return err
}

// noSegment is the number of what lies in none.
const noSegment = -1

// heal makes the records whole of which a copy was found damaged. It does not
// persist.
func (c *Cache) heal() {
	for _, n := range c.layout.DamagedCopies {
		if err := n.Heal(c.mem); err != nil {
			c.bad(BadPlace{What: n.What, Off: n.Off, Len: int64(n.Size), Segment: noSegment}, err)
		}
	}
	c.healSettings()
}
