// Command bench writes docs/benchmarks.md, and the plots in it, from what the benchmarks printed, so that no number in
// there was typed by anybody. A number is the median of all runs in a file.
package main

import (
	"fmt"
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
	"`make bench-count`, `make bench` and `make bench-vm` measure, `make bench-report` writes this page and its plots from what they\n" +
	"printed. A number is the median of all rounds. In a round everything takes its turn, so only numbers of one table compare. Each\n" +
	"part says when it was measured.\n\n"

// part is what results of some files become: sections of the page. Where a file is missing they stay as they are, since to
// measure everything takes hours.
type part struct {
	files, titles []string
	write         func(page *strings.Builder) error
}

// report writes nothing unless all results of the files that are there can be found.
func report(results, folder string) error {
	file := filepath.Join(folder, "benchmarks.md")
	before, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(results, name) }
	var counts *counted
	var native, machine *measured
	var page strings.Builder
	page.WriteString(intro)
	for _, p := range []part{
		{[]string{"bench-count.txt"}, []string{"Instructions"}, func(page *strings.Builder) (err error) {
			if counts, err = readCounts(in("bench-count.txt")); err != nil {
				return err
			}
			counts.report(page)
			return missing(counts.missing)
		}},
		{[]string{"bench-vm.txt"}, []string{"On a real kernel"}, func(page *strings.Builder) (err error) {
			if machine, err = read(in("bench-vm.txt")); err != nil {
				return err
			}
			machine.machineReport(page)
			if err := missing(machine.missing); err != nil {
				return err
			}
			return machine.plot(folder)
		}},
		{[]string{"bench.txt"}, []string{"Hits, without a driver", "The index", "Opening and writing back"}, func(page *strings.Builder) (err error) {
			if native, err = read(in("bench.txt")); err != nil {
				return err
			}
			var profiles [][]string // of a write at first and now, and of a read
			for _, op := range []string{"Write", "Read"} {
				both, err := readProfiles(in("bench-profile-" + op + ".txt"))
				if err != nil {
					return err
				}
				profiles = append(profiles, both...)
			}
			native.nativeReport(page, profiles)
			return missing(native.missing)
		}},
		{[]string{"bench-vm.txt", "bench.txt"}, []string{"Goals"}, func(page *strings.Builder) error {
			goals := goals{missed: map[string][]string{}}
			machine.machineGoals(&goals)
			native.nativeGoals(&goals)
			goals.write(page)
			return missing(slices.Concat(machine.missing, native.missing))
		}},
	} {
		if there := func(name string) bool { _, err := os.Stat(in(name)); return err == nil }; slices.ContainsFunc(p.files, func(name string) bool { return !there(name) }) {
			page.WriteString(sections(string(before), p.titles))
			fmt.Fprintf(os.Stderr, "bench: without %s, what follows from it stays as it was\n", strings.Join(p.files, " and "))
			continue
		}
		if err := p.write(&page); err != nil {
			return err
		}
	}
	return os.WriteFile(file, []byte(page.String()), 0o644)
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

func missing(names []string) error {
	if len(names) > 0 {
		return fmt.Errorf("no result of %s", strings.Join(names, ", "))
	}
	return nil
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

// add is given what keeps it from being met, in case it is not.
func (g *goals) add(what string, is float64, sign string, want float64, reason string) {
	met := "missed"
	if sign == "≤" && is <= want || sign == "≥" && is >= want {
		met = "met"
	} else {
		if g.missed[reason] == nil {
			g.reasons = append(g.reasons, reason)
		}
		g.missed[reason] = append(g.missed[reason], what)
	}
	fmt.Fprintf(&g.rows, "| %s | %.2f | %s %g, %s |\n", what, is, sign, want, met)
}

func (g *goals) write(b *strings.Builder) {
	b.WriteString("## Goals\n\n| what | measured | goal |\n|-|--:|--:|\n" + g.rows.String())
	if len(g.reasons) > 0 {
		b.WriteString("\n### Why some are missed\n\nWhat else was tried for them, and how it went, is in docs/design.md under *Threads*.\n")
	}
	for _, reason := range g.reasons {
		b.WriteString("\n")
		for _, what := range g.missed[reason] {
			fmt.Fprintf(b, "*%s*  \n", what)
		}
		b.WriteString(reason + "\n")
	}
}
