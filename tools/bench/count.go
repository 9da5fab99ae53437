package main

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
)

// What make bench-count found: instructions of a request, by target and job.

// counted is what was counted.
type counted struct {
	date, kernel string
	values       map[[2]string]count // by target and job
	functions    map[string][]string // of our server, by job: those with most, their instructions first
	engine       map[string]float64  // of the engine alone, by path
	missing      []string
}

type count struct{ server, kernel, client, iops float64 }

// countJobs are in the order of the tables. The last two are for caches only.
var countJobs = []struct{ name, what string }{
	{"randread-4k 1x1", "4K random read, depth 1 × 1"}, {"randread-4k 1x2", "4K random read, depth 1 × 2"},
	{"randread-4k 32x1", "4K random read, depth 32 × 1"}, {"randread-4k 32x2", "4K random read, depth 32 × 2"},
	{"randwrite-4k 1x1", "4K random write, depth 1 × 1"}, {"randwrite-4k 1x2", "4K random write, depth 1 × 2"},
	{"randwrite-4k 32x1", "4K random write, depth 32 × 1"}, {"randwrite-4k 32x2", "4K random write, depth 32 × 2"},
	{"seqread-128k 8x1", "128K sequential read, depth 8 × 1"},
	{"seqwrite-128k 8x1", "128K sequential write, depth 8 × 1"},
	{"miss-4k 32x1", "4K random read, not in the cache, depth 32 × 1"},
	{"full-4k 32x1", "4K random write, cache full of dirty data, depth 32 × 1"},
}

func readCounts(name string) (*counted, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c := &counted{values: map[[2]string]count{}, functions: map[string][]string{}, engine: map[string]float64{}}
	last := ""
	for lines := bufio.NewScanner(f); lines.Scan(); err = lines.Err() {
		line := lines.Text()
		if date, ok := strings.CutPrefix(line, "date: "); ok {
			c.date = date
		}
		if kernel, ok := strings.CutPrefix(line, "kernel: "); ok {
			c.kernel = kernel
		}
		var target, job, at, path string
		var n count
		var alone float64
		if _, err := fmt.Sscanf(line, "COUNT %s %s %s server %f kernel %f client %f iops %f", &target, &job, &at,
			&n.server, &n.kernel, &n.client, &n.iops); err == nil {
			last = job + " " + at
			c.values[[2]string{target, last}] = n
		} else if _, err := fmt.Sscanf(line, "COUNT engine %s %f", &path, &alone); err == nil {
			c.engine[path] = alone
		} else if f := strings.Fields(line); len(f) == 2 && line[0] == ' ' {
			c.functions[last] = append(c.functions[last], f[0]+" "+strings.TrimPrefix(f[1], "ublk-pcache/"))
		}
	}
	return c, err
}

// of returns what was counted; a target without data cannot miss, nor be full.
func (c *counted) of(target, job string) count {
	n, ok := c.values[[2]string{target, job}]
	if !ok {
		if slices.Contains(caches, target) || !strings.HasPrefix(job, "miss") && !strings.HasPrefix(job, "full") {
			c.missing = append(c.missing, target+" "+job)
		}
		nan := math.NaN()
		return count{nan, nan, nan, nan}
	}
	return n
}

const countIntro = "## Instructions\n\n" +
	"In the test machine, whose emulator counts them, %s; %s.\n" +
	"They are counted in the middle of a job, from one moment to another, with whatever goes on beside it, and divided by the\n" +
	"requests that the device has done meanwhile. Other load of the host's processors is not in there; that of its disk is, since the\n" +
	"machine's time goes on while a request waits. Two runs, of programs that hardly\n" +
	"differ, agreed within 2 %% for most jobs; the kernel's part of 4K reads at depth 32 × 1 differed by 5 %%, that of two jobs at depth 1\n" +
	"by 13 %%, where processors sleep and wake between requests, and 128K writes by a fifth, with which write-back meets or does not.\n" +
	"The first random writes come to a cache that was filled in order, and turn trees of its index into tables. Where the cache is full,\n" +
	"a quarter of the disk is in it, in trees. Instructions are not time: a copy of memory counts little, and a wait for memory nothing.\n\n" +
	"### A request\n\n" +
	"Of the server and the kernel together, all but fio's. The first jobs hit.\n\n"

func (c *counted) report(b *strings.Builder) {
	fmt.Fprintf(b, countIntro, c.kernel, c.date)
	everything, against := with("null", "kublk-null", "disk"), []string{"dm-pcache", "null"}
	c.table(b, everything, against, func(n count) float64 { return n.server + n.kernel })
	b.WriteString("\n### Its server\n\nOf them, those of the server itself.\n\n")
	c.table(b, []string{caches[0], "null", "kublk-null"}, nil, func(n count) float64 { return n.server })
	b.WriteString("\n### Requests per second\n\nOf a machine that takes a nanosecond for each instruction.\n\n")
	c.table(b, everything, against, func(n count) float64 { return n.iops })
	b.WriteString("\n### Where the server's are\n\nThe functions with most, of a 4K random request that hits, depth 32 × 1.\n\n| a read | a write |\n|-|-|\n")
	reads, writes := c.functionsOf("randread-4k 32x1"), c.functionsOf("randwrite-4k 32x1")
	for i := range min(len(reads), len(writes), 16) {
		fmt.Fprintf(b, "| %s | %s |\n", reads[i], writes[i])
	}
	b.WriteString(engineIntro)
	for _, p := range enginePaths {
		fmt.Fprintf(b, "| %s | %.0f |\n", p.what, c.alone(p.name))
	}
	b.WriteString("\n")
	var g goals
	c.goals(&g)
	g.write(b)
}

const engineIntro = "\n### The engine alone\n\n" +
	"Of its own paths, under user-mode emulation, exactly; `make count` fails where one of them has risen.\n\n| | |\n|-|--:|\n"

// enginePaths are those of BenchmarkCount.
var enginePaths = []struct{ name, what string }{
	{"write", "a write of 4 KiB"}, {"write-16", "one of 16 in a turn"}, {"hit", "a read of 4 KiB that hits"}, {"hit-16", "one of 16 in a turn"},
	{"miss", "one that misses"}, {"enter", "a key entered into the index"}, {"replay", "a key replayed"}, {"writeback", "a block written back"},
}

func (c *counted) functionsOf(job string) []string {
	if c.functions[job] == nil {
		c.missing = append(c.missing, "functions of "+job)
	}
	return c.functions[job]
}

func (c *counted) alone(path string) float64 {
	n, ok := c.engine[path]
	if !ok {
		c.missing = append(c.missing, "engine "+path)
	}
	return n
}

// goals has them with what they were at 84208a5.
func (c *counted) goals(g *goals) {
	whole := func(target, job string) float64 { n := c.of(target, job); return n.server + n.kernel }
	ratio := func(job, other string) float64 { return whole(caches[0], job) / whole(other, job) }
	iops := func(job string) float64 { return c.of(caches[0], job).iops / c.of("dm-pcache", job).iops }
	g.add("server and kernel, 4K read hit, depth 32 × 1, against dm-pcache", 1.10, ratio("randread-4k 32x1", "dm-pcache"), "≤", 1.05, besideDriver)
	g.add("server and kernel, 4K write, depth 32 × 1, against dm-pcache", 0.92, ratio("randwrite-4k 32x1", "dm-pcache"), "≤", 0.8, besideDriver)
	g.add("server and kernel, 4K read hit, depth 1 × 1, against the null device", unknown, ratio("randread-4k 1x1", "null"), "≤", 1.15, besideSleep)
	g.add("server and kernel, 4K write, depth 1 × 1, against the null device", unknown, ratio("randwrite-4k 1x1", "null"), "≤", 1.15, besideSleep)
	g.add("server, 4K read hit, depth 32 × 1", 1824, c.of(caches[0], "randread-4k 32x1").server, "≤", 1400, besideServer)
	g.add("server, 4K write, depth 32 × 1", 3646, c.of(caches[0], "randwrite-4k 32x1").server, "≤", 2200, besideServer)
	g.add("requests a second, depth 32 × 1, against dm-pcache, the lesser of reads and writes", 0.90,
		min(iops("randread-4k 32x1"), iops("randwrite-4k 32x1")), "≥", 1, besideDriver)
	g.add("requests a second, depth 32 × 2, against dm-pcache, the lesser of reads and writes", 0.87, min(iops("randread-4k 32x2"), iops("randwrite-4k 32x2")), "≥", 1, besideDriver)
	g.add("the null device against 128K hits, server and kernel, the lesser of reads and writes", 0.62,
		min(1/ratio("seqread-128k 8x1", "null"), 1/ratio("seqwrite-128k 8x1", "null")), "≥", 0.8, besideCopy)
	g.add("a block written back, engine alone", 3647, c.alone("writeback"), "≤", 3647/2, besideServer)
}

// Why goals are missed.
const (
	besideDriver = "Both ways of the driver are in it, which a target in the kernel does without: the column of the null device, which does nothing\n" +
		"else, is what is left of these goals before the cache does anything. How much the kernel's part of it is depends on how many requests\n" +
		"come to a turn, which differs from run to run, see above."
	besideSleep = "Each request wakes the server and the client here, and how often either still looks when the other is done decides. The\n" +
		"writes are the first random ones of the cache, which enter trees."
	besideServer = "More than a quarter of it is the copy. The rest is in the table of functions, where no line is large any more."
	besideCopy   = "What the null device does not have is the server's, and half of that the copy between its buffer and the pmem. To have the kernel\n" +
		"do one copy for that and its own was tried, and is not done; docs/design.md says why."
)

// table has a row for each job, with a number of each target, and ours as a multiple of others.
func (c *counted) table(b *strings.Builder, targets, against []string, number func(count) float64) {
	head := append([]string{"job"}, targets...)
	for _, other := range against {
		head = append(head, "÷ "+other)
	}
	table(b, head)
	for _, j := range countJobs {
		cells := []string{j.what}
		cell := func(format string, v float64) {
			if math.IsNaN(v) || v < 0 { // or nothing but what measuring takes
				cells = append(cells, "–")
				return
			}
			cells = append(cells, fmt.Sprintf(format, v))
		}
		for _, t := range targets {
			cell("%.0f", number(c.of(t, j.name)))
		}
		for _, other := range against {
			cell("%.2f", number(c.of(caches[0], j.name))/number(c.of(other, j.name)))
		}
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
}
