package plugin

import (
	"cmp"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"slices"
	"text/tabwriter"
)

// Functions are those of a program, by address.
type Functions []elf.Symbol

// FunctionsOf returns the functions of a program that has its symbols.
func FunctionsOf(program *elf.File) (Functions, error) {
	all, err := program.Symbols()
	if err != nil {
		return nil, err
	}
	f := slices.DeleteFunc(all, func(s elf.Symbol) bool { return elf.ST_TYPE(s.Info) != elf.STT_FUNC })
	slices.SortFunc(f, func(a, b elf.Symbol) int { return cmp.Compare(a.Value, b.Value) })
	return f, nil
}

// Sum adds up, by function, what a plugin has counted for each 16 bytes from an address on: numbers of 8 bytes each.
func (f Functions) Sum(from uint64, counters []byte) map[string]uint64 {
	sums := map[string]uint64{}
	next := 0
	for i := range len(counters) / 8 {
		v := binary.LittleEndian.Uint64(counters[i*8:])
		if v == 0 {
			continue
		}
		at := from + uint64(i)*16 + 15
		for next < len(f) && f[next].Value <= at {
			next++
		}
		if next == 0 || at >= f[next-1].Value+(f[next-1].Size+31)&^15 {
			sums["elsewhere"] += v
		} else {
			sums[f[next-1].Name] += v
		}
	}
	return sums
}

// List prints the functions that have most.
func List(functions map[string]float64) {
	names := slices.SortedFunc(maps.Keys(functions), func(a, b string) int {
		return cmp.Or(cmp.Compare(functions[b], functions[a]), cmp.Compare(a, b))
	})
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	for _, name := range names[:min(len(names), 40)] {
		fmt.Fprintf(w, "%.1f\t %s\n", functions[name], name)
	}
	w.Flush()
}
