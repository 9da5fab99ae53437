// Command count tells how many instructions the engine executes for what it is asked most often. Times depend on the
// machine and on what else it does; instructions do not: two runs agree within a percent, on any machine with the
// same Go. So they can be held against a file, and a change that makes a request dearer has to say so there.
//
// BenchmarkCount of package engine runs under qemu-user, with a plugin that counts, for n operations and for 3n. The
// difference is 2n operations and nothing of what is done before and after.
package main

import (
	"bufio"
	"bytes"
	"debug/elf"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"ublk-pcache/tests/plugin"
)

var (
	check = flag.String("check", "", "a file of counts that may not be exceeded by more than 2 %")
	write = flag.String("write", "", "the file to write the counts to")
	by    = flag.Bool("by-function", false, "say where each is executed")
)

// tolerance is how much more than in the file a count may be: twice of what two runs differ by at most.
const tolerance = 0.02

// operations are the parts of BenchmarkCount, with how many there are in the short run.
var operations = []struct {
	name string
	n    int
}{
	{"write", 1 << 14}, {"write-16", 1 << 15}, {"hit", 1 << 14}, {"hit-16", 1 << 15}, {"miss", 1 << 12},
	{"enter", 1 << 16}, {"replay", 1 << 12}, {"writeback", 1 << 13},
}

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "count:", err)
		os.Exit(1)
	}
}

func run() error {
	dir, err := os.MkdirTemp("", "count-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	p, err := build(dir)
	if err != nil {
		return err
	}
	if err := onOneCPU(); err != nil {
		return err
	}
	counts := map[string]float64{}
	for _, o := range operations {
		functions, err := p.perOperation(o.name, o.n)
		if err != nil {
			return err
		}
		for _, n := range functions {
			counts[o.name] += n
		}
		fmt.Printf("COUNT engine %-10s %6.0f\n", o.name, counts[o.name])
		if *by {
			plugin.List(functions)
		}
	}
	switch {
	case *write != "":
		return save(*write, counts)
	case *check != "":
		return compare(*check, counts)
	}
	return nil
}

// onOneCPU has this thread, and the programs that it starts, run on one processor: what
// replay does depends on how many there are.
func onOneCPU() error {
	runtime.LockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("ask for the processors: %w", err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("choose a processor: %w", err)
	}
	return nil
}

// program is the engine's test binary, and what counts it.
type program struct {
	dir, binary, plugin string
	base, size          uint64
	begin, end          uint64 // of what is counted
	functions           plugin.Functions
}

func build(dir string) (*program, error) {
	p := &program{dir: dir, binary: filepath.Join(dir, "engine.test"), plugin: filepath.Join(dir, "count.so")}
	if out, err := exec.Command("go", "test", "-c", "-o", p.binary, "./engine").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the engine's test binary: %w\n%s", err, out)
	}
	if err := plugin.Build("thread", p.plugin); err != nil {
		return nil, err
	}
	f, err := elf.Open(p.binary)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text := f.Section(".text")
	if text == nil {
		return nil, fmt.Errorf("%s has no text", p.binary)
	}
	p.base, p.size = text.Addr, (text.Size+15)&^15
	if p.functions, err = plugin.FunctionsOf(f); err != nil {
		return nil, err
	}
	for _, s := range p.functions {
		switch s.Name {
		case "ublk-pcache/engine.countBegin":
			p.begin = s.Value
		case "ublk-pcache/engine.countEnd":
			p.end = s.Value
		}
	}
	if p.begin == 0 || p.end == 0 {
		return nil, fmt.Errorf("%s does not have countBegin and countEnd", p.binary)
	}
	return p, nil
}

// perOperation returns how many instructions of each function an operation takes in the thread that does it.
func (p *program) perOperation(name string, n int) (map[string]float64, error) {
	short, err := p.count(name, n)
	if err != nil {
		return nil, err
	}
	long, err := p.count(name, 3*n)
	if err != nil {
		return nil, err
	}
	per := map[string]float64{}
	for function, many := range long {
		// The rest of the runtime does not do the same each time.
		if strings.HasPrefix(function, "runtime.") && !strings.HasPrefix(function, "runtime.mem") {
			continue
		}
		if d := float64(many) - float64(short[function]); d != 0 {
			per[function] = d / float64(2*n)
		}
	}
	return per, nil
}

// count runs a part of BenchmarkCount and returns its counts by function.
func (p *program) count(name string, n int) (map[string]uint64, error) {
	file := filepath.Join(p.dir, "counters")
	arguments := fmt.Sprintf("%s,out=%s,base=%#x,size=%#x,begin=%#x,end=%#x", p.plugin, file, p.base, p.size, p.begin, p.end)
	cmd := exec.Command("qemu-x86_64", "-plugin", arguments, p.binary,
		"-test.run=^$", "-test.bench=^BenchmarkCount$/^"+name+"$", fmt.Sprintf("-test.benchtime=%dx", n))
	// The runtime does not come when it likes.
	cmd.Env = append(os.Environ(), "GOGC=off", "GODEBUG=asyncpreemptoff=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("BenchmarkCount/"+name)) {
		return nil, fmt.Errorf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if want := int(p.size/16+1) * 8; len(data) != want {
		return nil, fmt.Errorf("%s has %d bytes, not %d", file, len(data), want)
	}
	return p.functions.Sum(p.base, data), nil
}

// save writes a file of counts.
func save(name string, counts map[string]float64) error {
	var b strings.Builder
	fmt.Fprintln(&b, runtime.Version())
	for _, o := range operations {
		fmt.Fprintf(&b, "%s %.0f\n", o.name, counts[o.name])
	}
	return os.WriteFile(name, []byte(b.String()), 0o644)
}

// release is a version of Go without its last number.
func release(version string) string {
	return strings.Join(strings.SplitN(version, ".", 3)[:2], ".")
}

// compare holds counts against a file of them.
func compare(name string, counts map[string]float64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	known := map[string]float64{}
	lines := bufio.NewScanner(f)
	if lines.Scan(); release(lines.Text()) != release(runtime.Version()) {
		fmt.Printf("%s is of %s, and %s compiles otherwise: not compared\n", name, lines.Text(), runtime.Version())
		return nil
	}
	for lines.Scan() {
		var operation string
		var n float64
		if _, err := fmt.Sscan(lines.Text(), &operation, &n); err != nil {
			return fmt.Errorf("%s: %q: %w", name, lines.Text(), err)
		}
		known[operation] = n
	}
	if err := lines.Err(); err != nil {
		return err
	}
	var worse []string
	for _, o := range operations {
		limit, ok := known[o.name]
		if !ok {
			return fmt.Errorf("%s does not have %s", name, o.name)
		}
		if got := counts[o.name]; got > limit*(1+tolerance) {
			worse = append(worse, fmt.Sprintf("%s takes %.0f instructions, %.0f in %s", o.name, got, limit, name))
		}
	}
	if len(worse) > 0 {
		return fmt.Errorf("%s (if that is worth it: go run ./tests/count -write %s)", strings.Join(worse, "; "), name)
	}
	return nil
}
