package backing

import (
	"errors"
	"fmt"
	"syscall"
)

// While opening: wrapped with the path and shown to users.
var (
	ErrMissing  = errors.New("there is no such device or file")
	ErrKind     = errors.New("it is neither a block device nor a regular file")
	ErrReadOnly = errors.New("it is read-only")
	ErrInUse    = errors.New("it is in use") // and by what
	ErrSize     = errors.New("its size does not fit")
	ErrZoned    = errors.New("it is a zoned device, which takes writes in the order of its zones only")
)

// While looking for a device by its identity.
var (
	ErrNameless  = errors.New("nothing is known that tells the device from others")
	ErrNotFound  = errors.New("there is no block device known as")
	ErrAmbiguous = errors.New("more than one block device is known as")
)

// ErrNoLoop: a device whose cache is not there cannot be claimed.
var ErrNoLoop = errors.New("no loop device can be made")

// While running.
var (
	errShort = fmt.Errorf("the device ended the transfer early: %w", syscall.EIO)
	// errGone is what ENOSPC means on a block device: it has size 0 once it was
	// pulled out.
	errGone = fmt.Errorf("the device is gone, or smaller than it was: %w", syscall.EIO)
)
