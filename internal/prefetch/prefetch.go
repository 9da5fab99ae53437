// Package prefetch asks the processor for memory that will be read soon. This is a
// hint: it only changes when that memory comes.
//
// Programs cannot use Go's own (internal/runtime/sys).
package prefetch

import "unsafe"

// Line fetches the cache line that v begins in.
func Line[T any](v *T) { line(unsafe.Pointer(v)) }

//go:noescape
func line(p unsafe.Pointer)
