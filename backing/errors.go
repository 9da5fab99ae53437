package backing

import (
	"errors"
	"fmt"
	"syscall"
)

// While opening: wrapped with the path and shown to users.
var (
	ErrMissing  = errors.New("there is no such device or file: check the path")
	ErrKind     = errors.New("it is neither a block device nor a regular file: give one of those")
	ErrReadOnly = errors.New("it is read-only: make it writable (for a device 'blockdev --setrw') or choose another")
	ErrInUse    = errors.New("it is in use") // and by what
	ErrSize     = errors.New("its size does not fit")
	ErrZoned    = errors.New("it is a zoned device, which takes writes in the order of its zones only: choose another, or put dm-zoned on it")
)

// While looking for a device by its identity.
var (
	ErrNameless  = errors.New("nothing is known that tells the device from others: give its path")
	ErrNotFound  = errors.New("there is no block device known as")
	ErrAmbiguous = errors.New("more than one block device is known as")
)

// While running.
var (
	errShort = fmt.Errorf("the device ended the transfer early: %w", syscall.EIO)
	// errGone is what ENOSPC means on a block device: it has size 0 once it was
	// pulled out.
	errGone = fmt.Errorf("the device is gone, or smaller than it was: %w", syscall.EIO)
)
