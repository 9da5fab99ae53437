//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// settings are what status tells of them.
func (d device) settings(t *testing.T) map[string]string {
	t.Helper()
	var s struct {
		Settings map[string]string `json:"settings"`
	}
	if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &s); err != nil {
		t.Fatal(err)
	}
	return s.Settings
}

// Each setting is changed while the device is written to and read, is there after the server was
// killed, replaced and started anew, and what was refused has changed nothing.
func TestSettings(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk, "--seq-cutoff", "1M", "--dirty_high=40")
	want := d.settings(t)
	if want["seq_cutoff"] != "1048576" || want["dirty_high"] != "40" || want["gc_percent"] != "70" || want["writeback"] != "on" || want["mode"] != "writeback" {
		t.Errorf("after add: %v", want)
	}
	f, err := os.OpenFile(d.path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var load sync.WaitGroup
	load.Go(func() {
		p, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		for off := int64(0); err == nil; off = (off + 3<<16) % (512 << 20) {
			select {
			case <-stop:
				return
			default:
			}
			if _, err = f.WriteAt(p, off); err == nil {
				_, err = f.ReadAt(p, (off+256<<20)%(512<<20))
			}
		}
		t.Error(err)
	})
	change := func(to ...string) {
		t.Helper()
		pcache(t, append([]string{"set", d.id}, to...)...)
		for _, s := range to {
			name, value, _ := strings.Cut(s, "=")
			want[name] = value
		}
		if got := d.settings(t); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("after set %v: %v, want %v", to, got, want)
		}
	}
	for _, one := range []string{"mode=writeonly", "gc_percent=60", "dirty_high=30", "dirty_low=10", "dirty_max_age=5", "idle_after=3", "writeback_rate=1048576", "writeback=off", "seq_cutoff=0"} {
		change(one)
	}
	change("dirty_high=auto", "dirty_low=auto", "writeback=on", "gc_percent=80", "writeback_rate=0")
	change("dirty_high=50", "dirty_low=20", "idle_after=0", "dirty_max_age=0", "writeback_rate=4194304", "seq_cutoff=65536")
	refuse(t, nil, t.TempDir(), []refusal{ // the load changes pmem and disk
		{name: "low above high", args: "set " + d.id + " gc_percent=10 dirty_low=60", says: []string{"dirty_low 60", "dirty_high 50"}},
		{name: "the second one", args: "set " + d.id + " gc_percent=10 idle_after=x", says: []string{"idle_after=x", "seconds"}},
		{name: "no mode", args: "set " + d.id + " gc_percent=10 mode=fast", says: []string{"mode=fast: give writeback, writeonly, writethrough, writearound or passthrough"}},
		{name: "rate too low", args: "set " + d.id + " writeback_rate=5", says: []string{"writeback_rate 5", "65536"}},
	})
	if got := d.settings(t); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("after what was refused: %v, want %v", got, want)
	}
	killServer(t, d, unix.SIGKILL)
	pcache(t, "recover", d.id)
	if got := d.settings(t); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("after a kill: %v, want %v", got, want)
	}
	pcache(t, "upgrade", d.id)
	if got := d.settings(t); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("after an upgrade: %v, want %v", got, want)
	}
	close(stop)
	load.Wait()
	f.Close()
	d.del(t)
	if out := pcache(t, "dump", dax); !strings.Contains(out, "seq_cutoff=65536") || !strings.Contains(out, "dirty_low=20") {
		t.Errorf("dump shows %.400s", out)
	}
	d = add(t, "-p", dax, "-b", disk, "--writeback", "off")
	want["writeback"] = "off"
	if got := d.settings(t); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("added again: %v, want %v", got, want)
	}
	d.del(t)
	refuse(t, []string{dax, disk}, t.TempDir(), []refusal{
		{name: "low above high", args: "add --dirty-low 51 -p " + dax + " -b " + disk, says: []string{"dirty_low 51", "dirty_high 50"}},
		{name: "no size", args: "add --seq-cutoff 4X -p " + dax + " -b " + disk, says: []string{"--seq-cutoff 4X", "bytes"}},
	})
}
