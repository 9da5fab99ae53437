// Command guest runs inside a machine of tests/vmbench. Round after round it makes each target anew on the same pmem and
// disk, measures it, and removes it, so that what slows the machine down for a while slows down everything alike, and no
// target has another one's write-back beside it.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

const disk = "/dev/nvme0n1" // as fast as the emulator

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "null":
			serveNull()
			return
		case "hdd":
			serveHDD()
			return
		}
	}
	rounds := flag.Int("rounds", 5, "how often to measure each")
	only := flag.String("only", "", "only targets that match this `regexp`")
	instructions := flag.Bool("count", false, "count instructions")
	byFunction := flag.Bool("by-function", false, "say where the cache's server executes them")
	flag.Parse()
	var err error
	if *instructions {
		err = count(regexp.MustCompile(*only), *byFunction)
	} else {
		err = measure(*rounds, regexp.MustCompile(*only))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "measure:", err)
		os.Exit(1)
	}
}

// parts are what is measured, each of some kinds of target.
var parts = []struct {
	measure func(t *target) error
	kinds   []kind
}{
	{hits, []kind{cache, nothing, bare}},
	{drains, []kind{cache, bare}},
	{large, []kind{cache, bare}},
	{scanned, []kind{cache, hotspot}},
	{skewed, []kind{cache, hotspot, bare}},
	{steered, []kind{cache}},
}

func measure(rounds int, only *regexp.Regexp) error {
	if err := prepare(); err != nil {
		return err
	}
	header()
	for round := range rounds {
		for i := range targets {
			t := &targets[(i+round)%len(targets)] // nobody always comes after the same one
			if !only.MatchString(t.name) {
				continue
			}
			for _, p := range parts {
				if !slices.Contains(p.kinds, t.kind) {
					continue
				}
				if err := p.measure(t); err != nil {
					return fmt.Errorf("round %d, %s: %w", round+1, t.name, err)
				}
			}
		}
	}
	return nil
}

// header prints when and where everything was measured.
func header() {
	fmt.Printf("date: %s\nkernel: %s\n", time.Now().UTC().Format(time.DateOnly), output("uname", "-sr"))
}

// prepare loads what is measured, and gives the fast disk data everywhere, so that reading it costs what it costs.
func prepare() error {
	if err := run("modprobe", "-a", "dm-mod", "dm-writecache", "dm-cache", "dm-cache-smq", "bcache"); err != nil {
		return err
	}
	if err := run("insmod", "/share/dm-pcache.ko"); err != nil {
		return err
	}
	return run("dd", "if=/dev/zero", "of="+disk, "bs=1M", "count=4096", "oflag=direct", "status=none")
}

// run runs a program that has to succeed.
func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// output returns what a program prints, without spaces around it, and nothing if it fails.
func output(args ...string) string {
	out, _ := exec.Command(args[0], args[1:]...).Output()
	return strings.TrimSpace(string(out))
}

// within waits until a condition holds.
func within(limit time.Duration, what string, holds func() bool) error {
	for begin := time.Now(); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > limit {
			return fmt.Errorf("%s: not after %v", what, limit)
		}
	}
	return nil
}

// result prints one line of results: pairs of a value and its unit.
func result(t *target, n int64, name string, pairs ...any) {
	var b strings.Builder
	fmt.Fprintf(&b, "Benchmark%s/target=%s %d", name, t.name, max(1, n))
	for i := 0; i < len(pairs); i += 2 {
		fmt.Fprintf(&b, " %.6g %s", pairs[i], pairs[i+1])
	}
	fmt.Println(b.String())
}
