package engine

import (
	"runtime"
	"sync"

	"ublk-pcache/ondisk"
)

// bulkLoad enters what replay finds into the index. Replay reads the log in one thread;
// to enter its keys is the larger part, so there is a loader for each processor. Keys
// for the same sectors must be entered in the log's order, and they are of the same
// stripe, so a loader has its own stripes, and gets them in order. A log that fills no
// batch starts no loader.
//
// A bulkLoad belongs to one goroutine, and nobody may look at the index between the
// first add and finish.
type bulkLoad struct {
	batches [][]placed // being filled, by loader
	loaders []chan []placed
	spare   chan []placed // batches that have been entered
	ended   sync.WaitGroup
}

// placed is what a key does to the index.
type placed struct {
	s     span
	e     extent
	shard uint8
	dead  bool // it only overrides
}

const (
	// bulkBatch is how many keys are handed over at a time, 512 KiB of them:
	// enough that each shard of a loader gets some dozens at once, few enough to
	// stay in a processor's cache until they are entered.
	bulkBatch = 16 << 10
	// bulkAhead is how many batches the log is read ahead of a loader.
	bulkAhead = 2
)

// add does p to the sectors of a key, now or later.
func (l *bulkLoad) add(k *ondisk.Key, p placed) {
	if l.batches == nil {
		l.batches = make([][]placed, runtime.NumCPU())
	}
	p.shard = shardOf(k.Off)
	i := int(p.shard) % len(l.batches)
	l.batches[i] = append(l.batches[i], p)
	if len(l.batches[i]) < bulkBatch {
		return
	}
	if l.loaders == nil {
		l.start()
	}
	l.loaders[i] <- l.batches[i]
	select {
	case batch := <-l.spare:
		l.batches[i] = batch[:0]
	default:
		l.batches[i] = make([]placed, 0, bulkBatch)
	}
}

func (l *bulkLoad) start() {
	l.loaders = make([]chan []placed, len(l.batches))
	l.spare = make(chan []placed, len(l.loaders)*(bulkAhead+1))
	for i := range l.loaders {
		loader := make(chan []placed, bulkAhead)
		l.loaders[i] = loader
		l.ended.Go(func() {
			for batch := range loader {
				enterAll(batch)
				select {
				case l.spare <- batch:
				default: // the last ones, which nobody will fill again
				}
			}
		})
	}
}

// finish returns when everything added is in the index.
func (l *bulkLoad) finish() {
	for i, batch := range l.batches {
		if l.loaders == nil {
			enterAll(batch)
			continue
		}
		l.loaders[i] <- batch
		close(l.loaders[i])
	}
	l.ended.Wait()
	l.batches, l.loaders, l.spare = nil, nil, nil
}

// enterAll enters a batch shard by shard, each in the log's order: the nodes
// that the next key of a shard needs are then still in the processor's cache.
func enterAll(batch []placed) {
	var ends [shardCount]int
	for i := range batch {
		ends[batch[i].shard]++
	}
	at := 0
	for shard, n := range ends {
		ends[shard], at = at, at+n
	}
	order := make([]uint32, len(batch))
	for i := range batch {
		end := &ends[batch[i].shard]
		order[*end] = uint32(i)
		*end++
	}
	for begin := 0; begin < len(batch); {
		sh := batch[order[begin]].s.sh
		end := ends[batch[order[begin]].shard]
		sh.Lock()
		for _, i := range order[begin:end] {
			if p := &batch[i]; p.dead {
				p.s.cutLocked(nil)
			} else {
				p.s.setLocked(p.e, nil)
			}
		}
		sh.Unlock()
		begin = end
	}
}
