package engine

// The extents of one stripe form a B+tree whose nodes live in a slab and name
// each other by number, so that the garbage collector has nothing to follow:
// with pointers, marking an index of four million extents costs tens of
// milliseconds of every collection; without, nothing that can be measured.
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
	seg   uint32 // cache_seg_id, or the number of a fill when loading
}

const (
	// extDirty: the backing device does not have these sectors yet.
	extDirty = 1 << iota
	// extLoading: a miss read is on its way; seg is its fill, pos is unused.
	extLoading
	// extZero: the sectors are zeros; nobody needs to look at the place.
	extZero
)

func (e extent) end() uint16 { return e.off + e.n }

// abuts reports whether f continues e in address, place and state, so that
// one extent can stand for both.
func (e extent) abuts(f extent) bool {
	return e.end() == f.off && e.seg == f.seg && e.flags == f.flags &&
		(e.flags&extLoading != 0 || e.pos+e.n == f.pos)
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

const (
	// nodeExtents fills a node to 512 bytes: eight cache lines, of which a
	// binary search touches three.
	nodeExtents = 42
	// mergeBelow: two neighbours are joined when together they fill no more
	// than this, which leaves room to grow before the next split.
	mergeBelow = nodeExtents * 3 / 4
	// slabNodes is how many nodes are allocated at a time: 32 KiB.
	slabNodes = 64
	// maxHeight: a stripe holds at most 8192 extents and a node that is not
	// the last of its level at least mergeBelow/2 on average; 21^4 is plenty.
	maxHeight = 6
)

type node struct {
	n     uint16
	inner bool
	link  uint32 // next free node while the node is free
	e     [nodeExtents]extent
}

// slab hands out nodes by number; 0 is no node.
type slab struct {
	chunks [][]node
	free   uint32
	used   int
}

func (s *slab) at(id uint32) *node {
	id--
	return &s.chunks[id/slabNodes][id%slabNodes]
}

func (s *slab) alloc(inner bool) uint32 {
	if s.free == 0 {
		chunk := make([]node, slabNodes)
		base := uint32(len(s.chunks) * slabNodes)
		for i := range chunk {
			chunk[i].link = base + uint32(i) + 2
		}
		chunk[slabNodes-1].link = 0
		s.chunks = append(s.chunks, chunk)
		s.free = base + 1
	}
	id := s.free
	nd := s.at(id)
	s.free = nd.link
	nd.n, nd.inner, nd.link = 0, inner, 0
	s.used++
	return id
}

func (s *slab) release(id uint32) {
	s.at(id).link = s.free
	s.free = id
	s.used--
}

// search returns the number of entries whose off is at most off.
func (nd *node) search(off uint16) int {
	lo, hi := 0, int(nd.n)
	for lo < hi {
		m := int(uint(lo+hi) >> 1)
		if nd.e[m].off <= off {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

func (nd *node) insert(i int, e extent) {
	copy(nd.e[i+1:nd.n+1], nd.e[i:nd.n])
	nd.e[i] = e
	nd.n++
}

func (nd *node) remove(i int) {
	copy(nd.e[i:], nd.e[i+1:nd.n])
	nd.n--
}

// cursor is a place in a tree: the way from the root down to one extent. Any
// change of the tree other than of the extent it is at invalidates it.
type cursor struct {
	slab  *slab
	root  *uint32
	depth int // nodes on the way; 0 for an empty tree
	path  [maxHeight]struct {
		id uint32
		i  int
	}
}

// descend places the cursor where an extent that begins at off belongs.
func descend(s *slab, root *uint32, off uint16) cursor {
	c := cursor{slab: s, root: root}
	for id := *root; id != 0; {
		nd := s.at(id)
		i := nd.search(off)
		c.path[c.depth].id, c.path[c.depth].i = id, i
		if !nd.inner {
			c.depth++
			return c
		}
		i = max(i-1, 0)
		c.path[c.depth].i = i
		c.depth++
		id = nd.e[i].seg
	}
	return c
}

// seek places the cursor at the first extent that ends after off. The extent
// that covers off may be the last of the leaf before the one that off belongs
// to: separators bound where extents begin, not where they end.
func seek(s *slab, root *uint32, off uint16) cursor {
	c := descend(s, root, off)
	if c.depth == 0 {
		return c
	}
	if before := c; before.prev() && before.at().end() > off {
		return before
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
	return p.i < int(c.slab.at(p.id).n)
}

func (c *cursor) at() *extent {
	p := &c.path[c.depth-1]
	return &c.slab.at(p.id).e[p.i]
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
		if p.i+1 == int(nd.n) {
			continue
		}
		p.i++
		id := nd.e[p.i].seg
		for d++; d <= leaf; d++ {
			c.path[d].id, c.path[d].i = id, 0
			id = c.slab.at(id).e[0].seg
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
			id := c.slab.at(c.path[d].id).e[c.path[d].i].seg
			c.path[d+1].id, c.path[d+1].i = id, int(c.slab.at(id).n)-1
		}
		return true
	}
	return false
}

// insert adds an extent that overlaps none.
func insert(s *slab, root *uint32, e extent) {
	c := descend(s, root, e.off)
	if c.depth == 0 {
		*root = s.alloc(false)
		s.at(*root).insert(0, e)
		return
	}
	c.insertAt(c.depth-1, c.path[c.depth-1].i, e)
}

// insertAt puts e at place i of the node at depth d. A full node gives its
// upper half to a new right neighbour; when the new entry goes behind the
// last one the neighbour gets that alone, so that a sequential writer leaves
// full nodes behind.
func (c *cursor) insertAt(d, i int, e extent) {
	id := c.path[d].id
	nd := c.slab.at(id)
	if nd.n < nodeExtents {
		nd.insert(i, e)
		return
	}
	rid := c.slab.alloc(nd.inner)
	right := c.slab.at(rid)
	at := nodeExtents / 2
	if i == nodeExtents {
		at = nodeExtents
	}
	right.n = uint16(copy(right.e[:], nd.e[at:]))
	nd.n = uint16(at)
	if i > at || at == nodeExtents {
		right.insert(i-at, e)
	} else {
		nd.insert(i, e)
	}
	sep := extent{off: right.e[0].off, seg: rid}
	if d > 0 {
		c.insertAt(d-1, c.path[d-1].i+1, sep)
		return
	}
	top := c.slab.alloc(true)
	nt := c.slab.at(top)
	nt.insert(0, extent{off: nd.e[0].off, seg: id})
	nt.insert(1, sep)
	*c.root = top
}

// remove takes the cursor's extent out.
func (c *cursor) remove() { c.removeAt(c.depth - 1) }

func (c *cursor) removeAt(d int) {
	id, i := c.path[d].id, c.path[d].i
	nd := c.slab.at(id)
	nd.remove(i)
	if d == 0 {
		switch {
		case nd.n == 0:
			*c.root = 0
			c.slab.release(id)
		case nd.inner && nd.n == 1:
			*c.root = nd.e[0].seg
			c.slab.release(id)
		}
		return
	}
	up := &c.path[d-1]
	parent := c.slab.at(up.id)
	if nd.n == 0 {
		c.slab.release(id)
		c.removeAt(d - 1)
		return
	}
	// Join with the left neighbour, else with the right one.
	for _, l := range [2]int{up.i - 1, up.i} {
		if l < 0 || l+1 >= int(parent.n) {
			continue
		}
		left, rid := c.slab.at(parent.e[l].seg), parent.e[l+1].seg
		right := c.slab.at(rid)
		if left.n+right.n > mergeBelow {
			continue
		}
		// The first child's own separator may be too high by now (nothing
		// looks at it); the parent's for the whole node is not.
		if right.inner {
			right.e[0].off = parent.e[l+1].off
		}
		left.n += uint16(copy(left.e[left.n:], right.e[:right.n]))
		c.slab.release(rid)
		up.i = l + 1
		c.removeAt(d - 1)
		return
	}
}
