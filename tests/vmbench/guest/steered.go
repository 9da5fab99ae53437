package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A setting says when and how fast something comes to the disk. Somebody who looks at nothing but the counters of the
// disk and of the device must find just that.

// done is what a block device has done so far, of the fields of /sys/block/*/stat (Documentation/block/stat.rst).
type done struct{ reads, bytesRead, writes, bytesWritten int64 }

func doneBy(device string) (d done) {
	text, _ := os.ReadFile("/sys/block/" + filepath.Base(device) + "/stat")
	var skip int64
	fmt.Sscan(string(text), &d.reads, &skip, &d.bytesRead, &skip, &d.writes, &skip, &d.bytesWritten)
	d.bytesRead, d.bytesWritten = d.bytesRead*512, d.bytesWritten*512
	return d
}

// steered measures what the settings of our own cache do.
func steered(t *target) error {
	if t.name != "ublk-pcache" {
		return nil
	}
	for _, s := range []struct {
		name     string
		says     float64
		settings string // beside it, so that nothing else makes write-back begin
		measure  func(device string) (float64, error)
	}{
		{"writeback_rate", 8 << 20, "writeback_rate=8M dirty_high=1 dirty_low=0 idle_after=0 dirty_max_age=0", drainRate},
		{"dirty_high", 20, "dirty_high=20 dirty_low=10 idle_after=0 dirty_max_age=0", dirtyAtFirst},
		{"dirty_low", 10, "dirty_high=20 dirty_low=10 idle_after=0 dirty_max_age=0", dirtyAtLast},
		{"gc_percent", 40, "gc_percent=40 dirty_high=90 idle_after=0 dirty_max_age=0", dirtyAtFirst},
		{"dirty_max_age", 4, "dirty_max_age=4 idle_after=0", ageAtFirst},
		{"idle_after", 2, "idle_after=2 dirty_max_age=0", idleAtFirst},
		{"writeback", 0, "writeback=off idle_after=1 dirty_max_age=2 dirty_high=1", writtenUnasked},
		{"seq_cutoff", 4 << 20, "seq_cutoff=4M", keptOfStream},
		{"mode=writeback", 0, "mode=writeback idle_after=0 dirty_max_age=0", writtenWhenAnswered},
		{"mode=writethrough", 1, "mode=writethrough", writtenWhenAnswered},
		{"mode=writearound", 1, "mode=writearound", writtenWhenAnswered},
		{"mode=passthrough", 1, "mode=passthrough", writtenWhenAnswered},
	} {
		device, err := t.start(disk)
		if err != nil {
			return err
		}
		if err := run(append([]string{"ublk-pcache", "set", "0"}, strings.Fields(s.settings)...)...); err != nil {
			return err
		}
		is, err := s.measure(device)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		result(t, 1, "Setting/name="+s.name, s.says, "says", is, "measured")
		if err := t.stop(); err != nil {
			return err
		}
	}
	return nil
}

// pmemSize is how many bytes the cache may use, about.
const pmemSize = 1 << 30

// writes writes to the device, in order, up to a size. It is one process, and can be killed.
func writes(device, size string, more ...string) *exec.Cmd {
	return exec.Command("fio", append([]string{"--name=writes", "--thread", "--filename=" + device, "--direct=1", "--ioengine=io_uring", "--rw=write", "--bs=128k",
		"--iodepth=8", "--size=" + size}, more...)...)
}

// firstWrite waits until the disk has written something more, and returns what the device has written by then.
func firstWrite(device string) (int64, error) {
	before := doneBy(disk).writes
	err := within(time.Minute, "something is written back", func() bool { return doneBy(disk).writes > before })
	return doneBy(device).bytesWritten, err
}

// lastWrite waits until the disk has written nothing for two seconds.
func lastWrite() error {
	last, since := doneBy(disk).writes, time.Now()
	return within(time.Minute, "write-back ends", func() bool {
		if now := doneBy(disk).writes; now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) > 2*time.Second
	})
}

// drainRate returns how many bytes of a lot of dirty data are written back in a second.
func drainRate(device string) (float64, error) {
	if err := writes(device, "192M").Run(); err != nil {
		return 0, err
	}
	begin, before := time.Now(), doneBy(disk)
	time.Sleep(6 * time.Second)
	return float64(doneBy(disk).bytesWritten-before.bytesWritten) / time.Since(begin).Seconds(), nil
}

// dirtyAtFirst returns how many percent of the cache are dirty when write-back begins.
func dirtyAtFirst(device string) (float64, error) {
	cmd := writes(device, "600M", "--rate=40m")
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	written, err := firstWrite(device)
	cmd.Process.Kill()
	cmd.Wait()
	return 100 * float64(written) / pmemSize, err
}

// dirtyAtLast returns how many are when it has ended.
func dirtyAtLast(device string) (float64, error) {
	before := doneBy(disk).bytesWritten
	if err := writes(device, "300M", "--rate=40m").Run(); err != nil {
		return 0, err
	}
	err := lastWrite()
	return 100 * float64(doneBy(device).bytesWritten-(doneBy(disk).bytesWritten-before)) / pmemSize, err
}

// ageAtFirst returns how many seconds after the first write something is written back, while others go on.
func ageAtFirst(device string) (float64, error) {
	cmd := writes(device, "600M", "--bs=4k", "--rate_iops=50", "--iodepth=1")
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if err := within(time.Minute, "fio writes", func() bool { return doneBy(device).writes > 0 }); err != nil {
		return 0, err
	}
	begin := time.Now()
	_, err := firstWrite(device)
	return time.Since(begin).Seconds(), err
}

// idleAtFirst returns how many seconds after the last write something is written back.
func idleAtFirst(device string) (float64, error) {
	if err := run("dd", "if=/dev/zero", "of="+device, "bs=64k", "count=100", "oflag=direct", "status=none"); err != nil {
		return 0, err
	}
	begin := time.Now()
	_, err := firstWrite(device)
	return time.Since(begin).Seconds(), err
}

// writtenUnasked returns how many bytes are written back in some seconds in which nobody waits for it.
func writtenUnasked(device string) (float64, error) {
	before := doneBy(disk).bytesWritten
	err := writes(device, "128M").Run()
	time.Sleep(5 * time.Second)
	return float64(doneBy(disk).bytesWritten - before), err
}

// keptOfStream returns how many bytes of a long sequential read need not be read from the disk again.
func keptOfStream(device string) (float64, error) {
	const size = 256 << 20
	stream := []string{"dd", "if=" + device, "of=/dev/null", "bs=128k", fmt.Sprintf("count=%d", size/(128<<10)), "iflag=direct", "status=none"}
	if err := run(stream...); err != nil {
		return 0, err
	}
	before := doneBy(disk).bytesRead
	err := run(stream...)
	return float64(size - (doneBy(disk).bytesRead - before)), err
}

// writtenWhenAnswered returns the share of what was written that the disk has when it is answered.
func writtenWhenAnswered(device string) (float64, error) {
	before := doneBy(disk).bytesWritten
	if err := writes(device, "8M", "--bs=4k").Run(); err != nil {
		return 0, err
	}
	return float64(doneBy(disk).bytesWritten-before) / float64(8<<20), nil
}
