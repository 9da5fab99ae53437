package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"ublk-pcache/engine"
	"ublk-pcache/internal/bytesize"
	"ublk-pcache/ondisk"
)

// A knob is a setting that can be changed while the cache is used: by set, by an option of
// add, and by a line of a service's file, with - or _ in its name. parse and text agree:
// what status and dump print is what set takes.
type knob struct {
	name    string
	help    string
	choices []string                                     // all that it can be; none for a number
	parse   func(s *engine.Settings, value string) error // its error says what to give
	text    func(s *engine.Settings) string              // nil: it is no setting of the cache, but of its server
}

// modes are in the order of what they promise.
var modes = []struct {
	mode ondisk.Mode
	does string
}{
	{ondisk.WriteBack, "a write is answered when PMEM has it; BACKING gets it later"},
	{ondisk.WriteOnly, "the same, but what is read from BACKING is not kept"},
	{ondisk.WriteThrough, "a write is answered when BACKING has it and has flushed it"},
	{ondisk.WriteAround, "the same; it is kept only where something is cached already"},
	{ondisk.PassThrough, "the same as writearound, and what is read is not kept either"},
}

func modeNames() (names []string) {
	for _, m := range modes {
		names = append(names, m.mode.String())
	}
	return names
}

// anyOf is a list of which one is to be given.
func anyOf(choices []string) string {
	last := len(choices) - 1
	return strings.Join(choices[:last], ", ") + " or " + choices[last]
}

var knobs = []knob{
	{
		"mode", "what a write waits for and what is kept: " + anyOf(modeNames()), modeNames(),
		func(s *engine.Settings, value string) (err error) {
			if s.Mode, err = ondisk.ParseMode(value); err != nil {
				return fmt.Errorf("give %s", anyOf(modeNames()))
			}
			return nil
		},
		func(s *engine.Settings) string { return s.Mode.String() },
	},
	{
		"gc_percent", "how full garbage collection lets the cache become, 0 to 90", nil,
		func(s *engine.Settings, value string) (err error) {
			s.GCPercent, err = wholePercent(value, 0)
			return err
		},
		func(s *engine.Settings) string { return strconv.Itoa(s.GCPercent) },
	},
	{
		"dirty_high", "percent of the cache at which write-back begins, 1 to 90, or auto", nil,
		func(s *engine.Settings, value string) (err error) {
			s.DirtyHigh, err = dirtyPercent(value, 1)
			return err
		},
		func(s *engine.Settings) string { return dirtyText(s.DirtyHigh) },
	},
	{
		"dirty_low", "percent to which it goes on then, 0 to dirty_high, or auto", nil,
		func(s *engine.Settings, value string) (err error) {
			s.DirtyLow, err = dirtyPercent(value, 0)
			return err
		},
		func(s *engine.Settings) string { return dirtyText(s.DirtyLow) },
	},
	{
		"dirty_max_age", "seconds after which dirty data is written back however busy writers are, 0 for never", nil,
		func(s *engine.Settings, value string) (err error) {
			s.DirtyMaxAge, err = seconds(value)
			return err
		},
		func(s *engine.Settings) string { return secondsText(s.DirtyMaxAge) },
	},
	{
		"idle_after", "seconds without a write after which all is written back, 0 for never", nil,
		func(s *engine.Settings, value string) (err error) {
			s.IdleAfter, err = seconds(value)
			return err
		},
		func(s *engine.Settings) string { return secondsText(s.IdleAfter) },
	},
	{
		"writeback_rate", "bytes per second that are written back at most while nobody waits for it, such as 20M, 0 for no limit", nil,
		func(s *engine.Settings, value string) (err error) {
			s.WritebackRate, err = bytesOf(value)
			return err
		},
		func(s *engine.Settings) string { return strconv.FormatInt(s.WritebackRate, 10) },
	},
	{
		"writeback", "on, or off: only what somebody waits for is written back", []string{onOff(true), onOff(false)},
		func(s *engine.Settings, value string) error {
			if value != "on" && value != "off" {
				return errors.New("give on or off")
			}
			s.Writeback = value == "on"
			return nil
		},
		func(s *engine.Settings) string { return onOff(s.Writeback) },
	},
	{
		"seq_cutoff", "bytes from which on a stream of reads is not kept, such as 4M, 0 for never", nil,
		func(s *engine.Settings, value string) (err error) {
			s.SeqCutoff, err = bytesOf(value)
			return err
		},
		func(s *engine.Settings) string { return strconv.FormatInt(s.SeqCutoff, 10) },
	},
	{
		logLevelName, "what the server logs: " + anyOf(logLevels) + ", each with all that follow it", logLevels,
		func(_ *engine.Settings, value string) error {
			if !slices.Contains(logLevels, value) {
				return fmt.Errorf("give %s", anyOf(logLevels))
			}
			return nil
		},
		nil,
	},
}

// logLevelName names the setting that the state file has and not the media: it is about the
// server, and must not outlive the device.
const logLevelName = "log_level"

// kept says for how long a setting is.
func (k *knob) kept() string {
	if k.text == nil {
		return "kept until the device is removed; info unless given"
	}
	return "kept on the media; as it is unless given"
}

func wholePercent(value string, least int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > ondisk.MaxGCPercent {
		return 0, fmt.Errorf("give %d to %d", least, ondisk.MaxGCPercent)
	}
	return n, nil
}

func dirtyPercent(value string, least int) (uint8, error) {
	if value == "auto" {
		return ondisk.DirtyAuto, nil
	}
	n, err := wholePercent(value, least)
	if err != nil {
		return 0, fmt.Errorf("%w, or auto", err)
	}
	return uint8(n), nil
}

func dirtyText(p uint8) string {
	if p == ondisk.DirtyAuto {
		return "auto"
	}
	return strconv.Itoa(int(p))
}

func seconds(value string) (time.Duration, error) {
	const most = int64(ondisk.MaxSettingTime / time.Second)
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < 0 || n > most {
		return 0, fmt.Errorf("give 0 to %d seconds", most)
	}
	return time.Duration(n) * time.Second, nil
}

func secondsText(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

func bytesOf(value string) (int64, error) {
	n, err := bytesize.Parse(value)
	if err != nil {
		return 0, errors.New("give bytes, such as 4194304, 4M or 4MiB, or 0")
	}
	return n, nil
}

// knobNamed returns the setting of that name, nil if there is none.
func knobNamed(name string) *knob {
	i := slices.IndexFunc(knobs, func(k knob) bool { return dashes(k.name) == dashes(name) })
	if i < 0 {
		return nil
	}
	return &knobs[i]
}

// values are new settings, as they were written, by their names.
type values map[string]string

// parse reads what set is given: NAME=VALUE, each name once.
func (v values) parse(args []string) error {
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		k := knobNamed(name)
		switch {
		case k == nil:
			return fmt.Errorf("no setting %.40q: there are %s", name, knobNames())
		case !ok:
			return fmt.Errorf("%s has no value: give %s=VALUE", k.name, k.name)
		}
		if _, again := v[k.name]; again {
			return fmt.Errorf("%s is given twice: give it once", k.name)
		}
		v[k.name] = value
	}
	var s engine.Settings
	return v.change(&s)
}

// change makes the new settings part of s. It does not judge what they are together.
func (v values) change(s *engine.Settings) error {
	if len(v) == 0 {
		return fmt.Errorf("nothing to set: there are %s", knobNames())
	}
	for name := range v {
		if k := knobNamed(name); k == nil || k.name != name {
			return fmt.Errorf("no setting %.40q: there are %s", name, knobNames())
		}
	}
	for _, k := range knobs {
		value, given := v[k.name]
		if !given {
			continue
		}
		if err := k.parse(s, value); err != nil {
			return fmt.Errorf("%s=%.40s: %w", k.name, value, err)
		}
	}
	return nil
}

// apart returns the values without the one of a name, and that.
func (v values) apart(name string) (others, one values) {
	others = maps.Clone(v)
	if value, given := v[name]; given {
		delete(others, name)
		one = values{name: value}
	}
	return others, one
}

func knobNames() string {
	var names []string
	for _, k := range knobs {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// textsOf are the settings of a cache as values.
func textsOf(s *engine.Settings) values {
	v := values{}
	for _, k := range knobs {
		if k.text != nil {
			v[k.name] = k.text(s)
		}
	}
	return v
}

// line is all of them, in the order of knobs.
func (v values) line() string {
	var words []string
	for _, k := range knobs {
		if value, has := v[k.name]; has {
			words = append(words, k.name+"="+value)
		}
	}
	return strings.Join(words, " ")
}

// changes returns those of the values that differ from what they were, and what that was.
func (v values) changes(was values) (from, to values) {
	from, to = values{}, values{}
	for name, value := range v {
		if was[name] != value {
			from[name], to[name] = was[name], value
		}
	}
	return from, to
}
