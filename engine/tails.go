package engine

import (
	"fmt"
	"sync"
	"ublk-pcache/ondisk"
)

// Tails only move forward, and durably before anybody relies on it. Each has two copies on
// media, of which the older is written.

// tails are the two positions that only move forward: the log begins at
// key_tail and is on the disk up to dirty_tail.
type tails struct {
	mu struct {
		sync.Mutex
		key, dirty     ondisk.Position
		keyAt, dirtyAt ondisk.Replica
		// cleaned counts the ksets that dirty_tail has passed, as
		// journal.mu.written counts those in front of the head.
		cleaned uint64
	}
}

func (t *tails) init(l *ondisk.Layout) {
	t.mu.key, t.mu.keyAt = l.KeyTail, l.KeyTailCopies.Newest
	t.mu.dirty, t.mu.dirtyAt = l.DirtyTail, l.DirtyTailCopies.Newest
}

func (t *tails) keyTail() ondisk.Position {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.key
}

func (t *tails) dirtyTail() (pos ondisk.Position, cleaned uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.dirty, t.mu.cleaned
}

// storeTail writes a tail over the older of its copies. It does not persist.
func (c *Cache) storeTail(t ondisk.Tail, at ondisk.Replica, pos ondisk.Position) error {
	var buf [ondisk.PositionSize]byte
	off := ondisk.EncodePosition(buf[:], t, at, pos)
	return c.storeRecord(t.String(), noSegment, buf[:], off)
}

// moveDirtyTail says, durably, that the disk holds everything before pos. The
// fingerprint of the disk as it is now is durable before that.
func (c *Cache) moveDirtyTail(pos ondisk.Position, ksets uint64) error {
	c.moveFingerprint(pos)
	if err := c.persist(); err != nil {
		return fmt.Errorf("write the fingerprint for dirty_tail: %w", err)
	}
	c.tails.mu.Lock()
	at := c.tails.mu.dirtyAt.Next()
	c.tails.mu.Unlock()
	if err := c.storeTail(ondisk.DirtyTail, at, pos); err != nil {
		return err
	}
	if err := c.persist(); err != nil {
		return fmt.Errorf("write dirty_tail: %w", err)
	}
	c.tails.mu.Lock()
	defer c.tails.mu.Unlock()
	c.tails.mu.dirty, c.tails.mu.dirtyAt = pos, at
	c.tails.mu.cleaned += ksets
	return nil
}

// moveKeyTail takes the ksets before pos out of the log. It does not persist:
// the caller does, before it reuses anything.
func (c *Cache) moveKeyTail(pos ondisk.Position) error {
	c.tails.mu.Lock()
	at := c.tails.mu.keyAt.Next()
	c.tails.mu.Unlock()
	if err := c.storeTail(ondisk.KeyTail, at, pos); err != nil {
		return err
	}
	c.tails.mu.Lock()
	defer c.tails.mu.Unlock()
	c.tails.mu.key, c.tails.mu.keyAt = pos, at
	return nil
}
