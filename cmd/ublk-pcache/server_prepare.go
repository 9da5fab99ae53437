package main

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

// plan looks at the region and refuses what does not fit. It returns how to make a
// new cache, nil if there is one. It changes nothing on media.
func (s *server) plan(o *serveOptions) (*ondisk.FormatOptions, error) {
	s.logDoubts()
	layout, err := ondisk.ReadLayout(s.region, s.region.Size())
	if !o.Recover && (err != nil || o.Format) {
		return s.planNew(o)
	}
	if err != nil {
		return nil, s.gone()
	}
	s.chooseQueues(o, len(layout.Chain))
	if crc := layout.Info.Flags.DataCRC(); o.DataCRC != nil && *o.DataCRC != crc {
		return nil, fmt.Errorf("cache %s was formatted with --data-crc=%t, not %t (leave the option out, or make a new cache with --format)", s.dev.PMEM, crc, *o.DataCRC)
	}
	if err := o.checkSettings(engine.Settings{Settings: layout.Settings, GCPercent: layout.Info.Flags.GCPercent()}); err != nil {
		return nil, err
	}
	if err := s.refuseExposed(o); err != nil {
		return nil, err
	}
	if o.Recover {
		if err := s.dev.mustHave(layout.Identity); err != nil {
			return nil, err
		}
	}
	if layout.Identity != nil {
		mine := identityOf(s.disk)
		if err := misfit(s.dev.PMEM, layout, s.dev.Backing, mine, o.Force); err != nil {
			return nil, s.shrunkError(o, layout.Identity, mine, err)
		}
	}
	return nil, nil
}

// checkSettings refuses new settings that make no sense with those that there are.
func (o *serveOptions) checkSettings(now engine.Settings) error {
	if len(o.Settings) == 0 {
		return nil
	}
	if err := o.Settings.change(&now); err != nil {
		return err
	}
	return now.Validate()
}

// chooseQueues has a small cache do with fewer queues, if nobody asked for more.
func (s *server) chooseQueues(o *serveOptions, segments int) {
	if o.AnyQueues {
		s.dev.Queues = min(s.dev.Queues, queuesFor(segments))
	}
}

// mustHave refuses a cache that is not the one that the device began with: an
// empty one, say, made in its place.
func (d *device) mustHave(id *ondisk.Identity) error {
	if id != nil && (d.Cache == "" || d.Cache == uuidText(id.UUID)) { // older servers did not note it
		return nil
	}
	return exitWith(exitRefused, fmt.Errorf("%s holds another cache than the one of device %s, which must have been formatted meanwhile (put the right one there; the device waits; to give up what it held: ublk-pcache del --force %d)", d.PMEM, d.title(), d.ID))
}

// openCache makes the new cache, if there is to be one, opens the cache, and binds
// it to its disk.
func (s *server) openCache(o *serveOptions, make *ondisk.FormatOptions) (err error) {
	if err := s.room(o.Recover); err != nil {
		return err
	}
	if make != nil {
		if err := ondisk.Format(s.region, *make); err != nil {
			return err
		}
	}
	options := s.engineOptions()
	options.Changed = o.Changed
	began := time.Now()
	s.cache, err = engine.Open(s.region, disk{s.disk}, options)
	if err != nil {
		return s.openError(o, err)
	}
	st := s.cache.Status()
	s.log.Debug("opened the cache", zap.Duration("took", time.Since(began)), zap.Int64("extents", st.Extents), zap.Int64("dirty_bytes", st.DirtyBytes),
		zap.Stringer("key_head", st.KeyHead), zap.Stringer("dirty_tail", st.DirtyTail), zap.Stringer("key_tail", st.KeyTail))
	if err := s.bindNow(); err != nil {
		return errors.Join(err, s.cache.Close())
	}
	if err := s.knowCache(); err != nil {
		return errors.Join(err, s.cache.Close())
	}
	return nil
}

// knowCache makes sure that the device has the cache that it began with, and notes
// which that is.
func (s *server) knowCache() error {
	layout, err := ondisk.ReadLayout(s.region, s.region.Size())
	if err != nil {
		return fmt.Errorf("cache %s: %w", s.dev.PMEM, err)
	}
	if err := s.dev.mustHave(layout.Identity); err != nil {
		return err
	}
	s.dev.Cache = uuidText(layout.Identity.UUID)
	return nil
}

// refuseExposed refuses a cache or a backing device that users without any right
// to the other may read or write. Where a device waits for its server, or a
// machine for its disks, a warning must do.
func (s *server) refuseExposed(o *serveOptions) error {
	for _, path := range []string{s.region.Path(), s.dev.Backing} {
		if err := exposed(path); err != nil && (o.Recover || o.Existing) {
			s.log.Warn("others can get at the data", zap.Error(err))
		} else if err != nil {
			return err
		}
	}
	return nil
}

// misfit says why a backing device cannot be the one that a cache belongs to, nil
// if it may be.
func misfit(cache string, l *ondisk.Layout, backing string, it *ondisk.Identity, force bool) error {
	id := l.Identity
	switch {
	case it.BackingSize < id.BackingSize:
		return exitWith(exitRefused, fmt.Errorf("backing device %s has %d bytes, less than the %d it had when cache %s was made (give the right device, or one at least as large)", backing, it.BackingSize, id.BackingSize, cache))
	case !sameDevice(l, it.Serial) && !force:
		return exitWith(exitRefused, fmt.Errorf("cache %s belongs to the backing device with %s; %s has %s (give that one, or if this is its copy: --force)", cache, known(id.Serial), backing, known(it.Serial)))
	}
	return nil
}

// shrunkError adds to a misfit how to go on with a disk that was made smaller. What
// the cache holds of its end would be read and written back there.
func (s *server) shrunkError(o *serveOptions, id, mine *ondisk.Identity, err error) error {
	if o.Recover || mine.BackingSize >= id.BackingSize {
		return err
	}
	may := o.formatting(s.dev.PMEM)
	h := ondisk.Survey(s.region, s.region.Size(), s.region.Durable())
	if h.Harmless {
		return fmt.Errorf("%w (if it was made smaller: the cache holds no dirty data, so begin with a new one: %s)", err, may.byClean)
	}
	return fmt.Errorf("%w (if it was made smaller: make it as large again and flush the %s first; or give them up: %s)", err, ondisk.Unwritten(h.Dirty, h.Zeros), may.byAll)
}

// openError says what can be done about a cache that the engine does not open.
func (s *server) openError(o *serveOptions, err error) error {
	switch {
	case errors.Is(err, engine.ErrChanged) && o.Recover:
		return fmt.Errorf("cache %s cannot continue device %s: %s: %w (to write that over what is there now: recover --changed=overwrite; the device waits)", s.dev.PMEM, s.dev.title(), s.dev.Backing, err)
	case errors.Is(err, engine.ErrChanged):
		return fmt.Errorf("cache %s: %s: %w (to write that over what is there now, as is right after a writeback that could not record itself: --changed=overwrite; to lose it: --changed=discard)", s.dev.PMEM, s.dev.Backing, err)
	case errors.Is(err, engine.ErrUnchanged):
		return fmt.Errorf("cache %s: %s: %w, so nothing is discarded (leave out --changed=discard, or give up what the cache holds with --format --force)", s.dev.PMEM, s.dev.Backing, err)
	}
	var damage *ondisk.Damage
	var faults ondisk.Faults
	switch {
	case errors.As(err, &damage), errors.As(err, &faults):
		return s.damagedError(o, true, err)
	case errors.Is(err, engine.ErrKeyGeneration), errors.Is(err, engine.ErrKeyInLog), errors.Is(err, engine.ErrKeyOverlap):
		return s.damagedError(o, false, err) // what no repair knows the right value of
	case errors.Is(err, engine.ErrDiskTooSmall):
		return fmt.Errorf("cache %s: %s: %w (give the right device, or make it as large as it was)", s.dev.PMEM, s.dev.Backing, err)
	}
	return fmt.Errorf("cache %s: %w", s.dev.PMEM, err)
}

// damagedError says what can be done about a cache that is damaged.
func (s *server) damagedError(o *serveOptions, mendable bool, err error) error {
	do := damageRemedies(err, mendable, s.dev.PMEM, s.dev.Backing)
	if o.Recover {
		return exitWith(exitDamaged, &remedied{fmt.Errorf("cache %s cannot continue device %s: %w", s.dev.PMEM, s.dev.title(), err), do + "; the device waits"})
	}
	return exitWith(exitDamaged, &remedied{fmt.Errorf("cache %s: %w", s.dev.PMEM, err), do + "; to give up what it holds: " + o.formatting(s.dev.PMEM).byAll})
}

// gone says why a device cannot be continued whose cache is not there any more, or
// not as a whole.
func (s *server) gone() error {
	h := ondisk.Survey(s.region, s.region.Size(), s.region.Durable())
	if h.Err == nil {
		return exitWith(exitRefused, fmt.Errorf("%s holds no cache any more, so device %s cannot be continued (bring back what it held, or give up the device: ublk-pcache del --force %d; the device waits)", s.dev.PMEM, s.dev.title(), s.dev.ID))
	}
	return s.damagedError(&serveOptions{Recover: true}, h.Mendable, h.Err)
}

// planNew plans a new cache, if that is harmless or was asked for.
func (s *server) planNew(o *serveOptions) (*ondisk.FormatOptions, error) {
	if err := o.formatting(s.dev.PMEM).check(s.region, s.dev.Backing); err != nil {
		return nil, err
	}
	if o.Existing {
		return nil, fmt.Errorf("%s is blank and holds no cache (if it is to begin with a new one: ublk-pcache format %s)", s.dev.PMEM, s.dev.PMEM)
	}
	segments := int(ondisk.SegmentsIn(s.region.Size()))
	s.chooseQueues(o, segments)
	switch most := engine.MaxQueues(segments); {
	case s.dev.Queues > most:
		return nil, fmt.Errorf("--queues %d: a cache on %s, of %d segments, can have 1 to %d", s.dev.Queues, s.dev.PMEM, segments, most)
	case o.Changed != engine.Refuse:
		return nil, fmt.Errorf("--changed=%s: a new cache on %s holds nothing yet that this could be about (leave it out)", o.Changed, s.dev.PMEM)
	}
	if err := o.checkSettings(engine.Settings{Settings: ondisk.DefaultSettings(), GCPercent: ondisk.DefaultGCPercent}); err != nil {
		return nil, err
	}
	if err := s.refuseExposed(o); err != nil {
		return nil, err
	}
	opts := ondisk.FormatOptions{
		// On a plain file a power cut may lose some pages and keep others;
		// the checksums find the keys it hit.
		DataCRC:   !s.region.Durable(),
		GCPercent: ondisk.DefaultGCPercent,
		Identity:  identityOf(s.disk),
	}
	if o.DataCRC != nil {
		opts.DataCRC = *o.DataCRC
	}
	return &opts, nil
}
