package main

import (
	"fmt"
	"strings"
)

// ns is the median time of an operation in nanoseconds.
func (m *measured) ns(format string, args ...any) float64 {
	return m.median("sec/op", format, args...) * 1e9
}

const (
	shape  = "size=%d/batch=%d/threads=%d"
	native = "## Hits, without a driver\n\n" +
		"The engine alone, on a plain mapping, rounds: %d, on %s CPUs (%s), %s, %s, %s.\n\n"
	work = "What the thread of a queue does for a %s, over 256 MiB at random, in turns of a batch. Write-back rests, so that\n" +
		"it costs no part of it. *Bare* is the same %s, with nothing to find and nothing to log. Nanoseconds for an\n" +
		"operation, and how much that is of the bare one.\n\n" +
		"| bytes | batch | threads | bare | | without data crc | | with data crc | | allocations |\n|--:|--:|--:|--:|-|--:|--:|--:|--:|--:|\n"
	index = "## The index\n\n" +
		"Nanoseconds; lookup+copy also copies 4 KiB from a random place in 1 GiB. A collection is one of the Go runtime's.\n\n" +
		"| extents | lookup | lookup+copy | overwrite | collection |\n|--:|--:|--:|--:|--:|\n"
	whole = "## Opening and writing back\n\n" +
		"| | without data crc | with data crc |\n|-|--:|--:|\n"
)

var (
	sizes   = []int{512, 4 << 10, 64 << 10, 1 << 20}
	extents = []int{1e4, 1e5, 1e6, 1e7}
)

func (m *measured) nativeReport(b *strings.Builder) {
	runs := len(m.values["Index/lookup/extents=10000"]["sec/op"])
	fmt.Fprintf(b, native, runs, m.cpus, m.machine["cpu"], m.machine["kernel"], m.machine["go"], m.machine["date"])
	for _, op := range []struct{ name, bare, what, same string }{
		{"Write", "BareStore", "write", "stores to consecutive places and one fence for a batch"},
		{"Read", "BareLoad", "read", "copies from random places"},
	} {
		fmt.Fprintf(b, work, op.what, op.same)
		for _, size := range sizes {
			for _, batch := range []int{1, 16} {
				for threads := 1; threads <= 2; threads++ {
					bare := m.ns(op.bare+"/"+shape, size, batch, threads)
					plain := m.ns(op.name+"/crc=false/"+shape, size, batch, threads)
					summed := m.ns(op.name+"/crc=true/"+shape, size, batch, threads)
					allocs := m.median("allocs/op", op.name+"/crc=false/"+shape, size, batch, threads)
					fmt.Fprintf(b, "| %d | %d | %d | %.0f | | %.0f | %.2f | %.0f | %.2f | %.0f |\n",
						size, batch, threads, bare, plain, plain/bare, summed, summed/bare, allocs)
				}
			}
		}
		b.WriteString("\n")
	}
	b.WriteString(index)
	for _, n := range extents {
		fmt.Fprintf(b, "| %d | %.0f | %.0f | %.0f | %.0f |\n", n, m.ns("Index/lookup/extents=%d", n),
			m.ns("Index/lookup+copy/extents=%d", n), m.ns("Index/insert/extents=%d", n), m.ns("Index/collection/extents=%d", n))
	}
	b.WriteString("\n" + whole)
	drain := func(crc bool) float64 { return 1e6 / m.ns("Drain/crc=%t", crc) }
	fmt.Fprintf(b, "| replay of a log of 2^20 random keys, million keys/s | %.2f | %.2f |\n", m.replay(false), m.replay(true))
	fmt.Fprintf(b, "| write-back of random 4 KiB to a disk that takes no time, thousand blocks/s | %.0f | %.0f |\n\n", drain(false), drain(true))
}

// replay is in million keys a second.
func (m *measured) replay(crc bool) float64 { return 1e-6 / m.median("sec/key", "Replay/crc=%t", crc) }

func (m *measured) nativeGoals(g *goals) {
	const four = "size=4096/batch=16/threads="
	g.add("4 KiB writes in batches of 16, against bare stores and one fence",
		m.ns("Write/crc=false/"+four+"1")/m.ns("BareStore/"+four+"1"), "≤", 1.3)
	g.add("4 KiB read hits, against bare copies", m.ns("Read/crc=false/"+four+"1")/m.ns("BareLoad/"+four+"1"), "≤", 1.3)
	g.add("4 KiB writes, two threads against one", m.ns("Write/crc=false/"+four+"1")/m.ns("Write/crc=false/"+four+"2"), "≥", 1.8)
	g.add("4 KiB read hits, two threads against one", m.ns("Read/crc=false/"+four+"1")/m.ns("Read/crc=false/"+four+"2"), "≥", 1.8)
	g.add("allocations of a write or read hit", m.median("allocs/op", "Write/crc=false/"+four+"1")+m.median("allocs/op", "Read/crc=false/"+four+"1"), "≤", 0)
	g.add("lookup and copy, 10^7 extents against 10^4",
		m.ns("Index/lookup+copy/extents=10000000")/m.ns("Index/lookup+copy/extents=10000"), "≤", 1.5)
	g.add("replay, million keys/s on all CPUs; the goal is for one of them", m.replay(false), "≥", 5)
}
