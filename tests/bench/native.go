// Command bench writes docs/benchmarks.md from what the benchmarks printed, so that no number in there was typed by
// anybody. A number is the median of all runs in the file.
package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"golang.org/x/perf/benchfmt"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: bench OUTPUT-OF-BENCHMARKS > docs/benchmarks.md")
		os.Exit(2)
	}
	m, err := read(os.Args[1])
	if err == nil {
		err = m.report(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// measured is what benchmarks said, by their names and then by unit.
type measured struct {
	machine map[string]string
	cpus    string
	values  map[string]map[string][]float64
	missing []string // names that the report asked for in vain
}

func read(name string) (*measured, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := &measured{machine: map[string]string{}, values: map[string]map[string][]float64{}}
	r := benchfmt.NewReader(f, name)
	for r.Scan() {
		res, ok := r.Result().(*benchfmt.Result)
		if !ok {
			continue // go test's own lines
		}
		for _, c := range res.Config {
			m.machine[c.Key] = strings.TrimSpace(string(c.Value))
		}
		full := res.Name.String()
		if i := strings.LastIndexByte(full, '-'); i >= 0 {
			full, m.cpus = full[:i], full[i+1:]
		}
		if m.values[full] == nil {
			m.values[full] = map[string][]float64{}
		}
		for _, v := range res.Values {
			m.values[full][v.Unit] = append(m.values[full][v.Unit], v.Value)
		}
	}
	return m, r.Err()
}

// median returns the median of a benchmark's values, NaN if it has none.
func (m *measured) median(unit, format string, args ...any) float64 {
	name := fmt.Sprintf(format, args...)
	v := slices.Sorted(slices.Values(m.values[name][unit]))
	if len(v) == 0 {
		m.missing = append(m.missing, name+" "+unit)
		return math.NaN()
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// ns is the median time of an operation in nanoseconds.
func (m *measured) ns(format string, args ...any) float64 {
	return m.median("sec/op", format, args...) * 1e9
}

const (
	shape = "size=%d/batch=%d/threads=%d"
	intro = "# Benchmarks\n\n" +
		"`make bench` runs the benchmarks, `make bench-report` writes this page from what they printed.\n" +
		"A number is the median of %d runs, which took turns.\n\n" +
		"%s CPUs (%s), %s, %s, %s.\n\n"
	hits = "What the thread of a queue does for a %s, over 256 MiB at random, in turns of a batch. Write-back rests, so that\n" +
		"it costs no part of it. *Bare* is the same %s, with nothing to find and nothing to log. Nanoseconds for an\n" +
		"operation, and how much that is of the bare one.\n\n" +
		"| bytes | batch | threads | bare | | without data crc | | with data crc | | allocations |\n|--:|--:|--:|--:|-|--:|--:|--:|--:|--:|\n"
	index = "## The index\n\n" +
		"Nanoseconds; lookup+copy also copies 4 KiB from a random place in 1 GiB. A collection is one of the Go runtime's.\n\n" +
		"| extents | lookup | lookup+copy | overwrite | collection |\n|--:|--:|--:|--:|--:|\n"
	whole = "## Opening and writing back\n\n" +
		"| | without data crc | with data crc |\n|-|--:|--:|\n"
	goals = "## Goals\n\n| what | measured | goal |\n|-|--:|--:|\n"
)

var (
	sizes   = []int{512, 4 << 10, 64 << 10, 1 << 20}
	extents = []int{1e4, 1e5, 1e6, 1e7}
)

func (m *measured) report(w io.Writer) error {
	var b strings.Builder
	runs := len(m.values["Index/lookup/extents=10000"]["sec/op"])
	fmt.Fprintf(&b, intro, runs, m.cpus, m.machine["cpu"], m.machine["kernel"], m.machine["go"], m.machine["date"])
	b.WriteString("## Hits, without a driver\n\n")
	for _, op := range []struct{ name, bare, what, same string }{
		{"Write", "BareStore", "write", "stores to consecutive places and one fence for a batch"},
		{"Read", "BareLoad", "read", "copies from random places"},
	} {
		fmt.Fprintf(&b, hits, op.what, op.same)
		for _, size := range sizes {
			for _, batch := range []int{1, 16} {
				for threads := 1; threads <= 2; threads++ {
					bare := m.ns(op.bare+"/"+shape, size, batch, threads)
					plain := m.ns(op.name+"/crc=false/"+shape, size, batch, threads)
					summed := m.ns(op.name+"/crc=true/"+shape, size, batch, threads)
					allocs := m.median("allocs/op", op.name+"/crc=false/"+shape, size, batch, threads)
					fmt.Fprintf(&b, "| %d | %d | %d | %.0f | | %.0f | %.2f | %.0f | %.2f | %.0f |\n",
						size, batch, threads, bare, plain, plain/bare, summed, summed/bare, allocs)
				}
			}
		}
		b.WriteString("\n")
	}
	b.WriteString(index)
	for _, n := range extents {
		fmt.Fprintf(&b, "| %d | %.0f | %.0f | %.0f | %.0f |\n", n, m.ns("Index/lookup/extents=%d", n),
			m.ns("Index/lookup+copy/extents=%d", n), m.ns("Index/insert/extents=%d", n), m.ns("Index/collection/extents=%d", n))
	}
	b.WriteString("\n" + whole)
	replay := func(crc bool) float64 { return 1e-6 / m.median("sec/key", "Replay/crc=%t", crc) }
	drain := func(crc bool) float64 { return 1e6 / m.ns("Drain/crc=%t", crc) }
	fmt.Fprintf(&b, "| replay of a log of 2^20 random keys, million keys/s | %.2f | %.2f |\n", replay(false), replay(true))
	fmt.Fprintf(&b, "| write-back of random 4 KiB to a disk that takes no time, thousand blocks/s | %.0f | %.0f |\n\n", drain(false), drain(true))
	m.goals(&b, replay(false))
	if len(m.missing) > 0 {
		return fmt.Errorf("no result of %s", strings.Join(m.missing, ", "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (m *measured) goals(b *strings.Builder, replay float64) {
	b.WriteString(goals)
	goal := func(what string, is float64, sign string, want float64) {
		met := "missed"
		if sign == "≤" && is <= want || sign == "≥" && is >= want {
			met = "met"
		}
		fmt.Fprintf(b, "| %s | %.2f | %s %g, %s |\n", what, is, sign, want, met)
	}
	const four = "size=4096/batch=16/threads="
	goal("4 KiB writes in batches of 16, against bare stores and one fence",
		m.ns("Write/crc=false/"+four+"1")/m.ns("BareStore/"+four+"1"), "≤", 1.3)
	goal("4 KiB read hits, against bare copies", m.ns("Read/crc=false/"+four+"1")/m.ns("BareLoad/"+four+"1"), "≤", 1.3)
	goal("4 KiB writes, two threads against one", m.ns("Write/crc=false/"+four+"1")/m.ns("Write/crc=false/"+four+"2"), "≥", 1.8)
	goal("4 KiB read hits, two threads against one", m.ns("Read/crc=false/"+four+"1")/m.ns("Read/crc=false/"+four+"2"), "≥", 1.8)
	goal("allocations of a write or read hit", m.median("allocs/op", "Write/crc=false/"+four+"1")+m.median("allocs/op", "Read/crc=false/"+four+"1"), "≤", 0)
	goal("lookup and copy, 10^7 extents against 10^4",
		m.ns("Index/lookup+copy/extents=10000000")/m.ns("Index/lookup+copy/extents=10000"), "≤", 1.5)
	goal("replay, million keys/s on all CPUs; the goal is for one of them", replay, "≥", 5)
}
