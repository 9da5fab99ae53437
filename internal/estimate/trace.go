package estimate

import (
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"

	"ublk-pcache/internal/trace"
)

// blockSize is the size in bytes of the blocks in which a trace is counted.
const blockSize = 4 << 10

// Trace is what a recorder has seen, in blocks of 4 KiB. What an access covers in part only
// counts as a whole block.
type Trace struct {
	Name    string
	Blocks  int64 // accesses, each of one block
	Touched int   // different blocks
	runs    []run
	end     int64           // behind the last block of the disk that is touched
	numbers map[int64]int32 // of the blocks touched, in the order in which they were first
}

// run is an access of some blocks.
type run struct {
	first int64
	n     int32
	write bool
}

// TouchedBytes returns how much of the disk the trace touches.
func (t *Trace) TouchedBytes() int64 { return int64(t.Touched) * blockSize }

// mostTouched is how many different blocks a trace may have: 4 TiB of them.
const mostTouched = 1 << 30

// Load reads a trace from a file, in any of the forms that package trace knows, gzip or not.
// The trace has the file's name, up to the first dot.
func Load(path string) (*Trace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	name, _, _ := strings.Cut(filepath.Base(path), ".")
	return load(name, trace.Read(f, path))
}

// load takes in a trace. Its error is the first of accesses, or is that they are too many.
func load(name string, accesses iter.Seq2[trace.Access, error]) (*Trace, error) {
	t := &Trace{Name: name, numbers: map[int64]int32{}}
	for a, err := range accesses {
		if err != nil {
			return nil, err
		}
		first, last := a.Off/blockSize, (a.Off+a.Len-1)/blockSize
		if last-first >= mostTouched {
			return nil, t.tooMany()
		}
		t.runs = append(t.runs, run{first, int32(last - first + 1), a.Write})
		t.Blocks += last - first + 1
		t.end = max(t.end, last+1)
		for b := first; b <= last; b++ {
			if _, ok := t.numbers[b]; !ok {
				t.numbers[b] = int32(len(t.numbers))
			}
		}
		if len(t.numbers) > mostTouched {
			return nil, t.tooMany()
		}
	}
	t.Touched = len(t.numbers)
	return t, nil
}

func (t *Trace) tooMany() error {
	return fmt.Errorf("%s touches more than %d different blocks of 4 KiB", t.Name, mostTouched)
}
