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
//
// It is read here and by no library, since those for files of this kind lose something:
// go-systemd's unit and gopkg.in/ini.v1 the numbers of the lines, github.com/creachadair/ini
// the quotes and comments that begin with #.

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
	name := strings.TrimSuffix(filepath.Base(path), configExt)
	if wrong := checkName(name); wrong != nil {
		fmt.Fprintf(os.Stderr, "ublk-pcache: %s: its device has only a number: %v\n", path, wrong)
	} else {
		o.Device.Name = name
	}
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
	wrong             error // with the value, which is as it was written then
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
			s.name = dashes(strings.TrimSpace(name))
			s.value, s.wrong = unquote(strings.TrimSpace(value))
		}
		all = append(all, s)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return all, nil
}

// unquote returns a value without the quotes, of either kind, that it may have around it
// for the sake of what is in it. A backslash in quotes stands for itself in some files, and
// in systemd's it does not, so it is refused.
func unquote(value string) (string, error) {
	if value == "" || !strings.Contains(quotes, value[:1]) {
		switch {
		case strings.Contains(value, " #") || strings.Contains(value, "\t#"):
			return value, errComment
		case value != "" && strings.Contains(quotes, value[len(value)-1:]):
			return value, errors.New("no quote begins what this one ends")
		}
		return value, nil
	}
	inner, behind, closed := strings.Cut(value[1:], value[:1])
	switch behind = strings.TrimSpace(behind); {
	case !closed:
		return value, errors.New("the quote has no end")
	case strings.HasPrefix(behind, "#"):
		return value, errComment
	case behind != "":
		return value, errors.New("the value goes on behind the quote (put quotes around all of it, of the kind that is not in it)")
	case strings.Contains(inner, `\`):
		return value, errors.New("a backslash in quotes (write it without quotes)")
	}
	return inner, nil
}

const quotes = `"'`

var errComment = errors.New("give the comment a line of its own, or if it belongs to the value, put that in quotes")

// dashes is the name of an option, which may be written with underscores.
func dashes(name string) string { return strings.ReplaceAll(name, "_", "-") }

func (s *setting) check(known *pflag.FlagSet) error {
	switch {
	case s.name == "":
		return fmt.Errorf("%q is not OPTION = VALUE", s.text)
	case known.Lookup(s.name) == nil:
		return fmt.Errorf("no option %q (see 'ublk-pcache run --help')", s.name)
	case s.wrong != nil:
		return fmt.Errorf("%s = %s: %w", s.name, s.value, s.wrong)
	case s.value == "":
		return fmt.Errorf("%s has no value", s.name)
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
