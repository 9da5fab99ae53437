package main

import (
	"regexp"
	"testing"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
)

// TestSameDevice: what can be compared decides, and a table on the disk only
// while it is known to be nobody's but the one on record.
func TestSameDevice(t *testing.T) {
	at := ondisk.Position{Seg: 3, Off: 4096}
	known := ondisk.Fingerprint{State: ondisk.FingerprintKnown, Sum: 0x1234, DirtyTail: [2]ondisk.Position{{}, at}}
	moved, unknown := known, ondisk.Fingerprint{}
	moved.DirtyTail[1].Off += 24
	changed := known
	changed.State = ondisk.FingerprintChanged
	for _, c := range []struct {
		recorded, present string
		fingerprint       ondisk.Fingerprint
		same              bool
	}{
		{"", "S1", known, true}, {"S1", "", known, true}, {"S1", "S1", known, true}, {"S1", "S2", unknown, false},
		{"file:0:1:2", "file:0:1:2", known, true}, {"file:0:1:2", "file:0:1:3", unknown, false}, {"file:0:1:2", "", known, true},
		{"S1", "file:0:1:2", unknown, false}, {"file:0:1:2", "S1", unknown, false}, {"gpt:a", "file:0:1:2", unknown, true},
		{"partuuid:1", "partuuid:1", known, true}, {"partuuid:1", "partuuid:2", unknown, false},
		{"S1", "partuuid:1", known, true}, {"partuuid:1", "S1", known, true}, {"gpt:a@00001234", "S1", known, true},
		{"gpt:a@00001234", "gpt:a", known, true}, {"gpt:a@00001234", "gpt:b", known, false},
		{"gpt:a@00001234", "gpt:b", unknown, true}, {"gpt:a@00001234", "gpt:b", moved, true}, {"gpt:a@00001234", "gpt:b", changed, true},
		{"gpt:a@00001235", "gpt:b", known, true}, {"gpt:a", "gpt:b", known, true}, {"gpt:a@", "gpt:b", known, true},
	} {
		l := &ondisk.Layout{Identity: &ondisk.Identity{Serial: c.recorded}, Fingerprint: c.fingerprint, DirtyTail: at}
		if got := sameDevice(l, c.present); got != c.same {
			t.Errorf("%q on record, %q present, %v: %v", c.recorded, c.present, c.fingerprint, got)
		}
		l.FingerprintCopies.State[1] = ondisk.CopyUnreadable
		if backing.OnDevice(c.recorded) && !sameDevice(l, c.present) {
			t.Errorf("%q on record, %q present: not the same, and the fingerprint may be an older one", c.recorded, c.present)
		}
	}
}

// TestBind: a record is made, kept, and made better, and never loses its uuid.
func TestBind(t *testing.T) {
	s := newServer(t)
	if err := ondisk.Format(s.region, ondisk.FormatOptions{}); err != nil {
		t.Fatal(err)
	}
	var uuid [16]byte
	for i, c := range []struct{ present, recorded string }{
		{"", ""}, {"gpt:a", "gpt:a"}, {"", "gpt:a"}, {"gpt:b", "gpt:b"}, {"S1", "S1"}, {"", "S1"}, {"gpt:a", "S1"}, {"partuuid:1", "S1"}, {"S2", "S2"},
	} {
		if err := s.bind(func() (*ondisk.Identity, bool) {
			return &ondisk.Identity{UUID: [16]byte{byte(i + 1)}, BackingSize: int64(i+1) << 20, Serial: c.present}, true
		}); err != nil {
			t.Fatal(err)
		}
		l, err := ondisk.ReadLayout(s.region, s.region.Size())
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			uuid = l.Identity.UUID
		}
		if id := l.Identity; id.Serial != c.recorded || id.UUID != uuid || id.BackingSize != int64(i+1)<<20 {
			t.Errorf("%q present: on record %+v, should be %q", c.present, id, c.recorded)
		}
	}
	if err := s.bind(func() (*ondisk.Identity, bool) { return nil, false }); err != nil {
		t.Errorf("bound to a disk that does not answer: %v", err)
	}

	// The proof that a table has not been replaced since.
	store := func(f *ondisk.Fingerprint) {
		var buf [ondisk.FingerprintSize]byte
		l, err := ondisk.ReadLayout(s.region, s.region.Size())
		if err != nil {
			t.Fatal(err)
		}
		off := ondisk.EncodeFingerprint(buf[:], l.FingerprintCopies.Newest.Next(), f)
		if _, err := s.region.WriteAt(buf[:], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := ondisk.Format(s.region, ondisk.FormatOptions{}); err != nil {
		t.Fatal(err)
	}
	known := &ondisk.Fingerprint{State: ondisk.FingerprintKnown, Sum: 0xABCD, Size: 4 << 20}
	for _, c := range []struct {
		before, after *ondisk.Fingerprint
		recorded      string
	}{
		{known, known, "gpt:a@0000abcd"},
		{known, &ondisk.Fingerprint{}, "gpt:a"},
		{&ondisk.Fingerprint{}, known, "gpt:a"},
		{&ondisk.Fingerprint{State: ondisk.FingerprintKnown, Sum: 1}, known, "gpt:a"},
	} {
		store(c.before)
		if err := s.bind(func() (*ondisk.Identity, bool) {
			store(c.after)
			return &ondisk.Identity{BackingSize: 4 << 20, Serial: "gpt:a"}, true
		}); err != nil {
			t.Fatal(err)
		}
		if l, err := ondisk.ReadLayout(s.region, s.region.Size()); err != nil || l.Identity.Serial != c.recorded {
			t.Errorf("fingerprint %v, then %v: on record %+v, should be %q, %v", c.before, c.after, l.Identity, c.recorded, err)
		}
	}

	// At the end the disk is only asked if it has been written to.
	for _, c := range []struct {
		fingerprint *ondisk.Fingerprint
		proven      string
		asked       bool
	}{
		{&ondisk.Fingerprint{}, "0000abcd", false}, {known, "0000abcd", false}, {known, "0000abce", true}, {known, "", true},
	} {
		if err := s.bind(func() (*ondisk.Identity, bool) { return &ondisk.Identity{BackingSize: 1 << 20}, true }); err != nil {
			t.Fatal(err)
		}
		store(c.fingerprint)
		s.proven = c.proven
		if err := s.rebind(); err != nil {
			t.Fatal(err)
		}
		l, err := ondisk.ReadLayout(s.region, s.region.Size())
		if asked := err == nil && l.Identity.BackingSize == s.disk.Size(); asked != c.asked {
			t.Errorf("fingerprint %v, %q when it was bound: asked %v, %v", c.fingerprint, c.proven, asked, err)
		}
	}
}

// TestUUID: a cache's own name is a random UUID, written as older servers wrote it into
// the state file.
func TestUUID(t *testing.T) {
	version4 := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := map[[16]byte]bool{}
	for range 256 {
		u := newUUID()
		if seen[u] || !version4.MatchString(uuidText(u)) {
			t.Fatalf("%s after %d others", uuidText(u), len(seen))
		}
		seen[u] = true
	}
	known := [16]byte{0x6b, 0xa7, 0xb8, 0x10, 0x9d, 0xad, 0x11, 0xd1, 0x80, 0xb4, 0, 0xc0, 0x4f, 0xd4, 0x30, 0xc8}
	if text := uuidText(known); text != "6ba7b810-9dad-11d1-80b4-00c04fd430c8" {
		t.Errorf("it is written as %s", text)
	}
}
