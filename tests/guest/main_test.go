//go:build vm

// Package guest is the end-to-end tests: the program's binary on a real ublk driver, device-dax and NVMe. It is built
// into a test binary of its own and runs as root inside a machine of package vm; tests/vm_test.go takes it there.
//
// The tests share one machine and so run one after the other. Each makes the pmem and the disks it uses what it needs
// them to be, and leaves no ublk device behind.
package guest

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

// The parts of the machine (vm.Standard).
const (
	dax      = "/dev/dax0.0"
	disk     = "/dev/nvme0n1" // 4 GiB, blocks of 512 bytes
	disk4K   = "/dev/nvme1n1" // 1 GiB, blocks of 4096 bytes
	tinyDisk = "/dev/nvme2n1" // 16 MiB, the size of the golden images' disk

	cacheSize = 551_550_976 // bytes of dax, the size of the golden images
)

var seed = flag.Uint64("seed", 0, "random seed of the workloads (default: from the clock)")

func TestMain(m *testing.M) {
	flag.Parse()
	if _, err := os.Stat("/sys/bus/nd/devices/namespace0.0"); err != nil {
		fmt.Fprintf(os.Stderr, "these tests overwrite %s, %s, … of a test machine: run go test -tags vm ./tests\n", dax, disk)
		os.Exit(1)
	}
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	fmt.Printf("seed %d\n", *seed)
	if err := installProgram(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// installProgram copies the program from the shared folder, which is slow and which only root may be able to read, to
// where everybody finds it first.
func installProgram() error {
	const dir = "/tmp/bin"
	if out, err := exec.Command("install", "-D", "-m", "755", "-t", dir, "/share/ublk-pcache").CombinedOutput(); err != nil {
		return fmt.Errorf("install ublk-pcache: %w\n%s", err, out)
	}
	return os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}
