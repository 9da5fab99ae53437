package engine

import (
	"slices"
	"unsafe"
)

// The extents of one stripe, unless it has a table (table.go), form a B+tree whose
// nodes live in a slab and name each other by number, so that the garbage
// collector has nothing to follow: with pointers, marking an index of four million
// extents costs tens of milliseconds of every collection; without, nothing that can
// be measured.
//
// Invariants: the extents of a stripe are disjoint and sorted by offset; no
// node is empty; a separator is at most the first offset below it and greater
// than any offset left of it, except the first of a node, which is not looked
// at: whatever is smaller goes there.

// An extent says where a run of sectors of one stripe is cached. Inside an
// inner node the same twelve bytes hold a separator (off) and a child (seg).
type extent struct {
	off   uint16 // first sector, counted from the start of the stripe
	n     uint16 // sectors; a stripe has 8192, so both fit
	pos   uint16 // first sector in the segment's data area, which has 32,744
	flags uint16
	seg   uint32 // cache_seg_id, or, in a claim, the number of its fill
}

const (
	// extDirty: the backing device does not have these sectors yet.
	extDirty = 1 << iota
	// extClaim: a miss read is on its way; seg is its fill, pos is unused.
	extClaim
	// extZero: the sectors are zeros; nobody needs to look at the place.
	extZero
	// extHit: some of it has been read since it was stored there.
	extHit
	// extWindow: it lies in a segment of the window (window.go).
	extWindow
	// extFill: it was read from the disk. It stays apart from its neighbours, so that a hit
	// says something of it alone: what is read once comes in pieces that are hit together or
	// not, and what joined them would be kept for the sake of one.
	extFill
)

func (e extent) end() uint16 { return e.off + e.n }

// abuts reports whether f continues e in address, place and state, so that
// one extent can stand for both. It has been hit if either of them was.
func (e extent) abuts(f extent) bool {
	return e.end() == f.off && e.seg == f.seg && e.flags&extFill == 0 && (e.flags^f.flags)&^extHit == 0 &&
		(e.flags&extClaim != 0 || e.pos+e.n == f.pos)
}

// from returns the part of e that starts at off.
func (e extent) from(off uint16) extent {
	d := off - e.off
	e.off, e.n, e.pos = off, e.n-d, e.pos+d
	return e
}

// to returns the part of e that ends at off.
func (e extent) to(off uint16) extent {
	e.n = off - e.off
	return e
}

// A node takes one of seven sizes: a stripe of which little is cached should
// not cost a full one. All nodes but the root have the largest size; the root,
// which may be a leaf, has one that it fills well, and moves as it grows. So
// that the places it moves out of are no waste, nodes of the smaller sizes lie
// close together: the last takes the place of one that goes, and since it is a
// root, one number tells who has to know.
//
// An extent then costs, in bytes: 24 where it is alone in its stripe, 36 / 2 to
// 108 / 5 in small roots, and in larger trees 12 at best, about 17 after random
// insertions, and 30 at worst, when two neighbours of any level are just too
// full to be joined. To that come 4 for each stripe of the device.

const classes = 7

// capacity is how many extents a node of a class holds. With its header the
// largest has 504 bytes, eight cache lines, of which a search touches three.
var capacity = [classes]int{1, 2, 4, 8, 16, 27, 41}

const (
	largest = classes - 1
	// tableClass is what the number of a stripe's root has for a class where it is that
	// of a table (table.go).
	tableClass = classes
	// mergeBelow: two neighbours are joined when together they fill no more
	// than this, which leaves room to grow before the next split.
	mergeBelow = 35
	// slabNodes is how many nodes are allocated at a time: 8 KiB of the
	// largest. With a slab for each shard more would be a waste of megabytes.
	slabNodes = 16
	// maxHeight: a stripe holds at most 8192 extents, and a node that is not
	// the root at least mergeBelow/2 on average; 17^4 is plenty.
	maxHeight = 6
)

// node is a run of extents in a slab. The first is its header: off counts the
// entries, flags is not 0 in an inner node, and seg is its stripe. Of a free one, which
// has no entries, seg names the next, and that of the second the one before.
type node []extent

func (nd node) n() int            { return int(nd[0].off) }
func (nd node) inner() bool       { return nd[0].flags != 0 }
func (nd node) entries() []extent { return nd[1 : 1+nd[0].off] }
func (nd node) at(i int) *extent  { return &nd[1+i] }

// slab hands out nodes by number; 0 is no node. The number holds the class.
type slab struct {
	roots []uint32 // by stripe of the shard
	class [classes]struct {
		chunks [][]extent
		n      uint32 // nodes in use, or free and of the largest
	}
	free   uint32 // of the largest
	spare  int    // how many are free
	used   int    // nodes
	tables []table
}

const classShift = 29

func classOf(id uint32) int { return int(id >> classShift) }

// indexOf returns which of its class a number is for.
func indexOf(id uint32) int { return int(id&(1<<classShift-1)) - 1 }

func (s *slab) at(id uint32) node {
	k := classOf(id)
	i := indexOf(id)
	size := capacity[k] + 1
	at := i % slabNodes * size
	return s.class[k].chunks[i/slabNodes][at : at+size]
}

// alloc returns an empty node of class k for a stripe, its root unless it is one of the
// largest.
func (s *slab) alloc(k int, inner bool, stripe uint32) uint32 {
	c := &s.class[k]
	s.used++
	id := s.free
	if k == largest && id != 0 {
		s.unlink(id)
	} else {
		if int(c.n) == len(c.chunks)*slabNodes {
			c.chunks = append(c.chunks, make([]extent, slabNodes*(capacity[k]+1)))
		}
		c.n++
		id = uint32(k)<<classShift | c.n
	}
	nd := s.at(id)
	nd[0] = extent{seg: stripe}
	if inner {
		nd[0].flags = 1
	}
	return id
}

func (s *slab) release(id uint32) {
	s.used--
	k := classOf(id)
	if k == largest {
		s.link(id)
		return
	}
	c := &s.class[k]
	if last := uint32(k)<<classShift | c.n; last != id {
		nd := s.at(last)
		copy(s.at(id), nd)
		s.roots[nd[0].seg] = id
	}
	c.n--
	// One chunk is kept for the next.
	if n := len(c.chunks); int(c.n) <= (n-2)*slabNodes {
		s.drop(k)
	}
}

// drop gives the last chunk of a class back, of which no node is in use.
func (s *slab) drop(k int) {
	c := &s.class[k]
	n := len(c.chunks) - 1
	c.chunks[n] = nil
	c.chunks = c.chunks[:n]
}

// link puts a node on the free list.
func (s *slab) link(id uint32) {
	nd := s.at(id)
	nd[0].off, nd[0].seg, nd[1].seg = 0, s.free, 0
	if s.free != 0 {
		s.at(s.free)[1].seg = id
	}
	s.free = id
	s.spare++
}

// unlink takes a node off the free list.
func (s *slab) unlink(id uint32) {
	nd := s.at(id)
	next, prev := nd[0].seg, nd[1].seg
	if next != 0 {
		s.at(next)[1].seg = prev
	}
	if prev != 0 {
		s.at(prev)[0].seg = next
	} else {
		s.free = next
	}
	s.spare--
}

// build makes the tree of a stripe that had something else, of extents in order: as many
// as a root of leaves can have at most.
func (s *slab) build(stripe uint32, extents []extent) {
	if len(extents) <= capacity[largest] {
		s.roots[stripe] = s.newRoot(extents, false, stripe)
		return
	}
	var leaves [tableSlots/mergeBelow + 1]extent // more than are full
	n := 0
	for leaf := range slices.Chunk(extents, capacity[largest]) {
		id := s.alloc(largest, false, stripe)
		s.at(id).append(leaf)
		leaves[n] = extent{off: leaf[0].off, seg: id}
		n++
	}
	s.roots[stripe] = s.newRoot(leaves[:n], true, stripe)
}

// newRoot returns a root that has the entries, of the smallest class, or 0 for none.
func (s *slab) newRoot(entries []extent, inner bool, stripe uint32) uint32 {
	if len(entries) == 0 {
		return 0
	}
	k := slices.IndexFunc(capacity[:], func(most int) bool { return most >= len(entries) })
	id := s.alloc(k, inner, stripe)
	s.at(id).append(entries)
	return id
}

// eachLeaf visits the extents of all leaves below a node, in order, until visit returns
// false, and reports whether it never did.
func (s *slab) eachLeaf(id uint32, visit func(leaf []extent) bool) bool {
	nd := s.at(id)
	if !nd.inner() {
		return visit(nd.entries())
	}
	for _, e := range nd.entries() {
		if !s.eachLeaf(e.seg, visit) {
			return false
		}
	}
	return true
}

// releaseTree releases a node and all below it.
func (s *slab) releaseTree(id uint32) {
	if nd := s.at(id); nd.inner() {
		for _, e := range nd.entries() {
			s.releaseTree(e.seg)
		}
	}
	s.release(id)
}

// trimTree is how many chunks of nodes there are in a tree of blocks at most, which are
// half full on average.
const trimTree = (2*tableSlots/mergeBelow + slabNodes) / slabNodes

// trim gives up to so many chunks of the largest nodes back, when an eighth of these are
// free and more than a chunk: what is in use in the last one moves to free places.
func (s *slab) trim(chunks int) {
	c := &s.class[largest]
	for ; chunks > 0 && s.spare > max(slabNodes, int(c.n)/8); chunks-- {
		base := uint32(len(c.chunks)-1) * slabNodes
		var room [slabNodes]uint32
		used := room[:0]
		for id := largest<<classShift | base + 1; id <= largest<<classShift|c.n; id++ {
			if s.at(id).n() == 0 {
				s.unlink(id)
			} else {
				used = append(used, id)
			}
		}
		for _, id := range used {
			to := s.free
			s.unlink(to)
			copy(s.at(to), s.at(id))
			s.moved(id, to)
		}
		c.n = base
		s.drop(largest)
	}
}

// moved is called for a node of the largest that has a new number: the parent, or the
// stripe, gets that. The way to the node is that to the first extent below it, and
// goes by the old place, which is as it was.
func (s *slab) moved(from, to uint32) {
	nd := s.at(to)
	stripe := nd[0].seg
	if s.roots[stripe] == from {
		s.roots[stripe] = to
		return
	}
	for nd.inner() {
		nd = s.at(nd.at(0).seg)
	}
	c := descend(s, stripe, nd.at(0).off)
	for d := 1; d < c.depth; d++ {
		if up := c.path[d-1]; c.path[d].id == from {
			s.at(up.id).at(up.i).seg = to
		}
	}
}

// bytes returns the memory that the slab takes.
func (s *slab) bytes() int64 {
	n := int64(4*len(s.roots)) + s.tableBytes()
	for k := range s.class {
		n += int64(cap(s.class[k].chunks)) * int64(unsafe.Sizeof([]extent{}))
		n += int64(len(s.class[k].chunks)*slabNodes*(capacity[k]+1)) * int64(unsafe.Sizeof(extent{}))
	}
	return n
}

// search returns the number of entries whose off is at most off.
func (nd node) search(off uint16) int {
	e := nd.entries()
	lo, hi := 0, len(e)
	for lo < hi {
		m := int(uint(lo+hi) >> 1)
		if e[m].off <= off {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

func (nd node) insert(i int, e extent) {
	nd[0].off++
	es := nd.entries()
	copy(es[i+1:], es[i:])
	es[i] = e
}

func (nd node) remove(i int) {
	es := nd.entries()
	copy(es[i:], es[i+1:])
	nd[0].off--
}

// append adds entries behind the last.
func (nd node) append(e []extent) {
	n := nd[0].off
	nd[0].off += uint16(len(e))
	copy(nd.entries()[n:], e)
}

// cursor is a place in a tree: the way from the root down to one extent. Any
// change of the tree other than of the extent it is at invalidates it.
type cursor struct {
	slab  *slab
	root  uint32 // stripe
	depth int    // nodes on the way; 0 for an empty tree
	path  [maxHeight]struct {
		id uint32
		i  int
	}
}

// descend places the cursor where an extent that begins at off belongs.
func descend(s *slab, root uint32, off uint16) cursor {
	c := cursor{slab: s, root: root}
	for id := s.roots[root]; id != 0; {
		nd := s.at(id)
		i := nd.search(off)
		c.path[c.depth].id, c.path[c.depth].i = id, i
		if !nd.inner() {
			c.depth++
			return c
		}
		i = max(i-1, 0)
		c.path[c.depth].i = i
		c.depth++
		id = nd.at(i).seg
	}
	return c
}

// last returns the last extent that begins at off or before, nil if there is none: without
// a cursor's way from the root, which nobody needs who only looks.
func (s *slab) last(root uint32, off uint16) *extent {
	id := s.roots[root]
	if id == 0 {
		return nil
	}
	nd := s.at(id)
	i := nd.search(off)
	for nd.inner() {
		nd = s.at(nd.at(max(i-1, 0)).seg)
		i = nd.search(off)
	}
	if i > 0 {
		return nd.at(i - 1)
	}
	c := descend(s, root, off) // it may be in the leaf before, see seek
	if !c.prev() {
		return nil
	}
	return c.at()
}

// seek places the cursor at the first extent that ends after off. The extent
// that covers off may be the last of the leaf before the one that off belongs
// to: separators bound where extents begin, not where they end.
func seek(s *slab, root uint32, off uint16) cursor {
	c := descend(s, root, off)
	if c.depth == 0 {
		return c
	}
	if e, ok := c.before(); ok && e.end() > off {
		c.prev()
		return c
	}
	if !c.ok() {
		c.nextLeaf()
	}
	return c
}

// ok reports whether the cursor is at an extent.
func (c *cursor) ok() bool {
	if c.depth == 0 {
		return false
	}
	p := &c.path[c.depth-1]
	return p.i < c.slab.at(p.id).n()
}

func (c *cursor) at() *extent {
	p := &c.path[c.depth-1]
	return c.slab.at(p.id).at(p.i)
}

// next moves to the following extent, if there is one.
func (c *cursor) next() {
	c.path[c.depth-1].i++
	if !c.ok() {
		c.nextLeaf()
	}
}

func (c *cursor) nextLeaf() {
	leaf := c.depth - 1
	for d := leaf - 1; d >= 0; d-- {
		p := &c.path[d]
		nd := c.slab.at(p.id)
		if p.i+1 == nd.n() {
			continue
		}
		p.i++
		id := nd.at(p.i).seg
		for d++; d <= leaf; d++ {
			c.path[d].id, c.path[d].i = id, 0
			id = c.slab.at(id).at(0).seg
		}
		return
	}
}

// prev moves to the extent before, if there is one.
func (c *cursor) prev() bool {
	leaf := c.depth - 1
	for d := leaf; d >= 0; d-- {
		p := &c.path[d]
		if p.i == 0 {
			continue
		}
		p.i--
		for ; d < leaf; d++ {
			id := c.slab.at(c.path[d].id).at(c.path[d].i).seg
			c.path[d+1].id, c.path[d+1].i = id, c.slab.at(id).n()-1
		}
		return true
	}
	return false
}

// before returns the extent before the cursor's place, if there is one.
func (c *cursor) before() (e extent, ok bool) {
	p := &c.path[c.depth-1]
	if p.i > 0 {
		return *c.slab.at(p.id).at(p.i - 1), true
	}
	if there := *c; there.prev() {
		return *there.at(), true
	}
	return extent{}, false
}

// from returns the extent n, 0 or 1, behind the cursor's place, if there is one.
func (c *cursor) from(n int) (e extent, ok bool) {
	p := &c.path[c.depth-1]
	if nd := c.slab.at(p.id); p.i+n < nd.n() {
		return *nd.at(p.i + n), true
	}
	there := *c
	there.path[c.depth-1].i += n
	if there.nextLeaf(); there.ok() {
		return *there.at(), true
	}
	return extent{}, false
}

// insert adds an extent that overlaps none.
func insert(s *slab, root uint32, e extent) {
	c := descend(s, root, e.off)
	if c.depth == 0 {
		id := s.alloc(0, false, root)
		s.roots[root] = id
		s.at(id).insert(0, e)
		return
	}
	c.insert(e)
}

// insert adds an extent at the cursor's place, where descend has put it for that.
func (c *cursor) insert(e extent) { c.insertAt(c.depth-1, c.path[c.depth-1].i, e) }

// insertAt puts e at place i of the node at depth d. A root that is full gets
// a larger size. A node of the largest gives its upper half to a new right
// neighbour; when the new entry goes behind the last one the neighbour gets
// that alone, so that a sequential writer leaves full nodes behind.
func (c *cursor) insertAt(d, i int, e extent) {
	id := c.path[d].id
	nd := c.slab.at(id)
	k := classOf(id)
	if nd.n() == capacity[k] && k < largest {
		nd = c.resizeRoot(k + 1)
	}
	if nd.n() < capacity[classOf(c.path[d].id)] {
		nd.insert(i, e)
		return
	}
	rid := c.slab.alloc(largest, nd.inner(), c.root)
	right := c.slab.at(rid)
	at := nd.n() / 2
	if i == nd.n() {
		at = i
	}
	right.append(nd.entries()[at:])
	nd[0].off = uint16(at)
	if i > at || right.n() == 0 {
		right.insert(i-at, e)
	} else {
		nd.insert(i, e)
	}
	sep := extent{off: right.at(0).off, seg: rid}
	if d > 0 {
		c.insertAt(d-1, c.path[d-1].i+1, sep)
		return
	}
	top := c.slab.alloc(1, true, c.root)
	nt := c.slab.at(top)
	nt.insert(0, extent{off: nd.at(0).off, seg: id})
	nt.insert(1, sep)
	c.slab.roots[c.root] = top
}

// resizeRoot moves the root to a node of class k.
func (c *cursor) resizeRoot(k int) node {
	old := c.path[0].id
	nd := c.slab.at(old)
	id := c.slab.alloc(k, nd.inner(), c.root)
	to := c.slab.at(id)
	to.append(nd.entries())
	c.slab.roots[c.root], c.path[0].id = id, id
	c.slab.release(old)
	return to
}

// remove takes the cursor's extent out.
func (c *cursor) remove() { c.removeAt(c.depth - 1) }

func (c *cursor) removeAt(d int) {
	id, i := c.path[d].id, c.path[d].i
	nd := c.slab.at(id)
	nd.remove(i)
	if d == 0 {
		switch k := classOf(id); {
		case nd.n() == 0:
			c.slab.roots[c.root] = 0
			c.slab.release(id)
		case nd.inner() && nd.n() == 1:
			c.slab.roots[c.root] = nd.at(0).seg
			c.slab.release(id)
		case k > 0 && nd.n() == 1:
			c.resizeRoot(0)
		case k > 0 && nd.n() < capacity[k-1]:
			c.resizeRoot(k - 1)
		}
		return
	}
	up := &c.path[d-1]
	parent := c.slab.at(up.id)
	if nd.n() == 0 {
		c.slab.release(id)
		c.removeAt(d - 1)
		return
	}
	// Join with the left neighbour, else with the right one.
	for _, l := range [2]int{up.i - 1, up.i} {
		if l < 0 || l+1 >= parent.n() {
			continue
		}
		left, rid := c.slab.at(parent.at(l).seg), parent.at(l+1).seg
		right := c.slab.at(rid)
		if left.n()+right.n() > mergeBelow {
			continue
		}
		// The first child's own separator may be too high by now (nothing
		// looks at it); the parent's for the whole node is not.
		if right.inner() {
			right.at(0).off = parent.at(l + 1).off
		}
		left.append(right.entries())
		c.slab.release(rid)
		up.i = l + 1
		c.removeAt(d - 1)
		return
	}
}
