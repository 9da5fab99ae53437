//go:build vm

// Package tests takes the end-to-end tests into test machines and reports each of them as a test of its own.
package tests

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-pcache/tests/vm"
)

var (
	kernelFlag = flag.String("kernel", "", "only this kernel")
	guestFlag  = flag.String("guest", "", "run only the tests in there that match this `regexp`")
	seedFlag   = flag.Uint64("seed", 0, "random seed of the guest's workloads")
	limit      = flag.Duration("limit", 25*time.Minute, "for one package on one kernel; a test that hangs takes the machine with it")

	guestFlags []string
)

func init() {
	flag.Func("guest.flag", "hand this `flag` to the end-to-end tests in there; can be given several times", func(f string) error {
		guestFlags = append(guestFlags, f)
		return nil
	})
}

// A suite is what runs of one package. Every package is a test binary of its own, and all of a kernel's run in one boot.
type suite struct {
	pkg   string // folder of the module
	tests string // regular expression
}

// pcacheKernel is the suite whose kernel has dm-pcache in its source.
const pcacheKernel = "trixie-backports"

// everything is in the order in which it runs: pmem's tests turn the namespace into one of another mode.
var everything = []suite{
	{"tests/guest", "."},
	{"ublk", "."},
	{"backing", "."},
	{"pmem", "."},
}

// failures are the guests' tests that failed, with what they said.
var failures []string

// TestMain says at the end what has failed in there: the testing package says it among hundreds of tests that have not.
func TestMain(m *testing.M) {
	code := m.Run()
	for _, failure := range failures {
		fmt.Print(failure)
	}
	os.Exit(code)
}

// Everything runs on the newest kernel; what depends on the driver's age runs on the old one, too.
func TestGuest(t *testing.T) {
	share := t.TempDir()
	build(t, share)
	for _, on := range []struct {
		kernel string
		suites []suite
	}{
		{"trixie-backports", everything},
		{"bookworm-backports", []suite{
			{"tests/guest", "^(TestFileSystems|TestServerKilled|TestZeroing|TestTrimFreesFile)$"},
			{"ublk", "."},
			{"backing", "."},
		}},
	} {
		if *kernelFlag != "" && *kernelFlag != on.kernel {
			continue
		}
		if *guestFlag != "" {
			on.suites = slices.Clone(everything)
			for i := range on.suites {
				on.suites[i].tests = *guestFlag
			}
		}
		t.Run(on.kernel, func(t *testing.T) { onKernel(t, on.kernel, on.suites, share) })
	}
}

// build puts what the machines need into share: the program, the test binaries, the kernel's own target, the golden
// images.
func build(t *testing.T, share string) {
	t.Helper()
	goBuild(t, "build", "-o", share+"/ublk-pcache", "ublk-pcache/cmd/ublk-pcache")
	makeOf(t, "install", "DESTDIR="+share+"/installed")
	if err := os.Mkdir(share+"/packages", 0o755); err != nil {
		t.Fatal(err)
	}
	// The packages of a version before, and those of this one.
	for _, version := range [][]string{{"VERSION=0.0.1"}, nil} {
		makeOf(t, append([]string{"packages"}, version...)...)
		packages, err := filepath.Glob("../bin/packages/*.???")
		if err != nil || len(packages) != 2 {
			t.Fatalf("make packages has made %q, %v", packages, err)
		}
		for _, p := range packages {
			install(t, p, share+"/packages")
		}
	}
	for _, s := range everything {
		goBuild(t, "test", "-c", "-tags", "vm", "-o", filepath.Join(share, s.binary()), "ublk-pcache/"+s.pkg)
	}
	module, err := vm.Module(pcacheKernel)
	if err != nil {
		t.Fatal(err)
	}
	install(t, module, share)
	images, err := filepath.Glob("../ondisk/testdata/*.tar.gz")
	if err != nil || len(images) == 0 {
		t.Fatalf("no golden images in ondisk/testdata (%v)", err)
	}
	if err := os.Mkdir(share+"/golden", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, image := range images {
		install(t, image, share+"/golden")
	}
}

// install copies a file into a folder.
func install(t *testing.T, file, folder string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, filepath.Base(file)), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// makeOf runs make in the module's folder.
func makeOf(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("make", append([]string{"-C", ".."}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("make %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func goBuild(t *testing.T, args ...string) {
	t.Helper()
	if err := vm.Build(args...); err != nil {
		t.Fatal(err)
	}
}

func (s suite) binary() string { return path.Base(s.pkg) + ".test" }

func onKernel(t *testing.T, kernel string, suites []suite, share string) {
	start := time.Now()
	m, err := vm.Boot(vm.Standard(kernel, t.TempDir(), share))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Kill()
	t.Logf("booted %s in %v", strings.TrimSpace(release(t, m)), time.Since(start).Round(time.Second))
	for _, s := range suites {
		var died error
		t.Run(path.Base(s.pkg), func(t *testing.T) { died = s.run(t, m) })
		if died != nil {
			t.Fatalf("what comes after %s was not run: %v\nconsole:\n%s", s.pkg, died, m.Console())
		}
	}
	if err := m.Halt(); err != nil {
		t.Error(err)
	}
}

// run runs a suite and reports its tests below t. An error means that the machine did not live through it.
func (s suite) run(t *testing.T, m *vm.Machine) error {
	// The test binary's output, marked up for test2json, becomes a stream of events.
	args := []string{s.binary(), "-test.v=test2json", "-test.run=" + s.tests, fmt.Sprintf("-test.timeout=%v", *limit)}
	if s.pkg == "tests/guest" {
		args = append(args, fmt.Sprintf("-seed=%d", *seedFlag), "-test.skip=^TestAroundPowerCuts") // those are for the power cuts
		args = append(args, guestFlags...)
	}
	convert := exec.Command("go", "tool", "test2json", "-t")
	in, err := convert.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := convert.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := convert.Start(); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	var code int
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		code, err = m.Run(*limit, in, &stderr, nil, args...)
		in.Close()
	}()
	(&report{events: json.NewDecoder(bufio.NewReader(out))}).follow(t, "")
	<-ended
	convert.Wait()

	if stderr.Len() > 0 {
		t.Logf("stderr:\n%s", &stderr)
	}
	if err == nil && code != 0 && !t.Failed() {
		t.Errorf("%s: exit status %d", s.binary(), code)
	}
	return err
}

func release(t *testing.T, m *vm.Machine) string {
	var out bytes.Buffer
	if _, err := m.Run(time.Minute, &out, io.Discard, nil, "uname", "-sr"); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// An event is what test2json makes of a line.
type event struct {
	Action, Test, Output string
	Elapsed              float64
}

// A report turns the events of the guest's tests into tests of this process, with the same names, nesting and results.
type report struct{ events *json.Decoder }

// follow reads up to the end of the guest's test name ("" for the whole run) and says on t what happened in it.
func (r *report) follow(t *testing.T, name string) {
	said, inner := "what failed: "+t.Name()+"\n", false
	defer func() {
		if t.Failed() && !inner { // else one of its own tests has said it
			failures = append(failures, said)
		}
	}()
	for {
		var e event
		if err := r.events.Decode(&e); err != nil {
			if name != "" {
				t.Errorf("the machine died, or was stopped, in this test")
			}
			return
		}
		switch {
		case e.Action == "run" && e.Test != name:
			if !t.Run(strings.TrimPrefix(strings.TrimPrefix(e.Test, name), "/"), func(t *testing.T) { r.follow(t, e.Test) }) {
				inner = true
			}
		case e.Action == "output" && worthShowing(e.Output):
			t.Log(strings.TrimSuffix(e.Output, "\n"))
			said += e.Output
		case e.Test != name:
		case e.Action == "pass" && name != "":
			return
		case e.Action == "fail" && name != "":
			t.Fail()
			return
		case e.Action == "skip":
			t.Error("a guest test was skipped; none may be")
			return
		}
	}
}

// worthShowing leaves out the lines that only say what the events say.
func worthShowing(line string) bool {
	trimmed := strings.TrimSpace(line)
	for _, prefix := range []string{"=== ", "--- ", "PASS", "FAIL"} {
		if strings.HasPrefix(trimmed, prefix) {
			return false
		}
	}
	return trimmed != ""
}
