package ondisk

import (
	"bytes"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

func drawKey(t *rapid.T) Key {
	size := rapid.Uint32Range(1, 256).Draw(t, "sectors") * SectorSize
	inStripe := rapid.Uint64Range(0, (StripeSize-uint64(size))/SectorSize).Draw(t, "in stripe") * SectorSize
	return Key{
		Off:    rapid.Uint64Range(0, 1<<40).Draw(t, "stripe")*StripeSize + inStripe,
		Len:    size,
		Flags:  KeyFlags(rapid.SampledFrom([]KeyFlags{0, KeyClean}).Draw(t, "flags")),
		Gen:    rapid.Uint64().Draw(t, "gen"),
		Seg:    rapid.Uint32Range(0, 31).Draw(t, "seg"),
		SegOff: rapid.Uint32Range(0, (SegmentData-size)/SectorSize).Draw(t, "seg off") * SectorSize,
		CRC:    rapid.Uint32().Draw(t, "crc"),
	}
}

func TestKsetRoundTrip(t *testing.T) {
	var got Kset
	rapid.Check(t, func(t *rapid.T) {
		want := Kset{Seq: rapid.Uint64Range(0, seqMask).Draw(t, "seq")}
		buf := make([]byte, MaxKsetSize+8)
		var p []byte
		if rapid.Bool().Draw(t, "last") {
			want.Last, want.Next = true, rapid.Uint32().Draw(t, "next")
			p = EncodeLast(buf, want.Seq, want.Next)
		} else {
			want.Keys = rapid.SliceOfN(rapid.Custom(drawKey), 1, MaxKeys).Draw(t, "keys")
			p = EncodeKset(buf, want.Seq, want.Keys)
		}
		if len(p) != int(want.Size()) {
			t.Fatalf("%d bytes for %d keys", len(p), len(want.Keys))
		}
		if err := DecodeKset(buf, &got); err != nil {
			t.Fatal(err)
		}
		if got.Seq != want.Seq || got.Last != want.Last || got.Next != want.Next ||
			len(got.Keys) != len(want.Keys) || len(want.Keys) > 0 && !reflect.DeepEqual(got.Keys, want.Keys) {
			t.Fatalf("got %+v, want %+v", got, want)
		}
		for i := range got.Keys {
			if err := got.Keys[i].Validate(32); err != nil {
				t.Fatal(err)
			}
		}
		if err := DecodeKset(p[:len(p)-1], &got); err == nil {
			t.Fatal("a cut kset decodes")
		}
		// Each 8 bytes arrive or do not; a mixture with what was there before
		// must not pass.
		torn := bytes.Clone(p)
		word := rapid.IntRange(0, len(p)/8-1).Draw(t, "torn word") * 8
		old := rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "old bytes")
		copy(torn[word:], old)
		if !bytes.Equal(torn, p) && DecodeKset(torn, &got) == nil {
			t.Fatal("a torn kset decodes")
		}
	})
}

// TestKsetBytes keeps the log readable by the kernel: a kset without a number,
// encoded again, is the kernel's own.
func TestKsetBytes(t *testing.T) {
	image := golden(t, "small-crc.pmem")
	l, err := ReadLayout(image, image.Size())
	if err != nil {
		t.Fatal(err)
	}
	buf, want := make([]byte, MaxKsetSize), make([]byte, MaxKsetSize)
	_, err = l.WalkLog(image, l.KeyTail, func(at Position, k *Kset) error {
		p := EncodeKset(buf, 0, k.Keys)
		if _, err := image.ReadAt(want[:len(p)], l.Offset(at.Seg, at.Off)); err != nil {
			return err
		}
		if !bytes.Equal(p, want[:len(p)]) {
			t.Errorf("kset at %v is encoded differently", at)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestValidate(t *testing.T) {
	good := Key{Off: StripeSize - 512, Len: 512, Seg: 31, SegOff: SegmentData - 512, Gen: 1}
	if err := good.Validate(32); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(k *Key){
		"empty flag":           func(k *Key) { k.Flags = KeyEmpty },
		"no length":            func(k *Key) { k.Len = 0 },
		"odd length":           func(k *Key) { k.Len = 100 },
		"odd offset":           func(k *Key) { k.Off = 100 },
		"across a stripe":      func(k *Key) { k.Len = 1024; k.SegOff = 0 },
		"huge length":          func(k *Key) { k.Len = 1<<32 - 512 },
		"offset wraps":         func(k *Key) { k.Off = 1<<64 - 512; k.Len = 1024 },
		"offset is negative":   func(k *Key) { k.Off = 1 << 63 },
		"no such segment":      func(k *Key) { k.Seg = 32 },
		"beyond the segment":   func(k *Key) { k.SegOff += 512 },
		"off the sector grid":  func(k *Key) { k.SegOff -= 8 },
		"segment offset wraps": func(k *Key) { k.SegOff = 1<<32 - 256 },
	} {
		k := good
		spoil(&k)
		if err := k.Validate(32); err == nil {
			t.Errorf("%s: %+v passes", name, k)
		}
	}
}

func TestSeq(t *testing.T) {
	if NextSeq(seqMask) != 1 || NextSeq(1) != 2 {
		t.Error("numbers go from the largest to 1")
	}
	if seqDistance(seqMask, 1) != 1 || seqDistance(5, 8) != 3 || seqDistance(1, seqMask) != seqMask-1 {
		t.Error("distance does not count steps")
	}
	if a, b := FirstSeq(), FirstSeq(); a == b || a>>48 != 0 || a == 0 {
		t.Errorf("first numbers %#x, %#x", a, b)
	}
}

func TestEncodersDoNotAllocate(t *testing.T) {
	buf := make([]byte, MaxKsetSize)
	keys := make([]Key, MaxKeys)
	for i := range keys {
		keys[i] = Key{Off: uint64(i) * 512, Len: 512}
	}
	k := Kset{Keys: make([]Key, 0, MaxKeys)}
	l := &Layout{Chain: []uint32{0}}
	id := &Identity{Serial: "serial"}
	if n := testing.AllocsPerRun(100, func() {
		EncodeLast(buf, 7, 1)
		EncodePosition(buf, DirtyTail, Replica{}, Position{1, 8})
		EncodeInfo(buf, Replica{}, Info{})
		l.EncodeGeneration(buf, 0, Replica{}, 5)
		EncodeIdentity(buf, Replica{}, id)
		EncodeKset(buf, 7, keys)
		if err := DecodeKset(buf, &k); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkEncodeKset128(b *testing.B) {
	buf := make([]byte, MaxKsetSize)
	keys := make([]Key, MaxKeys)
	for b.Loop() {
		EncodeKset(buf, 7, keys)
	}
}

func BenchmarkDecodeKset128(b *testing.B) {
	buf := EncodeKset(make([]byte, MaxKsetSize), 7, make([]Key, MaxKeys))
	var k Kset
	for b.Loop() {
		if err := DecodeKset(buf, &k); err != nil {
			b.Fatal(err)
		}
	}
}
