package engine

import "ublk-pcache/ondisk"

// Dirty visits the runs of bytes that the disk does not have yet, in order. Any
// goroutine; it may see or miss changes made meanwhile.
func (c *Cache) Dirty(visit func(off, n int64)) {
	var parts []extent
	for base := int64(0); base < c.size; base += ondisk.StripeSize {
		s := c.index.span(base>>sectorShift, stripeSectors)
		s.sh.Lock()
		parts = s.partsLocked(parts[:0], func(e extent) bool {
			return e.flags&extClaim == 0 && e.flags&extDirty != 0
		})
		s.sh.Unlock()
		for _, e := range parts {
			visit(base+int64(e.off)<<sectorShift, int64(e.n)<<sectorShift)
		}
	}
}
