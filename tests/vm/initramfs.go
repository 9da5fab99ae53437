package vm

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// writeInitramfs writes a cpio archive ("newc") holding the agent as /init and the modules that must be loaded before
// the root disk can be mounted. The kernel unpacks it uncompressed faster than emulated code could decompress it.
func writeInitramfs(w io.Writer, agent string, modules []string) error {
	a := archive{w: w}
	a.entry("dev", 0o040755, nil)
	// The kernel opens /dev/console for /init before anything is mounted.
	a.device("dev/console", 0o020600, 5, 1)
	a.entry("modules", 0o040755, nil)
	a.file("init", 0o100755, agent)
	for i, m := range modules {
		a.file(fmt.Sprintf("modules/%03d-%s", i, filepath.Base(m)), 0o100644, m)
	}
	a.entry("TRAILER!!!", 0, nil)
	return a.err
}

// archive writes entries until the first error, which it keeps.
type archive struct {
	w     io.Writer
	inode int
	err   error
}

func (a *archive) file(name string, mode int, source string) {
	data, err := os.ReadFile(source)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.entry(name, mode, data)
}

func (a *archive) entry(name string, mode int, data []byte) { a.put(name, mode, data, 0, 0) }

func (a *archive) device(name string, mode, major, minor int) { a.put(name, mode, nil, major, minor) }

// put writes the 13 fields of a header as 8 hex digits each, the name with its NUL and the data, both padded to 4
// bytes; the header's 110 bytes count towards the padding of the name.
func (a *archive) put(name string, mode int, data []byte, major, minor int) {
	if a.err != nil {
		return
	}
	a.inode++
	fields := []int{a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0}
	header := "070701"
	for _, f := range fields {
		header += fmt.Sprintf("%08x", f)
	}
	header += name + "\x00"
	for len(header)%4 != 0 {
		header += "\x00"
	}
	if _, a.err = io.WriteString(a.w, header); a.err != nil {
		return
	}
	padded := append(data[:len(data):len(data)], make([]byte, -len(data)&3)...)
	_, a.err = a.w.Write(padded)
}
