package engine

import (
	"iter"
	"sync/atomic"
	"unsafe"

	"ublk-pcache/ondisk"
)

// Write-back and garbage collection each come to every key of the log, and
// mostly find that the index has nothing of it any more: it was overwritten. To
// look for it costs them as much as it cost to enter the key. So when a new key
// takes an older one's sectors from it, that is noted where the older one's data
// is, a bit for each sector, and a key that has all of them is passed by.
//
// A bit that is set wrongly loses data: write-back passes a key that the disk needs,
// or collection leaves an extent behind that leads into a segment's next use. So a
// bit is set at one occasion only, when a key is entered over an extent, and it
// means nothing unless each sector of a segment has at most one place in the index.
// That is true of what the queues allocate, but not of a log that somebody else
// wrote, nor of zeros, which share their place: only segments begun since Open have
// bits, and extents and keys of zeros are left out. Other changes of an extent set
// none: then somebody looks in vain, as before.
//
// The bits of an extent are set under the lock of its shard, before the extent is
// gone, and looked at without. To look a moment later would find the same: the key
// that overwrites was logged before its shards were locked, and a reader pins the
// segment under the same lock. Each bit is set once in a segment's life, and after
// the last one of an extent nothing is done to them any more: as soon as that can be
// seen, the last key may be passed, and the segment begun anew.

// staleSectors knows which sectors of the data segments are overwritten. A segment
// that was begun before Open has no bits.
type staleSectors struct {
	of []atomic.Pointer[sectorBits]
}

// sectorBits are 4 KiB for a segment of 16 MiB.
type sectorBits [(segmentSectors + 63) / 64]atomic.Uint64

func (o *staleSectors) init(segments int) { o.of = make([]atomic.Pointer[sectorBits], segments) }

// begin is called for a segment that gets data, before any of it is in the index.
func (o *staleSectors) begin(seg uint32) {
	bits := o.of[seg].Load()
	if bits == nil {
		o.of[seg].Store(new(sectorBits))
		return
	}
	for i := range bits {
		bits[i].Store(0)
	}
}

// add notes that a key has been entered over an extent. The caller holds the lock
// of its shard.
func (o *staleSectors) add(e extent) {
	if e.flags&(extClaim|extZero) != 0 {
		return
	}
	bits := o.of[e.seg].Load()
	if bits == nil {
		return
	}
	bits.add(e)
}

// addBlock does so for the extent of a slot.
func (o *staleSectors) addBlock(v slot) {
	if v&((extClaim|extZero)<<flagsShift) != 0 {
		return
	}
	bits := o.of[uint32(v)].Load()
	if bits == nil {
		return
	}
	if first := v.pos() % 64; first <= 64-blockSectors {
		bits[v.pos()/64].Or((1<<blockSectors - 1) << first)
		return
	}
	bits.add(v.extent(0))
}

// add sets the bits of an extent.
func (b *sectorBits) add(e extent) {
	for word, mask := range sectorMasks(uint(e.pos), uint(e.n)) {
		b[word].Or(mask)
	}
}

// has reports whether all data of a key has been overwritten.
func (o *staleSectors) has(k *ondisk.Key) bool {
	bits := o.of[k.Seg].Load()
	if bits == nil || k.Flags&ondisk.KeyZero != 0 {
		return false
	}
	for word, mask := range sectorMasks(uint(k.SegOff>>sectorShift), uint(k.Len>>sectorShift)) {
		if bits[word].Load()&mask != mask {
			return false
		}
	}
	return true
}

// sectorMasks yields the words that have bits of n sectors from pos on, and those
// bits.
func sectorMasks(pos, n uint) iter.Seq2[uint, uint64] {
	return func(yield func(uint, uint64) bool) {
		for n > 0 {
			first, some := pos%64, min(n, 64-pos%64)
			if !yield(pos/64, ^uint64(0)>>(64-some)<<first) {
				return
			}
			pos, n = pos+some, n-some
		}
	}
}

// bytes returns the memory that the bits take.
func (o *staleSectors) bytes() (n int64) {
	for i := range o.of {
		if o.of[i].Load() != nil {
			n += int64(unsafe.Sizeof(sectorBits{}))
		}
	}
	return n
}
