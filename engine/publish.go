package engine

import "ublk-pcache/ondisk"

// publisher brings the keys of a kset into the index after the journal's lock has
// been released.
//
// The obvious way, to enter them while that is held, has every queue wait for
// the index updates of all others, which are more work than all the rest that
// is done under it. To enter them after it has been released, each for itself,
// exchanges the order of two ksets, or shows write-back the end of a log whose
// keys the index does not have yet: they would pass for overwritten.
//
// So the locks of all their shards are taken while the journal's is still held,
// and each is given back when its keys are in. The next commit, write-back, and
// all others that have seen the kset in the log then wait where they look for
// the keys, and only there. This cannot end in a circle: more than one shard's
// lock is only taken under the journal's, and under a shard's only that of the
// fills, and under that none.
//
// A queue has one, since it does one commit at a time.
type publisher struct {
	// The keys of each shard form a list in the order of the log. Numbers are
	// those of keys in the kset plus 1, and 0 is none.
	first []uint8 // one key for each shard
	last  [shardCount]uint8
	next  [ondisk.MaxKeys]uint8
}

// lockShards locks the shards of the keys. The caller holds the journal's lock.
func (p *publisher) lockShards(x *index, keys []ondisk.Key) {
	for i := range keys {
		shard, k := shardOf(keys[i].Off), uint8(i+1)
		if last := p.last[shard]; last != 0 {
			p.next[last-1] = k
		} else {
			x.shards[shard].Lock()
			p.first = append(p.first, k)
		}
		p.next[i], p.last[shard] = 0, k
	}
}

// publish makes the index point at the keys, and unlocks the shards.
func (p *publisher) publish(c *Cache, keys []ondisk.Key) {
	for _, k := range p.first {
		shard := shardOf(keys[k-1].Off)
		for ; k != 0; k = p.next[k-1] {
			key := &keys[k-1]
			s, at := c.keySpan(key)
			s.setLocked(extent{seg: at.seg, pos: s.off + at.delta, flags: keyState(key, true)}, &c.stale)
		}
		p.last[shard] = 0
		c.index.shards[shard].Unlock()
	}
	p.first = p.first[:0]
}
