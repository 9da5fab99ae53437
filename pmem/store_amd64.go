package pmem

import (
	"unsafe"

	"golang.org/x/sys/cpu"
)

// wide says that the processor has stores of 32 bytes.
var wide = cpu.X86.HasAVX

// store copies n bytes to dst with non-temporal stores. dst and n are
// multiples of 8, src is not aligned.
//
//go:noescape
func store(dst, src unsafe.Pointer, n uintptr)

// storeZero clears n bytes at dst with non-temporal stores. dst and n are
// multiples of 8.
//
//go:noescape
func storeZero(dst unsafe.Pointer, n uintptr)

// fence orders the non-temporal stores before it.
func fence()
