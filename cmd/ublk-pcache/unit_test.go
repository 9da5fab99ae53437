package main

import (
	"fmt"
	"os"
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
	if err := refuseServed(unit); err != nil {
		t.Errorf("with a dead server: %v", err)
	}
	d.servedByUs()
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	fails(t, refuseServed(unit), unit, "device 3", "ublk-pcache del 3")
	if err := refuseServed("ublk-pcache-dev-dax1.0.service"); err != nil {
		t.Errorf("another unit: %v", err)
	}
}
