package pmem

import (
	"errors"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A signal for a bad address normally ends a Go program. With
// debug.SetPanicOnFault it becomes a panic of the goroutine that touched the
// address, with the address in its value. A guarded function begins with
//
//	defer r.guard(armGuard(), &err)
//
// The setting belongs to the goroutine and is put back, so code of the caller
// faults as it did before. A fault outside the mapping (the caller's buffer,
// say) is a bug, not a media error: it goes on as a panic.

// armGuard makes faults of this goroutine panic and returns what was set
// before.
func armGuard() bool { return debug.SetPanicOnFault(true) }

// guard undoes armGuard and turns a fault inside the mapping into an error.
func (r *Region) guard(before bool, err *error) {
	debug.SetPanicOnFault(before)
	cause := recover()
	if cause == nil {
		return
	}
	fault, ok := cause.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok || len(r.mem) == 0 {
		panic(cause)
	}
	off := fault.Addr() - uintptr(unsafe.Pointer(&r.mem[0]))
	if off >= uintptr(len(r.mem)) {
		panic(cause)
	}
	*err = &FaultError{Path: r.Path(), Off: int64(off), Cause: r.cause(int64(off))}
}

// cause returns how the file itself caused a fault at off, nil if it did not.
func (r *Region) cause(off int64) error {
	if r.kind != File && r.kind != DAXFile {
		return nil
	}
	info, err := r.file.Stat()
	if err == nil && info.Size() <= off {
		return errTruncated
	}
	page := off &^ (pageSize - 1)
	data, err := unix.Seek(int(r.file.Fd()), page, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) || err == nil && data >= page+pageSize {
		return errHole
	}
	return nil
}
