package ondisk

import "bytes"

// Nothing in the kernel's format says which backing device a cache belongs
// to: any disk of any size is accepted, and the dirty data of one is written
// over another. The identity record says it. It lies in the first 4 KiB of
// the device, which the kernel neither reads nor writes; a cache without one
// (the kernel's own) gets it when it is first opened with its backing device.
//
// A kernel that formats the device leaves the record of the cache that was
// there before. That record may then refuse a backing device until a person
// confirms it, and it does not tell the new cache from the old one.

const (
	identityMagic    = 0x4449454843414350 // "PCACHEID" in memory order
	identitySize     = 8 + 8 + 16 + 8 + serialSize
	identityDistance = 2 << 10 // between the copies
	serialSize       = 128     // longer ones (a wwid may be) are cut
)

// IdentitySize is the size in bytes of an encoded identity record.
const IdentitySize = identitySize

// Identity ties a cache to its backing device.
type Identity struct {
	UUID        [16]byte // of the cache, made when it is bound
	BackingSize int64    // bytes
	Serial      string   // of the backing device, or what else it is known by; empty when there is nothing
}

// Matches reports whether a backing device with this serial is the one named.
// A device without a serial, then or now, cannot be told apart by it.
func (id *Identity) Matches(serial string) bool {
	return id.Serial == "" || serial == "" || id.Serial == cutSerial(serial)
}

func cutSerial(s string) string { return s[:min(len(s), serialSize)] }

// EncodeIdentity writes the copy at of id into dst, IdentitySize bytes.
func EncodeIdentity(dst []byte, at Replica, id *Identity) (off int64) {
	dst = dst[:identitySize]
	clear(dst)
	le.PutUint64(dst[8:], identityMagic)
	copy(dst[16:32], id.UUID[:])
	le.PutUint64(dst[32:], uint64(id.BackingSize))
	copy(dst[40:], cutSerial(id.Serial))
	seal(dst, at.Seq)
	return IdentityOff + int64(at.Slot)*identityDistance
}

func decodeIdentity(p []byte) *Identity {
	id := &Identity{BackingSize: int64(le.Uint64(p[32:]))}
	copy(id.UUID[:], p[16:32])
	id.Serial = string(bytes.TrimRight(p[40:identitySize], "\x00"))
	return id
}
