// Command bench writes docs/benchmarks.md, and the plots in it, from what the benchmarks printed, so that no number in
// there was typed by anybody. A number is the median of all runs in a file.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/perf/benchfmt"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: bench FOLDER-OF-RESULTS FOLDER-OF-DOCS")
		os.Exit(2)
	}
	if err := report(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const intro = "# Benchmarks\n\n" +
	"`make bench-count`, `make bench`, `make bench-vm` and `make bench-hits` measure, `make bench-report` writes this page and its\n" +
	"plots from what they printed. A number is the median of all rounds. In a round everything takes its turn, so only numbers of one\n" +
	"table compare. Each part says when it was measured; what its goals were *before* is what they were at 84208a5, on 2026-11-27.\n\n"

// report writes nothing unless all results of the files that are there can be found. What follows from one that is not
// there stays as it is on the page, since to measure everything takes hours.
func report(results, folder string) error {
	file := filepath.Join(folder, "benchmarks.md")
	before, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	counts, err := ifThere(readCounts, results, "bench-count.txt")
	if err != nil {
		return err
	}
	machine, err := ifThere(read, results, "bench-vm.txt")
	if err != nil {
		return err
	}
	native, err := ifThere(read, results, "bench.txt")
	if err != nil {
		return err
	}
	kept, err := ifThere(readKept, results, "bench-hits.txt")
	if err != nil {
		return err
	}
	var page strings.Builder
	page.WriteString(intro)
	keep := func(titles ...string) { page.WriteString(sections(string(before), titles)) }
	var missing []string
	if counts != nil {
		counts.report(&page)
		missing = append(missing, counts.missing...)
	} else {
		keep("Instructions")
	}
	if machine != nil {
		machine.machineReport(&page)
	} else {
		keep("On a real kernel")
	}
	if native != nil {
		var profiles [][]string // of a write at first and now, and of a read
		for _, op := range []string{"Write", "Read"} {
			both, err := readProfiles(filepath.Join(results, "bench-profile-"+op+".txt"))
			if err != nil {
				return err
			}
			profiles = append(profiles, both...)
		}
		native.nativeReport(&page, profiles)
	} else {
		keep("Hits, without a driver", "The index", "Opening and writing back", "The log's lock")
	}
	if kept != nil {
		kept.report(&page)
	} else {
		keep("What is kept")
	}
	for _, m := range []*measured{machine, native} {
		if m != nil {
			missing = append(missing, m.missing...)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("no result of %s", strings.Join(missing, ", "))
	}
	if machine != nil {
		if err := machine.plot(folder); err != nil {
			return err
		}
	}
	if kept != nil {
		if err := kept.plot(folder); err != nil {
			return err
		}
	}
	return os.WriteFile(file, []byte(page.String()), 0o644)
}

// ifThere reads a file of results, and returns nil and says so if there is none.
func ifThere[T any](read func(name string) (*T, error), results, name string) (*T, error) {
	t, err := read(filepath.Join(results, name))
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "bench: without %s, what follows from it stays as it was\n", name)
		return nil, nil
	}
	return t, err
}

// sections returns those of a page that have the titles.
func sections(page string, titles []string) string {
	var b strings.Builder
	for _, s := range strings.SplitAfter("\n"+page, "\n## ")[1:] {
		title, _, _ := strings.Cut(s, "\n")
		if slices.Contains(titles, title) {
			b.WriteString("## " + strings.TrimSuffix(s, "## "))
		}
	}
	return b.String()
}

// measured is what benchmarks said, by their names and then by unit.
type measured struct {
	machine map[string]string
	cpus    int
	values  map[string]map[string][]float64
	missing []string // names that the report asked for in vain
}

func read(name string) (*measured, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := &measured{cpus: 1, machine: map[string]string{}, values: map[string]map[string][]float64{}}
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
			if n, err := strconv.Atoi(full[i+1:]); err == nil {
				full, m.cpus = full[:i], n
			}
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

// readProfiles reads what a benchmark and then go tool pprof -top printed, twice. A profile is the nanoseconds of an
// operation, and then the functions with the largest shares of its samples, each share first.
func readProfiles(name string) (both [][]string, err error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		last := len(both) - 1
		switch {
		case len(f) > 3 && f[3] == "ns/op":
			both = append(both, []string{f[2]})
		// flat, flat%, sum%, cum, cum%, and a name that may have spaces in it
		case len(f) > 5 && strings.HasSuffix(f[1], "%") && strings.HasSuffix(f[2], "%") && last >= 0:
			both[last] = append(both[last], f[1]+" "+strings.TrimPrefix(f[5], "ublk-pcache/"))
		}
	}
	if len(both) != 2 || slices.ContainsFunc(both, func(p []string) bool { return len(p) == 1 }) {
		return nil, fmt.Errorf("no two profiles with samples in %s", name)
	}
	return both, nil
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

// goals is the table of what was wanted, and why that was missed where it was.
type goals struct {
	rows    strings.Builder
	reasons []string
	missed  map[string][]string // by reason
}

// unknown is what was never measured before.
const unknown = -1

// add is given what it was before, and what keeps it from being met, in case it is not.
func (g *goals) add(what string, before, is float64, sign string, want float64, reason string) {
	met := "missed"
	if sign == "≤" && is <= want || sign == "≥" && is >= want {
		met = "met"
	} else {
		if g.missed == nil {
			g.missed = map[string][]string{}
		}
		if g.missed[reason] == nil {
			g.reasons = append(g.reasons, reason)
		}
		g.missed[reason] = append(g.missed[reason], what)
	}
	was := "–"
	if before != unknown {
		was = short(before)
	}
	fmt.Fprintf(&g.rows, "| %s | %s | %s | %s %g, %s |\n", what, was, short(is), sign, want, met)
}

// short is a number with as many digits as are worth reading.
func short(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (g *goals) write(b *strings.Builder) {
	b.WriteString("### Goals\n\n| what | before | now | goal |\n|-|--:|--:|--:|\n" + g.rows.String() + "\n")
	if len(g.reasons) > 0 {
		b.WriteString("Why some are missed; what else was tried for them is in docs/design.md under *Threads*.\n\n")
	}
	for _, reason := range g.reasons {
		for _, what := range g.missed[reason] {
			fmt.Fprintf(b, "*%s*  \n", what)
		}
		b.WriteString(reason + "\n\n")
	}
}
