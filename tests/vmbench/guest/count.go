package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"regexp"
)

// What a job costs in instructions is the difference between a run of n requests and one of 3n: 2n requests, and nothing
// of what fio does before and after. Before that the job runs once for nothing, so that whatever is done at first has
// been done.

// countsFile is where the emulator counts.
const countsFile = "/share/counts"

// counts are instructions: of the servers, of the kernel, and of all other programs, which is fio.
type counts [3]float64

func readCounts() (c counts, err error) {
	data, err := os.ReadFile(countsFile)
	if err != nil {
		return c, err
	}
	if len(data) != 8*len(c) {
		return c, fmt.Errorf("%s has %d bytes", countsFile, len(data))
	}
	for i := range c {
		c[i] = float64(binary.LittleEndian.Uint64(data[8*i:]))
	}
	return c, nil
}

// countJobs are those of which instructions are counted, with the number of requests of the short run.
var countJobs = func() (list []countJob) {
	for _, rw := range []string{"randread", "randwrite"} {
		for _, at := range [][3]int{{1, 1, 4000}, {1, 2, 4000}, {32, 1, 16000}, {32, 2, 16000}} {
			list = append(list, countJob{job{name: rw, rw: rw, block: "4k", depth: at[0], jobs: at[1], size: hot}, at[2]})
		}
	}
	for _, rw := range []string{"read", "write"} {
		list = append(list, countJob{job{name: "seq" + rw, rw: rw, block: "128k", depth: 8, jobs: 1, size: hot}, 500})
	}
	return list
}()

// miss comes after them, for caches: behind the part that is in there.
var miss = countJob{job{name: "miss", rw: "randread", block: "4k", depth: 32, jobs: 1, more: []string{"--offset=" + hot}}, 8000}

type countJob struct {
	job
	n int
}

// count counts the instructions of a request of each target, and how many requests are done in a second of a machine
// that takes a nanosecond for each instruction.
func count(only *regexp.Regexp) error {
	if err := prepare(); err != nil {
		return err
	}
	header()
	for i := range targets {
		if t := &targets[i]; only.MatchString(t.name) {
			if err := countTarget(t); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
		}
	}
	return nil
}

func countTarget(t *target) error {
	device, err := startFilled(t)
	if err != nil {
		return err
	}
	jobs := countJobs
	if t.kind == cache {
		jobs = append(jobs[:len(jobs):len(jobs)], miss)
	}
	for _, j := range jobs {
		if err := j.count(t, device); err != nil {
			return err
		}
		if err := settle(t); err != nil {
			return err
		}
	}
	return t.stop()
}

// count runs the job and prints what a request of it takes.
func (j countJob) count(t *target, device string) error {
	var taken [3]counts
	var m measured
	for run, n := range []int{j.n, j.n, 3 * j.n} {
		some := j.job
		some.more = append([]string{fmt.Sprintf("--io_size=%dk", n*blockKiB[j.block]/j.jobs)}, j.more...)
		before, err := readCounts()
		if err != nil {
			return err
		}
		if m, err = some.run(t, device); err != nil {
			return err
		}
		after, err := readCounts()
		if err != nil {
			return err
		}
		for i := range after {
			taken[run][i] = after[i] - before[i]
		}
	}
	per := func(i int) float64 { return (taken[2][i] - taken[1][i]) / float64(2*j.n) }
	fmt.Printf("COUNT %s %s-%s %dx%d server %.0f kernel %.0f client %.0f iops %.0f\n",
		t.name, j.name, j.block, j.depth, j.jobs, per(0), per(1), per(2), float64(m.ios)/m.seconds)
	return nil
}

var blockKiB = map[string]int{"4k": 4, "128k": 128}
