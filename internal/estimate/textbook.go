// Package estimate tells how many blocks a cache of some size misses, of those that a trace
// accesses: the real engine, and textbook algorithms beside it.
package estimate

// policy is a textbook algorithm: it decides which blocks a cache of some capacity keeps.
// Blocks are numbered from 0 on.
type policy interface {
	// access is told of a read or write of a block, and reports whether the cache has
	// it. If not, it has it from now on.
	access(block int32) (hit bool)
}

// fifo throws out what came first.
type fifo struct {
	capacity int
	kept     *order
}

func newFIFO(capacity, blocks int) policy { return &fifo{capacity, newOrder(blocks)} }

func (f *fifo) access(block int32) (hit bool) {
	if f.kept.has(block) {
		return true
	}
	if f.kept.n >= f.capacity {
		f.kept.pop()
	}
	f.kept.push(block)
	return false
}

// lru throws out what has not been accessed for longest.
type lru struct {
	capacity int
	kept     *order
}

func newLRU(capacity, blocks int) policy { return &lru{capacity, newOrder(blocks)} }

func (l *lru) access(block int32) (hit bool) {
	hit = l.kept.has(block)
	switch {
	case hit:
		l.kept.remove(block)
	case l.kept.n >= l.capacity:
		l.kept.pop()
	}
	l.kept.push(block)
	return hit
}

// s3fifo is S3-FIFO, of "FIFO queues are all you need for cache eviction", SOSP 2023. A tenth
// of the cache is a queue for newcomers. What is hit more than once there moves on to the main
// queue. The rest leaves the cache, and becomes a ghost: if it comes back, it begins in the
// main queue, where each hit gives another round, up to three. The paper leaves open how many
// ghosts there are; here it is one for each block of the cache.
type s3fifo struct {
	capacity, newcomers int // of the cache, and of small
	small, main, ghosts *order
	hits                []int8 // of each block since it entered its queue, up to 3
}

func newS3FIFO(capacity, blocks int) policy {
	return &s3fifo{
		capacity: capacity, newcomers: max(1, capacity/10),
		small: newOrder(blocks), main: newOrder(blocks), ghosts: newOrder(blocks),
		hits: make([]int8, blocks),
	}
}

func (s *s3fifo) access(block int32) (hit bool) {
	if s.small.has(block) || s.main.has(block) {
		s.hits[block] = min(s.hits[block]+1, 3)
		return true
	}
	for s.small.n+s.main.n >= s.capacity {
		s.makeRoom()
	}
	s.hits[block] = 0
	if s.ghosts.has(block) {
		s.ghosts.remove(block)
		s.main.push(block)
	} else {
		s.small.push(block)
	}
	return false
}

// makeRoom throws one block out, or moves one on.
func (s *s3fifo) makeRoom() {
	if s.small.n >= s.newcomers || s.main.n == 0 {
		block := s.small.pop()
		if s.hits[block] > 1 {
			s.hits[block] = 0
			s.main.push(block)
			return
		}
		s.ghosts.push(block)
		if s.ghosts.n > s.capacity {
			s.ghosts.pop()
		}
		return
	}
	if block := s.main.pop(); s.hits[block] > 0 {
		s.hits[block]--
		s.main.push(block)
	}
}

// order is a set of blocks in the order in which they came. Each links to its neighbours;
// behind the last block there is one that stands for both ends.
type order struct {
	next, prev []int32 // -1 for a block that is not in the set
	n          int     // blocks in the set
}

func newOrder(blocks int) *order {
	o := &order{next: make([]int32, blocks+1), prev: make([]int32, blocks+1)}
	for i := range blocks {
		o.next[i] = -1
	}
	o.next[blocks], o.prev[blocks] = int32(blocks), int32(blocks)
	return o
}

func (o *order) ends() int32 { return int32(len(o.next) - 1) }

func (o *order) has(block int32) bool { return o.next[block] >= 0 }

// push adds a block that is not in the set.
func (o *order) push(block int32) {
	ends := o.ends()
	last := o.prev[ends]
	o.next[last], o.prev[block] = block, last
	o.next[block], o.prev[ends] = ends, block
	o.n++
}

// remove takes out a block of the set.
func (o *order) remove(block int32) {
	before, after := o.prev[block], o.next[block]
	o.next[before], o.prev[after] = after, before
	o.next[block] = -1
	o.n--
}

// pop takes out the block that came first. The set must not be empty.
func (o *order) pop() int32 {
	first := o.next[o.ends()]
	o.remove(first)
	return first
}
