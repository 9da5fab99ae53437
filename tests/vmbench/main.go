// Command vmbench measures, in one boot of a test machine, the cache and what somebody would run instead of it, and
// prints what it finds as the lines of Go benchmarks (golang.org/x/perf/benchfmt). What it does in there is in guest.
//
// Or it counts instructions: the emulator does (tests/plugin), and guest says what a request takes of them. Then the machine's
// time is instructions, too, so that nothing else that the host does can be seen in either.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ublk-pcache/tests/plugin"
	"ublk-pcache/tests/vm"
)

// kernel is the suite whose kernel has dm-pcache in its source.
const kernel = "trixie-backports"

// limit is for all of it: an hour is usual on two cores.
const limit = 4 * time.Hour

func main() {
	rounds := flag.Int("rounds", 5, "how often to measure each")
	only := flag.String("only", "", "measure only targets that match this `regexp`")
	count := flag.Bool("count", false, "count instructions")
	byFunction := flag.Bool("by-function", false, "with -count: say where the cache's server executes them")
	flag.Parse()
	if err := run(*count, fmt.Sprintf("-rounds=%d", *rounds), "-only="+*only, fmt.Sprintf("-count=%t", *count), fmt.Sprintf("-by-function=%t", *byFunction)); err != nil {
		fmt.Fprintln(os.Stderr, "vmbench:", err)
		os.Exit(1)
	}
}

func run(count bool, flags ...string) error {
	dir, err := os.MkdirTemp("", "ublk-pcache-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	share, state := dir+"/share", dir+"/state"
	for _, d := range []string{share, state} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := fill(share); err != nil {
		return err
	}
	config := vm.Config{
		Suite: kernel, State: state, Share: share,
		Pmem: 1<<30 - 2<<20, Measured: true,
		Disks: []vm.Disk{{Size: 4 << 30, BlockSize: 512}},
	}
	if count {
		so := dir + "/plugin.so"
		if err := plugin.Build("machine", so); err != nil {
			return err
		}
		config.Plugin = so + ",out=" + share + "/counts"
	}
	m, err := vm.Boot(config)
	if err != nil {
		return err
	}
	program := "measure"
	if count {
		program = "measure-elsewhere"
	}
	code, err := m.Run(limit, os.Stdout, os.Stderr, nil, append([]string{program}, flags...)...)
	if err != nil {
		return err
	}
	if code != 0 {
		m.Kill()
		return fmt.Errorf("measuring ended with exit status %d\n%s", code, m.Console())
	}
	return m.Halt()
}

// fill puts what is measured, and what measures it, into the machine's shared folder.
func fill(share string) error {
	const guest = "ublk-pcache/tests/vmbench/guest"
	for name, args := range map[string][]string{
		"ublk-pcache": {"ublk-pcache/cmd/ublk-pcache"},
		"measure":     {guest},
		// Its instructions must not count among those of static programs, which the servers are.
		"measure-elsewhere": {"-buildmode=pie", guest},
	} {
		if err := vm.Build(append([]string{"build", "-o", filepath.Join(share, name)}, args...)...); err != nil {
			return err
		}
	}
	for _, compile := range []func(suite string) (string, error){vm.Module, vm.TestServer} {
		file, err := compile(kernel)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(share, filepath.Base(file)), data, 0o755); err != nil {
			return err
		}
	}
	return nil
}
