package engine

import (
	"fmt"
	"sync"
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
		err := c.mem.Sync()
		if err != nil {
			err = fmt.Errorf("sync the cache: %w", err)
			c.fail(err)
		}
		if f := c.failed.Load(); f != nil {
			err = f.err
		}
		for _, r := range list {
			r.Err = err
			r.q.post(r)
		}
	}
}
