package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"ublk-pcache/ondisk"
)

// Settings are what can be changed while a cache is used. Each has effect at once,
// and after a restart.
type Settings struct {
	ondisk.Settings
	GCPercent int // 0 to ondisk.MaxGCPercent: how full garbage collection lets the cache become
}

// settings are stored before they count. They are in two records, since the kernel
// knows one of them.
type settings struct {
	now      atomic.Pointer[Settings] // what counts; nobody changes what it points to
	obeyed   atomic.Uint32            // the mode, which counts before it is stored, see mode.go
	changing chan struct{}            // has room while nobody changes any
	mu       struct {
		sync.Mutex // held over stores and syncs
		resting    bool
		info       ondisk.Info
		infoAt     ondisk.Replica
		at         ondisk.Replica
		lacking    int // copies of that which were never written
	}
}

func (s *settings) init(l *ondisk.Layout) {
	s.changing = make(chan struct{}, 1)
	s.mu.info, s.mu.infoAt = l.Info, l.InfoCopies.Newest
	s.mu.at = l.SettingsCopies.Newest
	switch {
	case !l.SettingsCopies.Valid():
		s.mu.lacking = 2
	case slices.Contains(l.SettingsCopies.State[:], ondisk.CopyEmpty):
		s.mu.lacking = 1
	}
	s.now.Store(&Settings{l.Settings, l.Info.Flags.GCPercent()})
	s.obeyed.Store(uint32(l.Settings.Mode))
}

// rest says whether the settings must be left alone.
func (s *settings) rest(resting bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.resting = resting
}

// Settings returns what counts now. Any goroutine.
func (c *Cache) Settings() Settings { return *c.settings.now.Load() }

// infoFlags returns the options of the cache as the kernel's record has them.
func (s *settings) infoFlags() ondisk.InfoFlags {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.info.Flags
}

// Set makes the settings those that change makes of the present ones: all, or with an
// error none. For a mode that promises a clean cache it first waits until all that is dirty
// has been written back, or ctx ends. Its error is that of change, of Validate or of
// Flush, what keeps them from being stored, or ErrResting between Rest and
// Resume. A power cut while it runs may leave the gc percentage
// unchanged and the others not, since they are in two records. Any goroutine, one after
// the other.
func (c *Cache) Set(ctx context.Context, change func(*Settings) error) error {
	s := &c.settings
	select {
	case s.changing <- struct{}{}:
	default: // what need not wait does not ask whether anybody waits for it
		select {
		case s.changing <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer func() { <-s.changing }()
	old := *s.now.Load()
	wanted := old
	if err := change(&wanted); err != nil {
		return err
	}
	if err := wanted.Validate(); err != nil {
		return err
	}
	err := c.prepareMode(ctx, old.Mode, wanted.Mode)
	if err == nil {
		err = c.store(old, wanted)
	}
	if err != nil {
		c.obey(old.Mode)
		return err
	}
	c.obey(wanted.Mode)
	c.setBrake()
	c.gc.kick()
	c.writeback.kick()
	return nil
}

// store is the part of Set that changes the media.
func (c *Cache) store(old, wanted Settings) error {
	s := &c.settings
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-c.stop: // the region may be another's by now
		return ErrStopped
	default:
	}
	if s.mu.resting {
		return ErrResting
	}
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	if wanted.Settings != old.Settings {
		if err := c.storeSettingsLocked(wanted.Settings); err != nil {
			return err
		}
	}
	if wanted.GCPercent != old.GCPercent {
		if err := c.storeInfoLocked(s.mu.info.Flags.WithGCPercent(wanted.GCPercent)); err != nil {
			if wanted.Settings != old.Settings {
				err = errors.Join(err, c.storeSettingsLocked(old.Settings))
			}
			return err
		}
	}
	s.now.Store(&wanted)
	return nil
}

// Validate returns nil for settings that a cache can have, and otherwise
// ondisk.ErrSettings.
func (s *Settings) Validate() error {
	switch err := s.Settings.Validate(); {
	case err != nil:
		return err
	case s.GCPercent < 0 || s.GCPercent > ondisk.MaxGCPercent:
		return fmt.Errorf("%w: gc_percent %d is not within 0 to %d", ondisk.ErrSettings, s.GCPercent, ondisk.MaxGCPercent)
	}
	return nil
}

// storeSettingsLocked stores the record of this program, durably, in both copies if there
// was none. Then one is enough to count: where memory does not take the other, the loss
// of the one is still noticed.
func (c *Cache) storeSettingsLocked(rec ondisk.Settings) error {
	s := &c.settings
	for i := range max(1, s.mu.lacking) {
		at := s.mu.at.Next()
		var buf [ondisk.SettingsSize]byte
		off := ondisk.EncodeSettings(buf[:], at, &rec)
		switch err := c.storeRecord("settings", noSegment, buf[:], off); {
		case err != nil && i > 0:
			return nil // noted as bad memory; the next store is refused
		case err != nil:
			return err
		}
		if err := c.persist(); err != nil {
			return fmt.Errorf("write the settings: %w", err)
		}
		s.mu.at, s.mu.lacking = at, max(0, s.mu.lacking-1)
	}
	return nil
}

// healSettings writes the copy that a first store did not come to. Where that fails, it is
// noted as bad memory, or the cache has failed.
func (c *Cache) healSettings() {
	s := &c.settings
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.lacking == 1 {
		c.storeSettingsLocked(s.now.Load().Settings)
	}
}

// storeInfoLocked stores the kernel's record, durably.
func (c *Cache) storeInfoLocked(flags ondisk.InfoFlags) error {
	s := &c.settings
	info, at := s.mu.info, s.mu.infoAt.Next()
	info.Flags = flags
	var buf [ondisk.InfoSize]byte
	off := ondisk.EncodeInfo(buf[:], at, info)
	if err := c.storeRecord("cache_info", noSegment, buf[:], off); err != nil {
		return err
	}
	if err := c.persist(); err != nil {
		return fmt.Errorf("write cache_info: %w", err)
	}
	s.mu.info, s.mu.infoAt = info, at
	return nil
}
