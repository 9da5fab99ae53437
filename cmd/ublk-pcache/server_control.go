package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/engine"
	"ublk-pcache/pmem"
)

// A server takes commands on a unix socket in stateDir, where only root comes:
// one connection, one JSON request, one JSON reply, both on a line.
//
// Root can do worse to a server than send it nonsense, so what has to be
// guarded against is accidents: another program's bytes, a client that stops in
// the middle of a word, a script that asks for one more flush every second
// while the disk hangs. None of them may cost the server more than a bounded
// amount of memory, or keep the next command out for long, and each gets a line
// that says what was wrong. A word that is not known is refused and not ignored: a
// newer client means something by it.
//
// A panic is not caught here. Reading a command cannot cause one (FuzzControl),
// and one further in may have left a lock held; the next server has none.

// command is a request to a server.
type command struct {
	Do       string `json:"do"`                 // status, flush, set, upgrade, del
	Settings values `json:"settings,omitempty"` // set
	Force    bool   `json:"force,omitempty"`
}

// reply is a server's answer. An empty Error is success.
type reply struct {
	Error  string         `json:"error,omitempty"`
	Exit   int            `json:"exit,omitempty"` // what a command ends with for that; 0 of a server that does not tell
	Status *engine.Status `json:"status,omitempty"`
	Left   []string       `json:"left,omitempty"` // del: what is not quite gone

	Persistence pmem.Persistence `json:"persistence,omitempty"` // status
	Doubt       string           `json:"doubt,omitempty"`       // why it is not what could be expected
	Log         string           `json:"log,omitempty"`         // where the server's is
	LogLevel    string           `json:"log_level,omitempty"`   // empty of a server that has none

	Upgrade *upgraded `json:"upgrade,omitempty"`
}

const (
	// commandSize is more than any command needs, in bytes.
	commandSize = 4096
	// commandTime is how long a client may take to send one, or to take the
	// answer.
	commandTime = 5 * time.Second
	// maxClients are served at a time. Nobody but a flush, or a set that drains, has a
	// reason to stay longer than commandTime, and one is enough of these.
	maxClients = 64
	// acceptPause is for an error that passes by itself: no descriptor left.
	acceptPause = 100 * time.Millisecond
)

// listen opens the control socket, which accept then serves. A device that is
// continued does without one for a while if the folder is full.
func (s *server) listen(recover bool) (err error) {
	os.Remove(statePath(s.dev.ID, ".sock")) // its place is needed where there is no more
	s.socket, err = openSocket(s.dev.ID)
	if err != nil {
		s.socket = nil
		if !recover {
			return fmt.Errorf("open the control socket: %w", err)
		}
		s.log.Error("the control socket cannot be opened, commands do not reach the server until it can", zap.Error(err))
		return nil
	}
	s.socket.SetUnlinkOnClose(false) // a server that follows has it, too
	return nil
}

// listenAgain is how often a server that has no control socket tries to open it.
const listenAgain = time.Second

// accept serves the control socket.
func (s *server) accept() {
	go func() {
		for s.socket == nil {
			time.Sleep(listenAgain)
			s.listen(true)
		}
		for {
			conn, err := s.socket.AcceptUnix()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(acceptPause)
				continue
			}
			s.receive(conn)
		}
	}()
}

func (s *server) closeSocket() error {
	if s.socket == nil {
		return nil
	}
	return s.socket.Close()
}

// openSocket makes the socket of a device. It is root's from the beginning: see
// main for the umask. And it is made under another name, so that where one server
// follows another there is no moment without a socket.
func openSocket(id int) (*net.UnixListener, error) {
	made := statePath(id, ".sock.new")
	os.Remove(made)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err == nil {
		err = os.Rename(made, statePath(id, ".sock"))
	}
	return l, err
}

// receive lets a client in that may come, if there is a place for it.
func (s *server) receive(conn *net.UnixConn) {
	if err := refuseStranger(conn); err != nil {
		answer(conn, reply{}, err)
		return
	}
	select {
	case s.clients <- struct{}{}:
		go func() {
			r, err := serveClient(conn, s.execute)
			<-s.clients
			switch {
			case r.Upgrade != nil:
				s.exit(0)
			case errors.Is(err, errRetired):
				s.exit(1) // systemd starts another
			}
		}()
	default:
		answer(conn, reply{}, fmt.Errorf("device %s is busy with %d other commands (wait for one to end)", s.dev.title(), maxClients))
	}
}

// refuseStranger refuses a client that is not root. The folder and the socket's
// mode keep them out already, unless somebody has changed those.
func refuseStranger(conn *net.UnixConn) error {
	peer, err := peerOf(conn)
	if err != nil {
		return fmt.Errorf("ask who is calling: %w", err)
	}
	if peer.Uid != 0 {
		return fmt.Errorf("only root may give commands, not user %d", peer.Uid)
	}
	return nil
}

// peerOf tells who is at the other end of a connection.
func peerOf(conn *net.UnixConn) (peer *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlled := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return peer, errors.Join(controlled, err)
}

// serveClient serves one client. The context that execute gets ends when the client
// goes away, or says more than it has to.
func serveClient(conn net.Conn, execute func(context.Context, command) (reply, error)) (reply, error) {
	conn.SetReadDeadline(time.Now().Add(commandTime))
	cmd, err := readCommand(conn)
	if err != nil {
		answer(conn, reply{}, err)
		return reply{}, err
	}
	if hungUp(conn) {
		// The client has told its user by now that nobody answers, so the command must
		// not be carried out.
		conn.Close()
		return reply{}, errHungUp
	}
	conn.SetReadDeadline(time.Time{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		conn.Read(make([]byte, 1))
		cancel()
	}()
	r, err := execute(ctx, cmd)
	answer(conn, r, err)
	return r, err
}

// errHungUp: nobody waits for an answer any more.
var errHungUp = errors.New("the client has gone")

// hungUp reports whether a client has gone. One that has only said that this was
// all has not.
func hungUp(conn net.Conn) (gone bool) {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	controlled := raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}} // POLLHUP is always told
		n, _ := unix.Poll(p, 0)
		gone = n > 0 && p[0].Revents&unix.POLLHUP != 0
	})
	return gone || controlled != nil
}

// readCommand reads a command and nothing else.
func readCommand(r io.Reader) (cmd command, err error) {
	line, err := bufio.NewReaderSize(r, commandSize).ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return cmd, fmt.Errorf("malformed command: more than %d bytes", commandSize)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return cmd, fmt.Errorf("malformed command: no end of line within %v", commandTime)
	case err != nil:
		return cmd, fmt.Errorf("malformed command: no end of line: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&cmd); err != nil {
		return cmd, fmt.Errorf("malformed command: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return cmd, errors.New("malformed command: something follows it on its line")
	}
	return cmd, nil
}

// answer ends a conversation.
func answer(conn net.Conn, r reply, err error) {
	if err != nil {
		r.Error, r.Exit = oneLine(err), exitStatus(err)
	}
	conn.SetWriteDeadline(time.Now().Add(commandTime))
	json.NewEncoder(conn).Encode(r)
	conn.Close()
}

func (s *server) execute(ctx context.Context, cmd command) (r reply, err error) {
	// In words of their own, since each message is written some times a minute only: who asks for
	// status all the time must not hide the rest.
	s.log.Debug("command: "+cmd.Do, zap.Any("command", cmd))
	defer func(began time.Time) {
		s.log.Debug("answer: "+cmd.Do, zap.Any("command", cmd), zap.Duration("took", time.Since(began)), withRemedy(err))
	}(time.Now())
	switch cmd.Do {
	case "status":
		r := reply{Status: s.status()}
		r.Persistence, r.Doubt = s.region.Persistence()
		r.Log, r.LogLevel = s.logPlace(), s.level.String()
		return r, nil
	case "flush":
		return reply{}, s.heldWhereStopped(s.cache.Flush(ctx))
	case "set":
		return reply{}, s.set(ctx, cmd.Settings)
	case "upgrade":
		return s.upgrade(ctx)
	case "del":
		left, err := s.remove(cmd.Force)
		if err != nil {
			err = s.dev.removalError(err)
		}
		return reply{Status: s.status(), Left: left}, err
	default:
		return reply{}, fmt.Errorf("unknown command %.40q: there are status, flush, set, upgrade, del", cmd.Do)
	}
}

// set begins anew after an upgrade that it met, whose new server has read the settings
// already: if that has failed here, and otherwise there, with the client's next question.
func (s *server) set(ctx context.Context, v values) error {
	if err := v.change(&engine.Settings{}); err != nil {
		return err
	}
	ofCache, ofServer := v.apart(logLevelName)
	for {
		err := s.setOfCache(ctx, ofCache)
		if err == nil {
			err = s.setOfServer(ofServer)
		}
		switch {
		case err != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, engine.ErrResting) && ctx.Err() != nil):
			return fmt.Errorf("broken off: all settings are as they were, mode=%v", s.cache.Settings().Mode)
		case !errors.Is(err, engine.ErrResting):
			return s.heldWhereStopped(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(restingAgain):
		}
	}
}

// setOfCache is set for what is kept on the media.
func (s *server) setOfCache(ctx context.Context, v values) error {
	if len(v) == 0 { // and nobody's drain is waited for
		return nil
	}
	var was values
	err := s.cache.Set(ctx, func(now *engine.Settings) error {
		was = textsOf(now)
		return v.change(now)
	})
	if err == nil {
		s.tellSettings(was, v)
	}
	return err
}

// setOfServer is set for what is kept in the state file: log_level, of this server and of those that
// follow. Its error is ErrResting while one that is to follow has been told what it starts from, and
// has written its state beside ours.
func (s *server) setOfServer(v values) error {
	name, given := v[logLevelName]
	if !given {
		return nil
	}
	s.removal.Lock()
	defer s.removal.Unlock()
	switch {
	case s.removal.done:
		return engine.ErrStopped
	case s.removal.next != nil:
		return engine.ErrResting
	}
	d := s.dev
	d.LogLevel = name
	if err := d.save(); err != nil {
		return fmt.Errorf("%s is as it was, what else was given is changed: %w", logLevelName, err)
	}
	was, level := s.level.Level(), logLevel(name)
	s.level.SetLevel(min(was, level)) // that it says less is the last that it says
	s.tellSettings(values{logLevelName: was.String()}, v)
	s.level.SetLevel(level)
	return nil
}

// tellSettings logs new settings, as far as they are new.
func (s *server) tellSettings(was, v values) {
	if from, to := v.changes(was); len(to) > 0 {
		s.log.Info("settings changed", settingsChanged.id(), zap.Any("from", from), zap.Any("to", to))
	}
}

// restingAgain is how often that is tried.
const restingAgain = 100 * time.Millisecond

// heldWhereStopped returns the error of what the cache's end has broken off. If that is for
// the next server, it is held until the end of the process, and the next one is asked.
func (s *server) heldWhereStopped(err error) error {
	if errors.Is(err, engine.ErrStopped) {
		s.removal.Lock()
		defer s.removal.Unlock()
	}
	return err
}
