package ublk

import (
	"errors"
	"fmt"
	"syscall"
)

// Before anything is tried. All of these are shown to users.
var (
	ErrNotRoot  = errors.New("ublk devices need root (CAP_SYS_ADMIN)")
	ErrNoDriver = errors.New("no " + controlPath + ", so no ublk driver (CONFIG_BLK_DEV_UBLK, Linux 6.5 or later)")

	// ErrTooOld is wrapped with the name of what is missing.
	ErrTooOld = errors.New("the kernel is too old")

	ErrGeometry = errors.New("no disk can have this shape")

	// ErrNoPreemption: see uring.Ring.Turn for why.
	ErrNoPreemption = errors.New("GODEBUG=asyncpreemptoff=1 would hang the server at its first garbage collection")
)

// About one device.
var (
	// ErrNoDevice is wrapped with the device's number.
	ErrNoDevice = errors.New("no such ublk device")

	// ErrInUse says that somebody has the disk open or mounted.
	ErrInUse = errors.New("the disk is in use")

	// ErrExists says that the requested number is taken.
	ErrExists = errors.New("the number is taken")

	// ErrNode says that the name of a device leads to something else.
	ErrNode = errors.New("the device has no name in /dev")

	// ErrServed says that there is nothing to recover from.
	ErrServed = errors.New("its server is alive")

	// ErrNotRecoverable says that the device has no disk that waits for a server.
	ErrNotRecoverable = errors.New("it has no disk that waits for a server")
)

// While serving: these reach only the fatal callback.
var errUnexpectedResult = errors.New("the ublk driver ended a fetch with an unexpected result")

// deviceError says what was done to which device; nil stays nil.
func deviceError(verb string, id uint32, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENODEV):
		err = ErrNoDevice
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		err = fmt.Errorf("%w (is this the initial user namespace?)", err)
	}
	return fmt.Errorf("%s ublk device %d: %w", verb, id, err)
}

func addError(id uint32, err error) error {
	switch {
	case errors.Is(err, syscall.EEXIST):
		return deviceError("add", id, ErrExists)
	case errors.Is(err, syscall.EACCES):
		err = fmt.Errorf("%w (the limit /sys/module/ublk_drv/parameters/ublks_max is reached)", err)
	}
	if id == anyID {
		return fmt.Errorf("add a ublk device: %w", err)
	}
	return deviceError("add", id, err)
}
