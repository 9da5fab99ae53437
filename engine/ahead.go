package engine

import (
	"ublk-pcache/internal/prefetch"
	"ublk-pcache/ondisk"
)

// A search goes from the root of a stripe's tree down to a leaf, and where the
// index is larger than the processor's caches it waits for memory at each of them.
// Who has several places to search first has the processor fetch the nodes of all,
// level by level: then it waits for all of them at once. With ten million extents
// that is a quarter of the time of a read hit, copy included, and a third of what it
// takes to enter a key. A smaller index comes faster than it can be asked for.

// aheadFrom is how many nodes a shard has if that is worth while: 8 MiB of an
// index.
const aheadFrom = 8 << 20 / shardCount / 512

func (sh *shard) largeLocked() bool { return sh.slab.used >= aheadFrom }

// lookAhead fetches what a search for the first sector of each span will look at.
// The spans are of one index, whose shards are alike.
func lookAhead(spans []span) {
	if len(spans) < 2 {
		return
	}
	sh := spans[0].sh
	sh.Lock()
	large := sh.largeLocked()
	sh.Unlock()
	if !large {
		return
	}
	for _, s := range spans {
		s.sh.Lock()
		s.fetchRootLocked()
		s.sh.Unlock()
	}
	for _, s := range spans {
		s.sh.Lock()
		s.fetchLeafLocked()
		s.sh.Unlock()
	}
}

// lookAheadKeys does so for those keys of a kset that are not dead; where a dead
// one points may be outside the device.
func (c *Cache) lookAheadKeys(keys []ondisk.Key) {
	var spans [ondisk.MaxKeys]span
	n := 0
	for i := range keys {
		if k := &keys[i]; k.Gen == c.segments.all[k.Seg].gen.Load() {
			spans[n], _ = c.keySpan(k)
			n++
		}
	}
	lookAhead(spans[:n])
}

// lookAheadLocked does so for keys whose shards are locked.
func (c *Cache) lookAheadLocked(keys []ondisk.Key) {
	if len(keys) < 2 || !c.index.shards[shardOf(keys[0].Off)].largeLocked() {
		return
	}
	for i := range keys {
		s, _ := c.keySpan(&keys[i])
		s.fetchRootLocked()
	}
	for i := range keys {
		s, _ := c.keySpan(&keys[i])
		s.fetchLeafLocked()
	}
}

// fetchRootLocked fetches the root.
func (s span) fetchRootLocked() {
	if id := s.sh.slab.roots[s.root]; id != 0 {
		s.sh.slab.at(id).fetch()
	}
}

// fetchLeafLocked fetches the node below the root, which mostly is a leaf.
func (s span) fetchLeafLocked() {
	id := s.sh.slab.roots[s.root]
	if id == 0 {
		return
	}
	if nd := s.sh.slab.at(id); nd.inner() {
		s.sh.slab.at(nd.at(max(nd.search(s.off)-1, 0)).seg).fetch()
	}
}

// fetch has the processor get the header, and those entries that most searches
// look at.
func (nd node) fetch() {
	for i := range 4 {
		prefetch.Line(&nd[i*len(nd)/4])
	}
}
