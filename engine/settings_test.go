package engine

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// set changes the settings.
func set(t testing.TB, c *Cache, change func(*Settings)) {
	t.Helper()
	if err := c.Set(context.Background(), func(s *Settings) error { change(s); return nil }); err != nil {
		t.Fatal(err)
	}
}

// TestSettingsStay: what was set counts at once, and for the next server.
func TestSettingsStay(t *testing.T) {
	m := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, m, 8, false, 70)
	disk := deadDisk(t)
	c := open(t, m, disk)
	if got := c.Settings(); got != (Settings{ondisk.DefaultSettings(), 70}) {
		t.Errorf("a new cache has %+v", got)
	}
	want := Settings{ondisk.DefaultSettings(), 35}
	want.DirtyHigh, want.DirtyLow, want.DirtyMaxAge, want.SeqCutoff, want.Writeback = 30, 20, time.Hour, 0, false
	set(t, c, func(s *Settings) { *s = want })
	for round := range 3 {
		if got := c.Settings(); got != want || c.Status().Settings != want {
			t.Errorf("opened %d times: %+v, want %+v", round+1, got, want)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		l, err := ondisk.ReadLayout(m, m.Size())
		if err != nil || l.SettingsCopies.State != [2]ondisk.CopyState{ondisk.CopyValid, ondisk.CopyValid} {
			t.Errorf("copies are %v, %v", l.SettingsCopies.State, err)
		}
		if round == 1 { // as if the first store had been cut off
			m.Zero(512+2<<10*int64(l.SettingsCopies.Newest.Slot^1), ondisk.SettingsSize)
		}
		c = open(t, m, disk)
	}
	c.Close()
}

// TestSettingsAllOrNone: one that is refused, or cannot be stored, leaves all as they were.
func TestSettingsAllOrNone(t *testing.T) {
	m := pmem.NewFake(ondisk.MinSize)
	formatSmall(t, m, 8, false, 70)
	disk := deadDisk(t)
	c := open(t, m, disk)
	old := c.Settings()
	refused := errors.New("refused")
	for name, x := range map[string]struct {
		change func(*Settings) error
		want   error
	}{
		"the caller":  {func(s *Settings) error { s.IdleAfter = 0; return refused }, refused},
		"no mode":     {func(s *Settings) error { s.IdleAfter, s.Mode = 0, 9; return nil }, ondisk.ErrSettings},
		"gc_percent":  {func(s *Settings) error { s.IdleAfter, s.GCPercent = 0, 91; return nil }, ondisk.ErrSettings},
		"gc_percent-": {func(s *Settings) error { s.IdleAfter, s.GCPercent = 0, -1; return nil }, ondisk.ErrSettings},
		"dirty_low":   {func(s *Settings) error { s.GCPercent, s.DirtyHigh, s.DirtyLow = 50, 20, 30; return nil }, ondisk.ErrSettings},
	} {
		if err := c.Set(context.Background(), x.change); !errors.Is(err, x.want) || c.Settings() != old {
			t.Errorf("%s: %v, %+v", name, err, c.Settings())
		}
	}
	both := func(s *Settings) error { s.IdleAfter, s.GCPercent = 0, 50; return nil }
	l := c.layout
	for _, c2 := range []struct {
		name string
		off  int64
	}{
		{"settings", 512 + 2<<10}, // the first copy goes to slot 1
		{"cache_info", ondisk.InfoOff + 4<<10*int64(l.InfoCopies.Newest.Slot^1)},
	} {
		name, off := c2.name, c2.off
		m.Poison(off, 8)
		if err := c.Set(context.Background(), both); err == nil || c.Settings() != old {
			t.Errorf("%s cannot be stored: %v, %+v", name, err, c.Settings())
		}
		if l, err := ondisk.ReadLayout(m, m.Size()); err != nil || l.Settings != old.Settings || l.Info.Flags.GCPercent() != old.GCPercent {
			t.Errorf("%s cannot be stored: %+v, %v on the media", name, l.Settings, err)
		}
		m.Mend()
		m.Zero(off, 8)
	}
	if err := c.Set(context.Background(), both); err != nil {
		t.Error(err)
	}
	c.Close()
}

// TestSettingsPowerCut cuts the power at every store and fence of a change, with the words
// in flight kept or lost: the settings are the old ones or the new ones, and once Set has
// returned the new ones.
func TestSettingsPowerCut(t *testing.T) {
	for _, durable := range []bool{true, false} {
		disk := deadDisk(t)
		from := pmem.NewFake(ondisk.MinSize)
		formatSmall(t, from, 8, true, 70)
		m := newRecorder(from, 0, durable)
		c, err := Open(m, fakeDisk{disk}, Options{Queues: 1, Log: &testLog{}})
		if err != nil {
			t.Fatal(err)
		}
		dice := rand.New(rand.NewPCG(1, 2))
		old, next, states := c.Settings(), c.Settings(), 0
		look := func(returned bool) {
			s := &snapshot{}
			m.freeze(func(now moment) { s.moment = now })
			for _, choice := range s.choices(dice, 200) {
				region, _ := s.leave(choice)
				l, err := ondisk.ReadLayout(region, region.Size())
				gc := l.Info.Flags.GCPercent()
				if err != nil || l.Settings != next.Settings && (returned || l.Settings != old.Settings) || gc != next.GCPercent && (returned || gc != old.GCPercent) {
					t.Fatalf("durable %t, returned %t: %+v, gc %d, %v; old %+v, new %+v", durable, returned, l.Settings, gc, err, old, next)
				}
				states++
			}
		}
		m.hook = func(event) { look(false) }
		for i := range 6 {
			next.DirtyHigh, next.SeqCutoff, next.WritebackRate, next.GCPercent = uint8(10+i), int64(i)<<40|512, 1<<45-int64(i), 50+i
			next.Writeback, next.IdleAfter = !next.Writeback, time.Duration(i)*time.Hour
			set(t, c, func(s *Settings) { *s = next })
			look(true)
			old = next
		}
		m.hook = func(event) {}
		c.Close()
		if states < 1000 {
			t.Errorf("durable %t: only %d states", durable, states)
		}
	}
}
