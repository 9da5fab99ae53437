package ondisk

import "io"

// Two copies of each record that changes in place, and one rule: a writer
// never touches the newest valid copy. It takes the other slot, with the next
// sequence number, so that a store cut in half costs the new value and not
// the old one. (The kernel breaks the rule with the first update after each
// start: it reloads the newest slot's index and writes there.)
//
// The records are 16 to 168 bytes, and the memory below tears stores at 8. The
// checksum lies in the first 8 bytes and covers all that follows it, so any
// mixture of an old and a new copy fails it.
//
// A reader looks at both copies even when one is unreadable, which is the
// case the copies exist for.

// headerSize is the size in bytes of the header of a replicated record: crc
// u32, seq u8, version u8, reserved u16. The kernel leaves the last two
// uninitialised in places; here they are written as zero and never looked at.
const headerSize = 8

// Replica names one of the two copies of a record and its sequence number.
// The zero value stands for a record of which no copy was written yet.
type Replica struct {
	Slot uint8 // 0 or 1
	Seq  uint8 // compared in 8-bit serial arithmetic
}

// Next returns where the following version of the record goes: the other
// slot. The caller keeps the result once it knows that the write succeeded,
// and the old value until then.
func (r Replica) Next() Replica {
	return Replica{Slot: r.Slot ^ 1, Seq: r.Seq + 1}
}

// CopyState is what was found of one copy of a record.
type CopyState uint8

const (
	// CopyEmpty is a copy of zeros: never written. The kernel leaves many.
	CopyEmpty CopyState = iota
	// CopyValid has a matching checksum.
	CopyValid
	// CopyBad has a checksum that does not match.
	CopyBad
	// CopyUnreadable gave a read error, on pmem a media error.
	CopyUnreadable
)

func (s CopyState) String() string {
	return [...]string{"empty", "valid", "bad crc", "unreadable"}[s]
}

// Copies is what was found of both copies of a record.
type Copies struct {
	State  [2]CopyState
	Newest Replica // meaningful when one of the states is CopyValid
}

// Valid reports whether there is a newest copy at all.
func (c Copies) Valid() bool {
	return c.State[0] == CopyValid || c.State[1] == CopyValid
}

// damaged reports whether at least one of them is damaged.
func (c Copies) damaged() bool {
	return c.State[0].damaged() || c.State[1].damaged()
}

func (s CopyState) damaged() bool { return s == CopyBad || s == CopyUnreadable }

// readCopies reads both copies of a record of len(dst) bytes, the second one
// distance bytes behind the first, and leaves the newest valid one in dst.
func readCopies(r io.ReaderAt, off, distance int64, dst []byte) Copies {
	var c Copies
	var buf [2][identitySize]byte
	for slot := range buf {
		p := buf[slot][:len(dst)]
		c.State[slot] = readCopy(r, off+int64(slot)*distance, p)
	}
	seq := [2]uint8{buf[0][4], buf[1][4]}
	if c.State[1] == CopyValid && (c.State[0] != CopyValid || int8(seq[1]-seq[0]) > 0) {
		c.Newest.Slot = 1
	}
	c.Newest.Seq = seq[c.Newest.Slot]
	copy(dst, buf[c.Newest.Slot][:])
	return c
}

func readCopy(r io.ReaderAt, off int64, p []byte) CopyState {
	switch {
	case readFull(r, p, off) != nil:
		return CopyUnreadable
	case le.Uint32(p) == Checksum(p[4:]):
		return CopyValid
	case isZero(p):
		return CopyEmpty
	}
	return CopyBad
}

// seal completes a replicated record whose fields are in place: it clears and
// fills the header.
func seal(p []byte, seq uint8) {
	le.PutUint32(p[4:], uint32(seq))
	le.PutUint32(p, Checksum(p[4:]))
}
