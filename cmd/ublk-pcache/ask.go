package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/ublk"
)

// The other end of the control socket: whoever gives a command.
//
// A flush, or a set that drains, may take hours, and a server that has been
// stopped, or that hangs, says as little meanwhile. So where no answer comes for a
// while a second connection asks for the status, which a server always has at
// hand. Any answer to that, a refusal too, is a sign of life. It takes nothing that
// older servers do not have, and these refuse what they do not know.

var (
	// lifeSign is how long a server may say nothing before it is looked after:
	// longer than any answer takes that does not wait for a disk.
	lifeSign = 5 * time.Second
	// statusPatience is how long it may take then, on a machine that has neither
	// memory nor processors to spare.
	statusPatience = 10 * time.Second
)

// maxSuccessors is how many servers a command goes to, each in place of the one
// before: there is one more for each upgrade that comes in between.
const maxSuccessors = 10

// errNoAnswer: the server has ended, with the command or before it.
var errNoAnswer = errors.New("died before it answered")

// ask sends a command to the server of a device and returns its answer. If that
// server ends for another one to follow, it is the other one that answers.
func ask(id int, cmd command) (*reply, error) { return askUntil(context.Background(), id, cmd) }

// askUntil is ask for what can be broken off: when ctx ends, the server is told to, and
// answers what has come of it.
func askUntil(ctx context.Context, id int, cmd command) (*reply, error) {
	for successors := 0; ; successors++ {
		r, pid, err := askOnce(ctx, id, cmd)
		// An upgrade that was not answered may have been the reason.
		if !errors.Is(err, errNoAnswer) || cmd.Do == "upgrade" || successors == maxSuccessors {
			return r, err
		}
		if d, broken := readState(id); broken != nil || d.PID == pid || !d.alive() {
			return nil, err
		}
	}
}

// askOnce asks the server that is there now, the process pid.
func askOnce(ctx context.Context, id int, cmd command) (r *reply, pid int, err error) {
	conn, pid, err := dial(id)
	if err != nil {
		return nil, 0, unreachableError(id, err)
	}
	defer conn.Close()
	type answer struct {
		reply
		err error
	}
	answered := make(chan answer, 1)
	// A server that refuses does not wait for the command, so an error here is
	// not the end of it. A new socket has room for it.
	sent := json.NewEncoder(conn).Encode(cmd)
	go func() {
		var a answer
		if err := json.NewDecoder(conn).Decode(&a.reply); err != nil {
			a.err = errors.Join(sent, err)
		}
		answered <- a
	}()
	brokenOff := ctx.Done()
	for {
		select {
		case <-brokenOff:
			conn.CloseWrite() // see serveClient
			brokenOff = nil
		case a := <-answered:
			switch {
			case a.err != nil:
				return nil, pid, fmt.Errorf("the server of device %s %w: %w", titleOf(id), errNoAnswer, a.err)
			case a.Error != "":
				return nil, pid, exitWith(a.Exit, errors.New(a.Error))
			}
			return &a.reply, pid, nil
		case <-time.After(lifeSign):
			// A server that is stopped does not come to answer, so the wait ends.
			if !halted(pid) && showsLife(id) {
				continue
			}
			return nil, pid, unansweredError(id, pid)
		}
	}
}

// dial connects to the server of a device and says which process that is.
func dial(id int) (conn *net.UnixConn, pid int, err error) {
	conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: statePath(id, ".sock"), Net: "unix"})
	if err != nil {
		return nil, 0, err
	}
	if peer, err := peerOf(conn); err == nil {
		pid = int(peer.Pid) // who called listen (unix(7), SO_PEERCRED)
	}
	return conn, pid, nil
}

// showsLife reports whether the server of a device, the one that is there now,
// says anything at all.
func showsLife(id int) bool {
	conn, _, err := dial(id)
	if err != nil {
		// It is about to end, or to be followed by another; the command's own
		// connection tells.
		return !errors.Is(err, unix.EAGAIN) // which says that too many wait already
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(statusPatience))
	json.NewEncoder(conn).Encode(command{Do: "status"})
	n, err := conn.Read(make([]byte, 1))
	return n > 0 || !errors.Is(err, os.ErrDeadlineExceeded)
}

// unansweredError says what to do about a server that says nothing.
func unansweredError(id, pid int) error {
	if pid == 0 { // in a process namespace that is not ours
		return exitWith(exitNoServer, fmt.Errorf("the server of device %s does not answer (end it with 'kill -KILL', where it runs, then 'ublk-pcache recover %d' or 'ublk-pcache del %d')", titleOf(id), id, id))
	}
	how, also := "", ""
	switch stateOf(pid) {
	case 'T':
		how, also = ", which has been stopped,", fmt.Sprintf("let it go on with 'kill -CONT %d', or ", pid)
	case 't':
		how, also = ", which a debugger holds,", "let it go on there, or "
	case 'D':
		how = ", which waits in the kernel,"
	}
	return exitWith(exitNoServer, fmt.Errorf("the server of device %s, process %d%s does not answer (%send it with 'kill -KILL %d', then 'ublk-pcache recover %d', or 'ublk-pcache del %d'; what was acknowledged is in the cache)", titleOf(id), pid, how, also, pid, id, id))
}

// halted reports whether a process has been stopped, by a signal or a debugger.
func halted(pid int) bool {
	s := stateOf(pid)
	return s == 'T' || s == 't'
}

// stateOf is the letter for what a process is at (proc_pid_stat(5)), 0 if there
// is none.
func stateOf(pid int) byte {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// The name, in front, may hold anything.
	rest := bytes.TrimSpace(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(rest) == 0 {
		return 0
	}
	return rest[0]
}

// unreachableError says why a server cannot be reached.
func unreachableError(id int, err error) error {
	d, broken := readState(id)
	switch {
	case broken != nil:
		return broken
	case d.alive() && (halted(d.PID) || errors.Is(err, unix.EAGAIN)):
		return unansweredError(id, d.PID)
	case d.alive():
		return exitWith(exitNoServer, fmt.Errorf("the server of device %s (pid %d) does not answer: %w", titleOf(id), d.PID, err))
	}
	if _, err := d.lookup(); errors.Is(err, ublk.ErrNoDevice) {
		return exitWith(exitNoServer, fmt.Errorf("the server of device %s is dead, and the device is gone (take away what is left of it with 'ublk-pcache del %d', and add it again)", titleOf(id), id))
	}
	return exitWith(exitNoServer, fmt.Errorf("the server of device %s is dead: bring it back with 'ublk-pcache recover %d', or remove the device with 'ublk-pcache del %d'", titleOf(id), id, id))
}
