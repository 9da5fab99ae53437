// Command vmrun boots a test machine, runs one program in it and exits with that program's status.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	"ublk-pcache/tests/vm"
)

func main() {
	kernel := flag.String("kernel", "trixie-backports", "Debian `suite` whose newest kernel to run")
	share := flag.String("share", ".", "`folder` of this machine that is /share inside, first on PATH")
	state := flag.String("state", "", "`folder` of the pmem and disk files, kept afterwards (default: new ones)")
	iops := flag.Int("iops", 0, "make /dev/nvme0n1 as slow as this many `requests` per second (default: no limit)")
	limit := flag.Duration("timeout", 10*time.Minute, "kill the machine when the program takes longer")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: vmrun [flags] -- program [argument]...")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	code, err := run(*kernel, *share, *state, *iops, *limit, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmrun:", err)
		code = 1
	}
	os.Exit(code)
}

func run(kernel, share, state string, iops int, limit time.Duration, args []string) (int, error) {
	if state == "" {
		dir, err := os.MkdirTemp("", "ublk-pcache-state-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		state = dir
	}
	config := vm.Standard(kernel, state, share)
	config.Disks[0].IOPS = iops
	m, err := vm.Boot(config)
	if err != nil {
		return 0, err
	}
	code, err := m.Run(limit, os.Stdout, os.Stderr, nil, args...)
	if err != nil {
		return 0, err
	}
	return code, m.Halt()
}
