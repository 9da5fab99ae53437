package main

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
)

// The identity record names the backing device by its serial number or what else
// it is known by (backing.Device.Identity), in the same field: a version that
// knows serial numbers alone finds that the device has none, which it takes for
// any.
//
// A disk may have only the partition table that is on it. A table is
// no identity: users of the cached device make another table, it is in the cache,
// and some time later on the disk, and nothing else has happened. Refusing the
// disk for it would refuse the right one. But the fingerprint knows (see
// engine/fingerprint.go): while it is the one that the disk had with this table,
// the cache has not written to where the table is. So the record holds it
// as well, and a disk with another table is refused only if it has not changed.
//
// If the kernel has had the cache in between, it may have written a table and
// died before it moved dirty_tail, which cannot be told from here. Its users then
// need --force.

// identityOf describes a disk for the cache that belongs to it.
func identityOf(d *backing.Device) *ondisk.Identity {
	return &ondisk.Identity{UUID: newUUID(), BackingSize: d.Size(), Serial: d.Identity()}
}

// newUUID makes a random UUID (RFC 9562, version 4).
func newUUID() (u [16]byte) {
	rand.Read(u[:])
	u[6] = u[6]&0x0f | 4<<4    // the version
	u[8] = u[8]&0x3f | 0b10<<6 // the variant
	return u
}

// uuidText is a UUID as it is written everywhere.
func uuidText(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// proof is between the identity of a table and the fingerprint of its disk.
const proof = "@"

// sameDevice reports whether a device that is known as present may be the one
// that the cache with this layout belongs to. One without any identity, then or
// now, cannot be told apart, nor can two that are known by different things.
func sameDevice(l *ondisk.Layout, present string) bool {
	recorded := l.Identity.Serial
	if recorded == "" || present == "" || !backing.SameKind(recorded, present) {
		return true
	}
	if !backing.OnDevice(recorded) {
		return l.Identity.Matches(present)
	}
	table, sum, _ := strings.Cut(recorded, proof)
	return table == present || sum == "" || sum != provenBy(l)
}

// provenBy is the fingerprint that the disk of a cache has if nobody but the cache
// has written to it; empty if that cannot be told.
func provenBy(l *ondisk.Layout) string {
	f := l.Fingerprint
	if f.State != ondisk.FingerprintKnown || !slices.Contains(f.DirtyTail[:], l.DirtyTail) ||
		slices.Contains(l.FingerprintCopies.State[:], ondisk.CopyUnreadable) {
		return ""
	}
	return fmt.Sprintf("%08x", f.Sum)
}

// known is what a device is known by, for people.
func known(identity string) string {
	if backing.IsSerial(identity) {
		return fmt.Sprintf("serial %q", identity)
	}
	identity, _, _ = strings.Cut(identity, proof)
	return fmt.Sprintf("identity %q", identity)
}

// bind ties the cache to its disk, as that is now, where it is not on record. ask
// returns the disk's identity, or that it cannot be told now.
func (s *server) bind(ask func() (id *ondisk.Identity, ok bool)) error {
	l, err := ondisk.ReadLayout(s.region, s.region.Size())
	if err != nil {
		return err
	}
	before := provenBy(l)
	now, ok := ask()
	if !ok {
		return nil
	}
	if l, err = ondisk.ReadLayout(s.region, s.region.Size()); err != nil {
		return err
	}
	// While a table was read, write-back may have changed it. It has not if the
	// fingerprint is the same.
	if s.proven = provenBy(l); before != s.proven {
		s.proven = ""
	}
	if s.proven != "" && backing.OnDevice(now.Serial) {
		now.Serial += proof + s.proven
	}
	if old := l.Identity; old != nil {
		now.UUID = old.UUID
		if old.Serial != "" && (old.Matches(now.Serial) || !backing.SameKind(old.Serial, now.Serial) && !backing.OnDevice(old.Serial)) {
			now.Serial = old.Serial
		}
		if *old == *now {
			return nil
		}
	}
	return ondisk.WriteIdentity(s.region, l.IdentityCopies.Newest, now)
}

func (s *server) bindNow() error {
	return s.bind(func() (*ondisk.Identity, bool) { return identityOf(s.disk), true })
}

// rebind is for the end, when the disk may have another table than it began with.
// It need not answer, so it is only asked if it has been written to where that is.
func (s *server) rebind() error {
	l, err := ondisk.ReadLayout(s.region, s.region.Size())
	if err != nil {
		return err
	}
	if sum := provenBy(l); sum == "" || sum == s.proven {
		return nil
	}
	return s.bind(func() (id *ondisk.Identity, ok bool) {
		answer := make(chan *ondisk.Identity, 1)
		_, ok = inTime(func() error { answer <- identityOf(s.disk); return nil })
		if ok {
			id = <-answer
		}
		return id, ok
	})
}
