package ondisk

import (
	"crypto/sha256"
	"encoding/hex"
	"testing"
)

var goldens = []struct {
	name               string
	dataCRC            bool
	keys, clean, ksets int
	head               Position
	sum                string
}{
	{"small-crc", true, 217, 122, 4, Position{0, 8776}, "62a81938d76b6e6374f160aa65ce823c30fb7a9107a97c2db0ca7fb7759d9803"},
	{"small-nocrc", false, 214, 111, 8, Position{0, 8752}, "6a7695aa6137be5d99053f8c7953a0d2dbe02b01534093d77dec956d7232e384"},
}

// TestGolden replays what the kernel wrote and compares the device that a
// reader must see.
func TestGolden(t *testing.T) {
	for _, g := range goldens {
		t.Run(g.name, func(t *testing.T) {
			pmem, backing := golden(t, g.name+".pmem"), golden(t, g.name+".backing")
			l, err := ReadLayout(pmem, pmem.Size())
			if err != nil {
				t.Fatal(err)
			}
			if l.Info.Flags.DataCRC() != g.dataCRC || l.Info.Flags.GCPercent() != 70 || l.Superblock.Segments != 32 ||
				l.KeyTail != (Position{}) || l.DirtyTail != (Position{}) || l.Identity != nil || len(l.DamagedCopies) != 0 {
				t.Errorf("layout: %+v", l)
			}
			for id, phys := range l.Chain {
				if phys != uint32(id) || l.Gens[id] != 0 || l.GenAt[id] != (Replica{1, 1}) {
					t.Errorf("segment %d: physical %d, generation %d at %v", id, phys, l.Gens[id], l.GenAt[id])
				}
			}

			view := make([]byte, backing.Size())
			if _, err := backing.ReadAt(view, 0); err != nil {
				t.Fatal(err)
			}
			keys, clean, ksets := 0, 0, 0
			end, err := l.WalkLog(pmem, l.KeyTail, func(_ Position, k *Kset) error {
				ksets++
				for _, key := range k.Keys {
					keys++
					if key.Flags&KeyClean != 0 {
						clean++
					}
					data := view[key.Off:][:key.Len]
					if _, err := pmem.ReadAt(data, l.Offset(key.Seg, key.SegOff)); err != nil {
						t.Fatal(err)
					}
					if want := Checksum(data); g.dataCRC && key.CRC != want || !g.dataCRC && key.CRC != 0 {
						t.Errorf("key %+v: data has crc %#x", key, want)
					}
				}
				return nil
			})
			if err != nil || end != (LogEnd{Pos: g.head}) {
				t.Errorf("log ends at %+v, %v; want %v", end, err, g.head)
			}
			if keys != g.keys || clean != g.clean || ksets != g.ksets {
				t.Errorf("%d keys (%d clean) in %d ksets, want %d (%d) in %d", keys, clean, ksets, g.keys, g.clean, g.ksets)
			}
			if sum := sha256.Sum256(view); hex.EncodeToString(sum[:]) != g.sum {
				t.Errorf("device has sha256 %x, want %s", sum, g.sum)
			}
		})
	}
}
