// Command walls checks who imports whom: what a package may know is in the first table of docs/design.md, and what is
// dangerous lives in one place. `make vet` runs it.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// module is what the paths of our packages begin with.
const module = "ublk-pcache/"

// rooms are what each package of the product may import of the others, besides what is below it.
var rooms = map[string][]string{
	"cmd/ublk-pcache":    {"backing", "engine", "internal/bytesize", "internal/estimate", "internal/mountinfo", "internal/uring", "ondisk", "pmem", "ublk"},
	"engine":             {"internal/prefetch", "ondisk"},
	"ondisk":             {},
	"pmem":               {"internal/bytesize", "internal/filelock", "internal/mountinfo"},
	"backing":            {"internal/filelock", "internal/mountinfo", "internal/uring"},
	"ublk":               {"internal/mountinfo", "internal/uring"},
	"internal/uring":     {},
	"internal/estimate":  {"engine", "internal/bytesize", "internal/trace", "ondisk"},
	"internal/bytesize":  {},
	"internal/filelock":  {},
	"internal/mountinfo": {},
	"internal/prefetch":  {},
	"internal/trace":     {},
}

// dangers are who may import what is dangerous. The engine asks unsafe for sizes only.
var dangers = map[string][]string{
	"unsafe":                {"backing", "engine", "internal/prefetch", "internal/uring", "pmem", "ublk"},
	"syscall":               {"backing", "cmd/ublk-pcache", "internal/uring", "pmem", "ublk"},
	"golang.org/x/sys/unix": {"backing", "cmd/ublk-pcache", "internal/filelock", "internal/uring", "pmem", "ublk"},
	"os":                    {"backing", "cmd/ublk-pcache", "internal/estimate", "internal/filelock", "internal/mountinfo", "pmem", "ublk"},
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "walls:", err)
		os.Exit(1)
	}
}

func run() error {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		return fmt.Errorf("list packages: %w", err)
	}
	broken := 0
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		imports := strings.Fields(lines.Text())
		name := strings.TrimPrefix(imports[0], module)
		for _, why := range wrong(name, imports[1:]) {
			fmt.Fprintf(os.Stderr, "%s %s\n", name, why)
			broken++
		}
	}
	if broken > 0 {
		return fmt.Errorf("%d imports are not allowed (docs/design.md says what a package may know)", broken)
	}
	return nil
}

// wrong says what a package must not import. Tests may import anything; nobody imports them.
func wrong(name string, imports []string) (why []string) {
	test := strings.HasPrefix(name, "tests/")
	may, known := rooms[name]
	if !known && !test {
		return []string{"is in no table: add it to docs/design.md and here"}
	}
	for _, path := range imports {
		ours, of := strings.CutPrefix(path, module)
		switch allowed, dangerous := dangers[path]; {
		case test:
		case of && !slices.Contains(may, ours):
			why = append(why, "may not import "+ours)
		case dangerous && !slices.Contains(allowed, name):
			why = append(why, "may not import "+path)
		}
	}
	return why
}
