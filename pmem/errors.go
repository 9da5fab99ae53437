package pmem

import (
	"errors"
	"fmt"
	"syscall"
)

// Why a region cannot be opened.
var (
	ErrMissing     = errors.New("no such file")
	ErrNoDevice    = errors.New("no such device, and a file is not made in /dev")
	ErrDangling    = errors.New("a symbolic link that leads to nothing")
	ErrNoDriver    = errors.New("the device is there, but not in mode devdax")
	ErrBlockDevice = errors.New("a block device cannot be mapped as persistent memory")
	ErrNotMappable = errors.New("neither a device-dax device nor a file")
	ErrTooSmall    = errors.New("smaller than 512 MiB, the least a cache takes")
	ErrMisaligned  = errors.New("size is not a multiple of the page size")
	ErrInUse       = errors.New("in use by another process")
	ErrOtherSize   = errors.New("exists with another size")
	ErrNoSpace     = errors.New("no space could be reserved for the file")
	ErrNoReserving = errors.New("its file system cannot reserve space for it")
	ErrVolatile    = errors.New("it would be lost in a power cut or a reboot")
	ErrAppeared    = errors.New("somebody else has made it meanwhile")
	ErrUnfinished  = errors.New("an attempt to make it is under way, or was cut off")
)

// VolatileError is an ErrVolatile.
type VolatileError struct {
	Why  string
	Said Spec // what was asked for, with the word that the loss is accepted
}

func (e *VolatileError) Error() string { return fmt.Sprintf("%v: %s", ErrVolatile, e.Why) }

func (e *VolatileError) Unwrap() error { return ErrVolatile }

// UnreservedError is an ErrNoReserving.
type UnreservedError struct {
	Path  string
	Size  int64 // of the file, in bytes
	Holes int64 // how many of them have no blocks; 0 for a file that was to be made
}

func (e *UnreservedError) Error() string {
	if e.Holes > 0 {
		return fmt.Sprintf("%v: %d bytes of it are holes", ErrNoReserving, e.Holes)
	}
	return ErrNoReserving.Error()
}

func (e *UnreservedError) Unwrap() error { return ErrNoReserving }

// What is wrong with a call on an open region.
var (
	ErrUnaligned = errors.New("pmem: offset and length of a store must be multiples of 8")
	ErrReadOnly  = errors.New("pmem: the region is open for reading")
	ErrRange     = errors.New("pmem: outside the region")

	errTruncated = errors.New("the file has been truncated")
	errHole      = errors.New("the file has a hole there, and its file system no space for it")
)

// FaultError is an access that the memory did not answer: a media error, unless
// Cause says otherwise. It is an EIO to errors.Is.
type FaultError struct {
	Path  string
	Off   int64 // of the first bad byte met, from the start of the region
	Cause error // that a file was truncated, or that its file system is full
}

func (e *FaultError) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("%s at byte %d: %v", e.Path, e.Off, e.Cause)
	}
	return fmt.Sprintf("media error in %s at byte %d", e.Path, e.Off)
}

func (e *FaultError) Unwrap() error { return syscall.EIO }
