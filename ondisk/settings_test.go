package ondisk

import (
	"bytes"
	"errors"
	"testing"
	"time"
)

var through = Settings{
	Mode: WriteThrough, DirtyHigh: 40, DirtyLow: 10, DirtyMaxAge: time.Hour, IdleAfter: 0,
	WritebackRate: 1 << 20, SeqCutoff: 64 << 10,
}

// TestSettings writes versions of the record, and damages the newest copy.
func TestSettings(t *testing.T) {
	m := formatted(t, FormatOptions{GCPercent: 70, Identity: &Identity{BackingSize: 1 << 30}})
	if l := mustLayout(t, m); l.Settings != DefaultSettings() || l.SettingsCopies.Valid() {
		t.Fatalf("a new cache has the settings %+v", l.Settings)
	}
	for slot := range int64(2) {
		off := settingsOff + slot*identityDistance
		for _, r := range [][2]int64{{IdentityOff, IdentitySize}, {syncMarkOff, SyncMarkSize}, {fingerprintOff, FingerprintSize}} {
			if at := r[0] + slot*identityDistance; off < at+r[1] && at < off+SettingsSize {
				t.Fatalf("copy %d at %d lies on what is at %d", slot, off, at)
			}
		}
	}
	hold := DefaultSettings()
	hold.Writeback = false
	versions := []Settings{through, hold, DefaultSettings(), through}
	var at Replica
	for i := range versions {
		at = at.Next()
		var buf [SettingsSize]byte
		m.WriteAt(buf[:], EncodeSettings(buf[:], at, &versions[i]))
		if l := mustLayout(t, m); l.Settings != versions[i] || l.SettingsCopies.Newest != at {
			t.Errorf("read %+v at %v, want %+v at %v", l.Settings, l.SettingsCopies.Newest, versions[i], at)
		}
	}
	newest, older := settingsOff+int64(at.Slot)*identityDistance, settingsOff+int64(at.Slot^1)*identityDistance
	for _, state := range []CopyState{CopyEmpty, CopyBad, CopyUnreadable} {
		s := m.clone()
		spoilSettings(s, newest, state)
		if l := mustLayout(t, s); l.Settings != versions[2] {
			t.Errorf("newest copy %v: read %+v", state, l.Settings)
		}
		for _, other := range []CopyState{CopyEmpty, CopyBad, CopyUnreadable} {
			s := m.clone()
			spoilSettings(s, newest, state)
			spoilSettings(s, older, other)
			l, err := ReadLayout(s, s.Size())
			if lost := state != CopyEmpty && other != CopyEmpty; lost != errors.Is(err, ErrSettingsLost) || l.Settings != DefaultSettings() {
				t.Errorf("copies %v and %v: %+v, %v", state, other, l.Settings, err)
			}
		}
	}
	if err := Format(m, FormatOptions{GCPercent: 70}); err != nil {
		t.Fatal(err)
	}
	if l := mustLayout(t, m); l.SettingsCopies.Valid() || l.Settings != DefaultSettings() {
		t.Error("a format leaves the settings of the cache before")
	}
}

// spoilSettings leaves the magic of a copy that is bad.
func spoilSettings(s *sparse, off int64, state CopyState) {
	if state == CopyBad {
		off += 16
	}
	spoil(s, off, SettingsSize, state)
}

// TestSettingsOfOthers: a record that only a newer program can have written is refused and
// left alone, one that none writes is refused and repaired, and what is no record is none.
func TestSettingsOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		change func(p []byte)
		want   error
	}{
		"version":      {func(p []byte) { p[16]++ }, ErrSettingsNewer},
		"flag":         {func(p []byte) { p[20] |= 2 }, ErrSettingsNewer},
		"mode":         {func(p []byte) { p[24] = 5 }, ErrSettingsNewer},
		"field, first": {func(p []byte) { p[27] = 1 }, ErrSettingsNewer},
		"field":        {func(p []byte) { p[39] = 1 }, ErrSettingsNewer},
		"field, last":  {func(p []byte) { p[63] = 1 }, ErrSettingsNewer},
		"high":         {func(p []byte) { p[25] = 91 }, ErrSettings},
		"low":          {func(p []byte) { p[26] = 41 }, ErrSettings},
		"age":          {func(p []byte) { p[31] = 0xFF }, ErrSettings},
		"cutoff":       {func(p []byte) { p[48] = 1 }, ErrSettings},
		"magic":        {func(p []byte) { p[8] ^= 1 }, nil},
	} {
		m := formatted(t, FormatOptions{GCPercent: 70})
		for _, at := range bothCopies {
			var p [SettingsSize]byte
			off := EncodeSettings(p[:], at, &through)
			c.change(p[:])
			seal(p[:], at.Seq)
			m.WriteAt(p[:], off)
		}
		l, err := ReadLayout(m, m.Size())
		if !errors.Is(err, c.want) || l.Settings != DefaultSettings() {
			t.Errorf("%s: %v, %+v", name, err, l.Settings)
		}
		rep := Repair(m, m.Size(), RepairOptions{})
		rep.Verify()
		switch c.want {
		case ErrSettingsNewer:
			if h := Survey(m, m.Size(), true); len(rep.Mended) > 0 || rep.Done() || rep.Opens() || h.Harmless || h.Mendable {
				t.Errorf("%s: repair does %q, survey says %+v", name, rep.Mended, h)
			}
		case ErrSettings:
			if !rep.Done() || len(rep.Mended) != 1 || rep.Report.Layout.Settings != DefaultSettings() {
				t.Errorf("%s: repair does %q, %v is left", name, rep.Mended, rep.Left)
			}
		default:
			if len(rep.Mended) > 0 {
				t.Errorf("%s: repair does %q", name, rep.Mended)
			}
		}
	}
}

func TestSettingsValidate(t *testing.T) {
	for name, change := range map[string]func(s *Settings){
		"mode":           func(s *Settings) { s.Mode = 5 },
		"dirty_high":     func(s *Settings) { s.DirtyHigh = 0 },
		"dirty_low":      func(s *Settings) { s.DirtyHigh = 9 },
		"dirty_max_age":  func(s *Settings) { s.DirtyMaxAge = time.Second + 1 },
		"idle_after":     func(s *Settings) { s.IdleAfter = MaxSettingTime + time.Second },
		"writeback_rate": func(s *Settings) { s.WritebackRate = MinWritebackRate - 1 },
		"seq_cutoff":     func(s *Settings) { s.SeqCutoff = -SectorSize },
	} {
		s := through
		change(&s)
		if err := s.Validate(); !errors.Is(err, ErrSettings) || !bytes.Contains([]byte(err.Error()), []byte(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	auto := through
	if auto.DirtyHigh = DirtyAuto; auto.Validate() == nil {
		t.Error("a dirty_low without a dirty_high")
	}
	for _, s := range []Settings{through, DefaultSettings()} {
		if err := s.Validate(); err != nil {
			t.Error(err)
		}
	}
}

func TestParseMode(t *testing.T) {
	for m := WriteBack; m <= PassThrough; m++ {
		if got, err := ParseMode(m.String()); got != m || err != nil {
			t.Errorf("%v: %v, %v", m, got, err)
		}
	}
	for _, name := range []string{"", "write-back", "mode 5", "WRITEBACK"} {
		if _, err := ParseMode(name); !errors.Is(err, ErrSettings) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
