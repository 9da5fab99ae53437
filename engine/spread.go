package engine

import (
	"runtime"
	"sync"

	"ublk-pcache/ondisk"
)

// Replay reads the log in one thread and enters what it finds into the index in
// one for each processor: that is the larger part of it. Keys for the same
// sectors must be entered in the log's order, and they are of the same stripe, so
// a lane has its own stripes, and gets them in order. A log that fills no batch
// starts no thread.
//
// It belongs to one goroutine, and nobody may look at the index between the first
// add and finish.
type spread struct {
	batches [][]placed // being filled, by lane
	lanes   []chan []placed
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
	// spreadBatch is how many keys are handed over at a time, 512 KiB of them:
	// enough that each shard of a lane gets some dozens at once, few enough to
	// stay in a processor's cache until they are entered.
	spreadBatch = 16 << 10
	// spreadAhead is how many batches the log is read ahead of a lane.
	spreadAhead = 2
)

// add does p to the sectors of a key, now or later.
func (sp *spread) add(k *ondisk.Key, p placed) {
	if sp.batches == nil {
		sp.batches = make([][]placed, runtime.NumCPU())
	}
	p.shard = shardOf(k.Off)
	i := int(p.shard) % len(sp.batches)
	sp.batches[i] = append(sp.batches[i], p)
	if len(sp.batches[i]) < spreadBatch {
		return
	}
	if sp.lanes == nil {
		sp.start()
	}
	sp.lanes[i] <- sp.batches[i]
	select {
	case batch := <-sp.spare:
		sp.batches[i] = batch[:0]
	default:
		sp.batches[i] = make([]placed, 0, spreadBatch)
	}
}

func (sp *spread) start() {
	sp.lanes = make([]chan []placed, len(sp.batches))
	sp.spare = make(chan []placed, len(sp.lanes)*(spreadAhead+1))
	for i := range sp.lanes {
		lane := make(chan []placed, spreadAhead)
		sp.lanes[i] = lane
		sp.ended.Go(func() {
			for batch := range lane {
				enterAll(batch)
				select {
				case sp.spare <- batch:
				default: // the last ones, which nobody will fill again
				}
			}
		})
	}
}

// finish returns when everything added is in the index.
func (sp *spread) finish() {
	for i, batch := range sp.batches {
		if sp.lanes == nil {
			enterAll(batch)
			continue
		}
		sp.lanes[i] <- batch
		close(sp.lanes[i])
	}
	sp.ended.Wait()
	sp.batches, sp.lanes, sp.spare = nil, nil, nil
}

// enterAll enters a batch shard by shard, each in the log's order: what the next
// key of a shard needs is then still in the processor's cache.
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
