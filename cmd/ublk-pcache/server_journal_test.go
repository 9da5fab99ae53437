package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/engine"
)

// aJournal listens as the journal does, in journalDir.
func aJournal(t *testing.T) *net.UnixConn {
	t.Helper()
	os.Remove(filepath.Join(journalDir, "socket"))
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(journalDir, "socket"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// journalServer has standard error for the journal's stream, and its log.
func journalServer(t *testing.T) (*server, *net.UnixConn) {
	t.Helper()
	was := journalDir
	t.Cleanup(func() { journalDir = was })
	journalDir = t.TempDir()
	l := aJournal(t)
	var st unix.Stat_t
	if err := unix.Fstat(unix.Stderr, &st); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino))
	s := &server{dev: *someDevice(3), level: zap.NewAtomicLevel()}
	s.dev.Name = "data"
	s.openLog(true)
	if !s.journal {
		t.Fatal("the journal's stream is not taken for that")
	}
	return s, l
}

// entryOf reads a datagram as systemd.io/JOURNAL_NATIVE_PROTOCOL says.
func entryOf(t *testing.T, datagram []byte) map[string]string {
	t.Helper()
	entry := map[string]string{}
	for len(datagram) > 0 {
		line, rest, ended := bytes.Cut(datagram, []byte("\n"))
		name, value, ok := strings.Cut(string(line), "=")
		if !ok {
			n := binary.LittleEndian.Uint64(rest)
			value, rest = string(rest[8:8+n]), rest[8+n:]
			rest, ended = bytes.CutPrefix(rest, []byte("\n"))
		}
		if _, again := entry[name]; again || !ended || !regexp.MustCompile(`^[A-Z][A-Z0-9_]*$`).MatchString(name) {
			t.Fatalf("field %q in %q", name, datagram)
		}
		entry[name], datagram = value, rest
	}
	return entry
}

// hear returns the next entry.
func hear(t *testing.T, l *net.UnixConn) map[string]string {
	t.Helper()
	p := make([]byte, 2*logPending)
	n, err := l.Read(p)
	if err != nil {
		t.Fatal(err)
	}
	return entryOf(t, p[:n])
}

// TestJournalFields: an entry has a text that is enough by itself, and what it is found by.
func TestJournalFields(t *testing.T) {
	s, l := journalServer(t)
	s.level.SetLevel(zap.DebugLevel)
	refused := errors.New("input/output error")
	for _, c := range []struct {
		log  func()
		want map[string]string
	}{
		{func() {
			s.log.Info("serving", serverStarted.id(), zap.Any("state", s.dev), zap.Bool("recovered", false))
		}, map[string]string{
			"PRIORITY": "6", "MESSAGE_ID": messageIDs[serverStarted], "UBLK_PCACHE_RECOVERED": "false", "UBLK_PCACHE_ERROR": "",
		}},
		{func() { s.engineOptions().Log.Error(engine.WritebackFails, "write-back failed", refused) }, map[string]string{
			"PRIORITY": "3", "MESSAGE_ID": engineIDs[engine.WritebackFails], "UBLK_PCACHE_ERROR": "input/output error",
			"MESSAGE": `write-back failed {"error": "input/output error"}`,
		}},
		{func() { s.engineOptions().Log.Info(engine.OtherEvent, "nothing", nil) }, map[string]string{
			"PRIORITY": "6", "MESSAGE": "nothing", "MESSAGE_ID": "",
		}},
		{func() { s.log.Warn("two\nlines", zap.Strings("left", []string{"a", "b\nc"})) }, map[string]string{
			"PRIORITY": "4", "UBLK_PCACHE_LEFT": `["a","b\nc"]`, "MESSAGE": "two\nlines" + ` {"left": ["a", "b\nc"]}`,
		}},
		{func() { s.log.Debug("x", zap.String("error", "a\nb"), zap.Duration("took", 1500*time.Millisecond)) }, map[string]string{
			"PRIORITY": "7", "UBLK_PCACHE_ERROR": "a\nb", "UBLK_PCACHE_TOOK": "1.5",
		}},
	} {
		c.log()
		got := hear(t, l)
		for name, value := range c.want {
			if got[name] != value {
				t.Errorf("%s is %q, want %q", name, got[name], value)
			}
		}
		if got["SYSLOG_IDENTIFIER"] != "ublk-pcache" || got["UBLK_PCACHE_DEVICE"] != "/dev/ublkb3" || got["UBLK_PCACHE_NAME"] != "data" {
			t.Errorf("the entry is not told from others': %q", got)
		}
		if !strings.HasSuffix(got["CODE_FILE"], "server_journal_test.go") || got["CODE_LINE"] == "" {
			t.Errorf("the entry is from %s:%s", got["CODE_FILE"], got["CODE_LINE"])
		}
	}
}

// TestNotTheJournal: what is started from a unit, and has another standard error, writes there.
func TestNotTheJournal(t *testing.T) {
	_, l := journalServer(t)
	itself := os.Getenv("JOURNAL_STREAM")
	for _, stream := range []string{"1:2", "nonsense", "", itself} {
		t.Setenv("JOURNAL_STREAM", stream)
		s := &server{dev: *someDevice(3), level: zap.NewAtomicLevel()}
		if s.openLog(true); s.journal != (stream == itself) {
			t.Errorf("with %q: the journal %t", stream, s.journal)
		}
	}
	// Where its socket is missing, standard error takes lines.
	l.Close()
	s := &server{dev: *someDevice(3), level: zap.NewAtomicLevel()}
	if s.openLog(true); !s.journal {
		t.Error("the journal is not known without its socket")
	}
	s.log.Info("this line is for standard error")
	if err := s.log.Sync(); err != nil {
		t.Error(err)
	}
}

// missing is how many entries an entry says are missing.
func missing(t *testing.T, entry map[string]string) (n int) {
	t.Helper()
	if strings.Contains(entry["MESSAGE"], "missing") {
		if _, err := fmt.Sscan(entry["UBLK_PCACHE_COUNT"], &n); err != nil || entry["PRIORITY"] != "4" {
			t.Fatalf("%q: %v", entry, err)
		}
	}
	return n
}

// TestJournalHangs: a journal that takes nothing, with a queue full of what others have sent, costs a server no
// moment. When it goes on it gets what there was room for, and how much there was not.
func TestJournalHangs(t *testing.T) {
	s, l := journalServer(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for err == nil {
		err = unix.Sendto(fd, []byte("MESSAGE=another's\n"), 0, &unix.SockaddrUnix{Name: filepath.Join(journalDir, "socket")})
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	const sent = 2000
	begin := time.Now()
	for i := range sent {
		s.log.Error(fmt.Sprint("message ", i))
	}
	if err := s.log.Sync(); err == nil {
		t.Error("it is done although nobody takes it")
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	l.SetReadDeadline(time.Now().Add(time.Minute))
	written, lost := 0, 0
	for written == 0 || lost == 0 || written+lost < sent {
		entry := hear(t, l)
		switch n := missing(t, entry); {
		case n > 0:
			lost += n
		case entry["MESSAGE"] != "another's":
			written++
		}
	}
	if written+lost != sent || written < 100 {
		t.Errorf("of %d entries %d were sent and %d are said to be missing", sent, written, lost)
	}
}

// TestJournalRestarted: a journal with another socket is found, and told of what none has taken.
func TestJournalRestarted(t *testing.T) {
	s, l := journalServer(t)
	s.log.Info("first")
	if got := hear(t, l)["MESSAGE"]; got != "first" {
		t.Errorf("it hears %q", got)
	}
	l.Close()
	for i := range 3 {
		s.log.Warn(fmt.Sprint("lost ", i))
		s.log.Sync()
	}
	l = aJournal(t)
	s.log.Info("second")
	if n := missing(t, hear(t, l)); n != 3 {
		t.Errorf("%d are said to be missing", n)
	}
	if got := hear(t, l)["MESSAGE"]; got != "second" {
		t.Errorf("it hears %q", got)
	}
}

// TestMessageIDs: each is its own, and docs/admin.md tells of all of them and of no other.
func TestMessageIDs(t *testing.T) {
	text := textOf(t, "../../docs/admin.md")
	told := map[string]bool{}
	for _, id := range regexp.MustCompile("`([0-9a-f]{32})`").FindAllStringSubmatch(text, -1) {
		if told[id[1]] {
			t.Errorf("docs/admin.md tells of %s twice", id[1])
		}
		told[id[1]] = true
	}
	for e, id := range append(messageIDs[:], engineIDs[engine.OtherEvent+1:]...) {
		if !told[id] {
			t.Errorf("docs/admin.md does not tell of %q, number %d", id, e)
		}
		delete(told, id)
	}
	for id := range told {
		t.Errorf("docs/admin.md tells of %s, which there is not", id)
	}
}
