package pmem

import (
	"unsafe"

	"golang.org/x/sys/cpu"
)

// lineSize is the size of the smallest cache line in bytes, the step from
// one line to clean to the next. CTR_EL0.DminLine, bits 16 to 19, is its
// logarithm in 4-byte words.
var lineSize = uintptr(4) << (cacheType() >> 16 & 0xF)

// store copies n bytes to dst and cleans the lines they are in. The copy
// consists of aligned stores of 8 and 16 bytes, since dst and n are multiples
// of 8.
func store(dst, src unsafe.Pointer, n uintptr) {
	copy(unsafe.Slice((*byte)(dst), n), unsafe.Slice((*byte)(src), n))
	clean(dst, n)
}

func storeZero(dst unsafe.Pointer, n uintptr) {
	clear(unsafe.Slice((*byte)(dst), n))
	clean(dst, n)
}

// clean starts writing back the lines of n bytes at p, to the point of
// persistence. A CPU before ARMv8.2 does not know that point and has no
// persistent memory; there, cleaning to the point of coherency is enough
// for files.
func clean(p unsafe.Pointer, n uintptr) {
	start := uintptr(p) &^ (lineSize - 1)
	end := uintptr(p) + n
	if cpu.ARM64.HasDCPOP {
		cleanToPersistence(start, end, lineSize)
	} else {
		cleanToCoherency(start, end, lineSize)
	}
}

func cleanToPersistence(start, end, line uintptr)

func cleanToCoherency(start, end, line uintptr)

func cacheType() uint64

// fence waits for the cleaning that was started before.
func fence()
