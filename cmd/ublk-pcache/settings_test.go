package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

func defaults() engine.Settings {
	return engine.Settings{Settings: ondisk.DefaultSettings(), GCPercent: ondisk.DefaultGCPercent}
}

// TestKnobs: every field of the settings can be set, and what is printed is what set takes.
func TestKnobs(t *testing.T) {
	given := strings.Fields("mode=passthrough gc-percent=35 dirty_high=30 dirty-low=0 dirty_max_age=7 idle_after=0 writeback_rate=20m writeback=off seq_cutoff=64K")
	want := engine.Settings{GCPercent: 35, Settings: ondisk.Settings{
		Mode: ondisk.PassThrough, DirtyHigh: 30, DirtyMaxAge: 7 * time.Second, WritebackRate: 20 << 20, SeqCutoff: 64 << 10,
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
		"colour=red":                      `no setting "colour": there are mode, gc_percent,`,
		"":                                `no setting ""`,
		"mode=fast":                       "mode=fast: give writeback, writeonly, writethrough, writearound or passthrough",
		"mode=":                           "mode=: give writeback, ",
		"mode=WriteBack":                  "mode=WriteBack: give writeback, ",
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

// TestModesAreExplained: each mode that there is has its line in the help of set.
func TestModesAreExplained(t *testing.T) {
	_, help, _ := strings.Cut(newSetCmd().Long, "The modes.")
	names := 0
	for m := ondisk.Mode(0); ; m++ {
		if _, err := ondisk.ParseMode(m.String()); err != nil {
			break
		}
		names++
		if strings.Count(help, "\n  "+m.String()+"  ") != 1 {
			t.Errorf("the help of set has no line for mode %v:\n%s", m, help)
		}
	}
	if names != 5 {
		t.Errorf("there are %d modes", names)
	}
}

// TestModeOfAdd: add and a service take the mode as set does.
func TestModeOfAdd(t *testing.T) {
	for given, says := range map[string]string{"writethrough": "", "fast": "--mode fast: give writeback, "} {
		var a addOptions
		f := pflag.NewFlagSet("add", pflag.ContinueOnError)
		a.define(f)
		if err := f.Parse([]string{"-p", "/dev/dax0.0", "-b", "/dev/sdb", "--mode", given}); err != nil {
			t.Fatal(err)
		}
		o, err := a.options(f)
		switch {
		case says != "":
			fails(t, err, says)
		case err != nil || o.Settings["mode"] != given || len(o.Settings) != 1:
			t.Errorf("--mode %s: %+v, %v", given, o.Settings, err)
		}
	}
}

func TestApart(t *testing.T) {
	v := values{"mode": "writethrough", "idle_after": "3"}
	others, one := v.apart("mode")
	if len(others) != 1 || others["idle_after"] != "3" || len(one) != 1 || one["mode"] != "writethrough" || len(v) != 2 {
		t.Errorf("%v and %v of %v", others, one, v)
	}
	if others, one := v.apart("gc_percent"); len(others) != 2 || one != nil {
		t.Errorf("%v and %v", others, one)
	}
}
