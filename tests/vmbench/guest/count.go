package main

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"

	"ublk-pcache/tests/plugin"
)

// What a job costs in instructions is the difference between a run of n requests and one of 3n: 2n requests, and nothing
// of what fio does before and after. Before that the job runs once for nothing, so that whatever is done at first has
// been done.

// countsFile is where the emulator counts.
const countsFile = "/share/counts"

// counts are instructions: of the servers, of the kernel, and of all other programs, which is fio.
type counts struct {
	group  [3]uint64
	server map[string]uint64 // of the servers, by function of the cache's, if that is asked for
}

// readCounts reads what has been counted, by function if there are functions.
func readCounts(functions plugin.Functions) (c counts, err error) {
	f, err := os.Open(countsFile)
	if err != nil {
		return c, err
	}
	defer f.Close()
	if err := binary.Read(f, binary.LittleEndian, &c.group); err != nil || functions == nil {
		return c, err
	}
	info, err := f.Stat()
	if err != nil {
		return c, err
	}
	byAddress = slices.Grow(byAddress[:0], int(info.Size()))[:info.Size()]
	n, err := io.ReadFull(f, byAddress[:len(byAddress)-binary.Size(c.group)])
	if err == nil {
		c.server = functions.Sum(0, byAddress[:n])
	}
	return c, err
}

// byAddress is what is read, kept so that nothing is collected while others are counted.
var byAddress []byte

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
func count(only *regexp.Regexp, byFunction bool) error {
	if err := prepare(); err != nil {
		return err
	}
	header()
	var functions plugin.Functions
	if byFunction {
		program, err := exec.LookPath("ublk-pcache")
		if err != nil {
			return err
		}
		f, err := elf.Open(program)
		if err != nil {
			return err
		}
		defer f.Close()
		if functions, err = plugin.FunctionsOf(f); err != nil {
			return err
		}
	}
	for i := range targets {
		if t := &targets[i]; only.MatchString(t.name) {
			if err := countTarget(t, functions); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
		}
	}
	return nil
}

func countTarget(t *target, functions plugin.Functions) error {
	device, err := startFilled(t)
	if err != nil {
		return err
	}
	jobs := countJobs
	if t.kind == cache {
		jobs = append(jobs[:len(jobs):len(jobs)], miss)
	}
	for _, j := range jobs {
		if err := j.count(t, device, functions); err != nil {
			return err
		}
		if err := settle(t); err != nil {
			return err
		}
	}
	return t.stop()
}

// count runs the job and prints what a request of it takes; and of the cache's server, if there are functions, by function.
func (j countJob) count(t *target, device string, functions plugin.Functions) error {
	if t.name != "ublk-pcache" {
		functions = nil
	}
	var before, after [3]counts
	var m measured
	for run, n := range []int{j.n, j.n, 3 * j.n} {
		some := j.job
		some.more = append([]string{fmt.Sprintf("--io_size=%dk", n*blockKiB[j.block]/j.jobs)}, j.more...)
		var err error
		if before[run], err = readCounts(functions); err != nil {
			return err
		}
		if m, err = some.run(t, device); err != nil {
			return err
		}
		if after[run], err = readCounts(functions); err != nil {
			return err
		}
	}
	per := func(value func(c *counts) float64) float64 {
		taken := func(run int) float64 { return value(&after[run]) - value(&before[run]) }
		return (taken(2) - taken(1)) / float64(2*j.n)
	}
	group := func(i int) float64 { return per(func(c *counts) float64 { return float64(c.group[i]) }) }
	fmt.Printf("COUNT %s %s-%s %dx%d server %.0f kernel %.0f client %.0f iops %.0f\n",
		t.name, j.name, j.block, j.depth, j.jobs, group(0), group(1), group(2), float64(m.ios)/m.seconds)
	if functions != nil {
		of := map[string]float64{}
		for name := range after[2].server {
			of[name] = per(func(c *counts) float64 { return float64(c.server[name]) })
		}
		plugin.List(of)
	}
	return nil
}

var blockKiB = map[string]int{"4k": 4, "128k": 128}
