package engine

import (
	"encoding/binary"
	"math"

	"ublk-pcache/ondisk"
)

// fate is what becomes of a forged image when somebody opens it.
type fate int

const (
	opens fate = iota
	refused
	either // it depends on whether the cache keeps checksums
)

// forgeries are the ways known to forge a cache. Each works on an image with a
// kset or two in its log.
var forgeries = []struct {
	name  string
	fate  fate
	forge func(f *forgery)
}{
	{"key in a segment behind the last", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Seg = uint32(len(f.chain)) })},
	{"key in the last segment there can be", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Seg = math.MaxUint32 })},
	{"key of data that leaves the segment", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.SegOff = ondisk.SegmentData - k.Len + 512 })},
	{"key of data behind the segment", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.SegOff = ondisk.SegmentData })},
	{"key of data up to the segment's end", opens, forgeKey(func(f *forgery, k *ondisk.Key) {
		k.Seg, k.Gen, k.SegOff = 1, f.gens[1], ondisk.SegmentData-k.Len
	})},
	{"key of data whose end wraps", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.SegOff = math.MaxUint32 - 511 })},
	{"key of data off the sectors", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.SegOff += 256 })},
	{"key across a stripe", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off = ondisk.StripeSize - 512 })},
	{"key up to a stripe's end", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off = ondisk.StripeSize - uint64(k.Len) })},
	{"key of a whole stripe", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off, k.Len, k.SegOff = 0, ondisk.StripeSize, 0 })},
	{"key longer than a stripe", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off, k.Len, k.SegOff = 0, ondisk.StripeSize+512, 0 })},
	{"key of no length", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Len = 0 })},
	{"key of half a sector", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Len = 256 })},
	{"key off the sectors", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off++ })},
	{"key whose end wraps", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off = math.MaxUint64 - 511 })},
	{"key that ends at 2^63", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off = 1<<63 - uint64(k.Len) })},
	{"key behind the disk", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off = uint64(f.sectors)*512 - uint64(k.Len) + 512 })},
	{"key up to the disk's end", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.Off = uint64(f.sectors)*512 - uint64(k.Len) })},
	{"dead key behind the disk", opens, forgeKey(func(f *forgery, k *ondisk.Key) {
		f.setGeneration(k.Seg, 5)
		k.Off, k.Gen = 1<<40, 4
	})},
	{"key marked empty", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Flags |= ondisk.KeyEmpty })},
	{"key of less than a block of the disk", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.Len = 1536 })},
	{"key with unknown flags", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.Flags = 0xFFFFFFF8 })},
	{"key of zeros that are none", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.Flags = ondisk.KeyZero })},
	{"segment of nothing but zeros", opens, func(f *forgery) {
		k := f.sane()
		k.Seg, k.Gen, k.SegOff, k.Len, k.Flags = 1, f.gens[1], 0, 512, ondisk.KeyZero
		f.keys(k)
	}},
	{"key of the next generation", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Gen++ })},
	{"key of the last generation", refused, forgeKey(func(f *forgery, k *ondisk.Key) { k.Gen = math.MaxUint64 })},
	{"key of a past generation", opens, forgeKey(func(f *forgery, k *ondisk.Key) {
		f.setGeneration(k.Seg, 5)
		k.Gen = 4
	})},
	{"last generation", refused, func(f *forgery) { f.setGeneration(1, math.MaxUint64) }},
	{"key and segment of the last generation", refused, forgeKey(func(f *forgery, k *ondisk.Key) {
		f.setGeneration(k.Seg, math.MaxUint64)
		k.Gen = math.MaxUint64
	})},
	{"key in the log's segment", refused, forgeKey(func(f *forgery, k *ondisk.Key) {
		k.Seg = f.at.Seg % uint32(len(f.chain))
		k.Gen = f.gens[k.Seg]
	})},
	{"key in what becomes the log's segment", refused, func(f *forgery) {
		k := f.sane()
		f.keys(k)
		f.lastTo(k.Seg)
	}},
	{"key of damaged data", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.CRC++ })},
	{"clean key of damaged data", opens, forgeKey(func(f *forgery, k *ondisk.Key) { k.CRC, k.Flags = k.CRC+1, ondisk.KeyClean })},
	{"clean key over a dirty one", opens, func(f *forgery) {
		k := f.sane()
		f.keys(k)
		k.SegOff, k.Flags = k.SegOff+8192, ondisk.KeyClean
		f.stamp(&k)
		f.keys(k)
	}},
	{"keys of the same data", either, func(f *forgery) {
		k := f.sane()
		f.keys(k)
		k.Off += 8192
		f.keys(k)
	}},
	{"keys of data that overlaps", either, func(f *forgery) {
		k := f.sane()
		f.keys(k)
		k.Off, k.SegOff = k.Off+512, k.SegOff+512
		f.stamp(&k)
		f.keys(k)
	}},
	{"keys of the same data with different checksums", either, func(f *forgery) {
		k := f.sane()
		f.keys(k)
		k.Off, k.CRC = k.Off+8192, k.CRC+1
		f.keys(k)
		k.Off, k.CRC = k.Off+8192, k.CRC-1
		k.Len -= 512
		f.keys(k)
	}},
	{"kset without keys", opens, func(f *forgery) { f.keys() }},
	{"kset without keys at the segment's end", opens, func(f *forgery) {
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - ondisk.KsetHeaderSize})
		f.keys()
	}},
	{"kset of 129 keys", opens, ksetOf(ondisk.MaxKeys + 1)},
	{"kset of 2^32-1 keys", opens, ksetOf(math.MaxUint32)},
	{"kset of as many keys as wrap its size", opens, ksetOf(1<<32/ondisk.KeySize + 1)},
	{"kset up to the segment's end", opens, func(f *forgery) {
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - ondisk.KsetSize(1)})
		f.keys(f.sane())
	}},
	{"kset across the segment's end", opens, func(f *forgery) {
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - 64})
		f.keys(f.sane(), f.sane())
	}},
	{"kset that leaves room for a LAST", opens, func(f *forgery) {
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - ondisk.KsetSize(1) - ondisk.KsetHeaderSize})
		f.keys(f.sane())
		f.lastTo(1)
	}},
	{"LAST to its own segment", refused, func(f *forgery) { f.lastTo(f.at.Seg) }},
	{"LAST back", refused, func(f *forgery) {
		from := f.at.Seg
		f.lastTo(from + 1)
		f.lastTo(from)
	}},
	{"LAST to a segment behind the last", refused, func(f *forgery) { f.lastTo(uint32(len(f.chain))) }},
	{"LAST out of everything", refused, func(f *forgery) { f.lastTo(math.MaxUint32) }},
	{"LAST through segments of data", refused, func(f *forgery) {
		for f.at.Seg = 0; int(f.at.Seg)+1 < len(f.chain); {
			f.lastTo(f.at.Seg + 1)
		}
	}},
	{"dirty_tail before key_tail", refused, func(f *forgery) {
		from := f.at
		f.keys(f.sane())
		f.newer(ondisk.KeyTail, f.at)
		f.newer(ondisk.DirtyTail, from)
	}},
	{"dirty_tail inside a kset", refused, func(f *forgery) {
		p := f.at
		f.keys(f.sane())
		f.newer(ondisk.DirtyTail, ondisk.Position{Seg: p.Seg, Off: p.Off + 8})
	}},
	{"dirty_tail behind the log's end", refused, func(f *forgery) {
		f.newer(ondisk.DirtyTail, ondisk.Position{Seg: f.at.Seg, Off: f.at.Off + ondisk.KsetHeaderSize})
	}},
	{"dirty_tail at the log's end", opens, func(f *forgery) { f.newer(ondisk.DirtyTail, f.at) }},
	{"dirty_tail in another segment", refused, func(f *forgery) { f.newer(ondisk.DirtyTail, ondisk.Position{Seg: f.at.Seg + 1}) }},
	{"dirty_tail on a loop that key_tail leads to", refused, func(f *forgery) {
		from := f.at.Seg
		f.lastTo(from + 1)
		f.newer(ondisk.DirtyTail, f.at)
		f.keys(f.sane())
		f.lastTo(from)
	}},
	{"tails off the grid", refused, func(f *forgery) { f.startAt(ondisk.Position{Off: f.at.Off + 4}) }},
	{"no room in the log and no segment free", opens, func(f *forgery) {
		var keys []ondisk.Key
		for seg := range f.gens[1:] {
			k := f.sane()
			k.Off, k.Seg, k.Gen, k.SegOff = uint64(seg)*8192, uint32(seg)+1, f.gens[seg+1], 0
			f.stamp(&k)
			if f.crc {
				k.CRC = f.checksum(&k)
			}
			keys = append(keys, k)
		}
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - ondisk.KsetHeaderSize - ondisk.KsetSize(len(keys))})
		f.keys(keys...)
	}},
	{"key_tail in a segment behind the last", refused, func(f *forgery) { f.newer(ondisk.KeyTail, ondisk.Position{Seg: uint32(len(f.chain))}) }},
	{"dirty_tail in a segment behind the last", refused, func(f *forgery) { f.newer(ondisk.DirtyTail, ondisk.Position{Seg: math.MaxUint32}) }},
	{"tails in the last bytes of a segment", refused, func(f *forgery) { f.startAt(ondisk.Position{Off: ondisk.SegmentData - 16}) }},
	{"tails where only a LAST fits", opens, func(f *forgery) { f.startAt(ondisk.Position{Off: ondisk.SegmentData - 24}) }},
	{"tails at 2^32", refused, func(f *forgery) { f.startAt(ondisk.Position{Off: math.MaxUint32 - 7}) }},
	{"superblock without segments", refused, func(f *forgery) { f.segmentsInSuperblock(0) }},
	{"superblock with a segment more than fits", refused, func(f *forgery) { f.segmentsInSuperblock(forgeSegments + 1) }},
	{"superblock of 2^32-1 segments", refused, func(f *forgery) { f.segmentsInSuperblock(math.MaxUint32) }},
	{"superblock with fewer segments than the chain", refused, func(f *forgery) { f.segmentsInSuperblock(uint32(len(f.chain)) - 1) }},
	{"chain of no segments", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Segments = 0 })},
	{"chain longer than the device", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Segments = forgeSegments + 1 })},
	{"chain of 2^32-1 segments", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Segments = math.MaxUint32 })},
	{"chain longer than its links", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Segments++ })},
	{"chain shorter than its links", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Segments-- })},
	{"chain that begins behind the device", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.FirstSegment = forgeSegments })},
	{"chain that begins nowhere", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.FirstSegment = math.MaxUint32 })},
	{"gc percent 91", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Flags = i.Flags.WithGCPercent(91) })},
	{"gc percent 127", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Flags = i.Flags.WithGCPercent(127) })},
	{"write-through", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Flags |= 1 << 2 })},
	{"not initialised", refused, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Flags &^= 1 << 1 })},
	{"unknown flags", opens, forgeInfo(func(f *forgery, i *ondisk.Info) { i.Flags |= 0xFFFFE000 })},
	{"chain in a circle", refused, func(f *forgery) { f.linkTo(len(f.chain)-1, f.phys(0)) }},
	{"longer chain in a circle", refused, func(f *forgery) {
		f.newerInfo(ondisk.Info{FirstSegment: f.phys(0), Segments: uint32(len(f.chain)) + 2, Flags: ondisk.NewInfoFlags(f.crc, 70)})
		f.linkTo(len(f.chain)-1, f.phys(1))
	}},
	{"chain with a segment linked to itself", refused, func(f *forgery) { f.linkTo(1, f.phys(1)) }},
	{"chain that leaves the device", refused, func(f *forgery) { f.linkTo(1, forgeSegments) }},
	{"chain that leaves everything", refused, func(f *forgery) { f.linkTo(1, math.MaxUint32) }},
	{"segment of an unknown type", refused, func(f *forgery) { f.record(f.chain[1]+4096, 10, 7<<1|1|uint64(f.phys(2))<<32) }},
	{"copies with the same number", opens, func(f *forgery) {
		f.position(ondisk.KeyTail, ondisk.Replica{Slot: 1, Seq: 9}, f.at)
		f.position(ondisk.DirtyTail, ondisk.Replica{Slot: 1, Seq: 9}, f.at)
	}},
	{"copies half the numbers apart", opens, func(f *forgery) {
		f.position(ondisk.KeyTail, ondisk.Replica{Slot: 1, Seq: 9 + 128}, f.at)
		f.position(ondisk.DirtyTail, ondisk.Replica{Slot: 1, Seq: 9 + 128}, f.at)
	}},
	{"copies about to wrap", opens, func(f *forgery) {
		f.position(ondisk.DirtyTail, ondisk.Replica{Slot: 0, Seq: 255}, f.at)
		f.position(ondisk.DirtyTail, ondisk.Replica{Slot: 1, Seq: 0}, f.places[0])
	}},
	{"generation lost", refused, func(f *forgery) { f.store(f.chain[1]+8<<10, []byte("no generation in neither of them")) }},
	{"identity of a disk of no size", refused, func(f *forgery) { f.identity(0) }},
	{"identity of a disk of negative size", refused, func(f *forgery) { f.identity(math.MinInt64) }},
	{"sync mark far ahead", opens, func(f *forgery) { f.syncMark(1<<48 - 1) }},
	{"sync mark behind", opens, func(f *forgery) { f.syncMark(1) }},
	{"sync mark that no kset has", opens, func(f *forgery) { f.syncMark(math.MaxUint64) }},
	{"numbers that wrap", opens, func(f *forgery) {
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - 4096})
		f.seq = 1<<48 - 2
		for range 4 {
			f.keys(f.sane())
		}
	}},
	{"number left out", opens, func(f *forgery) {
		f.seq = 1000
		f.keys(f.sane())
	}},
	{"numbers given up", opens, func(f *forgery) {
		f.seq = 0
		f.keys(f.sane())
	}},
	{"damaged kset before a good one", refused, func(f *forgery) {
		at := f.at
		f.keys(f.sane())
		f.keys(f.sane())
		f.store(f.offset(at), []byte("damaged!"))
	}},
	{"damaged LAST before a good kset", refused, func(f *forgery) {
		f.seq = max(f.seq, 1)
		f.startAt(ondisk.Position{Off: ondisk.SegmentData - 1024})
		f.keys(f.sane())
		at := f.at
		f.lastTo(1)
		f.keys(f.sane())
		f.store(f.offset(at), []byte("damaged!"))
	}},
	{"old ksets behind the log's end", opens, func(f *forgery) {
		seq := f.seq
		f.seq = (f.seq + 1<<40) & (1<<48 - 1)
		// Of data in a segment that the first queue goes on filling, so that
		// its generation stays.
		k := f.sane()
		k.Seg, k.SegOff, k.Gen = 2, 0, f.gens[2]
		if f.crc {
			k.CRC = f.checksum(&k)
		}
		f.keys(k)
		f.keys(k)
		f.seq = seq
	}},
}

// sane returns a key with nothing wrong, and stores its data.
func (f *forgery) sane() ondisk.Key {
	k := ondisk.Key{Off: 64 * sectorSize, Len: 4 * sectorSize, Seg: uint32(len(f.chain)) - 1, SegOff: 2 << 20}
	k.Gen = f.gens[k.Seg]
	f.stamp(&k)
	if f.crc {
		k.CRC = f.checksum(&k)
	}
	return k
}

func (f *forgery) keys(keys ...ondisk.Key) {
	f.made = append(f.made, keys...)
	var buf [ondisk.MaxKsetSize]byte
	f.append(ondisk.EncodeKset(buf[:], f.seq, keys))
}

// forgeKey makes a forgery of something that is wrong with one key.
func forgeKey(spoil func(*forgery, *ondisk.Key)) func(*forgery) {
	return func(f *forgery) {
		k := f.sane()
		spoil(f, &k)
		if crc := f.checksum(&k); f.crc && k.Len != 4*sectorSize {
			k.CRC = crc
		}
		f.keys(k)
	}
}

// ksetOf makes a kset that says that it has n keys, as far as there is room,
// with a checksum of as much.
func ksetOf(n uint32) func(*forgery) {
	return func(f *forgery) {
		p := make([]byte, min(ondisk.KsetHeaderSize+uint64(n)*ondisk.KeySize, 8<<10))
		copy(p, ondisk.EncodeKset(p, f.seq, nil))
		binary.LittleEndian.PutUint32(p[4:], n)
		binary.LittleEndian.PutUint32(p, ondisk.Checksum(p[4:]))
		f.append(p)
	}
}

func (f *forgery) lastTo(next uint32) {
	var buf [ondisk.KsetHeaderSize]byte
	p := ondisk.EncodeLast(buf[:], f.seq, next)
	f.append(p)
	f.at = ondisk.Position{Seg: next}
	f.store(f.offset(f.at), make([]byte, ondisk.KsetHeaderSize))
	f.places = append(f.places, f.at)
}

// newer moves a tail for good.
func (f *forgery) newer(t ondisk.Tail, p ondisk.Position) {
	f.position(t, ondisk.Replica{Slot: 1, Seq: 40}, p)
}

// startAt lets the log begin anew.
func (f *forgery) startAt(p ondisk.Position) {
	f.at = p
	f.places = append(f.places, p)
	f.newer(ondisk.KeyTail, p)
	f.newer(ondisk.DirtyTail, p)
	if p.Off <= ondisk.SegmentData-ondisk.KsetHeaderSize {
		f.store(f.offset(p), make([]byte, ondisk.KsetHeaderSize))
	}
}

func (f *forgery) setGeneration(seg uint32, gen uint64) {
	f.gens[seg] = gen
	f.record(f.chain[seg]+8<<10+ondisk.GenerationSize, 40, gen)
}

func (f *forgery) phys(seg int) uint32 {
	return uint32((f.chain[seg] - ondisk.SegmentsOff) / ondisk.SegmentSize)
}

func (f *forgery) linkTo(seg int, next uint32) {
	f.record(f.chain[seg]+4096, 10, 1<<1|1|uint64(next)<<32)
}

func (f *forgery) segmentsInSuperblock(n uint32) {
	var buf [ondisk.SuperblockSize]byte
	ondisk.EncodeSuperblock(buf[:], ondisk.Superblock{Segments: n})
	f.store(ondisk.SuperblockOff, buf[:])
}

func (f *forgery) newerInfo(i ondisk.Info) {
	f.info(ondisk.Replica{Slot: 0, Seq: 40}, i)
}

func forgeInfo(spoil func(*forgery, *ondisk.Info)) func(*forgery) {
	return func(f *forgery) {
		i := ondisk.Info{FirstSegment: f.phys(0), Segments: uint32(len(f.chain)), Flags: ondisk.NewInfoFlags(f.crc, 70)}
		spoil(f, &i)
		f.newerInfo(i)
	}
}

func (f *forgery) identity(size int64) {
	var buf [ondisk.IdentitySize]byte
	off := ondisk.EncodeIdentity(buf[:], ondisk.Replica{Seq: 40}, &ondisk.Identity{BackingSize: size, Serial: "forged"})
	f.store(off, buf[:])
}

func (f *forgery) syncMark(seq uint64) {
	var buf [ondisk.SyncMarkSize]byte
	off := ondisk.EncodeSyncMark(buf[:], ondisk.Replica{Seq: 40}, seq)
	f.store(off, buf[:])
}
