package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// A job is a run of fio.
type job struct {
	name    string
	rw      string
	block   string
	depth   int
	jobs    int
	size    string // of the part of the device that it is about, "" for all of it
	seconds int    // 0: until all of size has been done once
	fsync   bool   // after every write
	more    []string
}

// hot is what a hit hits: an eighth of the pmem.
const hot = "128M"

// hitJobs are what a cache is asked when all of it is in there. The more a job writes the later it comes, since its
// write-back goes on beside the next ones.
var hitJobs = func() (list []job) {
	random := func(rw string) {
		for _, depth := range []int{1, 32} {
			for jobs := 1; jobs <= 2; jobs++ {
				list = append(list, job{name: rw, rw: rw, block: "4k", depth: depth, jobs: jobs, size: hot, seconds: 2})
			}
		}
	}
	random("randread")
	list = append(list,
		job{name: "seqread", rw: "read", block: "128k", depth: 8, jobs: 1, size: hot, seconds: 2},
		job{name: "fsync", rw: "randwrite", block: "4k", depth: 1, jobs: 1, size: hot, seconds: 2, fsync: true},
		job{name: "mixed", rw: "randrw", block: "4k", depth: 32, jobs: 2, size: hot, seconds: 2, more: []string{"--rwmixread=70"}})
	random("randwrite")
	return append(list, job{name: "seqwrite", rw: "write", block: "128k", depth: 8, jobs: 1, size: hot, seconds: 2})
}()

// measured is what fio and the kernel say about a job.
type measured struct {
	ios     int64
	reads   int64 // of them
	seconds float64
	median  float64 // time of a request to its completion, in ns
	p99     float64
	longest float64
	busy    float64 // CPU time of the whole machine, in ns
	server  float64 // and that of the target's server
}

// command returns fio with the job.
func (j *job) command(device string) *exec.Cmd {
	args := []string{"--output-format=json", "--name=" + j.name, "--filename=" + device, "--direct=1", "--ioengine=io_uring",
		"--rw=" + j.rw, "--bs=" + j.block, fmt.Sprintf("--iodepth=%d", j.depth), fmt.Sprintf("--numjobs=%d", j.jobs),
		"--group_reporting", "--norandommap", "--randrepeat=0"}
	if j.size != "" {
		args = append(args, "--size="+j.size)
	}
	if j.seconds > 0 {
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%d", j.seconds))
	}
	if j.fsync {
		args = append(args, "--fsync=1")
	}
	return exec.Command("fio", append(args, j.more...)...)
}

func (j *job) run(t *target, device string) (m measured, err error) {
	// fio makes a file where there is no device, and measures that.
	if info, err := os.Stat(device); err != nil || info.Mode()&os.ModeDevice == 0 {
		return m, fmt.Errorf("%s is no device (%v)", device, err)
	}
	server := 0
	if t.server != nil {
		server = t.server()
	}
	busy, served := machineTime(), processTime(server)
	out, err := j.command(device).Output()
	if err != nil {
		return m, fmt.Errorf("fio: %w\n%s", err, out)
	}
	m.busy, m.server = machineTime()-busy, processTime(server)-served
	return m, m.parse(out)
}

func (m *measured) parse(out []byte) error {
	type direction struct {
		IOs     int64   `json:"total_ios"`
		Runtime float64 `json:"runtime"` // ms
		Latency struct {
			Max         float64
			Percentiles map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var said struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	// fio may print warnings before the object.
	text := string(out)
	if err := json.Unmarshal([]byte(text[max(0, strings.IndexByte(text, '{')):]), &said); err != nil || len(said.Jobs) != 1 {
		return fmt.Errorf("read what fio printed: %w\n%s", err, out)
	}
	j := said.Jobs[0]
	if j.Error != 0 {
		return fmt.Errorf("fio: error %d", j.Error)
	}
	m.ios, m.reads = j.Read.IOs+j.Write.IOs, j.Read.IOs
	m.seconds = max(j.Read.Runtime, j.Write.Runtime) / 1e3
	most := j.Read
	if j.Write.IOs > j.Read.IOs {
		most = j.Write
	}
	m.median, m.p99 = most.Latency.Percentiles["50.000000"], most.Latency.Percentiles["99.000000"]
	m.longest = max(j.Read.Latency.Max, j.Write.Latency.Max)
	return nil
}

// startFilled starts a target anew on the fast disk, with all that a hit hits in the cache and on the disk.
func startFilled(t *target) (device string, err error) {
	if device, err = t.start(disk); err != nil || t.kind == nothing {
		return device, err
	}
	fill := job{name: "fill", rw: "write", block: "128k", depth: 8, jobs: 1, size: hot}
	if _, err := fill.run(t, device); err != nil {
		return "", err
	}
	return device, settle(t)
}

// hits measures a target on the fast disk while everything is in the cache.
func hits(t *target) error {
	device, err := startFilled(t)
	if err != nil {
		return err
	}
	for _, j := range hitJobs {
		m, err := j.run(t, device)
		if err != nil {
			return err
		}
		pairs := []any{float64(m.ios) / m.seconds, "IO/s", m.median, "p50-ns", m.p99, "p99-ns", m.longest, "max-ns", m.busy / float64(m.ios), "cpu-ns/IO"}
		if t.server != nil {
			pairs = append(pairs, m.server/float64(m.ios), "server-ns/IO")
		}
		result(t, m.ios, fmt.Sprintf("Hit/job=%s/depth=%d/jobs=%d", j.name, j.depth, j.jobs), pairs...)
	}
	if t.kind == cache {
		if err := restart(t, disk); err != nil {
			return err
		}
	}
	return t.stop()
}

// settle lets write-back end where that leaves the data in the cache, so that it takes nothing from those who read.
func settle(t *target) error {
	if t.name == "ublk-pcache" || t.name == "dm-pcache" {
		return t.drain()
	}
	return nil
}

// restart measures how long a cache with all the keys that the jobs have left in its log takes to come back.
func restart(t *target, disk string) error {
	if t.server != nil {
		if err := resident(t); err != nil {
			return err
		}
	}
	if err := t.stop(); err != nil {
		return err
	}
	begin := time.Now()
	if _, err := t.open(disk); err != nil {
		return err
	}
	result(t, 1, "Restart", float64(time.Since(begin)), "ns")
	return nil
}

// resident tells how much memory of its own a server has, and for how much that it caches.
func resident(t *target) error {
	var status struct {
		Dirty int64 `json:"dirty_bytes"`
		Clean int64 `json:"clean_bytes"`
		Index int64 `json:"index_bytes"`
	}
	if err := json.Unmarshal([]byte(output("ublk-pcache", "status", "0", "--json")), &status); err != nil {
		return err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.server()))
	if err != nil {
		return err
	}
	var kib float64
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			fmt.Sscan(rest, &kib)
		}
	}
	result(t, 1, "Memory", kib*1024, "anonymous-B", float64(status.Index), "index-B", float64(status.Dirty+status.Clean), "cached-B")
	return nil
}

// burst is a burst of writes that the cache takes.
var burst = job{name: "burst", rw: "randwrite", block: "4k", depth: 32, jobs: 1, size: "64M", more: []string{"--io_size=8M"}}

// drains measures how long a hard disk takes to have what a cache in front of it took.
func drains(t *target) (err error) {
	var behind server
	path, err := behind.start("hdd")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			behind.Process.Kill() // it would wait for the target to close it
		}
		err = errors.Join(err, behind.stop())
	}()
	device, err := t.start(path)
	if err != nil {
		return err
	}
	m, err := burst.run(t, device)
	if err != nil {
		return err
	}
	begin := time.Now()
	if t.drain != nil {
		if err := t.drain(); err != nil {
			return err
		}
	}
	drained := m.seconds*1e9 + float64(time.Since(begin))
	result(t, m.ios, "Burst", m.seconds*1e9, "burst-ns", drained, "drained-ns", m.longest, "max-ns")
	return t.stop()
}

// large measures a target while not all fits into the cache.
func large(t *target) error {
	device, err := t.start(disk)
	if err != nil {
		return err
	}
	for _, j := range []job{
		{name: "zipfread", rw: "randread", block: "4k", depth: 32, jobs: 1, seconds: 6, more: []string{"--random_distribution=zipf:1.1"}},
		{name: "overflow", rw: "write", block: "128k", depth: 8, jobs: 1, size: "1536M"},
		{name: "full", rw: "randwrite", block: "4k", depth: 32, jobs: 1, seconds: 6},
	} {
		m, err := j.run(t, device)
		if err != nil {
			return err
		}
		result(t, m.ios, "Large/job="+j.name, float64(m.ios)/m.seconds, "IO/s", m.p99, "p99-ns", m.longest, "max-ns")
	}
	return t.stop()
}

// tick is what /proc counts CPU time in, 100 of them a second (USER_HZ).
const tick = 1e9 / 100

// machineTime returns the CPU time of all processors that was not idle, in ns.
func machineTime() (ns float64) {
	text, _ := os.ReadFile("/proc/stat")
	first, _, _ := strings.Cut(string(text), "\n")
	for i, f := range strings.Fields(first) {
		const idle, iowait, guest = 4, 5, 9 // guest is in user, too
		if n, err := strconv.ParseFloat(f, 64); err == nil && i != idle && i != iowait && i < guest {
			ns += n * tick
		}
	}
	return ns
}

// processTime returns the CPU time of a process, 0 for none.
func processTime(pid int) (ns float64) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	const user, system = 11, 12 // counted from the state, behind the command's name
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	for _, i := range []int{user, system} {
		n, _ := strconv.ParseFloat(fields[i], 64)
		ns += n * tick
	}
	return ns
}
