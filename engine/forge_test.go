package engine

import (
	"encoding/binary"
	"math"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// A forgery is an image of a cache made by a program of bytes, each of which
// means something, so that whatever a fuzzer does to the program makes another
// image: a valid one with something in its log as a rule, and one that is wrong
// in a place or two every so often. What is wrong carries a right checksum all
// the same, or it would never be looked at.
//
// A program is a header, see newForgery, and then instructions, see step, until
// it ends. Some instructions are not about the image but about what is done
// once it is open: they are kept in acts.
type forgery struct {
	prog []byte
	mem  *pmem.Fake

	crc     bool
	durable bool
	block   int     // of the disk, bytes
	sectors int64   // of the disk
	chain   []int64 // device offset of each segment of the cache
	gens    []uint64
	sick    bool // something cannot be read: what leans on it may fail

	at     ondisk.Position // where the next kset goes
	seq    uint64          // its number, 0 for none
	places []ondisk.Position
	made   []ondisk.Key // most of the keys, wherever they came to
	acts   []act
}

// act is what is done to an open cache.
type act struct {
	kind   byte
	sector int64
	n      int
	arg    byte
}

const (
	actWrite = iota
	actZero
	actFlush
	actCollect
	actIdle
	actReopen
	actKinds
)

// actCode is the instruction for an act of kind 0.
const actCode = 180

const (
	forgeSegments = 31 // that the least device has
	forgeStripe   = ondisk.StripeSize / sectorSize
	// forgeSectors make the disk a stripe and a bit.
	forgeSectors = forgeStripe + 131
)

var forgeBase = func() *pmem.Fake {
	mem := pmem.NewFake(ondisk.MinSize)
	if err := ondisk.Format(mem, ondisk.FormatOptions{GCPercent: ondisk.DefaultGCPercent}); err != nil {
		panic(err)
	}
	return mem
}()

// monsters are what any number of an image may be instead of a sensible one.
var monsters = [...]uint64{
	0, 1, 7, 511, 513, 4096 - 8, 1 << 15, 1 << 16, 1<<31 - 1, 1 << 31, math.MaxUint32 - 511, math.MaxUint32,
	1 << 32, 1 << 47, 1<<48 - 1, 1<<63 - 512, 1 << 63, math.MaxUint64 - 511, math.MaxUint64 - 1, math.MaxUint64,
	ondisk.SegmentData - 512, ondisk.SegmentData - ondisk.KsetHeaderSize, ondisk.SegmentData - 16, ondisk.SegmentData,
	ondisk.SegmentSize, ondisk.StripeSize, ondisk.StripeSize + 512, forgeSectors * sectorSize, forgeSectors*sectorSize + 512,
	forgeSegments, forgeSegments + 1, ondisk.MaxSegments,
}

func (f *forgery) byte() byte {
	if len(f.prog) == 0 {
		return 0
	}
	b := f.prog[0]
	f.prog = f.prog[1:]
	return b
}

func (f *forgery) monster() uint64 { return monsters[int(f.byte())%len(monsters)] }

func pick[T any](b byte, from ...T) T { return from[int(b)%len(from)] }

func newForgery(prog []byte) *forgery {
	f := &forgery{prog: prog, mem: forgeBase.Clone()}
	b := f.byte()
	f.crc, f.durable, f.block = b&1 != 0, b&6 != 0, 512
	if b&0x18 == 0x18 {
		f.block = 4096
	}
	f.sectors = forgeSectors &^ int64(f.block/sectorSize-1)
	// With one queue, five segments are the least.
	n := 5 + int(b>>5)%3
	f.makeChain(n, f.byte())
	f.seq = pick[uint64](f.byte(), 1, 0, 1<<48-3, 77)
	// The rest of the segment behind the log's end is searched for a
	// continuation, so a log that ends far from there takes a while: few do.
	from := uint32(64 << 10)
	if b := f.byte(); b >= 0xA0 {
		from = pick[uint32](b, 24, 64, 88, 5144, 5168, 5168+88, 2*5168, 12<<10, 256<<10, ondisk.SegmentData)
	}
	f.at.Off = ondisk.SegmentData - from
	f.places = append(f.places, f.at)
	f.position(ondisk.KeyTail, ondisk.Replica{Slot: 0, Seq: 9}, f.at)
	f.position(ondisk.DirtyTail, ondisk.Replica{Slot: 0, Seq: 9}, f.at)
	for len(f.prog) > 0 {
		f.step()
	}
	return f
}

// makeChain links n segments, in one of some orders.
func (f *forgery) makeChain(n int, order byte) {
	gc := pick(order>>4, 70, 0, 1, 50, 89, 90)
	phys := make([]int, n)
	for i := range phys {
		phys[i] = pick(order, i, n-1-i, i+forgeSegments-n, (i*7+3)%forgeSegments)
		f.chain = append(f.chain, ondisk.SegmentsOff+int64(phys[i])*ondisk.SegmentSize)
	}
	f.gens = make([]uint64, n)
	f.info(ondisk.Replica{Slot: 1, Seq: 9}, ondisk.Info{
		FirstSegment: uint32(phys[0]), Segments: uint32(n), Flags: ondisk.NewInfoFlags(f.crc, gc),
	})
	for i := range phys {
		info := uint64(1 << 1)
		if i+1 < n {
			info |= 1 | uint64(phys[i+1])<<32
		}
		f.record(f.chain[i], 9, info)
	}
}

// record stores a replicated record of words, sealed.
func (f *forgery) record(off int64, seq uint8, words ...uint64) {
	p := binary.LittleEndian.AppendUint64(nil, uint64(seq)<<32)
	for _, w := range words {
		p = binary.LittleEndian.AppendUint64(p, w)
	}
	binary.LittleEndian.PutUint32(p, ondisk.Checksum(p[4:]))
	f.store(off, p)
}

// store leaves out what lies outside the device.
func (f *forgery) store(off int64, p []byte) {
	if off >= 0 && off%8 == 0 && off+int64(len(p)) <= f.mem.Size() {
		f.mem.WriteAt(p, off)
	}
}

func (f *forgery) info(at ondisk.Replica, i ondisk.Info) {
	var buf [ondisk.InfoSize]byte
	off := ondisk.EncodeInfo(buf[:], at, i)
	f.store(off, buf[:])
}

func (f *forgery) position(t ondisk.Tail, at ondisk.Replica, p ondisk.Position) {
	var buf [ondisk.PositionSize]byte
	off := ondisk.EncodePosition(buf[:], t, at, p)
	f.store(off, buf[:])
}

// offset returns where a place in the data area of a segment is on the device,
// and a negative number if the forged chain does not have the segment.
func (f *forgery) offset(p ondisk.Position) int64 {
	if int64(p.Seg) >= int64(len(f.chain)) {
		return -1 << 60
	}
	return f.chain[p.Seg] + ondisk.SegmentHeader + int64(p.Off)
}

// step carries out one instruction. The numbers are their shares.
func (f *forgery) step() {
	switch b := f.byte(); {
	case b < 96:
		f.kset(0)
	case b < 102:
		f.last()
	case b < 132:
		f.tail()
	case b < 136:
		f.at = f.place(f.byte())
	case b < 142:
		f.number()
	case b < 148:
		f.generation()
	case b < 152:
		f.kset(1 + f.byte())
	case b < 154:
		f.poison()
	case b < 157:
		f.raw()
	case b < 160:
		f.forgeInfo()
	case b < 162:
		f.link()
	case b < 163:
		f.superblock()
	case b < 166:
		f.front()
	case b < actCode:
		forgeries[int(f.byte())%len(forgeries)].forge(f)
	default:
		f.act(b - actCode + actKinds)
	}
}

// kset puts one where the log goes on, broken in one byte if that is not 0.
func (f *forgery) kset(broken byte) {
	b := f.byte()
	n := 1 + int(b%4)
	switch {
	case b >= 0xFC:
		n = 0
	case b >= 0xF4:
		n = ondisk.MaxKeys
	}
	keys := make([]ondisk.Key, 0, n)
	for range n {
		if len(keys) >= 4 {
			// Enough to choose from; what comes repeats the first, elsewhere.
			k := keys[0]
			k.Off += uint64(len(keys)) * sectorSize
			keys = append(keys, k)
			continue
		}
		keys = append(keys, f.key())
		f.made = append(f.made, keys[len(keys)-1])
	}
	var buf [ondisk.MaxKsetSize]byte
	p := ondisk.EncodeKset(buf[:], f.seq, keys)
	if broken != 0 {
		p[int(broken)%len(p)] ^= 0x10
	}
	f.append(p)
}

// append adds what is a kset, or looks like one, to the log, and the end
// mark.
func (f *forgery) append(p []byte) {
	f.places = append(f.places, f.at)
	f.store(f.offset(f.at), p)
	f.at.Off += uint32(len(p))
	if f.at.Off <= ondisk.SegmentData-ondisk.KsetHeaderSize {
		f.store(f.offset(f.at), make([]byte, ondisk.KsetHeaderSize))
	}
	f.places = append(f.places, f.at)
	if f.seq != 0 {
		f.seq = ondisk.NextSeq(f.seq)
	}
}

// key makes a key and the data it names.
func (f *forgery) key() ondisk.Key {
	var k ondisk.Key
	b := f.byte()
	sector := int64(b & 0x3F)
	switch b >> 6 {
	case 2:
		sector += forgeStripe - 40
	case 3:
		sector += f.sectors - 72
	}
	b = f.byte()
	n := int64(b%8) + 1
	switch {
	case b >= 0xFC:
		n = pick[int64](b, 2048, 8192, 4096, 8191)
	case b >= 0xE8:
		n = pick[int64](b, 16, 17, 127, 128, 129, 256)
	}
	// Not across the stripe, nor the disk's end: that is for monsters.
	if sector < forgeStripe {
		n = min(n, forgeStripe-sector)
	} else {
		n = min(n, f.sectors-sector)
	}
	k.Off, k.Len = uint64(sector)*sectorSize, uint32(n)*sectorSize

	b = f.byte()
	k.Seg = 1 + uint32(b)%uint32(len(f.chain)-1)
	b = f.byte()
	switch {
	case b < 0x80:
		k.SegOff = uint32(b) * sectorSize
	case b < 0xD0:
		k.SegOff = ondisk.SegmentData - k.Len - uint32(b&7)*sectorSize
	default:
		k.SegOff = 1<<20 + uint32(b&0xF)*sectorSize
	}
	b = f.byte()
	k.Gen = f.gens[k.Seg]
	if b&0xF == 0xF && k.Gen > 0 {
		k.Gen--
	}
	switch {
	case b >= 0xE0:
		k.Flags = ondisk.KeyZero
	case b >= 0xB0:
		k.Flags = ondisk.KeyClean
	}
	if b&0x40 == 0 {
		f.stamp(&k)
	}
	wrong := f.byte()
	if wrong >= 0xD0 {
		f.spoil(&k, wrong)
	}
	if f.crc && wrong < 0xB8 {
		k.CRC = f.checksum(&k)
	}
	return k
}

// spoil makes one thing wrong with a key.
func (f *forgery) spoil(k *ondisk.Key, how byte) {
	m := f.monster()
	switch how % 8 {
	case 0:
		k.Off = m
	case 1:
		k.Len = uint32(m)
	case 2:
		k.Seg = pick(byte(m), 0, uint32(len(f.chain)), uint32(len(f.chain))-1, forgeSegments, uint32(m))
	case 3:
		k.SegOff = uint32(m)
	case 4:
		k.Gen = pick(byte(m), k.Gen+1, k.Gen-1, m)
	case 5:
		k.Flags = ondisk.KeyFlags(m)
	case 6:
		k.SegOff = ondisk.SegmentData - k.Len + sectorSize
	case 7:
		k.Off = ondisk.StripeSize - sectorSize
		k.Len = 2 * sectorSize
	}
}

// stamp fills the first and the last sectors of what a key names with what
// tells where they are.
func (f *forgery) stamp(k *ondisk.Key) {
	const edge = 4
	n := int64(k.Len / sectorSize)
	for i := int64(0); i < n; i++ {
		if i == edge && n > 2*edge {
			i = n - edge
		}
		at := ondisk.Position{Seg: k.Seg, Off: k.SegOff + uint32(i)*sectorSize}
		var p [sectorSize]byte
		fillStamp(p[:], f.offset(at), 2)
		f.store(f.offset(at), p[:])
	}
}

// checksum is that of what a key names, 0 if the image does not have it.
func (f *forgery) checksum(k *ondisk.Key) uint32 {
	p := make([]byte, min(k.Len, ondisk.StripeSize))
	if n, err := f.mem.ReadAt(p, f.offset(ondisk.Position{Seg: k.Seg, Off: k.SegOff})); n < len(p) || err != nil {
		return 0
	}
	return ondisk.Checksum(p)
}

func (f *forgery) last() {
	b := f.byte()
	next := uint32(b) % uint32(len(f.chain))
	if b >= 0xE0 {
		next = uint32(f.monster())
	}
	var buf [ondisk.KsetHeaderSize]byte
	f.append(ondisk.EncodeLast(buf[:], f.seq, next))
	if b&0x10 != 0 {
		return // and go on behind it
	}
	f.at = ondisk.Position{Seg: next}
	f.store(f.offset(f.at), make([]byte, ondisk.KsetHeaderSize))
	f.places = append(f.places, f.at)
}

// place is one that the log came through, or one that it cannot.
func (f *forgery) place(b byte) ondisk.Position {
	if b < 0xE0 {
		return f.places[int(b)%len(f.places)]
	}
	p := f.places[int(f.byte())%len(f.places)]
	switch b % 4 {
	case 0:
		p.Off = uint32(f.monster())
	case 1:
		p.Seg = uint32(f.monster())
	case 2:
		p.Off += pick[uint32](f.byte(), 8, 24, 40, 64, 4, 1)
	case 3:
		p = ondisk.Position{Seg: uint32(f.byte()) % uint32(len(f.chain)), Off: ondisk.SegmentData - pick[uint32](f.byte(), 24, 16, 64, 0)}
	}
	return p
}

// replica is a copy newer than what is there, or not.
func (f *forgery) replica() ondisk.Replica {
	b := f.byte()
	return ondisk.Replica{Slot: b & 1, Seq: pick[uint8](b>>1, 10, 11, 9, 8, 9+127, 9+128, 9+129, 255, 0)}
}

func (f *forgery) tail() {
	b := f.byte()
	pos := f.place(f.byte())
	f.position(ondisk.Tail(b&1), f.replica(), pos)
	if b >= 0xC0 {
		// Key_tail goes no further than dirty_tail in a cache.
		f.position(ondisk.KeyTail, f.replica(), pos)
	}
}

func (f *forgery) number() {
	b := f.byte()
	switch b % 5 {
	case 0:
		f.seq = 0
	case 1:
		f.seq = 1<<48 - 1
	case 2:
		f.seq = 1
	case 3:
		f.seq = (f.seq + uint64(b)) & (1<<48 - 1)
	case 4:
		f.seq = f.monster() & (1<<48 - 1)
	}
}

func (f *forgery) generation() {
	b := f.byte()
	seg := int(b) % len(f.chain)
	gen := pick[uint64](b>>4, 1, 2, 1<<32, 1<<40, 1<<62)
	if b >= 0xC0 {
		gen = f.monster()
	}
	at := f.replica()
	f.gens[seg] = gen
	f.record(f.chain[seg]+8<<10+int64(at.Slot)*ondisk.GenerationSize, at.Seq, gen)
}

// somewhere is the device offset of something that matters.
func (f *forgery) somewhere() int64 {
	b := f.byte()
	in := int64(f.byte()) * 8
	seg := f.chain[int(b>>4)%len(f.chain)]
	return pick(b,
		ondisk.IdentityOff+in%2048, ondisk.SuperblockOff+in%24, ondisk.InfoOff+in%24, ondisk.InfoOff+4096+in%24, ondisk.CtrlOff+in%64,
		seg+in%16, seg+4096+in%16, seg+8192+in%32, seg+ondisk.SegmentHeader+in,
		max(0, f.offset(f.places[0]))+in, max(0, f.offset(f.places[len(f.places)-1])), max(0, f.offset(f.places[len(f.places)/2]))+in)
}

func (f *forgery) poison() {
	f.sick = true
	f.mem.Poison(f.somewhere()&^255, 256)
}

func (f *forgery) raw() {
	at := f.somewhere()
	var p [8]byte
	if b := f.byte(); b < 0x80 {
		if n, _ := f.mem.ReadAt(p[:], at); n == 8 {
			p[b%8] ^= 1 << (b >> 4)
		}
	} else {
		binary.LittleEndian.PutUint64(p[:], f.monster())
	}
	f.store(at, p[:])
}

func (f *forgery) forgeInfo() {
	i := ondisk.Info{FirstSegment: f.phys(0), Segments: uint32(len(f.chain)), Flags: ondisk.NewInfoFlags(f.crc, 70)}
	b := f.byte()
	switch b % 6 {
	case 0:
		i.FirstSegment = uint32(f.monster())
	case 1:
		i.Segments = uint32(f.monster())
	case 2:
		i.Flags = ondisk.InfoFlags(f.monster())
	case 3:
		i.Flags |= ondisk.InfoFlags(1) << (b >> 3)
	case 4:
		i.Flags = i.Flags.WithGCPercent(int(b) / 2)
	case 5:
		i.Segments += uint32(b>>3)%3 - 1
	}
	f.info(f.replica(), i)
}

// link forges the link of one segment of the chain to the next.
func (f *forgery) link() {
	b := f.byte()
	next := uint64(f.phys(int(b>>4) % len(f.chain)))
	if b&8 != 0 {
		next = f.monster() & math.MaxUint32
	}
	flags := pick[uint64](b&7, 3, 3, 3, 3, 2, 1, 5, 0x1F)
	at := f.replica()
	f.record(f.chain[int(f.byte())%len(f.chain)]+int64(at.Slot)*4096, at.Seq, flags|next<<32)
}

func (f *forgery) superblock() {
	f.segmentsInSuperblock(pick(f.byte(), forgeSegments, uint32(len(f.chain)), forgeSegments+1, uint32(f.monster())))
}

// front forges what stands in the first 4 KiB.
func (f *forgery) front() {
	var buf [ondisk.IdentitySize]byte
	at, b := f.replica(), f.byte()
	if b < 0x80 {
		off := ondisk.EncodeIdentity(buf[:], at, &ondisk.Identity{BackingSize: int64(f.monster()), Serial: "forged"})
		f.store(off, buf[:])
		return
	}
	seq := f.seq
	if b >= 0xC0 {
		seq = f.monster()
	}
	if b >= 0xE0 {
		s := ondisk.Settings{Mode: ondisk.Mode(b % 8), DirtyHigh: f.byte(), DirtyLow: f.byte(), SeqCutoff: int64(f.monster()), WritebackRate: int64(f.monster()), Writeback: b&8 != 0}
		off := ondisk.EncodeSettings(buf[:], at, &s)
		f.store(off, buf[:ondisk.SettingsSize])
		return
	}
	off := ondisk.EncodeSyncMark(buf[:], at, seq)
	f.store(off, buf[:ondisk.SyncMarkSize])
}

func (f *forgery) act(b byte) {
	a := act{kind: b % actKinds, arg: f.byte()}
	if a.kind <= actZero {
		b, unit := f.byte(), int64(f.block/sectorSize)
		a.sector = int64(b&0x3F) * unit
		switch {
		case b >= 0xC0:
			a.sector = (f.sectors/unit - 8 + int64(b&7)) * unit
		case a.kind == actZero && b >= 0x80:
			// Which may cross a stripe.
			a.sector = forgeStripe - int64(b&0x1F)*unit
		}
		a.n = int(min(f.sectors-a.sector, unit*pick[int64](f.byte(), 1, 2, 3, 8, 17)))
	}
	f.acts = append(f.acts, a)
}
