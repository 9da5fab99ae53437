package main

import (
	"fmt"

	"go.uber.org/zap"

	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// The attributes of a device are a promise to its users that outlives the server: they
// ask once whether it has a volatile cache, and if it has none they send no FLUSH.

// region says which region is to be opened, by the name that the device has it
// under. Of a device that was there before, its path is known and no more, and it
// was accepted where it is.
func (o *serveOptions) region() (pmem.Spec, error) {
	if o.Recover {
		return pmem.Spec{Path: o.Device.PMEM, Volatile: true}, nil
	}
	return pmem.ParseSpec(o.Device.PMEM)
}

// keepsPromise refuses to continue a device that was made without a volatile
// cache on a region that is only durable when it is synced: nobody would ask for
// that. The other way round there are flushes that have nothing to do.
func (s *server) keepsPromise() error {
	if s.region.Durable() {
		return nil
	}
	volatile, err := ublk.VolatileCache(s.dev.ID)
	if err != nil || volatile {
		return err
	}
	return exitWith(exitRefused, fmt.Errorf("device %s has told its users that they need no flushes, and on %s, which is not on a file system with dax any more, they do (mount that with -o dax again, then: ublk-pcache recover %d; or give up the device, not the data: del --force %d, then add; the device waits)", s.dev.title(), s.dev.PMEM, s.dev.ID, s.dev.ID))
}

// room reserves what a file lacks. A device that waits is continued without: a
// store that finds no space is like one to bad memory, and better than none.
func (s *server) room(recover bool) error {
	err := s.region.Reserve()
	if err != nil && recover {
		s.log.Warn("the cache's file may run out of space", zap.Error(err))
		return nil
	}
	return err
}

// logDoubts leaves in the log what doubts prints.
func (s *server) logDoubts() {
	for _, d := range s.dev.doubts() {
		s.log.Warn(d)
	}
}

// doubts says what of a device a power cut, or a reboot, may take, unless that
// was asked for.
func (d *device) doubts() (all []string) {
	if spec, err := pmem.ParseSpec(d.PMEM); err == nil && !spec.Volatile {
		switch p, why := pmem.PersistenceOf(spec.Path); p {
		case pmem.Volatile:
			all = append(all, fmt.Sprintf("pmem %s does not survive a power cut: %s; what has not been flushed to %s is lost then", spec.Path, why, d.Backing))
		case pmem.Unknown:
			all = append(all, fmt.Sprintf("pmem %s may not survive a power cut: %s; what has not been flushed to %s would be lost then", spec.Path, why, d.Backing))
		}
	}
	if p, why := pmem.PersistenceOf(d.Backing); p == pmem.Volatile {
		all = append(all, fmt.Sprintf("backing device %s does not survive a power cut: %s", d.Backing, why))
	}
	return all
}
