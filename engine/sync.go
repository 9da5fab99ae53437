package engine

import (
	"fmt"
	"sync"

	"ublk-pcache/ondisk"
)

// syncer answers FLUSH and FUA on a region that needs a sync: one sync for all
// that came while the one before was running.
//
// After a sync that failed, nobody knows which pages the kernel still has, and
// a second one would succeed without them. So the first failure is the last
// write of the cache.
type syncer struct {
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
	r.stage = stageSynced
	s.mu.Lock()
	s.mu.list = append(s.mu.list, r)
	s.mu.Unlock()
	s.kick()
}

// markSynced says that the log is durable up to the kset numbered seq, where
// that goes without saying on a region that is Durable. Open, then syncLoop and
// at last Close call it, one after the other.
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
	err := c.mem.Sync()
	if err == nil {
		err = c.markSynced(seq)
	}
	if err != nil {
		return fmt.Errorf("sync the cache: %w", err)
	}
	return nil
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
		err := c.syncLog()
		if err != nil {
			c.fail(err)
		}
		if failed := c.failure(); failed != nil {
			err = failed
		}
		for _, r := range list {
			r.Err = err
			r.q.post(r)
		}
	}
}
