package engine

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"ublk-pcache/ondisk"
)

// errorCounts count what went wrong since the cache was opened.
type errorCounts struct {
	memory    atomic.Uint64 // accesses of the region that failed, bad checksums
	diskReads atomic.Uint64 // failed reads
	rounds    atomic.Uint64 // failed rounds of write-back

	unread atomic.Pointer[failure] // why the last read of the disk failed, nil if it did not
}

// diskRead is told how each read of the disk ended. A queue does so for each miss,
// so where all is well nothing is stored.
func (e *errorCounts) diskRead(off int64, err error) error {
	if err == nil {
		if e.unread.Load() != nil {
			e.unread.Store(nil)
		}
		return nil
	}
	err = fmt.Errorf("read the backing device at %d: %w", off, err)
	e.diskReads.Add(1)
	e.unread.Store(&failure{err})
	return err
}

// keptCounts count what was kept because it was hit, in bytes, since the cache was opened.
type keptCounts struct {
	promoted atomic.Uint64 // from the window to the log
	again    atomic.Uint64 // from the end of the log to its head
}

// State is how a cache is.
type State string

const (
	// Healthy: everything works.
	Healthy State = "ok"
	// Degraded: write-back fails at the moment, dirty data stays in the cache; or
	// the disk has failed the last read that it was asked for; or memory has failed,
	// and what it held is lost or not, as BadPlaces tells.
	Degraded State = "degraded"
	// Failed: the region takes no more writes. Reads go on.
	Failed State = "failed"
)

// Status is a cache at one moment. Sizes are in bytes, counts since Open.
type Status struct {
	State State
	Error string // why it is not healthy
	Cause error  `json:"-"` // the same for State Failed, for errors.Is

	Segments, UsedSegments int // used by the log, its data and the window
	WindowSegments         int // of those, what the window has
	Settings               Settings
	DataCRC                bool
	InfoFlags              ondisk.InfoFlags

	KeyHead, KeyTail, DirtyTail ondisk.Position

	DirtyBytes, CleanBytes int64
	ZeroBytes              int64 // zeros that the disk does not have yet
	Extents                int64 // or blocks of 4 KiB, where a table has them
	IndexBytes             int64

	Reads, Writes, Flushes, Zeros uint64
	ReadBytes, WriteBytes         uint64
	Hits, Misses                  uint64
	Bypassed                      uint64 // bytes of misses that were not kept, since they are of a stream or the mode keeps no reads
	WindowHits                    uint64 // of the hits, those in the window
	GhostHits                     uint64 // of the misses, those of what had just left it
	Promoted, Again               uint64 // bytes that were kept because they were hit: from the window, and at the end of the log
	DirectWrites                  uint64 // writes that went to the disk alone
	DirectWriteErrors             uint64 // of those
	WriteLimit                    int64  // bytes a second that writers are held to, since the cache is filling up; 0 for none
	WrittenBack                   uint64
	Ksets, Tried                  uint64        // in the log, and those that write-back has come to
	RoundBytes                    int64         // of the dirty bytes, written but not flushed yet
	Waiting                       int           // requests waiting for space
	LongestWait                   time.Duration // of a request for space

	MemoryErrors, DiskReadErrors, WritebackErrors uint64

	BadSegments []uint32   // not used any more, see badmem.go
	BadPlaces   []BadPlace // the first that were met
	MoreBad     int        // how many others
}

// Status returns the cache's present state. Any goroutine.
func (c *Cache) Status() Status {
	u := c.index.usage()
	flags := c.settings.infoFlags()
	s := Status{
		State:           Healthy,
		Segments:        len(c.segments.all),
		UsedSegments:    c.segments.good() - c.segments.free(),
		WindowSegments:  int(c.window.taken.Load()),
		DataCRC:         c.crc,
		Settings:        c.Settings(),
		InfoFlags:       flags,
		KeyTail:         c.tails.keyTail(),
		DirtyBytes:      u.dirty,
		CleanBytes:      u.clean,
		ZeroBytes:       u.zero,
		Extents:         u.extents,
		IndexBytes:      u.bytes + c.segments.sumBytes() + c.stale.bytes() + c.ghost.bytes(),
		WrittenBack:     c.writeback.written.Load(),
		Tried:           c.writeback.tried.Load(),
		RoundBytes:      c.writeback.inRound.Load(),
		Waiting:         int(c.space.waiting.Load()),
		LongestWait:     c.longestWait(),
		MemoryErrors:    c.errs.memory.Load(),
		DiskReadErrors:  c.errs.diskReads.Load(),
		WritebackErrors: c.errs.rounds.Load(),
		BadSegments:     c.segments.badList(),
	}
	s.WriteLimit = c.brake.writeLimit()
	s.DirectWrites, s.DirectWriteErrors = c.direct.writes.Load(), c.direct.errors.Load()
	s.Promoted, s.Again = c.counts.promoted.Load(), c.counts.again.Load()
	s.KeyHead, s.Ksets = c.journal.head()
	s.DirtyTail, _ = c.tails.dirtyTail()
	for _, q := range c.queues {
		q.shown.Lock()
		s.Reads += q.shown.reads
		s.Writes += q.shown.writes
		s.Flushes += q.shown.flushes
		s.Zeros += q.shown.zeros
		s.ReadBytes += q.shown.readBytes
		s.WriteBytes += q.shown.writeBytes
		s.Hits += q.shown.hits
		s.Misses += q.shown.misses
		s.WindowHits += q.shown.windowHits
		s.GhostHits += q.shown.ghostHits
		s.Bypassed += q.shown.bypassed
		q.shown.Unlock()
	}
	c.badMemory.mu.Lock()
	s.BadPlaces, s.MoreBad = slices.Clone(c.badMemory.mu.places), c.badMemory.mu.more
	degraded := c.badMemory.mu.fault
	c.badMemory.mu.Unlock()
	if f := c.errs.unread.Load(); f != nil {
		degraded = f.err
	}
	c.writeback.mu.Lock()
	degraded = cmp.Or(c.writeback.mu.err, degraded)
	c.writeback.mu.Unlock()
	if h := c.logDamage.Load(); h != nil {
		degraded = h.err
	}
	if degraded != nil {
		s.State, s.Error = Degraded, degraded.Error()
	}
	if err := c.failure(); err != nil {
		s.State, s.Error, s.Cause = Failed, err.Error(), err
	}
	return s
}
