package ublk

import "testing"

// TestPace: a thread polls for a client that makes one request after the other,
// and soon no more if there is nothing to be found; it gathers for one that makes
// several.
func TestPace(t *testing.T) {
	var p pace
	for range pollAlone {
		if p.polls() {
			t.Fatal("polls without having seen a client that waits")
		}
		p.turned(1)
	}
	nothing, something := func() bool { return false }, func() bool { return true }
	if !p.polls() || p.gathers() {
		t.Fatal("does not poll for a client that waits, or gathers for it")
	}
	for range 100 {
		if !p.poll(something) || !p.polls() {
			t.Fatal("does not go on polling though it helps")
		}
	}
	polls := 0
	for range 1 << 14 {
		if p.polls() {
			polls++
			p.poll(nothing)
		}
	}
	if polls == 0 || polls > 1<<14>>rarely+rarely {
		t.Errorf("%d polls in vain", polls)
	}
	// One in two is not enough.
	p = pace{alone: pollAlone}
	for i := range 1 << 14 {
		if p.polls() {
			p.poll([]func() bool{nothing, something}[i%2])
		}
	}
	if p.polling.failed < rarely-2 {
		t.Errorf("goes on polling where every other one is in vain: %d", p.polling.failed)
	}
	// Nor would a turn that brings nothing end, if it led to the next.
	p = pace{alone: pollAlone}
	if p.turned(0); p.polls() {
		t.Error("polls after a turn that has brought nothing")
	}
	p.turned(2)
	if p.polls() || !p.gathers() {
		t.Error("polls for a client with several requests, or does not gather for it")
	}
	if p.gathering.went(false); p.gathers() {
		t.Error("gathers again at once when that took too long")
	}
}
