package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/engine"
)

// hasty makes patience short.
func hasty(t *testing.T) {
	t.Helper()
	a, b := lifeSign, statusPatience
	t.Cleanup(func() { lifeSign, statusPatience = a, b })
	lifeSign, statusPatience = 100*time.Millisecond, 200*time.Millisecond
}

// served makes this process the server of device 3, which obeys like that until the test ends.
func served(t *testing.T, execute func(context.Context, command) (reply, error)) {
	t.Helper()
	d := someDevice(3)
	d.servedByUs()
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: statePath(3, ".sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go serveClient(conn, execute)
		}
	}()
}

// otherServer starts a process that listens for device 3 and does what it is told in TestOtherServer.
func otherServer(t *testing.T, what string) (pid int, in io.Closer, out *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestOtherServer$")
	cmd.Env = append(os.Environ(), "OTHER_SERVER="+what, "OTHER_SOCKET="+statePath(3, ".sock"))
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	out = bufio.NewReader(stdout)
	if line, err := out.ReadString('\n'); err != nil {
		t.Fatalf("the other server says %q, %v", line, err)
	}
	d := someDevice(3)
	d.PID, d.Started = cmd.Process.Pid, startOf(cmd.Process.Pid)
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	return d.PID, stdin, out
}

// TestOtherServer is the program of otherServer, and no test without it.
func TestOtherServer(t *testing.T) {
	what := os.Getenv("OTHER_SERVER")
	if what == "" {
		return
	}
	l, err := net.Listen("unix", os.Getenv("OTHER_SOCKET"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("listening")
	if what == "ends unanswered" {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		bufio.NewReader(conn).ReadString('\n')
		l.Close()
		fmt.Println("heard")
	}
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// TestStuckServer: no command waits for ever for a server that says nothing. The line names it, what it is at, and what
// can be done.
func TestStuckServer(t *testing.T) {
	all := []command{{Do: "status"}, {Do: "flush"}, {Do: "set"}, {Do: "upgrade"}, {Do: "del", Force: true}}
	t.Run("stopped", func(t *testing.T) {
		ownStateDir(t)
		hasty(t)
		pid, _, _ := otherServer(t, "listens")
		syscall.Kill(pid, syscall.SIGSTOP)
		for _, cmd := range all {
			_, err := ask(3, cmd)
			fails(t, err, "device 3", "stopped", fmt.Sprintf("process %d", pid), fmt.Sprintf("kill -CONT %d", pid), fmt.Sprintf("kill -KILL %d", pid), "recover 3", "del 3")
		}
	})
	t.Run("does nothing", func(t *testing.T) {
		ownStateDir(t)
		hasty(t)
		pid, _, _ := otherServer(t, "listens")
		for _, cmd := range all {
			_, err := ask(3, cmd)
			fails(t, err, fmt.Sprintf("process %d", pid), fmt.Sprintf("kill -KILL %d", pid))
			if strings.Contains(err.Error(), "CONT") || strings.Contains(err.Error(), "stopped") {
				t.Errorf("a process that runs: %v", err)
			}
		}
	})
	t.Run("too many wait", func(t *testing.T) {
		ownStateDir(t)
		hasty(t)
		l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(l)
		if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: statePath(3, ".sock")}), unix.Listen(l, 0)); err != nil {
			t.Fatal(err)
		}
		d := someDevice(3)
		d.servedByUs()
		if err := d.save(); err != nil {
			t.Fatal(err)
		}
		_, err = ask(3, command{Do: "flush"}) // has the only place, and leaves it to nobody
		fails(t, err, fmt.Sprintf("process %d", os.Getpid()), "does not answer")
		_, err = ask(3, command{Do: "status"})
		fails(t, err, fmt.Sprintf("process %d", os.Getpid()), "does not answer")
	})
}

// TestLongCommand: a server that does what it was told, and says so when it is asked, may take as long as it likes.
func TestLongCommand(t *testing.T) {
	ownStateDir(t)
	hasty(t)
	var asked atomic.Int32
	enough := make(chan struct{})
	served(t, func(_ context.Context, cmd command) (reply, error) {
		if cmd.Do == "status" {
			if asked.Add(1) == 5 {
				close(enough)
			}
			return reply{}, errors.New("busy with 64 other commands") // is a sign of life, too
		}
		<-enough
		return reply{Left: []string{"done"}}, nil
	})
	if r, err := ask(3, command{Do: "flush"}); err != nil || len(r.Left) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestFollowed: a command that waits at a server which is replaced goes to the next one. If there is none, or it is
// unknown what became of the command, that is said.
func TestFollowed(t *testing.T) {
	for _, c := range []struct {
		do     string
		next   bool
		answer string
	}{
		{"flush", true, "from the next"}, {"set", true, "from the next"}, {"del", true, "from the next"},
		{"flush", false, "died before it answered"}, {"upgrade", true, "died before it answered"},
	} {
		ownStateDir(t)
		_, in, out := otherServer(t, "ends unanswered")
		answered := make(chan error, 1)
		go func() {
			_, err := ask(3, command{Do: c.do})
			answered <- err
		}()
		if line, err := out.ReadString('\n'); line != "heard\n" {
			t.Fatalf("the other server says %q, %v", line, err)
		}
		if c.next {
			served(t, func(context.Context, command) (reply, error) { return reply{}, errors.New("from the next") })
		}
		in.Close()
		fails(t, <-answered, c.answer)
	}
}

// TestFlushOfTheNext: a server that hands its cache over does not answer those who flush; the next one does. If it is for
// good, they hear so.
func TestFlushOfTheNext(t *testing.T) {
	s := someServer(t)
	s.removal.Lock() // as by upgrade
	if _, err := s.cache.Rest(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.cache.Retire(); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := s.execute(t.Context(), command{Do: "flush"})
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("the answer is %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	s.removal.Unlock()
	fails(t, <-answered, "being stopped")
}

// TestClientThatGaveUp: a server that finds a command whose client has gone leaves it alone, also one that was to stay.
func TestClientThatGaveUp(t *testing.T) {
	for _, half := range []bool{false, true} {
		client, server := connected(t)
		io.WriteString(client, "{\"do\":\"del\",\"force\":true}\n")
		if half {
			client.CloseWrite()
		} else {
			client.Close()
		}
		obeyed := false
		serveClient(server, func(context.Context, command) (reply, error) {
			obeyed = true
			return reply{Status: &engine.Status{}}, nil
		})
		client.Close()
		if obeyed != half {
			t.Errorf("with a client that waits (%t), obeyed is %t", half, obeyed)
		}
	}
}

// TestSocketIsNeverGone: while one server's socket replaces another's there always is one.
func TestSocketIsNeverGone(t *testing.T) {
	ownStateDir(t)
	open := func() {
		l, err := openSocket(3)
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close() // as when a process ends
	}
	if err := os.WriteFile(statePath(3, ".sock.new"), nil, 0o600); err != nil { // of one that died there
		t.Fatal(err)
	}
	open()
	var looks atomic.Int32
	looked := make(chan error, 1)
	go func() {
		defer close(looked)
		for looks.Load() < 3000 {
			if _, err := os.Lstat(statePath(3, ".sock")); err != nil {
				looked <- err
				return
			}
			looks.Add(1)
		}
	}()
	for len(looked) == 0 && looks.Load() < 3000 {
		open()
	}
	if err := <-looked; err != nil {
		t.Error(err)
	}
	if err := someDevice(3).remove(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(stateDir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
