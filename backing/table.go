package backing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"strconv"
)

// table is the identities in a partition table. All but disk are for
// partitions, whose users cannot change them.
type table struct {
	disk       string   // identity of the disk, empty for an MBR
	partitions []string // identities by number, from 1 on; empty where there is none
	mbr        uint32   // the disk's number, for a table with one
}

// A GPT (UEFI specification 2.10, 5.3) is in blocks of the size that the disk had
// when it was made.
const (
	gptMagic     = "EFI PART"
	gptHeader    = 92   // bytes, the least there is
	gptEntry     = 128  // bytes, the least there is
	gptEntryMost = 4096 // bytes, and gptMost entries: more than any has
	gptMost      = 1024
	mbrDisk      = 440 // where an MBR has its number
	mbrSignature = 510
)

var (
	errNoTable  = errors.New("there is no partition table")
	errBadTable = errors.New("the partition table is damaged")
)

func readTable(r io.ReaderAt) (table, error) {
	var head [2 * 4096]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return table{}, err
	}
	for _, block := range []int64{512, 4096} {
		if h := head[block : 2*block]; string(h[:len(gptMagic)]) == gptMagic {
			return readGPT(r, h, block)
		}
	}
	number := binary.LittleEndian.Uint32(head[mbrDisk:])
	if head[mbrSignature] != 0x55 || head[mbrSignature+1] != 0xAA || number == 0 {
		return table{}, errNoTable
	}
	return table{mbr: number}, nil
}

func readGPT(r io.ReaderAt, h []byte, block int64) (table, error) {
	le := binary.LittleEndian
	size := le.Uint32(h[12:])
	if size < gptHeader || int64(size) > block {
		return table{}, errBadTable
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	if crc32.ChecksumIEEE(h[:size]) != sum || le.Uint64(h[24:]) != 1 {
		return table{}, errBadTable
	}
	t := table{disk: tablePrefix + guid(h[56:])}
	at, n, each := le.Uint64(h[72:]), int64(le.Uint32(h[80:])), int64(le.Uint32(h[84:]))
	if each < gptEntry || each > gptEntryMost || n > gptMost || at > math.MaxInt64/4096 {
		return table{}, errBadTable
	}
	entries := make([]byte, n*each)
	if _, err := r.ReadAt(entries, int64(at)*block); err != nil {
		return table{}, err
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(h[88:]) {
		return table{}, errBadTable
	}
	for e := range n {
		var identity string
		if entry := entries[e*each:]; [16]byte(entry[:16]) != [16]byte{} {
			identity = partitionPrefix + guid(entry[16:])
		}
		t.partitions = append(t.partitions, identity)
	}
	return t, nil
}

// partition returns the identity of a partition, given by its number in
// sysfs. It is written as other programs write it (PARTUUID).
func (t table) partition(number string) string {
	n, err := strconv.Atoi(number)
	switch {
	case err != nil || n < 1:
		return ""
	case t.mbr != 0:
		return fmt.Sprintf("%s%08x-%02x", partitionPrefix, t.mbr, n)
	case n > len(t.partitions):
		return ""
	}
	return t.partitions[n-1]
}

// guid writes a GUID, whose first three parts are little-endian.
func guid(p []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(p), le.Uint16(p[4:]), le.Uint16(p[6:]), p[8:10], p[10:16])
}
