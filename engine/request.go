package engine

import "sync/atomic"

// Op is what a request asks for.
type Op uint8

// The requests that a queue takes.
const (
	Read Op = iota
	Write
	Flush
	Zero // makes a range read as zeros; what a discard and a write of zeroes ask for
)

// MaxZero is how many bytes a Zero may cover.
const MaxZero = 64 << 20

// Request is one request and, once finished, its result. It belongs to the
// queue from Submit until Turn returns it; its memory can be used again then.
// The exported fields but Err are the caller's to set.
type Request struct {
	Op  Op
	FUA bool   // a Write or Zero that is durable when it finishes
	Tag int    // the caller's own
	Off int64  // bytes
	Buf []byte // whole sectors that do not cross a multiple of 4 MiB; from Disk.Buffer or as good
	Len int    // bytes of a Zero: whole sectors
	Err error  // the result

	q       *Queue
	stage   stage
	done    int    // bytes of a write or zero that have their place
	last    uint64 // the queue's count of keys when the last of the write was stored
	ticket  uint64 // place in the line for space, 0 for none
	since   int64  // when it got that, as sinceStart counts
	parked  bool   // it sleeps there; under the line's lock
	awake   bool   // it has been woken, and its turn has not come yet
	fills   *fill  // what a read still lacks, linked by next
	lacks   atomic.Int32
	passage passage // of what they read, see streams.go

	// Of a write that waits for write-back, see through.go, under its lock.
	through bool   // it is known there
	number  uint64 // in the order in which they came
	triedAt uint64 // through.done when it was first in front of that
	overBy  uint64 // the last then that may have overwritten it, 0 before
	from    uint64 // the kset that it is logged behind, or with
	until   uint64 // the kset that it is logged in front of, 0 while it is not
	refused error  // why the disk does not have all of it
}

// stage says how a request that comes back to its queue goes on.
type stage uint8

const (
	stageWrite    stage = iota // there may be space, or nobody will have any
	stageRead                  // somebody else's fill is done
	stageFilled                // its own fills are done
	stageDirect                // the disk is done with a write that goes around the cache
	stageAnswered              // what else it waited for has come about
)

// size returns how many bytes r covers.
func (r *Request) size() int {
	if r.Op == Zero {
		return r.Len
	}
	return len(r.Buf)
}
