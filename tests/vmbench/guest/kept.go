package main

import (
	"fmt"
	"strings"
	"syscall"
)

// What a cache keeps shows at its disk: a read that comes there has missed.

// watched runs a job, and returns what share of its reads has come to the disk, too.
func (j *job) watched(t *target, device string) (m measured, missed float64, err error) {
	d, err := doneDuring(disk, func() error {
		m, err = j.run(t, device)
		return err
	})
	return m, float64(d.reads) / float64(m.reads), err
}

// scanned measures what a sequential read of the whole disk costs those who read something else all the time.
func scanned(t *target) error {
	device, err := t.start(disk)
	if err != nil {
		return err
	}
	users := job{name: "users", rw: "randread", block: "4k", depth: 32, jobs: 1, size: hot, seconds: 8}
	if _, err := users.run(t, device); err != nil {
		return err
	}
	// Each block once.
	all := job{name: "all", rw: "randread", block: "4k", depth: 32, jobs: 1, size: hot, more: []string{"--norandommap=0"}}
	_, before, err := all.watched(t, device)
	if err != nil {
		return err
	}
	slow := job{name: "beside", rw: "randread", block: "4k", depth: 1, jobs: 1, size: hot, seconds: 600, more: []string{"--rate_iops=2000"}}
	beside := slow.command(device)
	var said strings.Builder
	beside.Stdout, beside.Stderr = &said, &said
	if err := beside.Start(); err != nil {
		return err
	}
	scan := job{name: "scan", rw: "read", block: "128k", depth: 8, jobs: 1, size: "100%"}
	m, scanErr := scan.run(t, device)
	beside.Process.Signal(syscall.SIGINT)
	beside.Wait() // an exit status says that it was told to end
	if scanErr != nil {
		return fmt.Errorf("%w\n%s", scanErr, &said)
	}
	_, after, err := all.watched(t, device)
	if err != nil {
		return err
	}
	result(t, m.ios, "Scan", float64(m.ios)/m.seconds, "IO/s", 1-before, "before-hits/IO", 1-after, "after-hits/IO")
	return t.stop()
}

// skewed measures a target that has room for a quarter of what is used, some of it much more than the rest.
func skewed(t *target) error {
	device, err := t.start(disk)
	if err != nil {
		return err
	}
	zipf := job{name: "zipf", rw: "randrw", block: "4k", depth: 32, jobs: 1, seconds: 12,
		more: []string{"--rwmixread=70", "--random_distribution=zipf:0.99"}}
	if _, err := zipf.run(t, device); err != nil {
		return err
	}
	m, missed, err := zipf.watched(t, device)
	if err != nil {
		return err
	}
	result(t, m.ios, "Zipf", float64(m.ios)/m.seconds, "IO/s", m.p99, "p99-ns", m.longest, "max-ns", 1-missed, "hits/IO")
	return t.stop()
}
