// Package prefetch asks the processor for memory that will be looked at soon. It is
// a hint, which changes nothing but when that memory comes.
//
// Go's own is not for programs to use (internal/runtime/sys).
package prefetch

import "unsafe"

// Line fetches the cache line that v begins in.
func Line[T any](v *T) { line(unsafe.Pointer(v)) }

//go:noescape
func line(p unsafe.Pointer)
