package backing

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"
)

// gpt is the head of a disk with blocks of a size: a table with this disk GUID
// and partitions, each numbered by the first byte of its GUID, 0 for none.
func gpt(block int, disk byte, partitions ...byte) []byte {
	le := binary.LittleEndian
	p := make([]byte, 40<<10)
	p[510], p[511] = 0x55, 0xAA
	p[450] = 0xEE // protective, from block 1 on
	le.PutUint32(p[454:], 1)
	le.PutUint32(p[458:], uint32(testSize/block-1))
	entries := p[2*block:][:128*128]
	for i, number := range partitions {
		if number == 0 {
			continue
		}
		e := entries[128*i:]
		e[0] = 0xAF // a type
		copy(e[16:], []byte{number, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
		le.PutUint64(e[32:], uint64(1<<20/block*(i+1)))
		le.PutUint64(e[40:], uint64(1<<20/block*(i+2)-1))
	}
	h := p[block:][:92]
	copy(h, "EFI PART")
	le.PutUint32(h[8:], 0x10000)
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[40:], uint64(32<<10/block))
	le.PutUint64(h[48:], uint64(testSize/block-34))
	copy(h[56:], []byte{disk, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	return p
}

func TestTable(t *testing.T) {
	for _, block := range []int{512, 4096} {
		table, err := readTable(bytes.NewReader(gpt(block, 0xAA, 1, 0, 3)))
		if err != nil || table.disk != "gpt:030201aa-0504-0706-0809-0a0b0c0d0e0f" {
			t.Errorf("blocks of %d: %q, %v", block, table.disk, err)
		}
		for number, want := range map[string]string{
			"1": "partuuid:03020101-0504-0706-0809-0a0b0c0d0e0f", "2": "", "3": "partuuid:03020103-0504-0706-0809-0a0b0c0d0e0f",
			"128": "", "129": "", "0": "", "-1": "", "": "", "x": "",
		} {
			if got := table.partition(number); got != want {
				t.Errorf("blocks of %d, partition %s: %q, should be %q", block, number, got, want)
			}
		}
		// Each byte counts that is not behind the checksums.
		for _, at := range []int{0, 12, 16, 24, 56, 71, 72, 80, 84, 88, 91} {
			p := gpt(block, 0xAA, 1)
			p[block+at] ^= 0x80
			if table, err := readTable(bytes.NewReader(p)); err == nil {
				t.Errorf("blocks of %d, byte %d damaged: %+v", block, at, table)
			}
		}
		p := gpt(block, 0xAA, 1)
		p[2*block+130] = 1
		if table, err := readTable(bytes.NewReader(p)); err == nil {
			t.Errorf("blocks of %d, an entry damaged: %+v", block, table)
		}
		if table, err := readTable(bytes.NewReader(p[:3*block])); err == nil {
			t.Errorf("blocks of %d, cut short: %+v", block, table)
		}
	}

	mbr := make([]byte, 8192)
	mbr[510], mbr[511] = 0x55, 0xAA
	if table, err := readTable(bytes.NewReader(mbr)); err == nil {
		t.Errorf("an MBR without a number: %+v", table)
	}
	copy(mbr[440:], []byte{0x78, 0x56, 0x34, 0x12})
	table, err := readTable(bytes.NewReader(mbr))
	if err != nil || table.disk != "" || table.partition("1") != "partuuid:12345678-01" || table.partition("17") != "partuuid:12345678-11" {
		t.Errorf("an MBR: %+v, %v", table, err)
	}
}

// Fields of a table with right checksums lead nowhere.
func TestForgedTable(t *testing.T) {
	for name, forge := range map[string]func(h []byte){
		"header too short":   func(h []byte) { binary.LittleEndian.PutUint32(h[12:], 91) },
		"header too long":    func(h []byte) { binary.LittleEndian.PutUint32(h[12:], 513) },
		"entries too far":    func(h []byte) { binary.LittleEndian.PutUint64(h[72:], 1<<63) },
		"entries at the end": func(h []byte) { binary.LittleEndian.PutUint64(h[72:], 1<<30) },
		"too many entries":   func(h []byte) { binary.LittleEndian.PutUint32(h[80:], 1<<31) },
		"entries too large":  func(h []byte) { binary.LittleEndian.PutUint32(h[84:], 1<<31) },
		"entries too small":  func(h []byte) { binary.LittleEndian.PutUint32(h[84:], 16) },
		"another place":      func(h []byte) { binary.LittleEndian.PutUint64(h[24:], 2) },
	} {
		p := gpt(512, 0xAA, 1)
		h := p[512:]
		forge(h)
		size := min(max(binary.LittleEndian.Uint32(h[12:]), 92), 512)
		binary.LittleEndian.PutUint32(h[16:], 0)
		binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:size]))
		if table, err := readTable(bytes.NewReader(p)); err == nil {
			t.Errorf("%s: %+v", name, table)
		}
	}
}
