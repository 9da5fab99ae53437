//go:build vm

package ublk

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A server in a process of its own, so that it can be killed. It ends with a
// clean stop when its input ends. The input "break" makes a queue's loop fail.

const serverEnv = "UBLK_TEST_SERVER"

func TestMain(m *testing.M) {
	if args := os.Getenv(serverEnv); args != "" {
		if err := serveProcess(strings.Fields(args)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// exitFatal tells the end by the fatal callback from every other.
const exitFatal = 42

func serveProcess(args []string) error {
	f, err := os.OpenFile(args[1], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	r := &ram{}
	if r.mem, err = unix.Mmap(int(f.Fd()), 0, ramSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	fatal := func(err error) {
		fmt.Fprintln(os.Stderr, "fatal:", err)
		os.Exit(exitFatal)
	}
	switch args[0] {
	case "add":
		r.Device, err = Add(twoQueues, r.handler, fatal)
	case "stuck":
		cfg := twoQueues
		cfg.Depth = 2
		r.Device, err = Add(cfg, func(q *Queue) Handler {
			return &ramdisk{q: q, mem: r.mem, late: make(chan Request, q.Depth())} // nobody finishes those
		}, fatal)
	case "mute":
		r.Device, err = Add(twoQueues, func(*Queue) Handler { return mute{} }, fatal)
	case "recover":
		var id int
		if id, err = strconv.Atoi(args[2]); err != nil {
			return err
		}
		r.Device, err = Recover(id, r.handler, fatal)
	}
	if err != nil {
		return err
	}
	fmt.Println(r.ID())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		for _, q := range r.Device.queues {
			unix.Close(q.ring.Fd())
		}
	}
	if err := r.Stop(false); err != nil {
		return err
	}
	return r.Delete()
}

// mute is a handler that answers nothing.
type mute struct{}

func (mute) Submit(*Request)                     {}
func (mute) Turn(done []Completion) []Completion { return done }

type server struct {
	*exec.Cmd
	in io.WriteCloser
	id int
}

func spawn(t *testing.T, args ...string) *server {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &server{Cmd: exec.Command(self)}
	s.Env = append(os.Environ(), serverEnv+"="+strings.Join(args, " "))
	s.Stderr = os.Stderr
	if s.in, err = s.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("server %v did not start: %v", args, err)
	}
	if s.id, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
		t.Fatal(err)
	}
	return s
}

func store(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ram")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, ramSize); err != nil {
		t.Fatal(err)
	}
	return path
}
