package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestStartLimit: neither kind of unit gives up a server that tries again and again, and both say the same.
func TestStartLimit(t *testing.T) {
	var interval uint64
	var burst uint32
	for _, p := range unitProperties(&serveOptions{}, "", "") {
		switch p.Name {
		case "StartLimitIntervalUSec":
			interval = p.Value.Value().(uint64)
		case "StartLimitBurst":
			burst = p.Value.Value().(uint32)
		}
	}
	if perMinute := time.Minute / retryPause; perMinute >= 20 {
		t.Errorf("%d starts in a minute are too many for units of versions that took 20", perMinute)
	}
	if within := time.Duration(interval) * time.Microsecond; within == 0 || time.Duration(burst)*retryPause <= within {
		t.Errorf("%d starts in %v are too many for one in %v", burst, within, retryPause)
	}
	file, err := os.ReadFile("../../systemd/ublk-pcache@.service")
	if want := fmt.Sprintf("\nStartLimitIntervalSec=%d\nStartLimitBurst=%d\n", interval/1e6, burst); err != nil || !strings.Contains(string(file), want) {
		t.Errorf("the service lacks %q (%v)", want, err)
	}
}

// TestRefuseServed: a unit that a server lives in is refused with the device, and no other unit is.
func TestRefuseServed(t *testing.T) {
	ownStateDir(t)
	const unit = "ublk-pcache-dev-dax0.0.service"
	d := someDevice(3)
	d.Unit, d.PID, d.Started = unit, 1, 1 // a process of another time
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	in := func(unit string) *serveOptions { return &serveOptions{Device: device{ID: 4, Unit: unit}} }
	if err := refuseServed(in(unit)); err != nil {
		t.Errorf("with a dead server: %v", err)
	}
	d.servedByUs()
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	fails(t, refuseServed(in(unit)), unit, "device 3", "ublk-pcache del 3")
	if err := refuseServed(in("ublk-pcache-dev-dax1.0.service")); err != nil {
		t.Errorf("another unit: %v", err)
	}
	again := in(unit)
	again.Recover, again.Device.ID = true, 3
	if err := refuseServed(again); err == nil || strings.Contains(err.Error(), "remove") || !strings.Contains(err.Error(), "nothing to recover") {
		t.Errorf("a device that is served again: %v", err)
	}
}

// TestUnitNames: each pmem has names of its own, which systemd takes.
func TestUnitNames(t *testing.T) {
	long := "/mnt/" + strings.Repeat("$", 250)
	seen := map[string]string{}
	for _, pmem := range []string{"/dev/dax0.0", "/dev/dax1.0", "/a-b", "/a/b", `/a$$b${HOME}%n`, long, long + "/a", long + "/b"} {
		for _, n := range []int{1, 2, 1000} {
			name := unitOf(pmem, n)
			if len(name) > 255 || !regexp.MustCompile(`^ublk-pcache-[A-Za-z0-9:_.\\-]+\.service$`).MatchString(name) {
				t.Errorf("the unit of %s is %q", pmem, name)
			}
			if other, ok := seen[name]; ok {
				t.Errorf("%s and %s share the unit %s", pmem, other, name)
			}
			seen[name] = pmem
		}
	}
	if name := unitOf("/dev/dax0.0", 1); name != "ublk-pcache-dev-dax0.0.service" {
		t.Errorf("the unit of /dev/dax0.0 is %q", name)
	}
}
