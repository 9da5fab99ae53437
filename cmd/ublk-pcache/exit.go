package main

import (
	"errors"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// What the program ends with tells scripts of what kind a failure is: whether to look for a typing
// error, for a server, or for somebody who decides. The numbers stay what they are.
//
// check and repair are to a cache what fsck is to a file system, and end like that (fsck(8)). Under
// systemd a server ends with 1, or with exitFinal (run.go).
const (
	exitFailed   = 1
	exitUsage    = 2 // the command line is wrong
	exitNotFound = 3 // there is no such device, PMEM or BACKING
	exitNoServer = 4 // the device has no server, or it does not answer
	exitRefused  = 5 // data could be lost, or somebody has it in use: somebody has to decide
	exitDamaged  = 6 // the cache is damaged, or data in it

	fsckMended = 1
	fsckLeft   = 4
	fsckFailed = 8
	fsckUsage  = 16
)

// exitError is an error that says what the program ends with.
type exitError struct {
	error
	status int
}

func (e *exitError) Unwrap() error { return e.error }

// errMended is of a repair that has done what it was asked for, and said so.
var errMended = errors.New("mended")

// exitWith is for errors that are of a kind because of where they are made. A status that
// no error has, as of a server that does not tell, tells nothing.
func exitWith(status int, err error) error {
	if status < exitFailed || status > exitDamaged {
		return err
	}
	return &exitError{err, status}
}

// exitStatuses are of errors that are of the same kind wherever they come from. Of one that is
// of several, the first counts.
var exitStatuses = []struct {
	status int
	errs   []error
}{
	{exitNoServer, []error{errNoAnswer}},
	{exitRefused, []error{
		errForeign, pmem.ErrInUse, pmem.ErrVolatile, pmem.ErrOtherSize, backing.ErrInUse, ublk.ErrInUse,
		engine.ErrChanged, engine.ErrUnchanged, engine.ErrDiskTooSmall, ondisk.ErrMagic,
	}},
	{exitDamaged, []error{
		engine.ErrDamaged, engine.ErrKeyGeneration, engine.ErrKeyInLog, engine.ErrKeyOverlap,
		ondisk.ErrSuperblock, ondisk.ErrSuperblockLost, ondisk.ErrLost, ondisk.ErrLogStart, ondisk.ErrUnreadable,
	}},
	{exitNotFound, []error{
		errNoDevice, ublk.ErrNoDevice,
		pmem.ErrMissing, pmem.ErrNoDevice, pmem.ErrDangling, backing.ErrMissing, backing.ErrNotFound,
	}},
}

// statusAfter is what a command ends with after an error.
func statusAfter(command *cobra.Command, err error) int {
	switch name := command.Name(); {
	case errors.As(err, &finalError{}):
		return exitFinal
	case slices.Contains(underSystemd, name) && os.Getenv("NOTIFY_SOCKET") != "":
		return exitFailed
	case errors.Is(err, errMended):
		return fsckMended
	case name == "check" || name == "repair":
		return asFsck(exitStatus(err))
	}
	return exitStatus(err)
}

// exitStatus is that of an error.
func exitStatus(err error) int {
	var known *exitError
	var usage *usageError
	var damage *ondisk.Damage
	var faults ondisk.Faults
	switch {
	case errors.As(err, &known):
		return known.status
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &damage), errors.As(err, &faults):
		return exitDamaged
	}
	for _, kind := range exitStatuses {
		if slices.ContainsFunc(kind.errs, func(of error) bool { return errors.Is(err, of) }) {
			return kind.status
		}
	}
	return exitFailed
}

// asFsck is fsck's number for a status.
func asFsck(status int) int {
	switch status {
	case exitUsage:
		return fsckUsage
	case exitDamaged:
		return fsckLeft
	}
	return fsckFailed
}
