package ublk

import "unsafe"

// The driver's ABI: include/uapi/linux/ublk_cmd.h, Linux 7.3; what is used of
// it has been the same since 6.5. Names follow the header.

// Command numbers are ioctl numbers (include/uapi/asm-generic/ioctl.h): two
// bits of direction, 14 of argument size, 8 of type, 8 of number. x86 and arm64
// share that layout.
const (
	ioctlRead  = 2
	ioctlWrite = 1
	ublkType   = 'u'
)

const (
	ctrlRead  = ioctlRead<<30 | ctrlCmdSize<<16 | ublkType<<8
	ctrlWrite = (ioctlRead|ioctlWrite)<<30 | ctrlCmdSize<<16 | ublkType<<8
	ioWrite   = (ioctlRead|ioctlWrite)<<30 | ioCmdSize<<16 | ublkType<<8

	cmdGetDevInfo        = ctrlRead | 0x02
	cmdAddDev            = ctrlWrite | 0x04
	cmdDelDev            = ctrlWrite | 0x05
	cmdStartDev          = ctrlWrite | 0x06
	cmdStopDev           = ctrlWrite | 0x07
	cmdSetParams         = ctrlWrite | 0x08
	cmdGetParams         = ctrlRead | 0x09
	cmdStartUserRecovery = ctrlWrite | 0x10
	cmdEndUserRecovery   = ctrlWrite | 0x11
	cmdGetFeatures       = ctrlRead | 0x13
	cmdTryStopDev        = ctrlWrite | 0x17

	ioFetchReq          = ioWrite | 0x20
	ioCommitAndFetchReq = ioWrite | 0x21
)

// Features, as reported by GET_FEATURES and negotiated by ADD_DEV.
const (
	featureUserRecovery        = 1 << 3
	featureUserRecoveryReissue = 1 << 4
	featureCmdIoctlEncode      = 1 << 6
	featureQuiesce             = 1 << 12
	featureSafeStopDev         = 1 << 17
)

const (
	paramTypeBasic   = 1 << 0
	paramTypeDiscard = 1 << 1

	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3

	ioFlagFUA = 1 << 13

	// maxQueueDepth fixes where each queue's descriptors are in the mapping of
	// the character device: as far apart as the deepest queue would need,
	// whatever the depth is.
	maxQueueDepth = 4096
	maxQueues     = 4096

	sectorShift = 9
)

// ctrlCmd is struct ublksrv_ctrl_cmd. It does not fit a 64-byte entry, hence
// the control ring's 128-byte ones.
type ctrlCmd struct {
	devID      uint32
	queueID    uint16
	len        uint16
	addr       uint64
	data       uint64
	devPathLen uint16
	_          uint16
	_          uint32
}

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	nrHwQueues    uint16
	queueDepth    uint16
	state         uint16
	_             uint16
	maxIOBufBytes uint32
	devID         uint32
	ublksrvPID    int32
	_             uint32
	flags         uint64
	ublksrvFlags  uint64
	ownerUID      uint32
	ownerGID      uint32
	_             [2]uint64
}

// params is the head of struct ublk_params and its first two members, struct
// ublk_param_basic and struct ublk_param_discard. The driver takes as much of
// the struct as len says.
type params struct {
	len              uint32
	types            uint32
	attrs            uint32
	logicalBSShift   uint8
	physicalBSShift  uint8
	ioOptShift       uint8
	ioMinShift       uint8
	maxSectors       uint32
	chunkSectors     uint32
	devSectors       uint64
	virtBoundaryMask uint64

	discardAlignment      uint32
	discardGranularity    uint32
	maxDiscardSectors     uint32
	maxWriteZeroesSectors uint32
	maxDiscardSegments    uint16
	_                     uint16
	_                     uint32 // of the next member, which is the driver's to fill in
}

// ioDesc is struct ublksrv_io_desc: what a fetched tag asks for.
type ioDesc struct {
	opFlags     uint32
	nrSectors   uint32
	startSector uint64
	addr        uint64
}

// ioCmd is struct ublksrv_io_cmd.
type ioCmd struct {
	queueID uint16
	tag     uint16
	result  int32
	addr    uint64
}

const (
	ctrlCmdSize = 32
	devInfoSize = 64
	paramsSize  = 64
	ioDescSize  = 24
	ioCmdSize   = 16
)

// Both directions: a negative array length does not compile.
var (
	_ [ctrlCmdSize - unsafe.Sizeof(ctrlCmd{})]byte
	_ [unsafe.Sizeof(ctrlCmd{}) - ctrlCmdSize]byte
	_ [devInfoSize - unsafe.Sizeof(devInfo{})]byte
	_ [unsafe.Sizeof(devInfo{}) - devInfoSize]byte
	_ [paramsSize - unsafe.Sizeof(params{})]byte
	_ [unsafe.Sizeof(params{}) - paramsSize]byte
	_ [40 - unsafe.Offsetof(params{}.discardAlignment)]byte
	_ [unsafe.Offsetof(params{}.discardAlignment) - 40]byte
	_ [56 - unsafe.Offsetof(params{}.maxDiscardSegments)]byte
	_ [unsafe.Offsetof(params{}.maxDiscardSegments) - 56]byte
	_ [ioDescSize - unsafe.Sizeof(ioDesc{})]byte
	_ [unsafe.Sizeof(ioDesc{}) - ioDescSize]byte
	_ [ioCmdSize - unsafe.Sizeof(ioCmd{})]byte
	_ [unsafe.Sizeof(ioCmd{}) - ioCmdSize]byte

	// One number per direction and size, as the header's macros give them.
	_ [cmdAddDev - 0xc0207504]byte
	_ [0xc0207504 - cmdAddDev]byte
	_ [cmdGetFeatures - 0x80207513]byte
	_ [0x80207513 - cmdGetFeatures]byte
	_ [ioCommitAndFetchReq - 0xc0107521]byte
	_ [0xc0107521 - ioCommitAndFetchReq]byte
)
