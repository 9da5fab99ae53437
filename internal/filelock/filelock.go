// Package filelock keeps a file to one server, or to some readers, and leaves
// those no say in it who may only read the file.
//
// # The obvious way
//
// flock(2) asks for no more than a descriptor. Any user who can read the file
// takes a lock, waits in line while the server lives, and has the file when it dies: the
// next server is locked out. Leases and locks for reading are no better, each can
// be had, or kept from others, by those who read.
//
// A lock for writing (fcntl(2), F_OFD_SETLK) takes a descriptor for writing, so
// nobody else can have it. But who reads can keep it from being given.
//
// # What is done
//
// A server takes both, flock because other versions know no other. One that it
// does not get is somebody's. If that is a lock for writing, the file is in use.
// If not, those who have the file open are looked at: it is in use if one has it
// for writing, or is this program and root's, which reads a file that must not
// change meanwhile. Else it is a reader's lock, and passed by.
//
// A lock that was passed by is asked for again until it is given. Until then the
// next server meets the reader, looks around as well, and finds this one's
// descriptor for writing. Everybody opens the file before looking, so of two
// at least one sees the other; both may, and then both refuse.
//
// Processes outside of the PID namespace are not seen. So elsewhere than in the
// first one, and where /proc does not tell, no lock is passed by.
package filelock

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHeld: somebody uses the file who has the right to.
var ErrHeld = errors.New("another process has locked it")

// Mode is what a file is wanted for.
type Mode int

const (
	Exclusive Mode = iota
	// Shared is for readers among themselves.
	Shared
)

func (m Mode) flock() int {
	return [...]int{unix.LOCK_EX, unix.LOCK_SH}[m] | unix.LOCK_NB
}

func (m Mode) record() int16 {
	return [...]int16{unix.F_WRLCK, unix.F_RDLCK}[m]
}

// place is the byte that the lock for writing is on: far from those that others
// lock, which lie in files or just behind them.
const place = 1 << 62

// again is how often a lock is asked for that a reader has.
const again = time.Second

// Lock is held until it is closed and all copies of the descriptor are: first
// the one, then the other.
type Lock struct {
	stop, ended chan struct{} // nil with both locks in hand
}

// Take locks the file that is open with fd, or says that it is in use and leaves
// it as it was.
func Take(fd int, mode Mode) (*Lock, error) {
	flocked, err := flock(fd, mode)
	if err == nil && !flocked {
		err = inUse(fd)
	}
	recorded := false
	if err == nil {
		recorded, err = record(fd, mode)
	}
	if err == nil && flocked && !recorded {
		err = inUse(fd)
	}
	if err != nil {
		unix.Flock(fd, unix.LOCK_UN)
		unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Start: place, Len: 1})
		return nil, err
	}
	return keep(fd, mode, flocked && recorded), nil
}

// Inherit goes on with the locks of a descriptor that another process has taken
// them for, which may know of flock alone.
func Inherit(fd int, mode Mode) (*Lock, error) {
	both, err := both(fd, mode)
	if err != nil {
		return nil, err
	}
	return keep(fd, mode, both), nil
}

func keep(fd int, mode Mode, complete bool) *Lock {
	if complete {
		return &Lock{}
	}
	l := &Lock{stop: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		for {
			select {
			case <-l.stop:
				return
			case <-time.After(again):
			}
			if both, _ := both(fd, mode); both {
				return
			}
		}
	}()
	return l
}

// Close comes before the descriptor is closed.
func (l *Lock) Close() {
	if l.stop != nil {
		close(l.stop)
		<-l.ended
	}
}

func both(fd int, mode Mode) (bool, error) {
	flocked, err1 := flock(fd, mode)
	recorded, err2 := record(fd, mode)
	return flocked && recorded, errors.Join(err1, err2)
}

func flock(fd int, mode Mode) (bool, error) {
	err := unix.Flock(fd, mode.flock())
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("lock it: %w", err)
	}
	return true, nil
}

// record takes the lock for writing, or in its place one for reading that keeps
// it from being given. A file system without such locks has nothing to give.
func record(fd int, mode Mode) (bool, error) {
	err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: mode.record(), Start: place, Len: 1})
	return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES), nil
}

// inUse tells what to make of a lock that was not given.
func inUse(fd int) error {
	user, err := findUser(fd)
	if user != "" {
		return fmt.Errorf("%w, %s: stop that", ErrHeld, user)
	}
	// What keeps a lock for reading from being given is one for writing.
	writer := unix.Flock_t{Type: unix.F_RDLCK, Start: place, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &writer); err == nil && writer.Type == unix.F_WRLCK {
		return ErrHeld
	}
	if err != nil {
		return fmt.Errorf("%w, and which one cannot be told: %w", ErrHeld, err)
	}
	return nil
}
