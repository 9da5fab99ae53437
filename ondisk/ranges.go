package ondisk

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Ranges is a set of sectors of the cached device. The zero value is empty.
type Ranges struct {
	runs   []run
	merged int // so many of the first ones are in order and apart
}

type run struct{ off, end int64 } // bytes

// shownRanges bounds a line that names sectors.
const shownRanges = 16

// Add adds n bytes at off.
func (r *Ranges) Add(off, n int64) {
	if last := len(r.runs) - 1; last >= 0 && r.runs[last].end == off {
		r.runs[last].end += n
		return
	}
	r.runs = append(r.runs, run{off, off + n})
	if len(r.runs) > 2*r.merged+shownRanges {
		r.merge()
	}
}

func (r *Ranges) merge() {
	slices.SortFunc(r.runs, func(a, b run) int { return cmp.Compare(a.off, b.off) })
	merged := r.runs[:0]
	for _, x := range r.runs {
		if last := len(merged) - 1; last >= 0 && x.off <= merged[last].end {
			merged[last].end = max(merged[last].end, x.end)
		} else {
			merged = append(merged, x)
		}
	}
	r.runs, r.merged = merged, len(merged)
}

// Each visits the runs in order.
func (r *Ranges) Each(visit func(off, n int64)) {
	r.merge()
	for _, x := range r.runs {
		visit(x.off, x.end-x.off)
	}
}

// Bytes returns the size of the set.
func (r *Ranges) Bytes() (n int64) {
	r.Each(func(_, len int64) { n += len })
	return n
}

// String names sectors of 512 bytes, the first and the last of each run.
func (r *Ranges) String() string {
	var runs []string
	r.Each(func(off, n int64) {
		from, to := off/SectorSize, (off+n)/SectorSize-1
		if len(runs) < shownRanges && from == to {
			runs = append(runs, fmt.Sprint(from))
		} else if len(runs) < shownRanges {
			runs = append(runs, fmt.Sprintf("%d-%d", from, to))
		}
	})
	s := strings.Join(runs, ", ")
	switch more := len(r.runs) - len(runs); {
	case len(runs) == 0:
		return "no sectors"
	case more > 0:
		s += fmt.Sprintf(" and %d more runs", more)
	}
	return "sectors " + s
}
