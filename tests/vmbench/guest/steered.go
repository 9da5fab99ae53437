package main

import (
	"fmt"
	"strings"
	"time"
)

// A setting says when and how fast something comes to the disk. Somebody who looks at nothing but the counters of the
// disk and of the device must find just that.

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

// writes returns a job that writes in order, up to a size. It is one process, and can be killed.
func writes(block string, depth int, size string, more ...string) *job {
	return &job{name: "writes", rw: "write", block: block, depth: depth, jobs: 1, size: size, more: append(more, "--thread")}
}

// firstWrite waits until the disk has written something more, and returns what the device has written by then.
func firstWrite(device string) (int64, error) {
	before, err := doneBy(disk)
	if err != nil {
		return 0, err
	}
	if err := within(time.Minute, "something is written back", func() bool {
		now, err := doneBy(disk)
		return err == nil && now.writes > before.writes
	}); err != nil {
		return 0, err
	}
	now, err := doneBy(device)
	return now.bytesWritten, err
}

// lastWrite waits until the disk has written nothing for two seconds.
func lastWrite() error {
	last, since := done{}, time.Now()
	return within(time.Minute, "write-back ends", func() bool {
		if now, err := doneBy(disk); err != nil || now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) > 2*time.Second
	})
}

// drainRate returns how many bytes of a lot of dirty data are written back in a second.
func drainRate(device string) (float64, error) {
	if err := writes("128k", 8, "192M").command(device).Run(); err != nil {
		return 0, err
	}
	begin := time.Now()
	d, err := doneDuring(disk, func() error {
		time.Sleep(6 * time.Second)
		return nil
	})
	return float64(d.bytesWritten) / time.Since(begin).Seconds(), err
}

// dirtyAtFirst returns how many percent of the cache are dirty when write-back begins.
func dirtyAtFirst(device string) (float64, error) {
	cmd := writes("128k", 8, "600M", "--rate=40m").command(device)
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
	d, err := doneDuring(disk, func() error {
		if err := writes("128k", 8, "300M", "--rate=40m").command(device).Run(); err != nil {
			return err
		}
		return lastWrite()
	})
	if err != nil {
		return 0, err
	}
	all, err := doneBy(device)
	return 100 * float64(all.bytesWritten-d.bytesWritten) / pmemSize, err
}

// ageAtFirst returns how many seconds after the first write something is written back, while others go on.
func ageAtFirst(device string) (float64, error) {
	cmd := writes("4k", 1, "600M", "--rate_iops=50").command(device)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if err := within(time.Minute, "fio writes", func() bool {
		now, err := doneBy(device)
		return err == nil && now.writes > 0
	}); err != nil {
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
	d, err := doneDuring(disk, func() error {
		defer time.Sleep(5 * time.Second)
		return writes("128k", 8, "128M").command(device).Run()
	})
	return float64(d.bytesWritten), err
}

// keptOfStream returns how many bytes of a long sequential read need not be read from the disk again.
func keptOfStream(device string) (float64, error) {
	const size = 256 << 20
	stream := []string{"dd", "if=" + device, "of=/dev/null", "bs=128k", fmt.Sprintf("count=%d", size/(128<<10)), "iflag=direct", "status=none"}
	if err := run(stream...); err != nil {
		return 0, err
	}
	d, err := doneDuring(disk, func() error { return run(stream...) })
	return float64(size - d.bytesRead), err
}

// writtenWhenAnswered returns the share of what was written that the disk has when it is answered.
func writtenWhenAnswered(device string) (float64, error) {
	d, err := doneDuring(disk, writes("4k", 8, "8M").command(device).Run)
	return float64(d.bytesWritten) / float64(8<<20), err
}
