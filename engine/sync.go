package engine

import (
	"fmt"
	"sync"

	"ublk-pcache/ondisk"
)

// # Syncs that fail
//
// A region in the page cache is durable as far as a sync has succeeded. After one
// that failed nobody knows what the file has: the kernel reports the error once,
// and the next sync succeeds without what was lost (pmem/settle.go). So does the
// first one of a server that is started later, and that one is told of no error
// at all. Everything can be read as it was stored until memory is short.
//
// The obvious way, to take no more writes after a failure, is right as long as
// the server lives, and forgotten with it. To note the failure on the media does
// not help: that is the file which takes nothing. So Open does not ask what went
// wrong before. It is known what may be lost: all stores since the last sync that
// succeeded, and the sync mark tells which that was (ondisk/syncmark.go). All of
// that is made durable anew, and then the log is read, as the file has it. If
// that fails, the cache does not open. No request is taken before.
//
// These may be lost:
//
//   - the ksets behind the mark, and the data that their living keys name. The
//     data of a kset in front of it was stored before the kset, so the same sync
//     has it;
//   - the records in front of the segments. Each is found as one of the last
//     stores left it, and a crash may leave any of these;
//   - where there is no mark, all ksets, and the segments' own records: the log is
//     the kernel's, or the file a copy, and nothing tells what was synced.
//
// With a mark the segments' own records are safe: their links never change, a
// generation is durable before a key names it, and where none does it is raised
// once more. All else, such as zeros behind the end of the log, is stored again
// before it counts.
//
// Pages for which memory was too short before that are as the file has them: a
// kset that is lost so ends the log, and so does data if there are checksums,
// as after a power cut.
//
// As long as the server lives there is no other sync. Write-back, which relies on
// them, rests, too; dirty data is saved when the cache is opened again, or read
// offline.

// syncs is how the syncs of the region have gone. A sync is told of a failure
// only if no other has been told before, so one begins when the one before has
// ended.
type syncs struct {
	sync.Mutex // held during a sync
	failed     error
}

// syncer answers FLUSH and FUA on a region that needs a sync: one sync for all
// that came while the one before was running. After the first failure the cache
// takes no more writes.
type syncer struct {
	syncs  syncs
	kicked chan struct{}
	mu     struct {
		sync.Mutex
		list []*Request
	}
}

func (s *syncer) init() { s.kicked = make(chan struct{}, 1) }

func (s *syncer) kick() {
	select {
	case s.kicked <- struct{}{}:
	default:
	}
}

func (s *syncer) add(r *Request) {
	r.stage = stageAnswered
	s.mu.Lock()
	s.mu.list = append(s.mu.list, r)
	s.mu.Unlock()
	s.kick()
}

// sync makes everything durable that was stored before. After an error the cache
// takes no more writes.
func (c *Cache) sync() error {
	s := &c.syncer.syncs
	s.Lock()
	defer s.Unlock()
	if s.failed != nil {
		return s.failed
	}
	if err := c.mem.Sync(); err != nil {
		s.failed = fmt.Errorf("%w: %w", ErrSync, err)
		c.fail(s.failed)
	}
	return s.failed
}

// settle makes durable what is behind the sync mark of a region that is not in use.
// A region without a cache, or with a damaged one, is left for others to report.
func settle(mem Memory) error {
	l, err := ondisk.ReadLayout(mem, mem.Size())
	if err != nil {
		return nil
	}
	u := unsynced{l: l, pages: map[uint32]*segmentPages{}, found: l.SyncMark == 0}
	end, _ := l.WalkLog(mem, l.KeyTail, u.kset)
	if end.Damage != nil {
		// Replay and repair judge the damage by the ksets behind it, too.
		u.add(end.Pos.Seg, end.Pos.Off, ondisk.SegmentData-end.Pos.Off)
	}
	return mem.Settle(u.ranges)
}

// unsynced gets the pages that no sync is known to cover.
type unsynced struct {
	l     *ondisk.Layout
	found bool                     // the mark has been passed
	pages map[uint32]*segmentPages // by cache_seg_id
}

// segmentPages has a bit for each page of a segment.
type segmentPages [ondisk.SegmentSize / pageBytes / 64]uint64

// pageBytes is how much is stored again at least.
const pageBytes = 4 << 10

func (u *unsynced) kset(at ondisk.Position, k *ondisk.Kset) error {
	u.found = u.found || k.Seq == 0 || ondisk.SeqAfter(k.Seq, u.l.SyncMark)
	if !u.found {
		return nil
	}
	u.add(at.Seg, at.Off, k.Size())
	for i := range k.Keys {
		if key := &k.Keys[i]; key.Gen == u.l.Gens[key.Seg] {
			u.add(key.Seg, key.SegOff, key.Len)
		}
	}
	return nil
}

// add adds n bytes at off of a segment's data.
func (u *unsynced) add(seg, off, n uint32) {
	pages := u.pages[seg]
	if pages == nil {
		pages = new(segmentPages)
		u.pages[seg] = pages
	}
	off += ondisk.SegmentHeader
	first := off / pageBytes
	for word, mask := range sectorMasks(uint(first), uint((off+n-1)/pageBytes-first+1)) {
		pages[word] |= mask
	}
}

// ranges yields them, by segment.
func (u *unsynced) ranges(yield func(off, n int64) bool) {
	if !yield(0, ondisk.SegmentsOff) {
		return
	}
	for seg := range u.l.Chain {
		begin := u.l.Offset(uint32(seg), 0) - ondisk.SegmentHeader
		if u.l.SyncMark == 0 && !yield(begin, ondisk.SegmentHeader) {
			return
		}
		pages := u.pages[uint32(seg)]
		if pages == nil {
			continue
		}
		for page := int64(0); page < ondisk.SegmentSize/pageBytes; page++ {
			n := int64(0)
			for page+n < ondisk.SegmentSize/pageBytes && pages[(page+n)/64]>>((page+n)%64)&1 != 0 {
				n++
			}
			if n > 0 && !yield(begin+page*pageBytes, n*pageBytes) {
				return
			}
			page += n
		}
	}
}

// markSynced says that the log is durable up to the kset numbered seq. On a
// region that is Durable it does nothing. Open, then syncLoop and at last Close
// call it, one after the other.
func (c *Cache) markSynced(seq uint64) error {
	if c.mem.Durable() {
		return nil
	}
	at := c.layout.SyncMarkCopies.Newest.Next()
	var buf [ondisk.SyncMarkSize]byte
	off := ondisk.EncodeSyncMark(buf[:], at, seq)
	if err := c.storeRecord("sync mark", noSegment, buf[:], off); err != nil {
		return err
	}
	c.layout.SyncMarkCopies.Newest = at
	return nil
}

// syncLog makes everything durable that is in the log, and says so.
func (c *Cache) syncLog() error {
	seq := c.journal.last()
	if err := c.sync(); err != nil {
		return err
	}
	return c.markSynced(seq)
}

func (c *Cache) syncLoop() {
	for {
		select {
		case <-c.syncer.kicked:
		case <-c.stop:
			return
		}
		c.syncer.mu.Lock()
		list := c.syncer.mu.list
		c.syncer.mu.list = nil
		c.syncer.mu.Unlock()
		if c.failure() == nil {
			if err := c.syncLog(); err != nil {
				c.fail(err)
			}
		}
		err := c.failure()
		for _, r := range list {
			r.Err = err
			r.q.post(r)
		}
	}
}
