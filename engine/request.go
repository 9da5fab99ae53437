package engine

import "sync/atomic"

// Op is what a request asks for.
type Op uint8

// The requests that a queue takes.
const (
	Read Op = iota
	Write
	Flush
)

// Request is one request and, once finished, its result. It belongs to the
// queue from Submit until Turn returns it; its memory can be used again then.
// The exported fields but Err are the caller's to set.
type Request struct {
	Op  Op
	FUA bool   // a Write that is durable when it finishes
	Tag int    // the caller's own
	Off int64  // bytes
	Buf []byte // whole sectors that do not cross a multiple of 4 MiB; from Disk.Buffer or as good
	Err error  // the result

	q      *Queue
	stage  stage
	done   int    // bytes of a write that have their place
	last   uint64 // the queue's count of keys when the last of the write was stored
	ticket uint64 // place in the line for space, 0 for none
	fills  *fill  // what a read still lacks, linked by next
	lacks  atomic.Int32
}

// stage says how a request that comes back to its queue goes on.
type stage uint8

const (
	stageWrite  stage = iota // there may be space
	stageRead                // somebody else's fill is done
	stageFilled              // its own fills are done
	stageSynced              // the region is synced
)
