package uring

import "unsafe"

// The kernel's side of the ring: include/uapi/linux/io_uring.h, Linux 6.1 (the
// oldest kernel with everything used here). The numbers are ABI and the same
// on every architecture; only the system call numbers come from x/sys.

const (
	setupSubmitAll    = 1 << 7
	setupCoopTaskrun  = 1 << 8
	setupTaskrunFlag  = 1 << 9
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1

	offSQRing = 0
	offSQEs   = 0x10000000

	enterGetEvents = 1 << 0

	sqCQOverflow = 1 << 1
	sqTaskrun    = 1 << 2

	opFsync     = 3
	opFallocate = 17
	opRead      = 22
	opWrite     = 23
	opMsgRing   = 40
	opURingCmd  = 46

	sqeCQESkipSuccess = 1 << 6
	fsyncDatasync     = 1 << 0
	msgData           = 0
)

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, resv1 uint32
	userAddr                                                        uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, resv1 uint32
	userAddr                                                        uint64
}

type params struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	resv                                                                   [3]uint32
	sq                                                                     sqOffsets
	cq                                                                     cqOffsets
}

// Both directions: a negative array length does not compile.
var (
	_ [120 - unsafe.Sizeof(params{})]byte
	_ [unsafe.Sizeof(params{}) - 120]byte
	_ [sqeSize - unsafe.Sizeof(SQE{})]byte
	_ [unsafe.Sizeof(SQE{}) - sqeSize]byte
	_ [cqeSize - unsafe.Sizeof(CQE{})]byte
	_ [unsafe.Sizeof(CQE{}) - cqeSize]byte
	_ [48 - unsafe.Offsetof(SQE{}.cmd)]byte
	_ [unsafe.Offsetof(SQE{}.cmd) - 48]byte
)

const (
	sqeSize = 64
	cqeSize = 16
)
