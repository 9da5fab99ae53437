package main

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// plan is what has to be stored in the region for its cache to be put in front of
// the disk.
type plan struct {
	make     *ondisk.FormatOptions // a new cache; nil: there is one
	identity *ondisk.Identity      // binds the cache to the disk; nil: that has been done
	over     ondisk.Replica        // the newest copy of the present one
}

// plan looks at the region and refuses what does not fit. It changes nothing.
func (s *server) plan(o *serveOptions) (*plan, error) {
	layout, err := ondisk.ReadLayout(s.region, s.region.Size())
	if o.Existing && errors.Is(err, ondisk.ErrNotFormatted) {
		return nil, fmt.Errorf("%s holds no cache; if it is to begin with a new one: ublk-pcache format %s", s.dev.PMEM, s.dev.PMEM)
	}
	if !o.Recover && (errors.Is(err, ondisk.ErrNotFormatted) || o.Format) {
		return s.planNew(o)
	}
	if err != nil {
		if o.Recover {
			return nil, fmt.Errorf("cache %s cannot continue device %d: %w (look with 'ublk-pcache check %s', and see 'ublk-pcache repair'; the device waits)", s.dev.PMEM, s.dev.ID, err, s.dev.PMEM)
		}
		return nil, fmt.Errorf("cache %s: %w (look with 'ublk-pcache check %s', mend it with 'ublk-pcache repair'; to give up what it holds: --format)", s.dev.PMEM, err, s.dev.PMEM)
	}
	if crc := layout.Info.Flags.DataCRC(); o.DataCRC != nil && *o.DataCRC != crc {
		return nil, fmt.Errorf("cache %s was formatted with --data-crc=%t, not %t (leave the option out, or make a new cache with --format)", s.dev.PMEM, crc, *o.DataCRC)
	}
	if err := exposed(s.region.Path()); err != nil {
		s.log.Warn("others can get at the cache", zap.Error(err))
	}
	id, mine := layout.Identity, identityOf(s.disk)
	if o.Recover {
		if err := s.dev.mustHave(id); err != nil {
			return nil, err
		}
	}
	if id != nil {
		if err := misfit(s.dev.PMEM, id, s.dev.Backing, mine, o.Force); err != nil {
			return nil, err
		}
		mine.UUID = id.UUID
	}
	s.dev.Cache = uuid.UUID(mine.UUID).String()
	p := &plan{over: layout.IdentityCopies.Newest}
	if id == nil || mine.BackingSize > id.BackingSize || !id.Matches(mine.Serial) {
		p.identity = mine
	}
	return p, nil
}

// mustHave refuses a cache that is not the one that the device began with: an
// empty one, say, made in its place.
func (d *device) mustHave(id *ondisk.Identity) error {
	if id != nil && (d.Cache == "" || d.Cache == uuid.UUID(id.UUID).String()) { // older servers did not note it
		return nil
	}
	return fmt.Errorf("%s holds another cache than the one of device %d, which must have been formatted meanwhile (put the right one there; the device waits; to give up what it held: ublk-pcache del --force %d)", d.PMEM, d.ID, d.ID)
}

// format makes the new cache, if there is to be one.
func (p *plan) format(r *pmem.Region) error {
	if p.make == nil {
		return nil
	}
	return ondisk.Format(r, *p.make)
}

// bind ties the cache to the disk. It is for when the cache has been opened.
func (p *plan) bind(r *pmem.Region) error {
	if p.identity == nil {
		return nil
	}
	return ondisk.WriteIdentity(r, p.over, p.identity)
}

// misfit says why a backing device cannot be the one that a cache belongs to, nil
// if it may be.
func misfit(cache string, id *ondisk.Identity, backing string, it *ondisk.Identity, force bool) error {
	switch {
	case !id.Matches(it.Serial) && !force:
		return fmt.Errorf("cache %s belongs to the backing device with serial %q; %s has %q (give that one, or if this is its copy: --force)", cache, id.Serial, backing, it.Serial)
	case it.BackingSize < id.BackingSize:
		return fmt.Errorf("backing device %s has %d bytes, less than the %d it had when cache %s was made (give the right device, or one at least as large)", backing, it.BackingSize, id.BackingSize, cache)
	}
	return nil
}

// openError says what can be done about a cache that the engine does not open.
func (s *server) openError(o *serveOptions, err error) error {
	switch {
	case errors.Is(err, engine.ErrChanged) && o.Recover:
		return fmt.Errorf("cache %s cannot continue device %d: %s: %w (to write that over what is there now: recover --changed=overwrite; the device waits)", s.dev.PMEM, s.dev.ID, s.dev.Backing, err)
	case errors.Is(err, engine.ErrChanged):
		return fmt.Errorf("cache %s: %s: %w (to write that over what is there now: --changed=overwrite; to give it up: --changed=discard)", s.dev.PMEM, s.dev.Backing, err)
	case errors.Is(err, engine.ErrUnchanged):
		return fmt.Errorf("cache %s: %s: %w, so nothing is discarded (leave out --changed=discard, or give up what the cache holds with --format --force)", s.dev.PMEM, s.dev.Backing, err)
	}
	return fmt.Errorf("cache %s: %w", s.dev.PMEM, err)
}

// planNew plans a new cache, if that is harmless or was asked for.
func (s *server) planNew(o *serveOptions) (*plan, error) {
	segments := int(ondisk.SegmentsIn(s.region.Size()))
	switch most := engine.MaxQueues(segments); {
	case s.dev.Queues > most:
		return nil, fmt.Errorf("--queues %d: a cache on %s, of %d segments, can have 1 to %d", s.dev.Queues, s.dev.PMEM, segments, most)
	case o.Changed != engine.Refuse:
		return nil, fmt.Errorf("--changed=%s: a new cache on %s holds nothing yet that this could be about (leave it out)", o.Changed, s.dev.PMEM)
	}
	if err := mayFormat(s.region, o.Format, o.Force); err != nil {
		return nil, err
	}
	if err := exposed(s.region.Path()); err != nil {
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
	if o.GCPercent != nil {
		opts.GCPercent = *o.GCPercent
	}
	s.dev.Cache = uuid.UUID(opts.Identity.UUID).String()
	return &plan{make: &opts}, nil
}

// mayFormat refuses to format a region that is not blank unless asked to, and
// one with dirty data, or that may have some, unless forced to.
func mayFormat(r *pmem.Region, format, force bool) error {
	if !format {
		blank, err := ondisk.Blank(r, r.Size())
		if err != nil {
			return fmt.Errorf("%s: %w", r.Path(), err)
		}
		if !blank {
			return fmt.Errorf("%s holds no cache, but is not blank (to overwrite what is there: --format)", r.Path())
		}
		return nil
	}
	if force {
		return nil
	}
	switch report := ondisk.Check(r, r.Size(), false); {
	case report.Dirty > 0:
		return fmt.Errorf("%s holds a cache with %d bytes of dirty data that its backing device does not have (flush it first, or lose them with --format --force)", r.Path(), report.DirtyBytes)
	case len(report.Problems) > 0 && !errors.Is(report.Problems[0], ondisk.ErrNotFormatted):
		return fmt.Errorf("%s holds a cache that is not in order: %w (to give up what it holds: --format --force)", r.Path(), report.Problems[0])
	}
	return nil
}
