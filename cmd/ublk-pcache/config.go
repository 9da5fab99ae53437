package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/spf13/pflag"
)

// A service's description says at the next boot what it said when it was
// written, or nothing: whatever could be taken for something else than it is
// meant to be is refused, with its line.

// readConfig reads the description of a service.
func readConfig(path string) (serveOptions, error) {
	all, err := settings(path)
	if err != nil {
		return serveOptions{}, err
	}
	var a addOptions
	flags := pflag.NewFlagSet(path, pflag.ContinueOnError)
	a.define(flags)
	lines := map[string]int{}
	for _, s := range all {
		err := s.check(flags)
		if before, again := lines[s.name]; err == nil && again {
			err = fmt.Errorf("%s is given again, after line %d (leave one out)", s.name, before)
		}
		if err == nil {
			err = flags.Set(s.name, s.value)
		}
		if err != nil {
			return serveOptions{}, fmt.Errorf("%s:%d: %w", path, s.line, err)
		}
		lines[s.name] = s.line
	}
	// The machine may have lost some since that was written.
	if queues, cpus := &a.o.Device.Queues, runtime.NumCPU(); *queues > cpus {
		fmt.Fprintf(os.Stderr, "ublk-pcache: %s:%d: queues = %d, of which %d are made, one for each CPU\n", path, lines["queues"], *queues, cpus)
		*queues = cpus
	}
	o, err := a.options(flags)
	if spec, wrong := o.region(); err == nil && wrong == nil && spec.Size != 0 {
		err = fmt.Errorf("--pmem %s: a service makes no pmem: give a file that is there, without a size", o.Device.PMEM)
	}
	if err != nil {
		return serveOptions{}, located(err, path, lines)
	}
	o.Foreground, o.Existing = true, true
	return o, nil
}

// located is an error about an option of the command line, as one about the line
// that has it.
func located(err error, path string, lines map[string]int) error {
	name, rest, _ := strings.Cut(strings.TrimPrefix(err.Error(), "--"), " ")
	if line, ok := lines[name]; ok {
		return fmt.Errorf("%s:%d: %s %s", path, line, name, rest)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// setting is a line NAME = VALUE. One that is no such line has no name.
type setting struct {
	line              int
	text, name, value string
}

// settings reads a description, and judges nothing.
func settings(path string) (all []setting, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (see 'ublk-pcache run --help' for what it says)", err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		s := setting{line: n, text: strings.TrimSpace(lines.Text())}
		if s.text == "" || strings.HasPrefix(s.text, "#") {
			continue
		}
		if name, value, ok := strings.Cut(s.text, "="); ok {
			s.name, s.value = dashes(strings.TrimSpace(name)), strings.TrimSpace(value)
		}
		all = append(all, s)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return all, nil
}

// dashes is the name of an option, which may be written with underscores.
func dashes(name string) string { return strings.ReplaceAll(name, "_", "-") }

func (s *setting) check(known *pflag.FlagSet) error {
	switch {
	case s.name == "":
		return fmt.Errorf("%q is not OPTION = VALUE", s.text)
	case known.Lookup(s.name) == nil:
		return fmt.Errorf("no option %q (see 'ublk-pcache run --help')", s.name)
	case s.value == "":
		return fmt.Errorf("%s has no value", s.name)
	case strings.ContainsAny(s.value[:1]+s.value[len(s.value)-1:], `"'`):
		return fmt.Errorf("%s = %s: write it without quotes", s.name, s.value)
	case strings.Contains(s.value, " #") || strings.Contains(s.value, "\t#"):
		return fmt.Errorf("%s = %s: give the comment a line of its own", s.name, s.value)
	case s.name == "pmem" || s.name == "backing":
		return checkPath(s.name, s.value)
	}
	return nil
}

func checkPath(name, path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s = %s: give the whole path, from / on", name, path)
	}
	for _, dir := range []string{byUUID, byLabel} {
		if strings.HasPrefix(path, "/dev/"+dir) {
			return fmt.Errorf("%s = %s: that is the name of what is on the disk, and so will be that of the cache's device (take one from /dev/disk/by-id)", name, path)
		}
	}
	return nil
}
