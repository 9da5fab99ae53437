package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A target is something that fio can be let loose on. Whatever it writes to belongs to it alone from start to stop.
type target struct {
	name string
	kind kind

	// fresh makes it anew in front of a disk, without any content; nil if open does.
	fresh func(disk string) error
	// open starts what fresh has made, or stop has left, and returns its block device.
	open func(disk string) (device string, err error)
	stop func() error
	// drain returns when the disk has all that was written. What was written stays in the cache.
	drain func() error
	// server is the process that serves it, 0 for the kernel.
	server func() int
}

type kind int

const (
	cache   kind = iota
	nothing      // answers at once, and has no data
	bare         // the disk itself
	hotspot      // a cache of what is used often, which takes its time: for what is kept alone
)

// start makes it anew and starts it.
func (t *target) start(disk string) (device string, err error) {
	if t.fresh != nil {
		if err := t.fresh(disk); err != nil {
			return "", err
		}
	}
	return t.open(disk)
}

var targets = []target{
	{
		name: "ublk-pcache", kind: cache,
		fresh: func(disk string) error {
			if err := mode("devdax"); err != nil {
				return err
			}
			if _, err := added("--format", "--force", "-b", disk); err != nil {
				return err
			}
			return removeOurs()
		},
		open:   func(disk string) (string, error) { return added("-b", disk) },
		stop:   removeOurs,
		drain:  func() error { return run("ublk-pcache", "flush", "0") },
		server: ours,
	},
	{
		name: "dm-pcache", kind: cache,
		fresh: blank,
		open: func(disk string) (string, error) {
			return mapped(disk, "pcache "+pmem+" "+disk+" 4 cache_mode writeback data_crc false")
		},
		stop:  removeKernels,
		drain: kernelClean,
	},
	{
		name: "dm-writecache", kind: cache,
		fresh: blank,
		open:  func(disk string) (string, error) { return mapped(disk, "writecache p "+disk+" "+pmem+" 4096 0") },
		stop:  func() error { return run("dmsetup", "remove", mapping) },
		drain: func() error { return run("dmsetup", "message", mapping, "0", "flush") },
	},
	{
		name: "bcache", kind: cache,
		fresh: func(disk string) error {
			if err := blank(disk); err != nil {
				return err
			}
			// What the jobs wrote may look like anything.
			if err := run("wipefs", "-q", "-a", disk); err != nil {
				return err
			}
			return run("make-bcache", "--wipe-bcache", "--block", "4k", "--writeback", "-C", pmem, "-B", disk)
		},
		open:  registered,
		stop:  unregister,
		drain: bcacheClean,
	},
	{
		name: "dm-cache", kind: hotspot,
		fresh: blank,
		open:  smq,
		stop:  removeSMQ,
	},
	{
		name: "null", kind: nothing,
		open:   func(string) (string, error) { return nullServer.start("null") },
		stop:   func() error { return nullServer.stop() },
		server: func() int { return nullServer.Process.Pid },
	},
	{
		name: "kublk-null", kind: nothing,
		open: func(string) (string, error) {
			return "/dev/ublkb7", run("kublk", "add", "-t", "null", "-n", "7", "-q", "2", "-d", "128")
		},
		stop:   func() error { return run("kublk", "del", "-n", "7") },
		server: func() int { return pidOf("kublk") },
	},
	{
		name: "disk", kind: bare,
		open: func(disk string) (string, error) { return disk, nil },
		stop: func() error { return nil },
	},
}

const (
	dax  = "/dev/dax0.0"
	pmem = "/dev/pmem0" // what it is for the kernel's own caches: the same bytes
)

// mode gives the pmem to user space (devdax) or to the kernel's targets (fsdax).
func mode(m string) error {
	return run("ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", m, "--map=mem")
}

// blank gives the pmem to the kernel's targets, without whatever was in it.
func blank(string) error {
	if err := mode("fsdax"); err != nil {
		return err
	}
	return run("dd", "if=/dev/zero", "of="+pmem, "bs=1M", "count=4", "oflag=direct", "status=none")
}

func added(args ...string) (string, error) {
	cmd := exec.Command("ublk-pcache", append([]string{"add", "-p", dax, "-n", "0"}, args...)...)
	var said strings.Builder // a warning, maybe
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("ublk-pcache add: %w\n%s", err, said.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func removeOurs() error { return run("ublk-pcache", "del", "0") }

func ours() int {
	var list []struct{ PID int }
	if err := json.Unmarshal([]byte(output("ublk-pcache", "list", "--json")), &list); err != nil || len(list) != 1 {
		return 0
	}
	return list[0].PID
}

const mapping = "measured"

func mapped(disk, table string) (string, error) {
	if err := run("dmsetup", "create", mapping, "--table", "0 "+output("blockdev", "--getsz", disk)+" "+table); err != nil {
		return "", err
	}
	return "/dev/mapper/" + mapping, run("dmsetup", "mknodes")
}

// smq makes dm-cache, with the policy smq and blocks of 32 KiB, the least there are.
func smq(disk string) (string, error) {
	const metadata = 32 << 11 // sectors
	var size int64
	fmt.Sscan(output("blockdev", "--getsz", pmem), &size)
	for name, table := range map[string]string{
		"metadata": fmt.Sprintf("0 %d linear %s 0", metadata, pmem),
		"blocks":   fmt.Sprintf("0 %d linear %s %d", size-metadata, pmem, metadata),
	} {
		if err := run("dmsetup", "create", name, "--table", table); err != nil {
			return "", err
		}
	}
	if err := run("dmsetup", "mknodes"); err != nil {
		return "", err
	}
	return mapped(disk, "cache /dev/mapper/metadata /dev/mapper/blocks "+disk+" 64 1 writeback smq 0")
}

func removeSMQ() error { return run("dmsetup", "remove", mapping, "blocks", "metadata") }

// removeKernels first waits for the end of write-back: the target is not to be removed while that goes on (it then uses
// memory that it has freed, Linux 7.3).
func removeKernels() error {
	if err := kernelClean(); err != nil {
		return err
	}
	return run("dmsetup", "remove", mapping)
}

// drainLimit is for the hard disk.
const drainLimit = 15 * time.Minute

// kernelTails matches the end of dm-pcache's status: its log's head, dirty_tail and key_tail.
var kernelTails = regexp.MustCompile(` (\d+:\d+) (\d+:\d+) \d+:\d+\s*$`)

func kernelClean() error {
	var line string
	err := within(drainLimit, "dm-pcache clean", func() bool {
		line = output("dmsetup", "status", mapping)
		tails := kernelTails.FindStringSubmatch(line)
		return tails != nil && tails[1] == tails[2]
	})
	if err != nil {
		return fmt.Errorf("%w: %s", err, line)
	}
	return nil
}

const bcacheControl = "/sys/block/bcache0/bcache/"

// registered starts the cache and lets it take every request, as the others do.
func registered(disk string) (string, error) {
	for _, part := range []string{pmem, disk} {
		if err := os.WriteFile("/sys/fs/bcache/register", []byte(part), 0); err != nil {
			return "", fmt.Errorf("register %s: %w", part, err)
		}
	}
	if err := within(time.Minute, "bcache attached", func() bool {
		state, _ := os.ReadFile(bcacheControl + "state")
		return len(state) > 0 && !strings.HasPrefix(string(state), "no cache")
	}); err != nil {
		return "", err
	}
	for _, s := range []struct{ name, value string }{
		{bcacheControl + "sequential_cutoff", "0"},
		{bcacheControl + "cache/congested_read_threshold_us", "0"},
		{bcacheControl + "cache/congested_write_threshold_us", "0"},
		{bcacheControl + "writeback_percent", "0"},
		{bcacheControl + "writeback_delay", "0"},
	} {
		if err := os.WriteFile(s.name, []byte(s.value), 0); err != nil {
			return "", err
		}
	}
	return "/dev/bcache0", nil
}

func bcacheClean() error {
	return within(drainLimit, "bcache clean", func() bool {
		state, _ := os.ReadFile(bcacheControl + "state")
		return strings.TrimSpace(string(state)) == "clean"
	})
}

func unregister() error {
	sets, err := filepath.Glob("/sys/fs/bcache/*-*-*-*-*/stop")
	if err != nil || len(sets) != 1 {
		return fmt.Errorf("%d sets of bcache (%w)", len(sets), err)
	}
	for _, name := range []string{bcacheControl + "stop", sets[0]} {
		if err := os.WriteFile(name, []byte("1"), 0); err != nil {
			return err
		}
	}
	return within(time.Minute, "bcache gone", func() bool {
		left, _ := filepath.Glob("/sys/fs/bcache/*-*-*-*-*")
		_, err := os.Stat("/sys/block/bcache0")
		if len(left) > 0 || !errors.Is(err, os.ErrNotExist) {
			return false
		}
		// It lets go of the pmem some time after that.
		f, err := os.OpenFile(pmem, os.O_RDWR|os.O_EXCL, 0)
		f.Close()
		return err == nil
	})
}

// A server is a process of this program that serves a device of its own.
type server struct{ *exec.Cmd }

var nullServer server

func (s *server) start(what string) (string, error) {
	s.Cmd = exec.Command("measure", what) // static, unlike what counts
	s.Stderr = os.Stderr
	out, err := s.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := s.Start(); err != nil {
		return "", err
	}
	path, err := bufio.NewReader(out).ReadString('\n')
	if err == io.EOF {
		err = s.Wait()
	}
	return strings.TrimSpace(path), err
}

func (s *server) stop() error {
	if err := s.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	return s.Wait()
}

// pidOf returns the process with this name that has run for longest.
func pidOf(name string) (pid int) {
	fmt.Sscan(output("pgrep", "-o", "-x", name), &pid)
	return pid
}
