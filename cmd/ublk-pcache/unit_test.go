package main

import "testing"

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
