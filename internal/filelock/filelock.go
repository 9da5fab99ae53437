// Package filelock keeps a file to one server, or to some readers. Users who
// may only read the file cannot interfere.
//
// # The obvious way
//
// flock(2) takes no more than a descriptor. Any user who can read the file asks for a
// lock, waits in line while the server lives, and has the lock when it dies: the next
// server is locked out. Leases and locks for reading are no better: a reader can have
// each of them, or keep it from others.
//
// A lock for writing (fcntl(2), F_OFD_SETLK) takes a descriptor for writing, so
// nobody else can have it. But a reader can keep it from being given.
//
// # What is done
//
// A server takes both, flock because other versions know no other. If it does
// not get one, somebody else has a lock. If that is a lock for writing, the file
// is in use. If not, the server looks at the processes that have the file open.
// The file is in use if one has it open for writing, or is root's and runs this
// program: it reads a file that must not change meanwhile. Else it is a reader's
// lock, and passed by.
//
// A lock that was passed by is asked for again until it is given. Until then the
// next server meets the reader, looks around as well, and finds this one's
// descriptor for writing. Every server opens the file before it looks, so of two
// servers at least one sees the other. If both do, both refuse.
//
// Processes outside of the PID namespace are not seen. So only a server in the
// first PID namespace passes a lock by, and only if it can read /proc.
package filelock

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHeld: the file is in use, by a process that has the right to use it.
var ErrHeld = errors.New("another process has locked it")

// Mode says what a file is wanted for.
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

// place is the offset of the byte that the lock for writing is on. It is far
// from bytes that other programs lock, which lie in files or just behind them.
const place = 1 << 62

// again is the time after which a lock that a reader has is asked for
// again.
const again = time.Second

// Lock is held until it is closed, and then all copies of the descriptor.
type Lock struct {
	stop, ended chan struct{} // nil with both locks in hand
}

// Take locks the file that is open with fd. If the file is in use, it returns
// ErrHeld and leaves the locks as they were.
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

// Inherit goes on with the locks that another process has taken with this
// descriptor. That process may know of flock alone.
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

// Close must be called before the descriptor is closed.
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

// inUse returns nil if a lock was not given because of a reader, and
// otherwise ErrHeld, with the user of the file if that is known.
func inUse(fd int) error {
	user, err := findUser(fd)
	if user != "" {
		return fmt.Errorf("%w, %s: stop that", ErrHeld, user)
	}
	// Only a lock for writing keeps a lock for reading from being given.
	writer := unix.Flock_t{Type: unix.F_RDLCK, Start: place, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &writer); err == nil && writer.Type == unix.F_WRLCK {
		return ErrHeld
	}
	if err != nil {
		return fmt.Errorf("%w, and which one cannot be told: %w", ErrHeld, err)
	}
	return nil
}
