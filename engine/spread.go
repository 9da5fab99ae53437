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
	ended   sync.WaitGroup
}

// placed is what a key does to the index.
type placed struct {
	s    span
	e    extent
	dead bool // it only overrides
}

const (
	// spreadBatch is how many keys are handed over at a time: 32 KiB.
	spreadBatch = 1024
	// spreadAhead is how many batches the log is read ahead of a lane.
	spreadAhead = 4
)

// add does p to the sectors of a key, now or later.
func (sp *spread) add(k *ondisk.Key, p placed) {
	if sp.batches == nil {
		sp.batches = make([][]placed, runtime.NumCPU())
	}
	i := k.Off / ondisk.StripeSize % uint64(len(sp.batches))
	sp.batches[i] = append(sp.batches[i], p)
	if len(sp.batches[i]) < spreadBatch {
		return
	}
	if sp.lanes == nil {
		sp.start()
	}
	sp.lanes[i] <- sp.batches[i]
	sp.batches[i] = make([]placed, 0, spreadBatch)
}

func (sp *spread) start() {
	sp.lanes = make([]chan []placed, len(sp.batches))
	for i := range sp.lanes {
		lane := make(chan []placed, spreadAhead)
		sp.lanes[i] = lane
		sp.ended.Go(func() {
			for batch := range lane {
				enterAll(batch)
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
	sp.batches, sp.lanes = nil, nil
}

func enterAll(batch []placed) {
	for i := range batch {
		p := &batch[i]
		p.s.sh.Lock()
		if p.dead {
			p.s.cutLocked()
		} else {
			p.s.setLocked(p.e)
		}
		p.s.sh.Unlock()
	}
}
