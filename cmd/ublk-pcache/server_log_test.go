package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"ublk-pcache/engine"
	"ublk-pcache/ublk"
)

// counted returns how many messages a log in JSON has, and how many it says that it has not.
func counted(t *testing.T, text []byte) (written, missing int) {
	t.Helper()
	for line := range bytes.Lines(text) {
		var entry struct {
			Msg        string
			Count      int
			Stacktrace string
		}
		if err := json.Unmarshal(line, &entry); err != nil || entry.Stacktrace != "" {
			t.Fatalf("a line of the log is %q: %v", line, err)
		}
		if strings.Contains(entry.Msg, "missing") {
			missing += entry.Count
		} else {
			written++
		}
	}
	return written, missing
}

// TestLogNeverWaits: a reader that stands still, and comes back, costs nobody a moment, and itself what it had no room for.
func TestLogNeverWaits(t *testing.T) {
	var heard []byte
	still := make(chan struct{})
	out := &logOutput{write: func(p []byte) error { <-still; heard = append(heard, p...); return nil }}
	log := newLog(out, zap.NewAtomicLevel(), zapcore.NewJSONEncoder)
	const lines = 5000
	begin := time.Now()
	for i := range lines {
		log.Error(fmt.Sprintf("message %d", i))
	}
	out.mu.Lock()
	waiting := 0
	for _, entry := range out.mu.pending {
		waiting += len(entry)
	}
	if waiting > logPending || waiting != out.mu.size {
		t.Errorf("%d bytes wait, %d are counted", waiting, out.mu.size)
	}
	out.mu.Unlock()
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	if err := log.Sync(); err == nil {
		t.Error("it is done without having written")
	}
	close(still)
	if err := log.Sync(); err != nil {
		t.Error(err)
	}
	log.Error("one more")
	if err := log.Sync(); err != nil {
		t.Error(err)
	}
	if written, missing := counted(t, heard); written+missing != lines+1 || written < 100 || missing < 100 {
		t.Errorf("of %d messages %d were written and %d are said to be missing", lines+1, written, missing)
	}
}

// TestLogRepeats: what happens all the time is written some times, and counted.
func TestLogRepeats(t *testing.T) {
	var heard []byte
	log := newLog(&logOutput{write: func(p []byte) error { heard = append(heard, p...); return nil }}, zap.NewAtomicLevel(), zapcore.NewJSONEncoder)
	for range 1000 {
		logger{log}.Error(engine.WritebackFails, "write-back failed", errors.New("input/output error"))
	}
	log.Info("another")
	log.Sync()
	if written, missing := counted(t, heard); written != logRepeats+1 || missing != 1000-logRepeats {
		t.Errorf("%d were written and %d are said to be missing", written, missing)
	}
}

// TestLogFailing: what could not be written is counted, and said as soon as something can be.
func TestLogFailing(t *testing.T) {
	var heard []byte
	var fails error
	log := newLog(&logOutput{write: func(p []byte) error {
		if fails == nil {
			heard = append(heard, p...)
		}
		return fails
	}}, zap.NewAtomicLevel(), zapcore.NewJSONEncoder)
	for i := range 7 {
		if fails = unix.ENOSPC; i > 4 {
			fails = nil
		}
		log.Warn(fmt.Sprint(i))
		log.Sync()
	}
	if written, missing := counted(t, heard); written != 2 || missing != 5 {
		t.Errorf("%d were written and %d are said to be missing", written, missing)
	}
}

// someLogFile is one whose descriptor is not standard error.
func someLogFile(t *testing.T) *logFile {
	t.Helper()
	fd, err := unix.Open(os.DevNull, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &logFile{path: filepath.Join(t.TempDir(), "3.log"), fd: fd}
}

// TestLogFile: neither lines nor what others write make the file grow without end; the newest is in it, and what was just
// before is not lost.
func TestLogFile(t *testing.T) {
	f := someLogFile(t)
	if err := os.WriteFile(f.path, []byte("of the last server\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	read := func(path string) []byte {
		t.Helper()
		text, err := os.ReadFile(path)
		if err != nil || len(text) > logSize {
			t.Fatalf("%s has %d bytes, %v", path, len(text), err)
		}
		return text
	}
	line := []byte(strings.Repeat("x", 999) + "\n")
	if err := f.write(line); err != nil || !bytes.HasPrefix(read(f.path), []byte("of the last server\nx")) {
		t.Fatalf("the file of the last server is not gone on with: %v", err)
	}
	const lines = 5000
	for i := range lines {
		if err := f.write(fmt.Appendf(nil, "%999d\n", i)); err != nil {
			t.Fatal(err)
		}
		unix.Write(f.fd, []byte("the runtime\n"))
	}
	both := append(read(f.path+".1"), read(f.path)...)
	at := lines
	for l := range strings.Lines(string(both)) {
		var n int
		if _, err := fmt.Sscan(l, &n); err != nil {
			continue
		}
		if at != lines && n != at+1 {
			t.Errorf("after %d comes %d", at, n)
		}
		at = n
	}
	if at != lines-1 || len(both) < logSize {
		t.Errorf("there are %d bytes up to line %d", len(both), at)
	}
	if files, err := os.ReadDir(filepath.Dir(f.path)); err != nil || len(files) != 2 {
		t.Errorf("there are %v, %v", files, err)
	}
}

// TestLogFileWithoutRoom: where no file can be made the log is bounded, too, and it begins as soon as one can.
func TestLogFileWithoutRoom(t *testing.T) {
	f := someLogFile(t)
	dir := filepath.Dir(f.path)
	if err := os.Rename(dir, dir+".x"); err != nil {
		t.Fatal(err)
	}
	if err := f.write([]byte("a\n")); err == nil {
		t.Error("a log without a folder is written")
	}
	if err := os.Rename(dir+".x", dir); err != nil {
		t.Fatal(err)
	}
	if err := f.write([]byte("b\n")); err != nil {
		t.Error(err)
	}
	if err := os.Rename(dir, dir+".x"); err != nil {
		t.Fatal(err)
	}
	for range 3 * logSize / 1000 {
		if err := f.write([]byte(strings.Repeat("x", 999) + "\n")); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(dir + ".x/3.log"); err != nil || info.Size() > logSize || info.Size() == 0 {
		t.Errorf("the file that cannot be followed by another is %v, %v", info, err)
	}
	os.Rename(dir+".x", dir) // for the cleanup
}

// TestReaderGone: a server whose standard output and error nobody reads any more goes on.
func TestReaderGone(t *testing.T) {
	if os.Getenv("READER_GONE") != "" {
		s := unstarted(serveOptions{})
		s.openLog(true)
		for i := range 3 {
			s.log.Error(fmt.Sprint("message ", i))
			s.log.Sync()
			fmt.Println("/dev/ublkb0")
			fmt.Fprintln(os.Stderr, "the runtime")
		}
		s.exit(7)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestReaderGone$")
	cmd.Env = append(os.Environ(), "READER_GONE=1")
	cmd.Stdout, cmd.Stderr = w, w
	r.Close()
	cmd.Run()
	w.Close()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		t.Errorf("%v", cmd.ProcessState)
	}
}

// TestLastWords: what was said before the end of the process is read.
func TestLastWords(t *testing.T) {
	if os.Getenv("LAST_WORDS") != "" {
		s := unstarted(serveOptions{})
		s.openLog(true)
		for i := range 50 {
			s.log.Error(fmt.Sprint("message ", i))
		}
		s.exit(0)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestLastWords$")
	cmd.Env = append(os.Environ(), "LAST_WORDS=1")
	said, err := cmd.CombinedOutput()
	n := 0
	for lines := bufio.NewScanner(bytes.NewReader(said)); lines.Scan(); {
		if strings.HasSuffix(lines.Text(), fmt.Sprint("message ", n)) {
			n++
		}
	}
	if err != nil || n != 50 {
		t.Errorf("%d lines in order, %v:\n%s", n, err, said)
	}
}

// TestLogLevels: the level decides what is written, and changes at once.
func TestLogLevels(t *testing.T) {
	for i, name := range logLevels {
		var heard []byte
		level := zap.NewAtomicLevel()
		log := newLog(&logOutput{write: func(p []byte) error { heard = append(heard, p...); return nil }}, level, zapcore.NewJSONEncoder)
		level.SetLevel(logLevel(name))
		log.Debug("debug")
		log.Info("info")
		log.Warn("warn")
		log.Error("error")
		log.Sync()
		if written, _ := counted(t, heard); written != len(logLevels)-i {
			t.Errorf("%s: %s", name, heard)
		}
	}
	if logLevel("") != zap.InfoLevel {
		t.Errorf("without a level it is %v", logLevel(""))
	}
}

// TestSetLogLevel: it counts at once and for the next server, the media have nothing of it, and what is refused has
// changed nothing.
func TestSetLogLevel(t *testing.T) {
	s, _ := dirtyServer(t)
	now := func(want string) {
		t.Helper()
		r, err := s.execute(t.Context(), command{Do: "status"})
		if err != nil || r.LogLevel != want || s.level.String() != want {
			t.Errorf("the level is %s, %v, %v, want %s", r.LogLevel, s.level, err, want)
		}
		d, err := readState(3)
		if err != nil {
			t.Fatal(err)
		}
		if level := logLevel(d.LogLevel).String(); level != want {
			t.Errorf("the state file has %s, want %s", level, want)
		}
		if kept := recovery(d, ublk.Info{}).Device.LogLevel; logLevel(kept).String() != want {
			t.Errorf("the next server would have %s, want %s", kept, want)
		}
	}
	set := func(v values) error {
		t.Helper()
		_, err := s.execute(t.Context(), command{Do: "set", Settings: v})
		return err
	}
	s.dev.servedByUs()
	now("info")
	before := s.cache.Settings()
	if err := set(values{logLevelName: "debug"}); err != nil || s.cache.Settings() != before {
		t.Error(err, s.cache.Settings())
	}
	now("debug")
	if err := set(values{logLevelName: "warn", "gc_percent": "50"}); err != nil || s.cache.Settings().GCPercent != 50 {
		t.Error(err, s.cache.Settings())
	}
	now("warn")
	fails(t, set(values{logLevelName: "loud", "gc_percent": "60"}), "log_level=loud: give debug, info, warn or error")
	fails(t, set(values{logLevelName: "error", "gc_percent": "95"}), "gc_percent=95")
	s.removal.next = &next{}
	if err := s.setOfServer(values{logLevelName: "error"}); !errors.Is(err, engine.ErrResting) {
		t.Errorf("while another server starts: %v", err)
	}
	s.removal.next = nil
	s.removal.done = true
	if err := s.setOfServer(values{logLevelName: "error"}); !errors.Is(err, engine.ErrStopped) {
		t.Errorf("after the end: %v", err)
	}
	if s.removal.done = false; s.cache.Settings().GCPercent != 50 {
		t.Errorf("what was refused has changed %+v", s.cache.Settings())
	}
	now("warn")
}

// TestLogLevelOfAnotherVersion: a level that is not known here is none.
func TestLogLevelOfAnotherVersion(t *testing.T) {
	ownStateDir(t)
	d := someDevice(3)
	d.LogLevel = "trace"
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	if d, err := readState(3); err != nil || d.LogLevel != "" {
		t.Errorf("%+v, %v", d, err)
	}
}
