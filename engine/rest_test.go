package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// dirtied opens a cache that has n MiB to write back, in MiB that are apart.
func dirtied(t *testing.T, disk *backing.Fake, n int64) (*rig, *pmem.Fake) {
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 12, false, 90)
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	for i := range n {
		r.write(t, i<<21, stamped(i<<12, 2048, 1))
	}
	return r, mem
}

// held waits until the disk has so many operations to answer.
func held(t *testing.T, disk *backing.Fake, n int) {
	t.Helper()
	within(t, "a transfer", func() {
		for disk.Held() < n {
			time.Sleep(time.Millisecond)
		}
	})
}

// TestRestBreaksRoundOff: a round that is told to rest ends with the transfers that
// are under way, is not taken for a failure, and is made again after that.
func TestRestBreaksRoundOff(t *testing.T) {
	for name, hold := range map[string]backing.Kind{"writes": backing.OpWrite, "flush": backing.OpFlush} {
		t.Run(name, func(t *testing.T) {
			disk := backing.NewFake(256<<20, 512, 1)
			r, mem := dirtied(t, disk, 48)
			var writes atomic.Int32
			disk.Script(func(op backing.Op) backing.Fault {
				if op.Kind == backing.OpWrite {
					writes.Add(1)
				}
				return backing.Fault{Hold: op.Kind == hold}
			})
			r.Resume()
			flushed := make(chan error, 1)
			go func() { flushed <- r.Flush(t.Context()) }()
			want, underWay := int32(96), 1
			if hold == backing.OpWrite {
				want, underWay = DefaultWritebackDepth, DefaultWritebackDepth
			}
			held(t, disk, underWay)
			_, before := r.tails.dirtyTail()
			rested := make(chan error, 1)
			go func() {
				_, err := r.Rest(t.Context())
				rested <- err
			}()
			if hold == backing.OpWrite {
				within(t, "being told to rest", func() { <-r.workers.stop })
				disk.Release()
			}
			within(t, "resting", func() {
				if err := <-rested; err != nil {
					t.Error(err)
				}
			})
			if n := writes.Load(); n != want {
				t.Errorf("%d transfers, want %d", n, want)
			}
			if _, now := r.tails.dirtyTail(); now != before {
				t.Errorf("dirty_tail has passed %d ksets whose flush was not waited for", now-before)
			}
			if s := r.Status(); s.State != Healthy || s.WritebackErrors > 0 {
				t.Errorf("%v, %q, %d errors", s.State, s.Error, s.WritebackErrors)
			}
			select {
			case err := <-flushed:
				t.Errorf("a flush was answered: %v", err)
			default:
			}
			disk.Script(nil)
			disk.Release()
			r.Resume()
			within(t, "the flush", func() {
				if err := <-flushed; err != nil {
					t.Error(err)
				}
			})
			if s := r.Status(); s.DirtyBytes > 0 {
				t.Errorf("%d bytes are dirty after a flush", s.DirtyBytes)
			}
			r.kill()
			disk.Close()
			_ = mem
		})
	}
}

// TestRestGivesUp: somebody who no longer wants the cache to rest need not wait for
// a disk that hangs, and the cache goes on when that answers, also one that is full.
func TestRestGivesUp(t *testing.T) {
	disk := backing.NewFake(256<<20, 512, 1)
	r, _ := dirtied(t, disk, 48)
	disk.Script(func(op backing.Op) backing.Fault { return backing.Fault{Hold: op.Kind == backing.OpWrite} })
	r.Resume()
	go r.Flush(t.Context())
	held(t, disk, DefaultWritebackDepth)
	for range 3 {
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("the client has gone")
		cancel(gone)
		within(t, "giving up", func() {
			if _, err := r.Rest(ctx); !errors.Is(err, gone) {
				t.Errorf("rested: %v", err)
			}
		})
		r.Resume()
		r.Resume()
	}
	// All but a reserve is taken by then, and writers wait.
	full := make(chan error, 1)
	go func() {
		for i := range int64(240) {
			i %= 120
			if err := r.do(0, &Request{Op: Write, Off: i << 21, Buf: stamped(i<<12, 2048, 2)}); err != nil {
				full <- err
				return
			}
		}
		full <- nil
	}()
	within(t, "filling the cache", func() {
		for r.Status().Waiting == 0 {
			time.Sleep(time.Millisecond)
		}
	})
	disk.Script(nil)
	disk.Release()
	within(t, "making room", func() {
		if err := <-full; err != nil {
			t.Error(err)
		}
	})
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	r.kill()
	disk.Close()
}

// TestRestThenClose: a cache can be closed while its rest is given up.
func TestRestThenClose(t *testing.T) {
	disk := backing.NewFake(256<<20, 512, 1)
	r, mem := dirtied(t, disk, 48)
	disk.Script(func(op backing.Op) backing.Fault { return backing.Fault{Hold: op.Kind == backing.OpWrite} })
	r.Resume()
	go r.Flush(context.Background())
	held(t, disk, DefaultWritebackDepth)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Rest(ctx)
	r.Resume()
	r.leave()
	closed := make(chan error, 1)
	go func() { closed <- r.Close() }()
	<-r.stop
	disk.Script(nil)
	disk.Release()
	within(t, "closing", func() {
		if err := <-closed; err != nil {
			t.Error(err)
		}
	})
	r = newRig(t, mem, disk, 1)
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	for i := range int64(48) {
		if v := r.version(t, i<<12); v != 1 {
			t.Errorf("sector %d has version %d", i<<12, v)
		}
	}
	r.kill()
	disk.Close()
}

// TestDeferredSurvivesRest: what the disk has refused is still known, with its error,
// when a round that was to try it again is broken off.
func TestDeferredSurvivesRest(t *testing.T) {
	disk := backing.NewFake(256<<20, 512, 1)
	r, _ := dirtied(t, disk, 2)
	badBlocks(disk, 10, 1)
	r.Resume()
	if err := r.Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a flush of what the disk refuses: %v", err)
	}
	disk.Script(func(op backing.Op) backing.Fault { return backing.Fault{Hold: op.Kind == backing.OpWrite} })
	go r.Flush(t.Context())
	held(t, disk, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Rest(ctx)
	badBlocks(disk, 10, 1)
	disk.Release()
	if _, err := r.Rest(t.Context()); err != nil {
		t.Error(err)
	}
	if n := len(r.writeback.deferred); n == 0 {
		t.Error("nothing is deferred any more")
	}
	if s := r.Status(); s.State != Degraded {
		t.Errorf("%v", s.State)
	}
	disk.Script(nil)
	r.Resume()
	if err := r.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if s := r.Status(); s.State != Healthy || s.DirtyBytes > 0 {
		t.Errorf("%v, %q, %d dirty bytes", s.State, s.Error, s.DirtyBytes)
	}
	r.kill()
	disk.Close()
}
