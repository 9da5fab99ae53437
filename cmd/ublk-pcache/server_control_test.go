package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

var controlSeed = flag.Uint64("control.seed", 0, "random seed of the commands (default: from the clock)")

// controlled is a server that can do everything but be removed or replaced.
func controlled(tb testing.TB) (execute func(context.Context, command) (reply, error)) {
	tb.Helper()
	s := someServer(tb)
	tb.Cleanup(func() { s.cache.Close() })
	return func(ctx context.Context, cmd command) (reply, error) {
		if cmd.Do == "del" || cmd.Do == "upgrade" {
			return reply{}, nil
		}
		return s.execute(ctx, cmd)
	}
}

// someServer is a cache without a device. Its caller ends the cache.
func someServer(tb testing.TB) *server {
	tb.Helper()
	return serverOnMemory(tb, pmem.NewFake(ondisk.MinSize))
}

// serverOnMemory makes the cache of someServer in mem.
func serverOnMemory(tb testing.TB, mem engine.Memory) *server {
	tb.Helper()
	return serverOnDisk(tb, mem, func(d disk) engine.Disk { return d })
}

// serverOnDisk has the cache use its disk as on gives it.
func serverOnDisk(tb testing.TB, mem engine.Memory, on func(disk) engine.Disk) *server {
	tb.Helper()
	if err := ondisk.Format(mem, ondisk.FormatOptions{GCPercent: ondisk.DefaultGCPercent}); err != nil {
		tb.Fatal(err)
	}
	path := filepath.Join(tb.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 16<<20), 0o600); err != nil {
		tb.Fatal(err)
	}
	dev, err := backing.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	cache, err := engine.Open(mem, on(disk{dev}), engine.Options{Queues: 1, Log: logger{zap.NewNop()}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { dev.Close() })
	return &server{cache: cache, disk: dev, region: pmem.Heap(8), log: zap.NewNop(), level: zap.NewAtomicLevel(), dev: *someDevice(3)}
}

// unsynced is a region whose syncs fail from some time on.
type unsynced struct {
	*pmem.Fake
	fails bool
}

func (*unsynced) Durable() bool { return false }

func (u *unsynced) Sync() error {
	if u.fails {
		return unix.EIO
	}
	return nil
}

// TestStatusHasRemedy: what a user does about a cache that has failed is in its status.
func TestStatusHasRemedy(t *testing.T) {
	mem := &unsynced{Fake: pmem.NewFake(ondisk.MinSize)}
	s := serverOnMemory(t, mem)
	mem.fails = true
	err := s.cache.Close()
	st := s.status()
	if st.State != engine.Failed || err == nil || st.Error != oneLine(err) || !strings.Contains(st.Error, "then end the server and start it again") {
		t.Errorf("closed with %v, %s: %s", err, st.State, st.Error)
	}
}

// connected returns the two ends of a unix socket.
func connected(tb testing.TB) (client, server *net.UnixConn) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			tb.Fatal(err)
		}
		ends[i] = conn.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

// say sends bytes, and no more, to a server and checks what holds for every
// conversation: it ends, with one line of JSON that is an answer.
func say(tb testing.TB, execute func(context.Context, command) (reply, error), said []byte) reply {
	tb.Helper()
	client, server := connected(tb)
	defer client.Close()
	obeyed := 0
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		serveClient(server, func(ctx context.Context, cmd command) (reply, error) {
			obeyed++
			return execute(ctx, cmd)
		})
	}()
	client.Write(said) // in vain if the server has heard enough
	client.CloseWrite()
	heard, err := io.ReadAll(client)
	<-ended
	line, whole := strings.CutSuffix(string(heard), "\n")
	var r reply
	switch {
	case !whole || strings.ContainsAny(line, "\n\r"):
		tb.Fatalf("to %q the server answers %q (%v), which is not a line", said, heard, err)
	case json.Unmarshal(heard, &r) != nil || strings.ContainsAny(r.Error, "\n\r"):
		tb.Fatalf("to %q the server answers %q", said, heard)
	case obeyed > 1 || obeyed == 0 && r.Error == "":
		tb.Fatalf("%q was obeyed %d times, the answer is %q", said, obeyed, heard)
	}
	if first, _, _ := strings.Cut(string(said), "\n"); obeyed == 1 && (len(first) >= commandSize || !json.Valid([]byte(first))) {
		tb.Fatalf("%q was obeyed", said)
	}
	return r
}

// malformed are commands that none of them may be taken for, with a word of
// the answer each.
var malformed = map[string]string{
	"":                                      "no end of line",
	"\n":                                    "malformed",
	"status\n":                              "malformed",
	`{"do":"status"}`:                       "no end of line",
	`{"do":"stat`:                           "no end of line",
	"\"status\"\n":                          "malformed",
	"[{\"do\":\"status\"}]\n":               "malformed",
	"null\n":                                `unknown command ""`,
	"{}\n":                                  `unknown command ""`,
	`{"do":7}` + "\n":                       "malformed",
	`{"do":"stop"}` + "\n":                  `unknown command "stop"`,
	`{"do":"Status"}` + "\n":                `unknown command "Status"`,
	"{\"do\":\"st\xff\"}\n":                 "unknown command",
	`{"do":"a\u0000\nb"}` + "\n":            `unknown command "a\x00\nb"`,
	`{"do":"status","colour":"red"}` + "\n": `unknown field "colour"`,
	`{"do":"status"}{"do":"del"}` + "\n":    "something follows",
	`{"do":"status"} x` + "\n":              "something follows",
	`{"do":"set"}` + "\n":                   "nothing to set",
	`{"do":"set","settings":null}` + "\n":   "nothing to set",
	`{"do":"set","settings":{}}` + "\n":     "nothing to set",
	`{"do":"set","settings":{"colour":"red"}}` + "\n":                     `no setting "colour"`,
	`{"do":"set","settings":{"gc_percent":"-1"}}` + "\n":                  "0 to 90",
	`{"do":"set","settings":{"gc_percent":"91"}}` + "\n":                  "0 to 90",
	`{"do":"set","settings":{"gc_percent":""}}` + "\n":                    "0 to 90",
	`{"do":"set","settings":{"gc_percent":"7.5"}}` + "\n":                 "0 to 90",
	`{"do":"set","settings":{"gc_percent":"9223372036854775808"}}` + "\n": "0 to 90",
	`{"do":"set","settings":{"gc_percent":70}}` + "\n":                    "malformed",
	`{"do":"set","settings":{"gc_percent":"50","dirty_low":"3"}}` + "\n":  "dirty_low 3 goes with a dirty_high",
	`{"do":"del","force":"yes"}` + "\n":                                   "malformed",
	strings.Repeat("[", commandSize-1) + "\n":                             "malformed",
	strings.Repeat(`{"do":`, commandSize/6-1) + "\n":                      "malformed",
	strings.Repeat(" ", commandSize) + "\n":                               "more than 4096 bytes",
	`{"do":"` + strings.Repeat("x", 1<<20) + `"}` + "\n":                  "more than 4096 bytes",
	`{"do":"` + strings.Repeat("x", commandSize/2) + `"}` + "\n":          "unknown command",
}

func TestMalformedCommands(t *testing.T) {
	execute := controlled(t)
	for said, word := range malformed {
		if r := say(t, execute, []byte(said)); !strings.Contains(r.Error, word) || len(r.Error) > 300 {
			t.Errorf("to %.100q the server answers %.400q, want a short line with %q", said, r.Error, word)
		}
	}
	// Zero is a setting, and not the same as none.
	for _, percent := range []int{0, 90} {
		if r := say(t, execute, fmt.Appendf(nil, "{\"do\":\"set\",\"settings\":{\"gc_percent\":\"%d\"}}\n", percent)); r.Error != "" {
			t.Errorf("set gc_percent to %d: %s", percent, r.Error)
		}
		if r := say(t, execute, []byte("{\"do\":\"status\"}\n")); r.Status == nil || r.Status.Settings.GCPercent != percent {
			t.Errorf("gc_percent was set to %d, status is %+v", percent, r.Status)
		}
	}
}

// FuzzControl: no bytes at all harm a server, or get anything but an answer.
func FuzzControl(f *testing.F) {
	for said := range malformed {
		f.Add([]byte(said))
	}
	for _, said := range commands {
		f.Add([]byte(said))
	}
	execute := controlled(f)
	f.Fuzz(func(t *testing.T, said []byte) { say(t, execute, said) })
}

var commands = []string{
	"{\"do\":\"status\"}\n", "{\"do\":\"flush\"}\n", "{\"do\":\"del\",\"force\":true}\n", "{\"do\":\"set\",\"settings\":{\"gc_percent\":\"50\"}}\n",
}

// TestRandomCommands is what FuzzControl tries, for a moment: commands with
// bytes changed, doubled and left out.
func TestRandomCommands(t *testing.T) {
	seed := *controlSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	execute := controlled(t)
	const tries = 2000
	understood := 0
	for range tries {
		said := []byte(commands[rnd.IntN(len(commands))])
		for range rnd.IntN(4) {
			at := rnd.IntN(len(said))
			switch rnd.IntN(4) {
			case 0:
				said[at] = byte(rnd.Uint32())
			case 1:
				said = append(said[:at:at], said[rnd.IntN(len(said)):]...)
			case 2:
				said = append(said[:at:at], commands[rnd.IntN(len(commands))]...)
			case 3:
				said[at] = `{}[]":,0-9e\`[rnd.IntN(12)]
			}
			if len(said) == 0 {
				break
			}
		}
		if say(t, execute, said).Error == "" {
			understood++
		}
	}
	t.Logf("%d of %d were understood", understood, tries)
	if understood == 0 || understood == tries {
		t.Error("the commands do not lie around the border")
	}
}

// TestSlowClients: neither one that does not finish its command nor one that
// does not take its answer keeps a place for longer than commandTime.
func TestSlowClients(t *testing.T) {
	status := func(context.Context, command) (reply, error) { return reply{Status: &engine.Status{}}, nil }
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		begin := time.Now()
		go serveClient(server, status)
		go client.Write([]byte(`{"do":"sta`))
		var r reply
		if err := json.NewDecoder(client).Decode(&r); err != nil || !strings.Contains(r.Error, "no end of line within 5s") {
			t.Errorf("half a command is answered with %+v, %v", r, err)
		}
		if waited := time.Since(begin); waited != commandTime {
			t.Errorf("the answer to half a command came after %v", waited)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer client.Close()
		begin := time.Now()
		go client.Write([]byte(commands[0]))
		serveClient(server, status)
		if waited := time.Since(begin); waited != commandTime {
			t.Errorf("an answer that nobody takes was held for %v", waited)
		}
	})
}

// TestClientGoesAway: what a client waits for is given up when it goes.
func TestClientGoesAway(t *testing.T) {
	client, server := connected(t)
	begun, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		serveClient(server, func(ctx context.Context, _ command) (reply, error) {
			close(begun)
			<-ctx.Done()
			return reply{}, ctx.Err()
		})
	}()
	io.WriteString(client, "{\"do\":\"flush\"}\n")
	<-begun
	client.Close()
	<-ended
}

// TestPlaces: when all are taken the next client hears so, and it is let in
// when one is free.
func TestPlaces(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &server{clients: make(chan struct{}, maxClients), log: zap.NewNop()}
	ask := func() string {
		t.Helper()
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		go s.receive(conn)
		io.WriteString(client, "{\"do\":\"dance\"}\n")
		var r reply
		if err := json.NewDecoder(client).Decode(&r); err != nil {
			t.Fatal(err)
		}
		return r.Error
	}
	for range maxClients {
		s.clients <- struct{}{}
	}
	if got := ask(); !strings.Contains(got, "busy with 64 other commands") {
		t.Errorf("with all places taken: %q", got)
	}
	<-s.clients
	if got := ask(); !strings.Contains(got, `unknown command "dance"`) {
		t.Errorf("with one place free: %q", got)
	}
	s.clients <- struct{}{} // the place is given back
}

// TestStranger: somebody who is not root, and has got to the socket somehow, is
// not heard.
func TestStranger(t *testing.T) {
	dir := t.TempDir()
	for d := dir; d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(l.Addr().String(), 0o777); err != nil {
		t.Fatal(err)
	}
	s := &server{clients: make(chan struct{}, maxClients), log: zap.NewNop()}
	go func() {
		if conn, err := l.AcceptUnix(); err == nil {
			s.receive(conn)
		}
	}()
	const nobody = 65534
	answer := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			answer <- fmt.Errorf("become user %d: %w", nobody, errno)
			return
		}
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			answer <- err
			return
		}
		defer conn.Close()
		var r reply
		if err := json.NewDecoder(conn).Decode(&r); err != nil {
			answer <- err
			return
		}
		answer <- fmt.Errorf("%s", r.Error)
	}()
	fails(t, <-answer, "only root", "65534")
}
