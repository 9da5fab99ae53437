package main

import (
	"strconv"
	"time"

	"ublk-pcache/ondisk"
)

// knobs are the settings that a cache keeps on its media, by their names, and how a
// value is written.
var knobs = []struct {
	name string
	text func(*ondisk.Settings) string
}{
	{"mode", func(s *ondisk.Settings) string { return s.Mode.String() }},
	{"dirty_high", func(s *ondisk.Settings) string { return percentText(s.DirtyHigh) }},
	{"dirty_low", func(s *ondisk.Settings) string { return percentText(s.DirtyLow) }},
	{"dirty_max_age", func(s *ondisk.Settings) string { return secondsText(s.DirtyMaxAge) }},
	{"idle_after", func(s *ondisk.Settings) string { return secondsText(s.IdleAfter) }},
	{"writeback_rate", func(s *ondisk.Settings) string { return strconv.FormatInt(s.WritebackRate, 10) }},
	{"writeback", func(s *ondisk.Settings) string { return onOff(s.Writeback) }},
	{"seq_cutoff", func(s *ondisk.Settings) string { return strconv.FormatInt(s.SeqCutoff, 10) }},
}

func percentText(p uint8) string {
	if p == ondisk.DirtyAuto {
		return "auto"
	}
	return strconv.Itoa(int(p))
}

func secondsText(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

// settingTexts returns the values by their names.
func settingTexts(s *ondisk.Settings) map[string]string {
	m := map[string]string{}
	for _, k := range knobs {
		m[k.name] = k.text(s)
	}
	return m
}
