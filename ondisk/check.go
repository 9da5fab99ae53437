package ondisk

import (
	"errors"
	"fmt"
	"io"
)

// Report is what Check found.
type Report struct {
	Layout *Layout
	End    LogEnd // meaningful when the log could be walked

	Ksets int
	Keys  int
	Clean int // keys flagged clean
	Dead  int // keys of a generation that is past
	Dirty int // keys at or after dirty_tail, neither clean nor dead

	// The bytes that those keys cover, overwritten data too. Each sector counts
	// once, unless there are more runs than maxRuns. ZeroBytes is the part that
	// zeros alone cover, DirtyBytes the rest.
	DirtyBytes, ZeroBytes int64
	// Likewise, of the keys behind damage of the log.
	behind unwritten

	Damaged    Ranges // dirty data that is not what it was, overwritten data too
	Unreadable Ranges // cached data that cannot be read, likewise
	Harmless   int    // how many of the problems are clean data, which the backing device has

	Problems []error // the first maxProblems of them
	More     int     // how many there were beyond

	left *remains // of a cache, if there is no superblock
}

// Unwritten says how much the backing device lacks.
func Unwritten(data, zeros int64) string {
	switch {
	case zeros == 0:
		return fmt.Sprintf("%d bytes of dirty data", data)
	case data == 0:
		return fmt.Sprintf("%d bytes to be zeroed", zeros)
	}
	return fmt.Sprintf("%d bytes of dirty data and %d bytes to be zeroed", data, zeros)
}

// maxRuns bounds the memory for counting sectors once, to 64 MiB.
const maxRuns = 4 << 20

// unwritten counts what the backing device lacks.
type unwritten struct {
	data, all Ranges
	more      [2]int64 // bytes of data and of zeros that came when there were maxRuns
}

func (u *unwritten) add(k *Key) {
	zero := k.Flags&KeyZero != 0
	switch {
	case len(u.all.runs) >= maxRuns:
		i := 0
		if zero {
			i = 1
		}
		u.more[i] += int64(k.Len)
		return
	case !zero:
		u.data.Add(int64(k.Off), int64(k.Len))
	}
	u.all.Add(int64(k.Off), int64(k.Len))
}

func (u *unwritten) bytes() (data, zeros int64) {
	n := u.data.Bytes()
	return n + u.more[0], u.all.Bytes() - n + u.more[1]
}

func (rep *Report) problem(err error) {
	if len(rep.Problems) == maxProblems {
		rep.More++
		return
	}
	rep.Problems = append(rep.Problems, err)
}

// Check reads the metadata and the whole log of a device of size bytes. With
// data it also reads every piece of cached data that a living key names, and
// compares its checksum if the cache keeps them. Where damaged metadata
// hides the log, the log is read as it will be once that is mended.
func Check(r io.ReaderAt, size int64, data bool) *Report {
	rep := check(r, size, data)
	if rep.Keys > 0 || len(rep.Problems) == 0 {
		return rep
	}
	if mended := Repair(r, size, RepairOptions{}); len(mended.Mended) > 0 {
		behind := check(mended, size, data)
		own := behind.Problems
		behind.Problems, behind.More = rep.Problems, rep.More
		for _, err := range own {
			behind.problem(err)
		}
		return behind
	}
	return rep
}

// check takes the metadata as it is, and goes as far as it can be read.
func check(r io.ReaderAt, size int64, data bool) *Report {
	rep := &Report{}
	l, err := ReadLayout(r, size)
	rep.Layout = l
	for _, note := range l.DamagedCopies {
		rep.problem(errors.New(note.String()))
	}
	if err != nil {
		for _, fault := range err.(Faults) {
			if noSuperblock(fault) {
				if rep.left = findRemains(r, size); rep.left.found {
					fault = ErrSuperblockLost
				}
			}
			rep.problem(fault)
		}
		return rep
	}
	c := checker{Report: rep, r: r, role: make([]role, len(l.Chain)), dirty: l.KeyTail == l.DirtyTail}
	if data {
		c.buf = make([]byte, StripeSize)
	}
	rep.End, _ = l.WalkLog(r, l.KeyTail, c.kset)
	c.claim(rep.End.Pos.Seg, logRole)
	rep.DirtyBytes, rep.ZeroBytes = c.unwritten.bytes()
	if rep.End.Damage != nil {
		var err error
		rep.behind, err = l.covered(r, rep.End.Damage)
		rep.problem(err)
	}
	return rep
}

// covered counts the dirty data that lies behind damage of the log, and
// returns the damage as an error that names this data.
func (l *Layout) covered(r io.ReaderAt, d *Damage) (dirty unwritten, err error) {
	from := d.Ahead
	if d.DirtyTail != nil {
		from = d.DirtyTail
	}
	if from != nil {
		l.walkOn(r, *from, func(_ Position, k *Kset) error {
			for i := range k.Keys {
				if k := &k.Keys[i]; k.Flags&KeyClean == 0 && k.Gen >= l.Gens[k.Seg] {
					dirty.add(k)
				}
			}
			return nil
		})
	}
	return dirty, fmt.Errorf("%w; behind that lie %s, %v", d, Unwritten(dirty.bytes()), &dirty.all)
}

type checker struct {
	*Report
	r     io.ReaderAt
	dirty bool   // dirty_tail was passed
	role  []role // by cache_seg_id
	buf   []byte // for data, nil if that is not to be read

	unwritten unwritten
}

// role says what a segment was seen used for. No segment is used for both.
type role uint8

const (
	logRole role = 1 << iota
	dataRole
	bothRoles = logRole | dataRole
)

func (c *checker) claim(seg uint32, as role) {
	if c.role[seg] != bothRoles && c.role[seg]|as == bothRoles {
		c.problem(fmt.Errorf("segment %d is part of the log and named by a living key as well", seg))
	}
	c.role[seg] |= as
}

func (c *checker) kset(at Position, k *Kset) error {
	c.claim(at.Seg, logRole)
	if at == c.Layout.DirtyTail {
		c.dirty = true
	}
	if !k.Last {
		c.Ksets++
	}
	for i := range k.Keys {
		if err := c.key(&k.Keys[i]); err != nil {
			c.problem(fmt.Errorf("key %d of the kset at %v: %w", i, at, err))
		}
	}
	return nil
}

func (c *checker) key(k *Key) error {
	c.Keys++
	kind := "clean"
	if k.Flags&KeyClean != 0 {
		c.Clean++
	}
	gen := c.Layout.Gens[k.Seg]
	if k.Gen < gen {
		c.Dead++
		return nil
	}
	if k.Flags&KeyClean == 0 && c.dirty {
		kind = "dirty"
		c.Dirty++
		c.unwritten.add(k)
	}
	c.claim(k.Seg, dataRole)
	if k.Gen > gen {
		return fmt.Errorf("its generation %d is above %d, that of segment %d", k.Gen, gen, k.Seg)
	}
	if id := c.Layout.Identity; id != nil && k.Off+uint64(k.Len) > uint64(id.BackingSize) {
		return fmt.Errorf("offset %d, length %d lie outside the backing device of %d bytes", k.Off, k.Len, id.BackingSize)
	}
	if c.buf == nil {
		return nil
	}
	p, at := c.buf[:k.Len], c.Layout.Offset(k.Seg, k.SegOff)
	damaged := func() {
		if kind == "clean" {
			c.Harmless++
		} else {
			c.Damaged.Add(int64(k.Off), int64(k.Len))
		}
	}
	if err := readFull(c.r, p, at); err != nil {
		damaged()
		c.Unreadable.Add(int64(k.Off), int64(k.Len))
		return fmt.Errorf("%s data of offset %d, length %d %w: %w", kind, k.Off, k.Len, ErrUnreadable, err)
	}
	if c.Layout.Info.Flags.DataCRC() && Checksum(p) != k.CRC {
		damaged()
		return fmt.Errorf("%s data of offset %d, length %d has a wrong crc (from byte %d on)", kind, k.Off, k.Len, at)
	}
	return nil
}
