package main

import (
	"fmt"

	"go.uber.org/zap"

	"ublk-pcache/pmem"
)

// region says which region is to be opened, by the name that the device has it
// under. Of a device that was there before, its path is known and no more, and it
// was accepted where it is.
func (o *serveOptions) region() (pmem.Spec, error) {
	if o.Recover {
		return pmem.Spec{Path: o.Device.PMEM, Volatile: true}, nil
	}
	return pmem.ParseSpec(o.Device.PMEM)
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
