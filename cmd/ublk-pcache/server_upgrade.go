package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// A running server is replaced by a child of its own: so the new one is where
// the old one is, in its mount namespace, its control group and its standing
// with systemd, and inherits the descriptors of disk and pmem, which nobody
// else can claim in between. Everything that takes time is done before the
// requests stop (engine/handover.go):
//
//	old                                   new
//	cache at rest
//	starts the new one ────────────────▶  maps, replays, makes rings
//	                    ◀──── prepared    waits at the gate
//	queues end, device released
//	the log's last head ───────────────▶  replays the rest, takes the device
//	                    ◀──────── live    requests go on
//	                    ◀─────── ready    the state file is the new one's, and it serves the socket
//	answers the command, ends
//
// Up to "queues end" whatever goes wrong with the new server, its death
// included, costs nothing: the old one goes on. From there on it is as if the
// old one had been killed: the device waits, and recover continues it. The old
// one then ends with an error, and systemd, if it is there, recovers at once.
//
// The driver has a command for this (QUIESCE_DEV), which is not used: it only
// asks a server to do what is done here anyway, and cannot be relied on to ask
// (on 6.18 and 7.3, with all tags busy, it returns without having told anybody).

// The descriptors of a new server, besides readyFD.
const (
	gateFD = readyFD + 1 + iota
	inheritedPmemFD
	inheritedDiskFD
	inheritedSocketFD // with Upgrade.Socket
)

// What a new server says on readyFD, a line each, before readyPrefix.
const (
	prepared = "prepared"
	live     = "live"
)

// upgradePatience is how long a new server may take for each of its two parts.
// Meanwhile the cache frees no space.
const upgradePatience = time.Minute

// restPatience is how long the disk may take for what it has under way when the
// cache comes to rest, 16 MiB of write-back.
const restPatience = 20 * time.Second

// upgraded is how an upgrade went.
type upgraded struct {
	PID   int           `json:"pid"`
	Pause time.Duration `json:"pause_ns"`
}

// errRetired is for a server that has given its device away in vain.
var errRetired = errors.New("the new server failed")

// errRemoved is for a server whose device was removed before it had another one.
var errRemoved = errors.New("it has been removed meanwhile")

// upgrade replaces this server by a new one. When that has worked, and after errRetired,
// this one only has to end. After any other error it goes on. The end of ctx is such an
// error, until the new one is prepared.
func (s *server) upgrade(ctx context.Context) (reply, error) {
	if !s.upgrading.TryLock() {
		return reply{}, fmt.Errorf("device %s: an upgrade is under way already", s.dev.title())
	}
	defer s.upgrading.Unlock()
	if err := s.canHandOver(); err != nil {
		return reply{}, err
	}
	head, err := s.rest(ctx)
	if err != nil {
		return reply{}, err
	}
	n, err := s.prepareNext(ctx, head)
	if err != nil {
		return reply{}, err
	}
	pause, err := s.handOver(n)
	if err != nil {
		return reply{}, err
	}
	if err := s.awaitReady(n); err != nil {
		return reply{}, err
	}
	s.log.Info("replaced", zap.Int("by", n.cmd.Process.Pid), zap.Duration("pause", pause))
	return reply{Upgrade: &upgraded{PID: n.cmd.Process.Pid, Pause: pause}}, nil
}

// canHandOver returns why this server cannot be replaced now, nil if it can.
func (s *server) canHandOver() error {
	switch err := s.ublk.CanLetGo(); {
	case errors.Is(err, ublk.ErrTooOld):
		return fmt.Errorf("device %s: %w (del and add it, or end its server and recover)", s.dev.title(), err)
	case err != nil:
		return fmt.Errorf("device %s: %w", s.dev.title(), err)
	}
	if waiting := s.disk.Waiting(); waiting > hangsAfter {
		return fmt.Errorf("device %s: backing device %s has not answered for %v, the old server goes on", s.dev.title(), s.dev.Backing, waiting.Round(time.Second))
	}
	return nil
}

// rest brings the cache to rest, and returns the log's head then. After an error the
// cache goes on, unless the device is being removed.
func (s *server) rest(ctx context.Context) (engine.Head, error) {
	resting, cancel := context.WithTimeout(ctx, restPatience)
	defer cancel()
	head, err := s.cache.Rest(resting)
	if err != nil {
		s.removal.Lock()
		defer s.removal.Unlock()
		if !s.removal.done {
			s.cache.Resume()
		}
		return head, fmt.Errorf("device %s cannot be handed over: %w", s.dev.title(), err)
	}
	return head, nil
}

// prepareNext starts a new server and returns it prepared. From then on the device
// cannot be removed: s.removal is locked, and stays so until this process ends. After an
// error the new server is killed and the cache goes on, unless the device is being
// removed.
func (s *server) prepareNext(ctx context.Context, head engine.Head) (*next, error) {
	n, err := s.startNext(head)
	if err == nil {
		err = n.expect(ctx, prepared)
	}
	s.removal.Lock()
	s.removal.next = nil
	if s.removal.done {
		err = errRemoved
	}
	if err == nil {
		_, err = s.cache.Rest(ctx) // it may have failed meanwhile
	}
	if err == nil {
		return n, nil
	}
	n.kill()
	if !s.removal.done {
		s.cache.Resume()
		err = fmt.Errorf("the new server did not get ready, the old one goes on: %w", err)
	}
	s.removal.Unlock()
	return nil, fmt.Errorf("device %s: %w", s.dev.title(), err)
}

// handOver gives the device to a prepared server, and returns how long requests waited
// for that. An error is an errRetired, and the device waits.
func (s *server) handOver(n *next) (pause time.Duration, err error) {
	if s.socket != nil {
		s.socket.Close() // the new server has it, too, and takes what waits there
	}
	began := time.Now()
	s.ublk.LetGo()
	last, err := s.cache.Retire()
	if err == nil {
		err = json.NewEncoder(n.gate).Encode(last)
	}
	if err == nil {
		err = n.expect(context.Background(), live)
	}
	pause = time.Since(began)
	if err != nil {
		n.kill()
		s.log.Error("the new server has failed, the device waits (ublk-pcache recover continues)", upgradeFailed.id(), zap.Error(err))
		return 0, fmt.Errorf("%w: %w (device %s waits: ublk-pcache recover %d)", errRetired, err, s.dev.title(), s.dev.ID)
	}
	return pause, nil
}

// awaitReady waits until a server that has the device can be found and asked. An error
// is an errRetired, since the device is the new server's.
func (s *server) awaitReady(n *next) error {
	if err := n.expect(context.Background(), readyPrefix+s.dev.Device); err != nil {
		s.log.Error("the new server serves, but has not said that it is ready", zap.Error(err))
		return fmt.Errorf("%w after it had taken over: %w (see 'ublk-pcache list'; if it is dead: ublk-pcache recover %d)", errRetired, err, s.dev.ID)
	}
	return nil
}

// next is a new server, as the old one sees it.
type next struct {
	cmd     *exec.Cmd
	answers *os.File
	lines   *bufio.Reader
	gate    *os.File
	ended   chan struct{} // closed when it has
	how     error         // it ended
}

// startNext starts a new server that waits at the gate. The result can be
// killed, also with an error. A removal of the device kills it: until then it has
// disk and pmem as well.
func (s *server) startNext(head engine.Head) (*next, error) {
	n := &next{}
	s.removal.Lock()
	defer s.removal.Unlock()
	if s.removal.done {
		return n, errRemoved
	}
	self, err := os.Executable()
	if err != nil {
		return n, err
	}
	d := s.dev
	d.LogLevel = s.level.String()
	config, err := json.Marshal(serveOptions{Device: d, Upgrade: &head, Foreground: s.foreground, Socket: s.socket != nil})
	if err != nil {
		return n, err
	}
	disk, err := s.disk.File()
	if err != nil {
		return n, err
	}
	defer disk.Close()
	var told, heard *os.File
	if n.answers, told, err = os.Pipe(); err != nil {
		return n, err
	}
	defer told.Close()
	n.lines = bufio.NewReader(n.answers)
	if heard, n.gate, err = os.Pipe(); err != nil {
		return n, err
	}
	defer heard.Close()
	cmd := exec.Command(self, "serve", string(config))
	cmd.Dir, cmd.Env = "/", serverEnv()
	cmd.Args[0] = os.Args[0] // see ExecStart in the unit
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{told, heard, s.region.File(), disk}
	if s.socket != nil {
		socket, err := s.socket.File()
		if err != nil {
			return n, err
		}
		defer socket.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, socket)
	}
	if err := cmd.Start(); err != nil {
		return n, err
	}
	n.cmd, n.ended = cmd, make(chan struct{})
	go func() {
		n.how = cmd.Wait()
		close(n.ended)
	}()
	s.removal.next = n
	return n, nil
}

// expect waits for a line. Any other line is the new server's error, with all that follows.
func (n *next) expect(ctx context.Context, want string) error {
	n.answers.SetReadDeadline(time.Now().Add(upgradePatience))
	defer context.AfterFunc(ctx, func() { n.answers.SetReadDeadline(time.Now()) })()
	line, err := n.lines.ReadString('\n')
	switch {
	case strings.TrimSuffix(line, "\n") == want:
		return nil
	case line != "":
		rest, _ := io.ReadAll(n.lines)
		return errors.New(oneLine(errors.New(line + string(rest))))
	case err == io.EOF:
		n.cmd.Process.Kill() // unless it has ended
		<-n.ended
		return fmt.Errorf("it ended without a word: %v", n.how)
	case ctx.Err() != nil:
		return fmt.Errorf("the command was broken off: %w", ctx.Err())
	default:
		return fmt.Errorf("it says nothing: %w", err)
	}
}

// kill ends a new server, as far as there is one, and reports whether it has ended.
// It may wait for the disk and so end late, but it does nothing any more.
func (n *next) kill() (ended bool) {
	ended = true
	if n.cmd != nil {
		n.cmd.Process.Kill()
		_, ended = inTime(func() error { <-n.ended; return nil })
	}
	n.answers.Close()
	n.gate.Close()
	return ended
}

// takeOver makes this process the server that follows the one that started it,
// and says on tell how far it is. A process that fails here has nothing to take
// back: its end is enough. Everything that may find no room is made before it says
// that it is prepared.
func takeOver(o serveOptions, tell io.Writer) (_ *server, err error) {
	s := unstarted(o)
	s.openLog(o.Foreground)
	defer closeOnError(&err, s.log.Sync)
	s.reportMounts()
	if err := protect(s.dev.Queues); err != nil {
		return nil, err
	}
	if err := s.inherit(o.Socket); err != nil {
		return nil, err
	}
	if err := s.keepsPromise(); err != nil {
		return nil, err
	}
	if err := s.knowCache(); err != nil {
		return nil, err
	}
	follower, err := engine.Follow(s.region, disk{s.disk}, s.engineOptions(), *o.Upgrade)
	if err != nil {
		return nil, fmt.Errorf("cache %s: %w", s.dev.PMEM, err)
	}
	device, err := ublk.Prepare(s.dev.ID, s.fatal)
	if err != nil {
		return nil, err
	}
	if err := s.dev.tellUdev(); err != nil { // of a device that a version without links began
		s.log.Warn(noLink, zap.Error(err))
	}
	s.dev.servedByUs()
	if err := s.dev.stage(); err != nil {
		return nil, err
	}
	fmt.Fprintln(tell, prepared)
	var last engine.Retired
	if err := json.NewDecoder(inherited(gateFD, "gate")).Decode(&last); err != nil {
		return nil, fmt.Errorf("the old server has changed its mind: %w", err)
	}
	if s.cache, err = follower.TakeOver(last); err != nil {
		return nil, fmt.Errorf("cache %s: %w", s.dev.PMEM, err)
	}
	if s.ublk, err = device.TakeOver(s.handler); err != nil {
		return nil, err
	}
	fmt.Fprintln(tell, live)
	s.announce()
	s.log.Info("serving, in place of another server", serverUpgraded.id(), zap.String("version", longVersion()), zap.Any("state", s.dev))
	return s, nil
}

// inherit takes over disk and pmem, and the control socket where it was handed over.
func (s *server) inherit(socket bool) (err error) {
	if s.disk, err = backing.Inherit(inherited(inheritedDiskFD, s.dev.Backing)); err != nil {
		return err
	}
	if s.region, err = pmem.Inherit(inherited(inheritedPmemFD, s.dev.PMEM)); err != nil {
		return err
	}
	return s.inheritSocket(socket)
}

// announce tells commands and systemd of a server that has taken over. The device is
// ours by then, so a failure is only logged.
func (s *server) announce() {
	if err := s.dev.publish(); err != nil {
		s.log.Error("others do not hear of the new server", zap.Error(err))
	}
	if s.socket == nil {
		s.listen(true)
	} else {
		s.listenAsUs()
	}
	s.accept()
	// While the old server, which systemd knows, is there: its end must not be
	// taken for the service's. And from here, since a message whose sender has
	// gone belongs to nobody.
	if os.Getenv("NOTIFY_SOCKET") == "" && adopted() { // the old one was not started by systemd
		os.Setenv("NOTIFY_SOCKET", notifySocket)
	}
	if _, err := daemon.SdNotify(false, fmt.Sprintf("MAINPID=%d", os.Getpid())); err != nil {
		s.log.Error("systemd does not hear of the new server, and does not start another when it dies", zap.Error(err))
	}
}

// inheritSocket takes over the control socket. Where it was not handed over, as by
// an older program, which still listens, a new one takes its place when the server
// is live.
func (s *server) inheritSocket(handed bool) error {
	if !handed {
		return nil
	}
	f := inherited(inheritedSocketFD, "socket")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("take over the control socket: %w", err)
	}
	s.socket = l.(*net.UnixListener)
	s.socket.SetUnlinkOnClose(false)
	return nil
}

// listenAsUs makes those who connect see this process at the other end: it is the
// last that has called listen (net/unix/af_unix.c, unix_listen, 7.3).
func (s *server) listenAsUs() {
	raw, err := s.socket.SyscallConn()
	if err == nil {
		var refused error
		err = raw.Control(func(fd uintptr) { refused = unix.Listen(int(fd), unix.SOMAXCONN) })
		err = errors.Join(err, refused)
	}
	if err != nil {
		s.log.Error("the control socket is still the old server's to those who ask", zap.Error(err))
	}
}
