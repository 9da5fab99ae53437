package engine

import (
	"context"
	"fmt"
	"time"

	"ublk-pcache/ondisk"
)

// # Modes
//
// A mode says what is answered when, and what is kept:
//
//	               a write is answered when         a write is kept   a read is kept
//	writeback      it is in the log                 yes               yes
//	writeonly      it is in the log                 yes               no
//	writethrough   the disk has flushed it, too     yes               yes
//	writearound    the disk has flushed it          where something   yes
//	passthrough    the disk has flushed it          is cached there   no
//
// In the last three the disk has all that was answered: the region may be lost, and power
// with it. That is the promise of a clean cache. It needs no FLUSH, since a device on
// a durable region has told its users that it has no volatile cache, and they send none.
//
// Where something is cached, a write goes through the log in every mode, and write-back
// brings it to the disk (through.go). The obvious way, to write to the disk first or at the
// same time, has two writers to one sector: they may come to the disk in another order than
// to the log, and the log then calls the older one clean. Where nothing is cached, a write may go to
// the disk alone (direct.go).
//
// What is cached is served in every mode.
//
// A mode that promises more is obeyed before it is stored: all that is dirty when it begins
// is drained meanwhile, and if that is broken off the old mode was never left. A mode that promises
// less is stored before it is obeyed. So whatever a crash leaves on the media promises
// no more than was kept. A turn of a queue obeys one mode. Who changes it waits for the turns that
// obey the old one, so what they answer is in the log in front of the head that the drain goes up to.

// promisesClean reports whether the disk has all that was answered.
func promisesClean(m ondisk.Mode) bool {
	return m == ondisk.WriteThrough || m == ondisk.WriteAround || m == ondisk.PassThrough
}

// keepsReads reports whether what a miss reads is kept.
func keepsReads(m ondisk.Mode) bool { return m != ondisk.WriteOnly && m != ondisk.PassThrough }

// goesAround reports whether a write may go to the disk alone.
func goesAround(m ondisk.Mode) bool { return m == ondisk.WriteAround || m == ondisk.PassThrough }

// mode returns the mode that is obeyed.
func (s *settings) mode() ondisk.Mode { return ondisk.Mode(s.obeyed.Load()) }

func (c *Cache) obey(m ondisk.Mode) {
	c.settings.obeyed.Store(uint32(m))
	if !promisesClean(m) {
		c.through.release()
	}
}

// prepareMode makes the cache keep what a new mode promises, before that is stored.
func (c *Cache) prepareMode(ctx context.Context, old, wanted ondisk.Mode) error {
	if !promisesClean(wanted) || promisesClean(old) {
		return nil
	}
	err := c.Flush(ctx) // so that few wait for what there is by now
	if err == nil {
		c.obey(ondisk.WriteThrough)
		err = c.drain(ctx)
	}
	if err != nil {
		return fmt.Errorf("write back what mode %v may not leave: %w", wanted, err)
	}
	return nil
}

// awaitTurns returns when no queue commits that has not seen the mode that is obeyed. It takes no
// longer than a commit.
func (c *Cache) awaitTurns() {
	for _, q := range c.queues {
		for q.committing.Load() {
			time.Sleep(time.Microsecond)
		}
	}
}

// drain returns when the disk has all that was answered before writes began to wait for it. What
// one that waits has overwritten is on the disk when that one is, unless it has failed.
func (c *Cache) drain(ctx context.Context) error {
	c.awaitTurns()
	failed, _ := c.through.failures()
	if err := c.Flush(ctx); err != nil {
		return err
	}
	for answered := c.through.registered(); answered != nil; {
		select {
		case <-answered:
			answered = nil
		case <-time.After(lastRetry): // some wait for room, and are not told what keeps them
			if err := c.writeback.hindrance(); err != nil {
				return err
			}
		case <-c.stop:
			return ErrStopped
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if n, err := c.through.failures(); n != failed {
		return err
	}
	return nil
}
