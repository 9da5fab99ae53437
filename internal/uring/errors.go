package uring

import (
	"errors"
	"fmt"
	"syscall"
)

// While setting up.
var (
	// ErrTooOld says that the kernel's io_uring lacks something this package
	// relies on.
	ErrTooOld = errors.New("the kernel's io_uring is too old: Linux 6.1 or later is needed")

	// ErrDisabled says that an administrator has switched io_uring off.
	ErrDisabled = errors.New("io_uring is switched off on this machine: set sysctl kernel.io_uring_disabled=0")
)

// While running.
var (
	// ErrClosed is returned by Messenger.Post after Close.
	ErrClosed = errors.New("messenger is closed")
)

func setupError(errno syscall.Errno) error {
	switch errno {
	case syscall.ENOSYS, syscall.EINVAL:
		return ErrTooOld
	case syscall.EPERM:
		return ErrDisabled
	}
	return fmt.Errorf("create an io_uring: %w", errno)
}

func enterError(errno syscall.Errno) error {
	return fmt.Errorf("enter io_uring: %w", errno)
}

func messageError(errno syscall.Errno) error {
	return fmt.Errorf("post a message to another io_uring: %w", errno)
}
