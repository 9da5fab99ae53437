package engine

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"ublk-pcache/ondisk"
)

// A cache can change hands while it is in use: from the server that serves it
// to another process, which maps the same region. Nobody may notice more than
// a pause, and the pause must not grow with the cache, as a replay does.
//
// The obvious way is to close the cache and to open it again. Time goes then
// into reading the log, to find out where it ends, and into waiting for the
// disk: for write-back to finish, for a flush, for the fingerprint. None of
// that needs the requests to stop. It only needs the media to stay as they were
// read, and that is a matter of write-back and garbage collection alone: while
// they rest, the log grows at its head and nothing else on the media changes
// but free space. So:
//
//	the old server                        the new one
//	Rest: the log only grows from here
//	                                      Follow: replay up to that head
//	its queues end, wherever they are
//	Retire: this is the last head
//	                                      TakeOver: replay the rest, go on
//
// The segments that are bad go with the last head, since the log does not tell
// them.
//
// Requests under way when the queues end are not answered; their client gives
// them again. Up to Retire the old server may change its mind and Resume, since
// Follow stores nothing. From there on, and until TakeOver has returned, the
// cache is that of a server that was killed: Open finds everything.
//
// Invariant: between Rest and Resume nothing that replay starts from changes: no
// generation, neither tail, no fingerprint, no setting, nothing on the disk. The sync mark
// does, since flushes go on.

// Head is the end of the log.
type Head struct {
	Pos ondisk.Position
	Seq uint64 // of the kset to be written there
}

// Retired is what a cache leaves to the one that follows it.
type Retired struct {
	Head
	Bad   []uint32 // segments with bad memory
	Doubt bool     // the disk may forget what it shows where the fingerprint looks
}

func (j *journal) end() Head {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Head{j.mu.head, j.mu.seq}
}

// workers are the loops that make room, garbage collection and write-back.
type workers struct {
	stop    chan struct{} // closed to stop them; replaced only while none runs
	running sync.WaitGroup
	mu      struct {
		sync.Mutex
		resting bool
		ended   chan struct{} // closed when they have come to rest
		resume  bool          // they go on as soon as they have
	}
}

// Rest stops garbage collection and write-back, and returns the log's head.
// Requests go on; those that need room wait for Resume, which is to be called
// after an error, too. A round of write-back is broken off: Rest waits for the
// transfers under way, but only until ctx ends. Rest can be called again, to
// learn whether the cache has failed since. Any goroutine.
func (c *Cache) Rest(ctx context.Context) (Head, error) {
	err := c.rest(ctx)
	if err == nil {
		err = c.failure()
	}
	if err == nil {
		// Where the region needs a sync, most of the one in TakeOver is done here.
		err = c.sync()
	}
	return c.journal.end(), err
}

func (c *Cache) rest(ctx context.Context) error {
	ended := c.tellToRest()
	select {
	case <-ended:
		return nil // also if ctx has ended
	default:
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the backing device has not answered yet: %w", context.Cause(ctx))
	}
}

// tellToRest tells the workers to rest, and returns what is closed when they do.
func (c *Cache) tellToRest() (ended <-chan struct{}) {
	w := &c.workers
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.resume = false
	if !w.mu.resting {
		w.mu.resting, w.mu.ended = true, make(chan struct{})
		c.settings.rest(true)
		close(w.stop)
		go c.awaitRest()
	}
	return w.mu.ended
}

func (c *Cache) awaitRest() {
	w := &c.workers
	w.running.Wait()
	c.restDirect()
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.mu.ended)
	if w.mu.resume {
		c.workLocked()
	}
}

// Resume ends a rest, or one that has not come about.
func (c *Cache) Resume() {
	w := &c.workers
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.mu.resting {
		return
	}
	select {
	case <-w.mu.ended:
		c.workLocked()
	default:
		w.mu.resume = true
	}
}

func (c *Cache) workLocked() {
	w := &c.workers
	w.mu.resting = false
	c.settings.rest(false)
	c.direct.set(&c.direct.mu.resting, false)
	w.stop = make(chan struct{})
	w.running.Go(c.gcLoop)
	w.running.Go(c.writebackLoop)
	c.gc.kick() // for those who have come to wait
}

// Retire ends a cache at rest for the one that follows it. The queues must have
// ended; requests may be under way. Nothing of the cache may be used afterwards.
// With an error nobody may follow: a sync that failed would not fail again.
func (c *Cache) Retire() (Retired, error) {
	close(c.stop)
	c.running.Wait()
	return Retired{c.journal.end(), c.segments.badList(), c.fingerprint.doubtful(c.flushes.failed.Load())}, c.failure()
}

// Follower is a cache that is still another's.
type Follower struct {
	c      *Cache
	r      *replayer
	at     ondisk.Position
	walker ondisk.Walker
}

// Follow reads the cache in mem, which another process serves and has at rest,
// with its log up to head. It stores nothing.
func Follow(mem Memory, disk Disk, o Options, head Head) (*Follower, error) {
	c, err := newCache(mem, disk, o)
	if err != nil {
		return nil, err
	}
	f := &Follower{c: c, r: newReplayer(c), at: c.layout.KeyTail}
	f.r.live = true
	if err := f.advance(head.Pos); err != nil {
		return nil, err
	}
	if err := c.compareDisk(Refuse, f.r.foreign); err != nil {
		return nil, err
	}
	if c.fingerprint.outdated {
		return nil, ErrChanged
	}
	c.readDisk()
	return f, nil
}

// advance replays the log up to a place that it came through.
func (f *Follower) advance(to ondisk.Position) (err error) {
	damage := f.c.walk(&f.walker, f.at, to, func(k *ondisk.Kset, after ondisk.Position) bool {
		err = f.r.kset(f.at, k)
		f.at = after
		return err == nil
	})
	f.r.index.finish()
	if damage != nil {
		err = damage
	}
	if err != nil {
		return fmt.Errorf("replay up to %v: %w", to, err)
	}
	return f.r.enterSums()
}

// TakeOver makes the cache this process's own, when the one that had it has
// retired.
func (f *Follower) TakeOver(old Retired) (*Cache, error) {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	if err := f.advance(old.Pos); err != nil {
		return nil, err
	}
	c := f.c
	f.r.logEnds(old.Head)
	if err := f.r.checkSegments(); err != nil {
		return nil, err
	}
	c.heal()
	for _, seg := range old.Bad {
		if int(seg) < len(c.segments.all) {
			c.retire(seg)
		}
	}
	f.r.sortSegments()
	if old.Doubt {
		c.fingerprint.now, c.fingerprint.doubt = ondisk.Fingerprint{}, true
	}
	if err := c.firstFingerprint(); err != nil {
		return nil, err
	}
	if err := c.persist(); err != nil {
		return nil, err
	}
	if !c.mem.Durable() {
		// Of the sync marks stored since Follow the last must be known, or it
		// would stay the newest.
		now, err := ondisk.ReadLayout(c.mem, c.mem.Size())
		if err != nil {
			return nil, err
		}
		c.layout.SyncMark, c.layout.SyncMarkCopies = now.SyncMark, now.SyncMarkCopies
	}
	if err := c.markSynced(ondisk.PrevSeq(old.Seq)); err != nil {
		c.fail(err)
	}
	c.start()
	return c, nil
}
