package ondisk

import (
	"bytes"
	"io"
	"testing"
)

func FuzzDecodeKset(f *testing.F) {
	buf := make([]byte, MaxKsetSize)
	f.Add(bytes.Clone(EncodeKset(buf, 3, []Key{{Len: 512}, {Off: 4096, Len: 4096, Seg: 3}})))
	f.Add(bytes.Clone(EncodeLast(buf, 4, 7)))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > KsetHeaderSize {
			// Let the fuzzer past the checksum: it cannot guess one.
			if n, err := ksetLen(p); err == nil && int(n) <= len(p) {
				p = bytes.Clone(p)
				le.PutUint32(p, Checksum(p[4:n]))
			}
		}
		var k Kset
		if DecodeKset(p, &k) != nil {
			return
		}
		if len(k.Keys) > MaxKeys || k.Last && len(k.Keys) > 0 || int(k.Size()) > len(p) {
			t.Fatalf("%+v from %d bytes", k, len(p))
		}
		for i := range k.Keys {
			if key := &k.Keys[i]; key.Validate(31) == nil {
				if key.Seg >= 31 || int64(key.SegOff)+int64(key.Len) > SegmentData || int64(key.Off)+int64(key.Len) <= 0 {
					t.Fatalf("%+v is no key", key)
				}
			}
		}
	})
}

func FuzzDecodeSuperblock(f *testing.F) {
	buf := make([]byte, SuperblockSize)
	EncodeSuperblock(buf, Superblock{Segments: 31})
	f.Add(buf, int64(MinSize))
	f.Fuzz(func(t *testing.T, p []byte, size int64) {
		if len(p) < SuperblockSize {
			return
		}
		p = bytes.Clone(p)
		le.PutUint32(p, Checksum(p[4:SuperblockSize]))
		s, err := DecodeSuperblock(p, size)
		if err == nil && (s.Segments == 0 || s.Segments > MaxSegments || segmentOff(s.Segments) > size) {
			t.Fatalf("%d segments on %d bytes", s.Segments, size)
		}
	})
}

// FuzzRecords gives the same bytes, with a checksum made right, to the decoder
// of every replicated record.
func FuzzRecords(f *testing.F) {
	buf := make([]byte, IdentitySize)
	EncodeIdentity(buf, Replica{}, &Identity{BackingSize: 4096, Serial: "S"})
	f.Add(bytes.Clone(buf))
	EncodeFingerprint(buf, Replica{}, &Fingerprint{State: FingerprintKnown, Size: 4096})
	f.Add(bytes.Clone(buf))
	EncodeSettings(buf, Replica{}, &through)
	f.Add(bytes.Clone(buf))
	EncodeInfo(buf, Replica{}, Info{Segments: 31, Flags: NewInfoFlags(true, 70)})
	f.Add(bytes.Clone(buf))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) < IdentitySize {
			return
		}
		sealed := func(n int) []byte {
			q := bytes.Clone(p[:n])
			le.PutUint32(q, Checksum(q[4:]))
			return q
		}
		i := decodeInfo(sealed(InfoSize))
		if i.validate(Superblock{Segments: 31}) == nil && (i.Segments > 31 || i.FirstSegment > 30 || i.Flags.GCPercent() > 90) {
			t.Fatalf("%+v", i)
		}
		pos := decodePosition(sealed(PositionSize))
		if pos.validate(31) == nil && (pos.Seg > 30 || pos.Off+KsetHeaderSize > SegmentData) {
			t.Fatalf("%+v", pos)
		}
		decodeSegmentInfo(sealed(SegmentInfoSize))
		decodeGeneration(sealed(GenerationSize))
		if f := decodeFingerprint(sealed(FingerprintSize)); f.State.String() == "" {
			t.Fatalf("%+v", f)
		}
		if s, err := decodeSettings(sealed(SettingsSize)); err == nil {
			again := make([]byte, SettingsSize)
			EncodeSettings(again, Replica{}, &s)
			if got, err := decodeSettings(again); got != s || err != nil || s.Validate() != nil {
				t.Fatalf("%+v becomes %+v, %v", s, got, err)
			}
		}
		if id := decodeIdentity(sealed(IdentitySize)); len(id.Serial) > serialSize {
			t.Fatalf("%+v", id)
		}
	})
}

// witness fails the test when something outside the device is asked for.
type witness struct {
	io.ReaderAt
	t    *testing.T
	size int64
}

func (w witness) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > w.size {
		w.t.Fatalf("read of %d bytes at %d of %d", len(p), off, w.size)
	}
	return w.ReaderAt.ReadAt(p, off)
}

// FuzzImage changes a small cache in many places, makes the checksums right
// again where asked to, and reads it in every way there is.
//
// An edit is 8 bytes: which record (or word of the log), which word of it, the
// value in 4 bytes, and what to do.
func FuzzImage(f *testing.F) {
	w := newScribe(f, 9)
	w.kset(2)
	w.last(3)
	w.kset(4)
	w.kset(1)
	for _, at := range bothCopies {
		var p [SettingsSize]byte
		w.s.WriteAt(p[:], EncodeSettings(p[:], at, &through))
	}
	records := []struct{ off, size int64 }{
		{SuperblockOff, SuperblockSize}, {InfoOff, InfoSize}, {InfoOff + infoDistance, InfoSize},
		{keyTailOff, PositionSize}, {keyTailOff + 16, PositionSize}, {dirtyTailOff, PositionSize}, {dirtyTailOff + 16, PositionSize},
		{segmentOff(2), SegmentInfoSize}, {segmentOff(2) + infoDistance, SegmentInfoSize}, {segmentOff(2) + genOff, GenerationSize},
		{IdentityOff, IdentitySize}, {IdentityOff + identityDistance, IdentitySize},
		{w.l.Offset(0, 0), int64(KsetSize(2))}, {w.l.Offset(0, KsetSize(2)), KsetHeaderSize},
		{w.l.Offset(3, 0), int64(KsetSize(4))}, {w.l.Offset(3, KsetSize(4)), int64(KsetSize(1))},
		{w.l.Offset(0, 1<<20), int64(KsetSize(2))},
		{fingerprintOff, FingerprintSize}, {fingerprintOff + identityDistance, FingerprintSize},
		{settingsOff, SettingsSize}, {settingsOff + identityDistance, SettingsSize},
	}
	const (
		set    = iota // store the value
		sealed        // and make the checksum right
		poison
		actions
	)
	f.Add([]byte{1, 3, 31, 0, 0, 0, sealed, 0})
	f.Add([]byte{13, 1, 0, 0, 0, 0, sealed, 0})
	f.Add([]byte{14, 6, 0xFF, 0xFF, 0xFF, 0xFF, sealed, 0})
	f.Add([]byte{12, 7, 1, 0, 0, 0, set, 0, 4, 0, 0, 0, 0, 0, poison, 0})
	f.Fuzz(func(t *testing.T, edits []byte) {
		s := w.s.clone()
		for ; len(edits) >= 8; edits = edits[8:] {
			rec := records[int(edits[0])%len(records)]
			at := rec.off + int64(edits[1])*4%rec.size
			switch edits[6] % actions {
			case poison:
				s.poison[at] = 4
				continue
			case set:
				s.WriteAt(edits[2:6], at)
			case sealed:
				s.WriteAt(edits[2:6], at)
				p := make([]byte, rec.size)
				if _, err := s.ReadAt(p, rec.off); err == nil {
					le.PutUint32(p, Checksum(p[4:]))
					s.WriteAt(p, rec.off)
				}
			}
		}
		r := witness{s, t, s.size}
		Blank(r, s.size)
		Check(r, s.size, true)
		for _, o := range []RepairOptions{{}, {Durable: true, GiveUpLog: true}} {
			rep := Repair(r, s.size, o) // panics if it stores outside
			if rep.Verify(); rep.Done() {
				if again := Repair(rep, s.size, o); len(again.Mended) > 0 {
					t.Fatalf("repaired again, it finds %q after %q", again.Mended, rep.Mended)
				}
			}
		}
		l, err := ReadLayout(r, s.size)
		if err != nil {
			return
		}
		for _, from := range []Position{l.KeyTail, l.DirtyTail} {
			end, err := l.WalkLog(r, from, func(_ Position, k *Kset) error {
				for i := range k.Keys {
					if l.Offset(k.Keys[i].Seg, k.Keys[i].SegOff)+int64(k.Keys[i].Len) > s.size {
						t.Fatalf("%+v", k.Keys[i])
					}
				}
				return nil
			})
			if err != nil || end.Pos.validate(uint32(len(l.Chain))) != nil {
				t.Fatalf("%+v, %v", end, err)
			}
		}
	})
}
