package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

func defaults() engine.Settings {
	return engine.Settings{Settings: ondisk.DefaultSettings(), GCPercent: ondisk.DefaultGCPercent}
}

// TestKnobs: every field of the settings can be set, and what is printed is what set takes.
func TestKnobs(t *testing.T) {
	given := strings.Fields("gc-percent=35 dirty_high=30 dirty-low=0 dirty_max_age=7 idle_after=0 writeback_rate=20m writeback=off seq_cutoff=64K")
	want := engine.Settings{GCPercent: 35, Settings: ondisk.Settings{
		DirtyHigh: 30, DirtyMaxAge: 7 * time.Second, WritebackRate: 20 << 20, SeqCutoff: 64 << 10,
	}}
	v := values{}
	if err := v.parse(given); err != nil {
		t.Fatal(err)
	}
	got := defaults()
	if err := v.change(&got); err != nil || got != want {
		t.Errorf("%v: %+v", err, got)
	}
	for _, s := range []engine.Settings{want, defaults()} {
		var again engine.Settings
		v := values{}
		if err := v.parse(strings.Fields(textsOf(&s).line())); err != nil {
			t.Fatal(err)
		}
		if err := v.change(&again); err != nil || again != s {
			t.Errorf("%q is read as %+v, %v", textsOf(&s).line(), again, err)
		}
	}
}

// TestKnobsRefused: each in a line that names the setting and says what to give.
func TestKnobsRefused(t *testing.T) {
	for given, want := range map[string]string{
		"colour=red":                      `no setting "colour": there are gc_percent,`,
		"":                                `no setting ""`,
		"gc_percent":                      "gc_percent has no value: give gc_percent=VALUE",
		"gc_percent=91":                   "gc_percent=91: give 0 to 90",
		"dirty_high=0":                    "dirty_high=0: give 1 to 90, or auto",
		"dirty_high=AUTO":                 "dirty_high=AUTO: give 1 to 90, or auto",
		"dirty_low=-1":                    "dirty_low=-1: give 0 to 90, or auto",
		"idle_after=1s":                   "idle_after=1s: give 0 to 31536000 seconds",
		"dirty_max_age=99999999999999999": "give 0 to 31536000 seconds",
		"writeback=":                      "writeback=: give on or off",
		"seq_cutoff=4X":                   "seq_cutoff=4X: give bytes",
		"seq_cutoff=-1":                   "seq_cutoff=-1: give bytes",
		"idle_after=1 gc_percent=10 gc-percent=20": "gc_percent is given twice",
	} {
		err := values{}.parse(strings.Split(given, " "))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", given, err, want)
		}
	}
	for given, want := range map[string]string{
		"dirty_low=20":               "dirty_low 20 goes with a dirty_high of 1 to 90",
		"dirty_high=20 dirty_low=30": "dirty_low 30 is above dirty_high 20",
		"writeback_rate=1K":          "writeback_rate 1024 is neither 0 nor within 65536",
		"seq_cutoff=1000":            "seq_cutoff 1000 is not within",
	} {
		o := serveOptions{Settings: values{}}
		if err := o.Settings.parse(strings.Split(given, " ")); err != nil {
			t.Fatal(err)
		}
		if err := o.checkSettings(defaults()); !errors.Is(err, ondisk.ErrSettings) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", given, err, want)
		}
	}
}
