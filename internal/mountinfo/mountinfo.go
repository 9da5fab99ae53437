// Package mountinfo reads the kernel's list of mounts.
//
// Users of the machine choose much of it: mount points and sources are any
// bytes but 0. The kernel writes four of those as a backslash and three octal
// digits, so that lines and fields can be told apart. Nothing can be assumed
// of the others: the text may not be UTF-8, and only a space separates fields
// (fs/proc_namespace.c, show_mountinfo, Linux 7.3).
package mountinfo

import (
	"os"
	"strconv"
	"strings"
)

// A Mount is a mount, as the process sees it whose list this is.
type Mount struct {
	ID, Parent   int
	Major, Minor uint32 // of the file system: of its disk, or of none (major 0)
	Point        string // mount point, an absolute path
	Type         string // of the file system
	Source       string // what is mounted: a disk's path, or any word
	Options      string // of the file system, as the kernel writes them, each to be unescaped
}

// Read reads a list of mounts, such as /proc/self/mountinfo.
func Read(path string) ([]Mount, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(string(text)), nil
}

// Parse decodes a list of mounts. A line that cannot be decoded is passed
// by: a caller must not fail because of a mount elsewhere.
func Parse(text string) []Mount {
	var all []Mount
	for line := range strings.SplitSeq(text, "\n") {
		if m, ok := parse(line); ok {
			all = append(all, m)
		}
	}
	return all
}

func parse(line string) (m Mount, ok bool) {
	// ID, parent, major:minor, root, point, options, any number of optional
	// fields, a dash, type, source, options of the file system. The last may hold
	// anything.
	f := strings.Split(line, " ")
	dash := 6
	for dash < len(f) && f[dash] != "-" {
		dash++
	}
	if len(f) < dash+3 {
		return m, false
	}
	major, minor, _ := strings.Cut(f[2], ":")
	var errs [4]error
	m.ID, errs[0] = strconv.Atoi(f[0])
	m.Parent, errs[1] = strconv.Atoi(f[1])
	m.Major, errs[2] = number(major)
	m.Minor, errs[3] = number(minor)
	m.Point, m.Type, m.Source = Unescape(f[4]), Unescape(f[dash+1]), Unescape(f[dash+2])
	m.Options = strings.Join(f[dash+3:], " ")
	return m, errs == [4]error{} && strings.HasPrefix(m.Point, "/")
}

func number(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// Unescape undoes the kernel's escapes in a path of this list, or of that of
// swaps (fs/seq_file.c, mangle_path). A backslash that begins no escape stays.
func Unescape(field string) string {
	var b strings.Builder
	for i := 0; i < len(field); i++ {
		if field[i] == '\\' && i+4 <= len(field) {
			if c, err := strconv.ParseUint(field[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(field[i])
	}
	return b.String()
}
