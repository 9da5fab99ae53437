package uring

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// AlignedBuffer maps size bytes of zeroed, page-aligned memory outside the Go
// heap. All memory the kernel reads or writes asynchronously comes from here:
// a collector that does not know of the kernel's reference could reuse heap
// memory under it, O_DIRECT wants the alignment, and pages that are never
// touched cost nothing (no swap space is reserved for them either). Release it
// with FreeBuffer, after the last operation on it has completed.
func AlignedBuffer(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of buffers: %w", size, err)
	}
	return b, nil
}

// FreeBuffer unmaps a buffer. b is the slice that AlignedBuffer returned.
func FreeBuffer(b []byte) {
	if err := unix.Munmap(b); err != nil {
		panic("uring: FreeBuffer of a slice that AlignedBuffer did not return: " + err.Error())
	}
}

func mapRing(fd int, off int64, size int) ([]byte, error) {
	b, err := unix.Mmap(fd, off, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map io_uring memory: %w", err)
	}
	return b, nil
}
