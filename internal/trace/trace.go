// Package trace reads what a recorder wrote of the accesses to a disk. It knows four
// forms, and tells them apart by what the first line says:
//
//	R 4096 8192                              R or W, offset and length in bytes
//	8,0 1 1 0.0 99 Q R 8 + 16 [fio]          what blkparse prints of blktrace
//	1281,host,0,Read,4096,8192,77            the CSV of the MSR Cambridge traces
//	fio version 2 iolog                      then FILE read 4096 8192; in version 3
//	                                         each line begins with a time
//
// All but the first may have been recorded of several disks at once. Places of several
// disks are no places of one, so such a trace is refused.
package trace

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"strconv"
	"strings"
)

// Access is one read or write of a disk.
type Access struct {
	Write    bool
	Off, Len int64 // bytes; Len is not 0, and Off+Len overflows nothing
}

// Errors of a trace. They come with the name of the trace and, where there is one, the
// number of the line.
var (
	ErrForm    = errors.New("the trace has none of the forms that are known: 'R|W offset length', blkparse, MSR Cambridge CSV, fio iolog")
	ErrLine    = errors.New("the line is malformed")
	ErrDisks   = errors.New("the trace is of several disks")
	ErrNoTrace = errors.New("the trace has no read and no write")
)

// longestLine is in bytes. blkparse prints the name of a process at most, fio a path.
const longestLine = 64 << 10

// Read yields the accesses of a trace in the order of its lines. r may be compressed with
// gzip. name is what errors call it. An error is the last that is yielded. What is not an
// access to data, such as a flush or a discard, is passed by.
func Read(r io.Reader, name string) iter.Seq2[Access, error] {
	return func(yield func(Access, error) bool) {
		fail := func(err error) { yield(Access{}, fmt.Errorf("%s: %w", name, err)) }
		text, err := plain(r)
		if err != nil {
			fail(err)
			return
		}
		lines := bufio.NewScanner(text)
		lines.Buffer(nil, longestLine)
		var parse parser
		some, number := false, 0
		for lines.Scan() {
			number++
			line := strings.TrimSpace(lines.Text())
			if line == "" {
				continue
			}
			if parse == nil {
				if parse = parserFor(line); parse == nil {
					fail(fmt.Errorf("line %d: %w", number, ErrForm))
					return
				}
			}
			a, ok, err := parse(line)
			if err != nil {
				fail(fmt.Errorf("line %d: %w", number, err))
				return
			}
			if ok {
				some = true
				if !yield(a, nil) {
					return
				}
			}
		}
		switch err := lines.Err(); {
		case errors.Is(err, bufio.ErrTooLong):
			fail(fmt.Errorf("line %d: %w: it is longer than %d bytes", number+1, ErrLine, longestLine))
		case err != nil:
			fail(fmt.Errorf("read behind line %d: %w", number, err))
		case !some:
			fail(ErrNoTrace)
		}
	}
}

// plain returns the text of r.
func plain(r io.Reader) (io.Reader, error) {
	b := bufio.NewReader(r)
	if magic, _ := b.Peek(2); !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return b, nil
	}
	return gzip.NewReader(b)
}

// parser decodes a line, which is not empty. ok is false where it is no access.
type parser func(line string) (a Access, ok bool, err error)

// parserFor returns what decodes a trace that begins with a line, nil if nothing does.
func parserFor(line string) parser {
	fields := strings.Fields(line)
	var d disk
	switch {
	case fields[0] == "R" || fields[0] == "W":
		return parsePlain
	case line == "fio version 2 iolog":
		return d.parseIolog(0)
	case line == "fio version 3 iolog":
		return d.parseIolog(1)
	case isDevice(fields[0]) || strings.HasPrefix(line, blkparseBegins):
		return d.parseBlkparse()
	case strings.Count(line, ",") >= msrDuration:
		return d.parseMSR()
	}
	return nil
}

// disk is the one that a trace is of, nil as long as it has not been named.
type disk struct{ name *string }

// is fails if a trace is of another disk, too.
func (d *disk) is(name string) error {
	if d.name == nil {
		d.name = &name
	}
	if *d.name != name {
		return fmt.Errorf("%w, here of %s and before of %s", ErrDisks, name, *d.name)
	}
	return nil
}

func parsePlain(line string) (a Access, ok bool, err error) {
	f := strings.Fields(line)
	if len(f) != 3 || f[0] != "R" && f[0] != "W" {
		return a, false, fmt.Errorf("%w: it is not 'R|W offset length'", ErrLine)
	}
	return access(f[0] == "W", f[1], f[2], 1)
}

// access makes one of an offset and a length that are written in units of so many bytes.
func access(write bool, off, n string, unit int64) (a Access, ok bool, err error) {
	o, err := strconv.ParseInt(off, 10, 64)
	if err != nil || o < 0 || o > math.MaxInt64/unit {
		return a, false, fmt.Errorf("%w: %q is not an offset", ErrLine, off)
	}
	l, err := strconv.ParseInt(n, 10, 64)
	if err != nil || l <= 0 || l > math.MaxInt64/unit-o {
		return a, false, fmt.Errorf("%w: %q is not a length", ErrLine, n)
	}
	return Access{write, o * unit, l * unit}, true, nil
}

// blkparseBegins is how the lines begin that blkparse may print before the first event.
const blkparseBegins = "Input file "

// isDevice reports whether a word is the major and minor number of a disk.
func isDevice(word string) bool {
	major, minor, ok := strings.Cut(word, ",")
	if !ok {
		return false
	}
	_, bad := strconv.ParseUint(major, 10, 32)
	_, too := strconv.ParseUint(minor, 10, 32)
	return bad == nil && too == nil
}

// parseBlkparse takes the events that are called Q: a request is queued once, whatever it
// is merged with or split into later. Its fields are disk, processor, number, time,
// process, event, what it asks for, and then 'sector + sectors [name]'. Behind the events
// are sums, which begin with those of a processor or, of one only, with the total.
func (d *disk) parseBlkparse() parser {
	sums := false
	return func(line string) (a Access, ok bool, err error) {
		f := strings.Fields(line)
		switch {
		case sums || strings.HasPrefix(line, blkparseBegins):
			return a, false, nil
		case strings.HasPrefix(line, "CPU") || strings.HasPrefix(line, "Total "):
			sums = true
			return a, false, nil
		case !isDevice(f[0]) || len(f) < 6:
			return a, false, fmt.Errorf("%w: it is not an event as blkparse prints it", ErrLine)
		case f[5] != "Q":
			return a, false, nil
		case len(f) < 7:
			return a, false, fmt.Errorf("%w: it does not say what is queued", ErrLine)
		}
		what := f[6]
		write := strings.Contains(what, "W")
		switch {
		case strings.Contains(what, "Z"), !write && !strings.Contains(what, "R"):
			return a, false, nil // an order to a zone, a discard, a flush
		case len(f) > 7 && f[7][0] == '[':
			return a, false, nil // a flush that is queued as a write of nothing
		case len(f) < 10 || f[8] != "+":
			return a, false, fmt.Errorf("%w: it has no 'sector + sectors'", ErrLine)
		}
		if err := d.is(f[0]); err != nil {
			return a, false, err
		}
		return access(write, f[7], f[9], sector)
	}
}

// sector is what blktrace counts in, in bytes, whatever the disk's own are.
const sector = 512

// The fields of a line of the MSR Cambridge traces that count here.
const (
	msrHost = iota + 1
	msrDisk
	msrType
	msrOff
	msrLen
	msrDuration
)

func (d *disk) parseMSR() parser {
	first := true
	return func(line string) (a Access, ok bool, err error) {
		f := strings.Split(line, ",")
		header := first && strings.EqualFold(f[0], "Timestamp")
		first = false
		switch {
		case header:
			return a, false, nil
		case len(f) <= msrDuration:
			return a, false, fmt.Errorf("%w: it is not 'time,host,disk,Read|Write,offset,length,duration'", ErrLine)
		}
		write := strings.EqualFold(f[msrType], "Write")
		if !write && !strings.EqualFold(f[msrType], "Read") {
			return a, false, fmt.Errorf("%w: %q is neither Read nor Write", ErrLine, f[msrType])
		}
		if err := d.is(f[msrHost] + "," + f[msrDisk]); err != nil {
			return a, false, err
		}
		return access(write, f[msrOff], f[msrLen], 1)
	}
}

// parseIolog decodes lines of 'FILE action [offset length]' behind so many other fields.
func (d *disk) parseIolog(before int) parser {
	first := true
	return func(line string) (a Access, ok bool, err error) {
		if first {
			first = false
			return a, false, nil
		}
		f := strings.Fields(line)
		if len(f) < before+2 {
			return a, false, fmt.Errorf("%w: it is not 'file action'", ErrLine)
		}
		f = f[before:]
		switch f[1] {
		case "add", "open", "close", "wait", "sync", "datasync", "trim":
			return a, false, nil
		case "read", "write":
		default:
			return a, false, fmt.Errorf("%w: %q is no action of fio", ErrLine, f[1])
		}
		if len(f) != 4 {
			return a, false, fmt.Errorf("%w: it has no offset and length", ErrLine)
		}
		if err := d.is(f[0]); err != nil {
			return a, false, err
		}
		return access(f[1] == "write", f[2], f[3], 1)
	}
}
