package engine

import (
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// ghost remembers which blocks have left the window without having been hit. One that is
// missed again goes to the log at once: it was hit, only too late for the window.
//
// It has as many blocks as the region has, no more than half of them older than that, four
// bytes for each. They are fingerprints, in buckets of which the oldest is replaced. A wrong
// one keeps something that nobody may need, so none of it has to be exact: what two threads
// store at once, one of them may lose.
type ghost struct {
	blocks int // of the region
	table  atomic.Pointer[[]atomic.Uint32]
	added  atomic.Uint32
}

const (
	ghostBlock = 4096 >> sectorShift // sectors
	ghostWays  = 4
	// ghostPrint is how many bits of an entry are of the hash: so many that of a million
	// misses none finds what is not its own. The others are its age, of which an entry can
	// have twice as many as it counts for.
	ghostPrint = 26
	ghostAges  = 1 << (32 - ghostPrint - 1)
	ghostTime  = 1<<(32-ghostPrint) - 1
)

func (g *ghost) init(l *ondisk.Layout) {
	g.blocks = len(l.Chain) * (ondisk.SegmentData >> sectorShift) / ghostBlock
}

// bytes returns the memory that it takes.
func (g *ghost) bytes() int64 {
	if t := g.table.Load(); t != nil {
		return int64(len(*t)) * 4
	}
	return 0
}

// An entry is 0, or what it has of a block's hash, and in the lower bits the time at which it came.

// bucket returns the bucket of a block, and what its entry has of the hash.
func (g *ghost) bucket(t []atomic.Uint32, block int64) (ways []atomic.Uint32, print uint32) {
	h := uint64(block) * 0x9e3779b97f4a7c15
	h ^= h >> 29
	h *= 0xbf58476d1ce4e5b9
	i := int(h >> 32 * uint64(len(t)/ghostWays) >> 32)
	return t[i*ghostWays : (i+1)*ghostWays], uint32(h)>>(32-ghostPrint) | 1
}

// now returns the time, in steps.
func (g *ghost) now() uint32 { return g.added.Load() / uint32(max(1, g.blocks/ghostAges)) }

// add remembers n sectors at lba.
func (g *ghost) add(lba int64, n uint16) {
	t := g.table.Load()
	if t == nil {
		made := make([]atomic.Uint32, max(1, g.blocks/ghostWays)*ghostWays)
		g.table.CompareAndSwap(nil, &made)
		t = g.table.Load()
	}
	for block := lba / ghostBlock; block*ghostBlock < lba+int64(n); block++ {
		ways, print := g.bucket(*t, block)
		now := g.now()
		entry := print<<(32-ghostPrint) | now&ghostTime
		oldest, age := 0, uint32(0)
		for i := range ways {
			v := ways[i].Load()
			if v == 0 || v>>(32-ghostPrint) == print {
				oldest = i
				break
			}
			if a := (now - v) & ghostTime; a >= age {
				oldest, age = i, a
			}
		}
		ways[oldest].Store(entry)
		g.added.Add(1)
	}
}

// take reports whether the block that has lba left the window lately, and forgets that.
func (g *ghost) take(lba int64) bool {
	t := g.table.Load()
	if t == nil {
		return false
	}
	ways, print := g.bucket(*t, lba/ghostBlock)
	for i := range ways {
		if v := ways[i].Load(); v>>(32-ghostPrint) == print {
			ways[i].Store(0)
			return (g.now()-v)&ghostTime <= ghostAges
		}
	}
	return false
}
