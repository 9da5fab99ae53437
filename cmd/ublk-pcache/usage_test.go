package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestCommandLines: what is wrong with a command line is one line that names what is missing and the command that was meant,
// for everybody, and asks nothing of the machine.
func TestCommandLines(t *testing.T) {
	for args, says := range map[string]string{
		"statsu":                    "no command \"statsu\" (perhaps status)",
		"dance":                     "no command \"dance\" (see 'ublk-pcache --help')",
		"flush":                     "give the device: ublk-pcache flush ID",
		"flush 0 1":                 "\"1\" is one too many: ublk-pcache flush ID",
		"flush -n 0 1":              "\"1\" is one too many: ublk-pcache flush ID",
		"flush -n":                  "--id has no value (see 'ublk-pcache flush --help')",
		"flush -x 0":                "no option -x (see 'ublk-pcache flush --help')",
		"del --colour red 0":        "no option --colour (see 'ublk-pcache del --help')",
		"del -a 0":                  "\"0\" is one too many: ublk-pcache del ID",
		"del -a -n 0":               "give --all or a device: ublk-pcache del ID",
		"del --force=maybe 0":       "--force maybe: give true or false, or leave the value out (see 'ublk-pcache del --help')",
		"status 0 --dm --json":      "give --json or --dm: one or the other is printed",
		"status --dm":               "give the device: --dm tells of one",
		"status 0 1":                "\"1\" is one too many: ublk-pcache status [ID]",
		"set":                       "give the device: ublk-pcache set ID NAME=VALUE…",
		"set 0":                     "give NAME=VALUE: ublk-pcache set ID NAME=VALUE…",
		"set -n 0":                  "give NAME=VALUE: ublk-pcache set ID NAME=VALUE…",
		"add x":                     "\"x\" is one too many: ublk-pcache add -p PMEM -b BACKING",
		"add -q two":                "--queues two: give a whole number (see 'ublk-pcache add --help')",
		"format":                    "give PMEM: ublk-pcache format PMEM",
		"writeback":                 "give PMEM: ublk-pcache writeback PMEM -b BACKING",
		"repair a b c":              "\"c\" is one too many: ublk-pcache repair PMEM [COPY]",
		"estimate --sizes 5":        "give TRACE: ublk-pcache estimate TRACE…",
		"run":                       "give NAME: ublk-pcache run NAME",
		"is-backing":                "give NODE: ublk-pcache is-backing NODE LINK...",
		"upgrade 0 --help=perhaps ": "--help perhaps: give true or false, or leave the value out (see 'ublk-pcache upgrade --help')",
	} {
		root := newRootCmd()
		root.SetArgs(strings.Fields(args))
		_, err := root.ExecuteC()
		var usage *usageError
		if !errors.As(err, &usage) || err.Error() != says {
			t.Errorf("%s: %v, want %s", args, err, says)
		}
	}
}

// TestEmptyID: what a script has in an empty variable is no device, and not all of them.
func TestEmptyID(t *testing.T) {
	ownStateDir(t)
	for _, args := range [][]string{{"status", "-n", ""}, {"flush", "-n", ""}, {"flush", ""}} {
		root := newRootCmd()
		root.PersistentPreRunE = nil
		root.SetArgs(args)
		_, err := root.ExecuteC()
		fails(t, err, `"" is not a device`)
	}
	root := newRootCmd()
	root.SetArgs([]string{"flush", "-n", "", "7"})
	_, err := root.ExecuteC()
	fails(t, err, `"7" is one too many`)
}

// TestWrongValues: a value that cannot be is as wrong as an option that is not there.
func TestWrongValues(t *testing.T) {
	ownStateDir(t)
	for _, args := range []string{
		"add -p x -b y --queues 0", "add -p x -b y --name 7", "add -p x -b y --mode foo", "add -p x -b y --changed=zz", "add -p x,size=zz -b y",
		"add -b y", "add -p x", "add -p x -b y --id -1", "set 0 gc_percent=200", "set 0 foo=1", "set 0 mode", "format x --gc-percent 95", "recover 0 --changed=zz",
		"estimate x --sizes y", "repair x y --in-place", "writeback x", "writeback x -b y --changed=zz", "list -o colour", "status a/b", "exporter",
	} {
		root := newRootCmd()
		root.PersistentPreRunE = nil
		root.SetArgs(strings.Fields(args))
		if _, err := root.ExecuteC(); exitStatus(err) != exitUsage {
			t.Errorf("%s: %v, which ends with %d", args, err, exitStatus(err))
		}
	}
}

// TestExamples: each command has some, and they are command lines of that command.
func TestExamples(t *testing.T) {
	for _, cmd := range newRootCmd().Commands() {
		if cmd.Hidden || cmd.Name() == "help" || cmd.Name() == "completion" {
			continue
		}
		if cmd.Example == "" || cmd.GroupID == "" {
			t.Errorf("%s has no example, or is in no group", cmd.Name())
		}
		shown := false
		for line := range strings.SplitSeq(strings.ReplaceAll(cmd.Example, " && ", "\n"), "\n") {
			args := strings.Fields(line)
			if len(args) == 0 || args[0] != "ublk-pcache" {
				continue
			}
			found, err := parsed(args)
			if err != nil {
				t.Errorf("%s: %v", line, err)
				continue
			}
			shown = shown || found.Name() == cmd.Name()
		}
		if !shown {
			t.Errorf("no example of %s is one of it", cmd.Name())
		}
	}
}

// parsed is the command that a command line calls, if there is nothing wrong with it.
func parsed(line []string) (*cobra.Command, error) {
	cmd, rest, err := newRootCmd().Find(line[1:])
	if err == nil {
		err = cmd.ParseFlags(rest)
	}
	if err == nil {
		err = cmd.ValidateArgs(cmd.Flags().Args())
	}
	return cmd, err
}

// TestCompletions: devices, names and settings are offered to everybody, and nothing that is none.
func TestCompletions(t *testing.T) {
	before := devDir
	t.Cleanup(func() { devDir = before })
	devDir = t.TempDir()
	if err := os.Mkdir(filepath.Join(devDir, "ublk-pcache"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ublkb0", "ublkb12", "ublkb0p1", "ublkc0", "sda", "ublk-pcache/data", "ublk-pcache/data-part1"} {
		if err := os.WriteFile(filepath.Join(devDir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	devices := []string{"0", "12", "data"}
	for args, want := range map[string][]string{
		"flush ":              devices,
		"status ":             devices,
		"status -n ":          devices,
		"set ":                devices,
		"recover ":            devices,
		"del 0 ":              nil,
		"del -n 0 ":           nil,
		"set 0 writeback=":    {"writeback=on", "writeback=off"},
		"set 0 writeback_r":   {"mode=", "gc_percent=", "dirty_high=", "dirty_low=", "dirty_max_age=", "idle_after=", "writeback_rate=", "writeback=", "seq_cutoff=", "log_level="},
		"set -n 0 gc_percent": {"mode=", "gc_percent=", "dirty_high=", "dirty_low=", "dirty_max_age=", "idle_after=", "writeback_rate=", "writeback=", "seq_cutoff=", "log_level="},
		"set 0 log_level=":    {"log_level=debug", "log_level=info", "log_level=warn", "log_level=error"},
		"set 0 gc_percent=":   nil,
		"set 0 colour=":       nil,
		"add --mode ":         {"writeback", "writeonly", "writethrough", "writearound", "passthrough"},
		"add --gc-percent ":   nil,
	} {
		root := newRootCmd()
		var out strings.Builder
		root.SetOut(&out)
		root.SetErr(&strings.Builder{})
		words := strings.Split(args, " ")
		root.SetArgs(append([]string{cobra.ShellCompNoDescRequestCmd}, words...))
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		got := strings.Fields(out.String())
		if got = got[:len(got)-1]; !slices.Equal(got, want) && len(got)+len(want) > 0 {
			t.Errorf("%q: offered are %q, want %q", args, got, want)
		}
	}
}
