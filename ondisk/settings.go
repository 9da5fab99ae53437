package ondisk

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// The settings are what a user may change while a cache is used, but for the gc
// percentage, which cache_info has. The kernel's code opens no cache whose
// cache_info says more (dm-pcache up to Linux 7.3 refuses any mode but 0), so they
// have a record of ours in the first 4 KiB, beside the identity record. The kernel
// ignores it, and so leaves it behind when it formats.
//
// A cache without the record has the default settings: it was made by the kernel
// or by an older version, and nobody was promised anything else. But a record that
// was there and is lost is not taken for none. It may have said that nothing is in
// the cache alone (write-through), and who relies on that would lose what the
// cache then keeps from the disk without a word. So such a cache is refused, and
// repair says what it gives up. A record of a version, or with a mode or a bit, that
// is not known here is refused for the same reason, and repair leaves it alone: a
// newer program knows what it means.
//
// The first time both copies are written, each durable before the next. So one
// damaged copy beside one of zeros is a first writing that was cut off, of which
// nobody has been told that it succeeded: none.

const (
	settingsOff     = 1 << 9             // the second copy at identityDistance, like the others
	settingsMagic   = 0x53474e4954544553 // "SETTINGS" in memory order
	settingsVersion = 1

	// SettingsSize is the size in bytes of an encoded settings record: the header,
	// the magic, the version, the flags, the mode, two percentages, two times, two
	// sizes, and zeros.
	SettingsSize = headerSize + 8 + 4 + 4 + 4 + 2*4 + 4 + 2*8 + 8

	settingsHold uint32 = 1 << 0 // of the flags: write-back is held
)

// Mode says when a write is answered and what is kept (engine/mode.go).
type Mode uint8

const (
	// WriteBack answers a write when it is in the cache.
	WriteBack Mode = iota
	// WriteThrough answers a write when the disk has it as well, and has flushed it.
	WriteThrough
	// WriteAround is WriteThrough, and writes to the disk alone where nothing is cached.
	WriteAround
	// WriteOnly is WriteBack, and keeps nothing that is read.
	WriteOnly
	// PassThrough is WriteAround, and keeps nothing that is read. What is cached is served.
	PassThrough
)

var modeNames = []string{"writeback", "writethrough", "writearound", "writeonly", "passthrough"}

func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// ParseMode returns the mode of that name. Its error says which there are.
func ParseMode(name string) (Mode, error) {
	if i := slices.Index(modeNames, name); i >= 0 {
		return Mode(i), nil
	}
	return 0, fmt.Errorf("%w: mode %.40q, there are %s", ErrSettings, name, strings.Join(modeNames, ", "))
}

// Settings of a cache. The zero value is not valid: see DefaultSettings.
type Settings struct {
	Mode Mode

	// DirtyHigh and DirtyLow are percents of the segments: when the log and its data
	// take more than the first, the oldest dirty data is written back until it is all in
	// the youngest part of the log, which is as large as the second says.
	// DirtyAuto is three quarters of the gc percentage, for DirtyLow as much as DirtyHigh.
	DirtyHigh, DirtyLow uint8

	DirtyMaxAge time.Duration // whole seconds until dirty data is written back although writers are busy, 0 for never
	IdleAfter   time.Duration // whole seconds without a write until all is written back, 0 for never

	WritebackRate int64 // bytes per second that are written back at most while nobody waits for it, 0 for no limit
	Writeback     bool  // false: only what somebody waits for is written back
	SeqCutoff     int64 // bytes, whole sectors, from which on a stream of reads is not kept, 0 for never
}

// DirtyAuto in place of a percentage lets the cache choose.
const DirtyAuto = 0xFF

const (
	// MaxDirtyPercent is the largest DirtyHigh: from MaxGCPercent on the collector asks
	// for a round of all that is dirty.
	MaxDirtyPercent = MaxGCPercent
	// MaxSettingTime is the longest time. Who means longer means never.
	MaxSettingTime = 365 * 24 * time.Hour
	// MinWritebackRate is the lowest rate that is one, in bytes per second: with it a
	// transfer of 512 KiB is made every 8 s.
	MinWritebackRate = 64 << 10
	// MaxSettingSize bounds rates and the cutoff, in bytes, so that sums of them
	// do not overflow.
	MaxSettingSize = 1 << 50
)

// DefaultSettings are those of a cache that nobody has given any.
func DefaultSettings() Settings {
	return Settings{
		DirtyHigh: DirtyAuto, DirtyLow: DirtyAuto,
		DirtyMaxAge: 30 * time.Second, IdleAfter: time.Second,
		Writeback: true,
	}
}

// Validate returns nil for settings that make sense; otherwise an ErrSettings that
// names the one that does not, and what it may be.
func (s *Settings) Validate() error {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrSettings, fmt.Sprintf(format, args...))
	}
	badTime := func(d time.Duration) bool { return d < 0 || d > MaxSettingTime || d%time.Second != 0 }
	switch most := int64(MaxSettingTime / time.Second); {
	case int(s.Mode) >= len(modeNames):
		return refuse("mode %d is none", s.Mode)
	case s.DirtyHigh != DirtyAuto && (s.DirtyHigh < 1 || s.DirtyHigh > MaxDirtyPercent):
		return refuse("dirty_high %d is not within 1 to %d", s.DirtyHigh, MaxDirtyPercent)
	case s.DirtyLow != DirtyAuto && s.DirtyHigh == DirtyAuto:
		return refuse("dirty_low %d goes with a dirty_high of 1 to %d", s.DirtyLow, MaxDirtyPercent)
	case s.DirtyLow != DirtyAuto && s.DirtyLow > s.DirtyHigh:
		return refuse("dirty_low %d is above dirty_high %d", s.DirtyLow, s.DirtyHigh)
	case badTime(s.DirtyMaxAge):
		return refuse("dirty_max_age %v is not within 0 to %d seconds", s.DirtyMaxAge, most)
	case badTime(s.IdleAfter):
		return refuse("idle_after %v is not within 0 to %d seconds", s.IdleAfter, most)
	case s.WritebackRate != 0 && (s.WritebackRate < MinWritebackRate || s.WritebackRate > MaxSettingSize):
		return refuse("writeback_rate %d is neither 0 nor within %d to %d bytes per second", s.WritebackRate, MinWritebackRate, int64(MaxSettingSize))
	case s.SeqCutoff < 0 || s.SeqCutoff > MaxSettingSize || s.SeqCutoff%SectorSize != 0:
		return refuse("seq_cutoff %d is not within 0 to %d bytes, in steps of %d", s.SeqCutoff, int64(MaxSettingSize), SectorSize)
	}
	return nil
}

// EncodeSettings writes the copy at of s, which must be valid, into dst, SettingsSize
// bytes.
func EncodeSettings(dst []byte, at Replica, s *Settings) (off int64) {
	dst = dst[:SettingsSize]
	clear(dst)
	le.PutUint64(dst[8:], settingsMagic)
	le.PutUint32(dst[16:], settingsVersion)
	if !s.Writeback {
		le.PutUint32(dst[20:], settingsHold)
	}
	dst[24], dst[25], dst[26] = byte(s.Mode), s.DirtyHigh, s.DirtyLow
	le.PutUint32(dst[28:], uint32(s.DirtyMaxAge/time.Second))
	le.PutUint32(dst[32:], uint32(s.IdleAfter/time.Second))
	le.PutUint64(dst[40:], uint64(s.WritebackRate))
	le.PutUint64(dst[48:], uint64(s.SeqCutoff))
	seal(dst, at.Seq)
	return settingsOff + int64(at.Slot)*identityDistance
}

// decodeSettings reads a record that has the magic. Its error is ErrSettingsNewer, or
// ErrSettings for what no version writes.
func decodeSettings(p []byte) (s Settings, err error) {
	version, flags := le.Uint32(p[16:]), le.Uint32(p[20:])
	switch {
	case version != settingsVersion:
		return s, fmt.Errorf("%w (version %d)", ErrSettingsNewer, version)
	case flags&^settingsHold != 0:
		return s, fmt.Errorf("%w (flags %#x)", ErrSettingsNewer, flags)
	case int(p[24]) >= len(modeNames):
		return s, fmt.Errorf("%w (mode %d)", ErrSettingsNewer, p[24])
	case p[27] != 0 || !isZero(p[36:40]) || !isZero(p[56:SettingsSize]):
		return s, fmt.Errorf("%w (a field behind those that are known)", ErrSettingsNewer)
	}
	s = Settings{
		Mode: Mode(p[24]), DirtyHigh: p[25], DirtyLow: p[26],
		DirtyMaxAge:   time.Duration(le.Uint32(p[28:])) * time.Second,
		IdleAfter:     time.Duration(le.Uint32(p[32:])) * time.Second,
		WritebackRate: int64(le.Uint64(p[40:])), SeqCutoff: int64(le.Uint64(p[48:])),
		Writeback: flags&settingsHold == 0,
	}
	return s, s.Validate()
}
