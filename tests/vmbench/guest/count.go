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
	"strings"
	"time"

	"ublk-pcache/tests/plugin"
)

// What a job costs in instructions is counted in the middle of it, from one moment to another, and divided by the
// requests that the device has done meanwhile: so nothing is in there of what fio does before and after, and whatever is
// done at first has been done.

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

// countJobs are those of which instructions are counted, with the number of requests that are.
var countJobs = func() (list []countJob) {
	for _, rw := range []string{"randread", "randwrite"} {
		for _, at := range [][3]int{{1, 1, 16000}, {1, 2, 16000}, {32, 1, 48000}, {32, 2, 48000}} {
			list = append(list, countJob{job: job{name: rw, rw: rw, block: "4k", depth: at[0], jobs: at[1], size: hot}, n: at[2]})
		}
	}
	for _, rw := range []string{"read", "write"} {
		list = append(list, countJob{job: job{name: "seq" + rw, rw: rw, block: "128k", depth: 8, jobs: 1, size: hot}, n: 4000})
	}
	return list
}()

// cacheJobs come after them, for caches: reads behind the part that is in there, and writes all over the disk once the
// pmem, of 1 GiB, has been filled with what the disk does not have.
var cacheJobs = []countJob{
	{job: job{name: "miss", rw: "randread", block: "4k", depth: 32, jobs: 1, more: []string{"--offset=" + hot}}, n: 16000},
	{job: job{name: "full", rw: "randwrite", block: "4k", depth: 32, jobs: 1}, n: 48000, after: pmemSize / 4096},
}

type countJob struct {
	job
	n     int // requests that are counted, about
	after int // requests before those; 0: n/4
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
		if t := &targets[i]; t.kind != hotspot && only.MatchString(t.name) {
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
		jobs = slices.Concat(jobs, cacheJobs)
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
	if j.after == 0 {
		j.after = j.n / 4
	}
	// To read what each function has takes long: so of these it is the whole job, before and after which the server
	// has nothing to do.
	whole, err := readCounts(functions)
	if err != nil {
		return err
	}
	begin, err := j.requestsDone(device)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		some := j.job
		all := j.after + j.n + j.n/4
		some.more = append([]string{fmt.Sprintf("--io_size=%dk", all*blockKiB[j.block]/j.jobs)}, j.more...)
		_, err := some.run(t, device)
		ended <- err
	}()
	var moments [2]moment
	for i, until := range []int{j.after, j.after + j.n} {
		m := &moments[i]
		for {
			if m.requests, err = j.requestsDone(device); err != nil {
				return err
			}
			if m.requests -= begin; m.requests >= until {
				break
			}
			select {
			case err := <-ended:
				return fmt.Errorf("%s ended after %d requests: %v", j.name, m.requests, err)
			case <-time.After(pollEvery):
			}
		}
		m.at = time.Now()
		if m.counts, err = readCounts(nil); err != nil {
			return err
		}
	}
	if err := <-ended; err != nil {
		return err
	}
	from, to := &moments[0], &moments[1]
	requests := float64(to.requests - from.requests)
	if requests < float64(j.n/2) {
		return fmt.Errorf("%s: %.0f requests were counted, of %d", j.name, requests, j.n)
	}
	group := func(i int) float64 { return float64(to.group[i]-from.group[i]) / requests }
	fmt.Printf("COUNT %s %s-%s %dx%d server %.0f kernel %.0f client %.0f iops %.0f\n",
		t.name, j.name, j.block, j.depth, j.jobs, group(0), group(1), group(2), requests/to.at.Sub(from.at).Seconds())
	if functions == nil {
		return nil
	}
	done, err := j.requestsDone(device)
	if err != nil {
		return err
	}
	after, err := readCounts(functions)
	if err != nil {
		return err
	}
	of := map[string]float64{}
	for name := range after.server {
		of[name] = float64(after.server[name]-whole.server[name]) / float64(done-begin)
	}
	plugin.List(of)
	return nil
}

// pollEvery is how often the device is asked how many requests it has done: so seldom that it is not seen in the counts.
const pollEvery = 10 * time.Millisecond

// moment is what has been counted once so many requests were done.
type moment struct {
	counts
	requests int
	at       time.Time
}

// requestsDone is how many reads, or writes, a block device has done.
func (j *job) requestsDone(device string) (int, error) {
	d, err := doneBy(device)
	if strings.HasSuffix(j.rw, "read") {
		return int(d.reads), err
	}
	return int(d.writes), err
}

var blockKiB = map[string]int{"4k": 4, "128k": 128}
