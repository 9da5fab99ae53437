package uring

import "unsafe"

// SQE is the common 64 bytes of a submission entry. It lives in ring memory
// and is the caller's until the ring is next entered. The Prepare methods
// expect the zeroed entry that Ring.SQE hands out, fill it completely except
// for UserData, and retain no reference that Go's collector could see: buffers
// must come from AlignedBuffer or another mapping, and stay mapped until the
// completion has been seen.
type SQE struct {
	opcode      uint8
	flags       uint8
	ioprio      uint16
	fd          int32
	off         uint64 // file offset; for a uring command, its number
	addr        uint64
	len         uint32
	opFlags     uint32
	UserData    uint64 // returned in CQE.UserData
	bufIndex    uint16
	personality uint16
	spliceFd    int32
	cmd         [16]byte // 80 bytes when the ring was made with SQE128
}

// CQE is one completion. Res is a byte count or zero, or a negative errno.
type CQE struct {
	UserData uint64
	Res      int32
	Flags    uint32
}

// PrepareRead reads len(buf) bytes at offset off.
func (s *SQE) PrepareRead(fd int, buf []byte, off int64) {
	s.transfer(opRead, fd, buf, off)
}

// PrepareWrite writes len(buf) bytes at offset off.
func (s *SQE) PrepareWrite(fd int, buf []byte, off int64) {
	s.transfer(opWrite, fd, buf, off)
}

func (s *SQE) transfer(op uint8, fd int, buf []byte, off int64) {
	s.opcode = op
	s.fd = int32(fd)
	s.off = uint64(off)
	s.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(buf))))
	s.len = uint32(len(buf))
}

// PrepareDatasync is fdatasync(2); on a block device it ends with a flush of
// the device's write cache.
func (s *SQE) PrepareDatasync(fd int) {
	s.opcode = opFsync
	s.fd = int32(fd)
	s.opFlags = fsyncDatasync
}

// PrepareFallocate is fallocate(2). The kernel takes the length in addr and
// the mode in len (io_uring/sync.c, io_fallocate_prep).
func (s *SQE) PrepareFallocate(fd int, mode uint32, off, n int64) {
	s.opcode = opFallocate
	s.fd = int32(fd)
	s.off = uint64(off)
	s.addr = uint64(n)
	s.len = mode
}

// PrepareCommand is a driver's own command. It returns the area for its
// argument: 16 bytes, or 80 in a ring with SQE128.
func (s *SQE) PrepareCommand(fd int, command uint32) unsafe.Pointer {
	s.opcode = opURingCmd
	s.fd = int32(fd)
	s.off = uint64(command)
	return unsafe.Pointer(&s.cmd)
}

// prepareMessage posts a completion with the given user data and a result of
// zero on the ring target; its own completion appears only if it fails.
func (s *SQE) prepareMessage(target int, userData uint64) {
	s.opcode = opMsgRing
	s.flags = sqeCQESkipSuccess
	s.fd = int32(target)
	s.off = userData
	s.addr = msgData
}
