package engine

import (
	"unsafe"

	"ublk-pcache/internal/prefetch"
)

// A stripe that has been written in blocks of 4 KiB all over has a table in place of a
// tree: a slot of eight bytes for each block. One line of memory answers a search, where
// a tree asks for several in each of its levels, and a block that is set is one store.
//
// A table has whole blocks only, so it is made of a tree that has nothing else, once
// that takes about as much memory. It becomes a tree again where anybody sets or cuts
// part of a block, or when so few blocks are left that a tree would take less. Either way
// costs as much as a hundred sets or more, so a tree is looked at for that at every so
// many sets only, and at fewer where it was in vain or was undone by part of a block:
// somebody who wants a table now and a tree then gets trees.
//
// An index counts each block of a table as an extent. Asked for extents, a table gives
// runs: all blocks that continue each other, as one extent of a tree would.

const (
	blockSectors = 8
	tableSlots   = stripeSectors / blockSectors

	// tableFrom is how many leaves of a tree take as much memory as a table, and
	// tableLeast how many blocks a table must have: 8192 bytes are no more than 26 for
	// each then. It has no less than tableKeeps: 31 for each, which is what a tree takes
	// at worst.
	tableFrom  = 16
	tableLeast = 320
	tableKeeps = 272
	// tableLongest is how many sectors a set has at most that leaves a table. After a
	// longer one a tree would have no more extents than that of which a table is made.
	tableLongest = (tableSlots - tableKeeps) * blockSectors

	// tableSoon, tableLate and tableLatest are how many sets of a shard there are between
	// two looks for what can become a table: at least, after one in vain, and at most,
	// which is soon come to where tables are undone by parts of blocks. They are odd, or
	// somebody who sets blocks in some stripes by turns might have the same of these
	// looked at always.
	tableSoon   = 61
	tableLate   = 1021
	tableLatest = 4 * tableLate
)

// table is a slot for each block of a stripe.
type table struct {
	slots  *[tableSlots]slot
	stripe uint32 // of the shard
	n      uint16 // slots in use
}

// A slot is 0, or what an extent says but for its bounds: from the lowest bit, seg, pos,
// flags, and a bit that is set.
type slot uint64

const (
	posShift   = 32
	flagsShift = 48

	slotUsed    slot = 1 << 63
	slotFlags   slot = (extDirty | extClaim | extZero | extHit | extWindow | extFill) << flagsShift
	windowShift      = flagsShift + 4
	slotHit     slot = extHit << flagsShift
	slotNext    slot = blockSectors << posShift // from a block's slot to that of the next of a run
)

func slotOf(e extent) slot {
	return slotUsed | slot(e.flags)<<flagsShift | slot(e.pos)<<posShift | slot(e.seg)
}

// extent returns what the slot i of a table has.
func (v slot) extent(i int) extent {
	return extent{off: uint16(i * blockSectors), n: blockSectors, pos: v.pos(), flags: v.flags(), seg: v.seg()}
}

func (v slot) seg() uint32   { return uint32(v) }
func (v slot) pos() uint16   { return uint16(v >> posShift) }
func (v slot) flags() uint16 { return uint16((v & slotFlags) >> flagsShift) }

// blocks reports whether the span is of whole blocks.
func (s span) blocks() bool { return (s.off|s.n)%blockSectors == 0 }

// slotRange returns the first slot that has any of the span, and the first behind it.
func (s span) slotRange() (from, to int) {
	return int(s.off) / blockSectors, (int(s.end()) + blockSectors - 1) / blockSectors
}

// tableLocked returns the table of the stripe, nil if it has none.
func (s span) tableLocked() *table {
	id := s.sh.slab.roots[s.root]
	if classOf(id) != tableClass {
		return nil
	}
	return &s.sh.slab.tables[indexOf(id)]
}

// run returns the blocks from slot i on, up to another, that continue each other. The
// claims of a fill do, too: each has a place, although nobody looks at that.
func (t *table) run(i, to int) extent {
	v, n, hit := t.slots[i], 1, t.slots[i]
	for i+n < to && (t.slots[i+n]^(v+slot(n)*slotNext))&^slotHit == 0 {
		hit |= t.slots[i+n]
		n++
	}
	e := (v | hit&slotHit).extent(i)
	e.n *= uint16(n)
	return e
}

// alike is run for a tree, which keeps what was hit of a fill apart from what was not.
func (t *table) alike(i int) extent {
	e := t.run(i, tableSlots)
	if e.flags&extFill == 0 {
		return e
	}
	n := 1
	for n < int(e.n)/blockSectors && (t.slots[i+n]^t.slots[i])&slotHit == 0 {
		n++
	}
	e = t.slots[i].extent(i)
	e.n *= uint16(n)
	return e
}

// hitTableLocked is hitLocked for a table.
func (s span) hitTableLocked(t *table) slot {
	i, to := s.slotRange()
	v := t.slots[i]
	if to == i+1 {
		if v == 0 {
			return 0
		}
		if v&slotHit == 0 {
			t.slots[i] = v | slotHit
		}
	} else {
		if v == 0 || t.run(i, to).end() < s.end() {
			return 0
		}
		for j := i; j < to; j++ {
			t.slots[j] |= slotHit
		}
	}
	return v + slot(s.off%blockSectors)<<posShift
}

// partsTableLocked is partsLocked for a table.
func (s span) partsTableLocked(t *table, parts []extent, keep func(extent) bool) []extent {
	for i, to := s.slotRange(); i < to; {
		if t.slots[i] == 0 {
			i++
			continue
		}
		e := t.run(i, to)
		if keep(e) {
			parts = append(parts, s.clip(e))
		}
		i = int(e.end()) / blockSectors
	}
	return parts
}

// setTableLocked is setLocked for whole blocks of a table.
func (s span) setTableLocked(t *table, e extent, stale *staleSectors) {
	v := slotOf(e)
	slots := t.slots[s.off/blockSectors : s.end()/blockSectors]
	for i := range slots {
		old := slots[i]
		if (old^v)&(slotUsed|slotFlags&^slotHit) != 0 {
			s.sh.countSlotLocked(t, old, v)
		}
		if old != 0 && stale != nil {
			stale.addBlock(old)
		}
		slots[i] = v
		v += slotNext
	}
}

// countSlotLocked counts that a slot of a table has v in place of old.
func (sh *shard) countSlotLocked(t *table, old, v slot) {
	if old == 0 {
		t.n++
		sh.extents++
	} else {
		sh.sectorsLocked(old.extent(0), -blockSectors)
	}
	sh.sectorsLocked(v.extent(0), blockSectors)
}

// cutTableLocked is cutLocked for whole blocks of a table.
func (s span) cutTableLocked(t *table, stale *staleSectors) {
	for i, to := s.slotRange(); i < to; i++ {
		if t.slots[i] == 0 {
			continue
		}
		was := t.slots[i].extent(i)
		if stale != nil {
			stale.addBlock(t.slots[i])
		}
		t.slots[i] = 0
		t.n--
		s.sh.countLocked(was, -1)
	}
	if t.n < tableKeeps {
		s.makeTreeLocked()
	}
}

// cleanTableLocked does what index.clean does, for whole blocks of a table.
func (s span) cleanTableLocked(t *table, p place) {
	for i, to := s.slotRange(); i < to; i++ {
		v := t.slots[i]
		if e := v.extent(i); v != 0 && e.flags&extDirty != 0 && p.holds(e) {
			t.slots[i] = v &^ (extDirty << flagsShift)
			s.sh.countSlotLocked(t, v, t.slots[i])
		}
	}
}

// fetchTableLocked fetches the slot of the span's first block.
func (s span) fetchTableLocked(t *table) { prefetch.Line(&t.slots[s.off/blockSectors]) }

// splitTableLocked makes a tree of the stripe's table, for part of a block.
func (s span) splitTableLocked() {
	s.makeTreeLocked()
	s.sh.tableEvery = min(2*max(s.sh.tableEvery, tableLate), tableLatest) | 1
}

// tryTableLocked is called for each set in a tree, and makes a table of that when it is
// worth it.
func (s span) tryTableLocked() {
	sh := s.sh
	if sh.sets++; sh.sets < max(tableSoon, sh.tableEvery) {
		return
	}
	sh.sets = 0
	if !sh.slab.hasLeaves(s.root) {
		sh.slab.trim(1)
		return
	}
	if s.makeTableLocked(tableLeast) {
		sh.slab.trim(trimTree) // of which there may be no other occasion
		sh.tableEvery = (sh.tableEvery - sh.tableEvery/4) | 1
	} else {
		sh.tableEvery = max(sh.tableEvery, tableLate)
	}
}

// hasLeaves reports whether the tree of a stripe has tableFrom leaves.
func (s *slab) hasLeaves(stripe uint32) bool {
	id := s.roots[stripe]
	if id == 0 {
		return false
	}
	nd := s.at(id)
	return nd.inner() && (nd.n() >= tableFrom || s.at(nd.at(0).seg).inner())
}

// makeTableLocked makes a table of the stripe's tree, if that has whole blocks only, and so
// many of them, and reports whether it has.
func (s span) makeTableLocked(least int) bool {
	slab := &s.sh.slab
	root := slab.roots[s.root]
	blocks, extents := 0, 0
	if !slab.eachLeaf(root, func(leaf []extent) bool {
		for _, e := range leaf {
			if (e.off|e.n)%blockSectors != 0 {
				return false
			}
			blocks += int(e.n) / blockSectors
		}
		extents += len(leaf)
		return true
	}) || blocks < least {
		return false
	}
	t := table{slots: new([tableSlots]slot), stripe: s.root, n: uint16(blocks)}
	slab.eachLeaf(root, func(leaf []extent) bool {
		for _, e := range leaf {
			v := slotOf(e)
			for i, to := s.sub(e).slotRange(); i < to; i++ {
				t.slots[i] = v
				v += slotNext
			}
		}
		return true
	})
	slab.releaseTree(root)
	slab.tables = append(slab.tables, t)
	slab.roots[s.root] = tableClass<<classShift | uint32(len(slab.tables))
	s.sh.extents += int64(blocks - extents)
	return true
}

// makeTreeLocked makes a tree of the stripe's table.
func (s span) makeTreeLocked() {
	slab := &s.sh.slab
	id := slab.roots[s.root]
	t := *s.tableLocked()
	s.sh.extents -= int64(t.n)
	last := len(slab.tables) - 1
	slab.tables[indexOf(id)] = slab.tables[last]
	slab.roots[slab.tables[last].stripe] = id
	slab.tables[last] = table{}
	slab.tables = slab.tables[:last]
	var extents [tableSlots]extent
	n := 0
	for i := 0; i < tableSlots; {
		if t.slots[i] == 0 {
			i++
			continue
		}
		extents[n] = t.alike(i)
		i = int(extents[n].end()) / blockSectors
		n++
	}
	slab.build(s.root, extents[:n])
	s.sh.extents += int64(n)
}

// tableBytes returns the memory that the tables take.
func (s *slab) tableBytes() int64 {
	return int64(cap(s.tables))*int64(unsafe.Sizeof(table{})) + int64(len(s.tables))*int64(unsafe.Sizeof([tableSlots]slot{}))
}
