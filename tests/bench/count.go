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

// counted is what was counted, by target and job.
type counted struct {
	date, kernel string
	values       map[[2]string]count
	missing      []string
}

type count struct{ server, kernel, client, iops float64 }

// countJobs are in the order of the tables. The last is for caches only.
var countJobs = []struct{ name, what string }{
	{"randread-4k 1x1", "4K random read, depth 1 × 1"}, {"randread-4k 1x2", "4K random read, depth 1 × 2"},
	{"randread-4k 32x1", "4K random read, depth 32 × 1"}, {"randread-4k 32x2", "4K random read, depth 32 × 2"},
	{"randwrite-4k 1x1", "4K random write, depth 1 × 1"}, {"randwrite-4k 1x2", "4K random write, depth 1 × 2"},
	{"randwrite-4k 32x1", "4K random write, depth 32 × 1"}, {"randwrite-4k 32x2", "4K random write, depth 32 × 2"},
	{"seqread-128k 8x1", "128K sequential read, depth 8 × 1"},
	{"seqwrite-128k 8x1", "128K sequential write, depth 8 × 1"},
	{"miss-4k 32x1", "4K random read, not in the cache, depth 32 × 1"},
}

func readCounts(name string) (*counted, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c := &counted{values: map[[2]string]count{}}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		if date, ok := strings.CutPrefix(line, "date: "); ok {
			c.date = date
		}
		if kernel, ok := strings.CutPrefix(line, "kernel: "); ok {
			c.kernel = kernel
		}
		var target, job, at string
		var n count
		if _, err := fmt.Sscanf(line, "COUNT %s %s %s server %f kernel %f client %f iops %f", &target, &job, &at,
			&n.server, &n.kernel, &n.client, &n.iops); err == nil {
			c.values[[2]string{target, job + " " + at}] = n
		}
	}
	return c, lines.Err()
}

// of returns what was counted; a target without data cannot miss.
func (c *counted) of(target, job string) count {
	n, ok := c.values[[2]string{target, job}]
	if !ok {
		if slices.Contains(caches, target) || !strings.HasPrefix(job, "miss") {
			c.missing = append(c.missing, target+" "+job)
		}
		nan := math.NaN()
		return count{nan, nan, nan, nan}
	}
	return n
}

const countIntro = "## Instructions\n\n" +
	"In the test machine, whose emulator counts them, %s; %s. A job ran for n requests and for 3n, and the difference\n" +
	"is what 2n took, with whatever went on beside them. Nothing else that the host does is in there. Two runs of one program\n" +
	"differ at depth 32 by 1 %% in the server for reads and 5 %% for writes, and in the kernel by as much as 15 %% where more requests\n" +
	"come to a turn in one of them; by 8 %% in misses; and where processors sleep and wake between requests, at depth 1, by 3 to 11 %%,\n" +
	"with two jobs by a quarter, with 128K by a third and more. Most of what is written is written back later and not counted.\n" +
	"Instructions are not time: a copy of memory counts little, and a wait for memory nothing.\n\n" +
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
	b.WriteString("\n")
}

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
