package engine

import (
	"math"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestManyKeysOfOneSegment: any number of keys may name one run of zeros, and a log
// has room for more than 31 bits count. Their segment is neither taken for free nor
// for one without end, also where all of them are dropped at once.
func TestManyKeysOfOneSegment(t *testing.T) {
	const more = math.MaxUint32
	mem := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, mem, 6, false, 70)
	disk := backing.NewFake(64<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	r.mustRest(t)
	for i := range int64(3) {
		r.zero(t, i<<20, 1<<20)
	}
	seg := r.extents(0, 1)[0].seg
	s := &r.segments.all[seg]
	refs := s.refs.Load()
	// As many keys again in the log, which would be 172 GB.
	s.refs.Add(more)
	r.journal.mu.named[seg] += more
	r.zero(t, 3<<20, 1<<20)
	if n := s.refs.Load(); n != refs+more+1 {
		t.Errorf("%d references", n)
	}
	// None of them can be read: all but those of the keys behind are hidden.
	head, _ := r.journal.head()
	dropped, damage := r.forgetHidden(head)
	if damage != nil || len(dropped) != 1 || dropped[0] != (references{seg, 4 + more}) {
		t.Fatalf("hidden are %v, %v", dropped, damage)
	}
	r.journal.passed(r.tails.keyTail(), dropped)
	if n := r.journal.mu.named[seg]; n != 0 {
		t.Errorf("%d keys name the segment after all were passed", n)
	}
	r.dropAll(dropped[0])
	// What is left is the queue's, for the segment and its zeros.
	if n := s.refs.Load(); n != refs+1-4 {
		t.Errorf("%d references are left of %d", n, refs)
	}
	if len(r.gc.mu.dying) > 0 {
		t.Errorf("%v are dying", r.gc.mu.dying)
	}
	r.kill()
}
