package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// A server's log goes to where standard error leads, so that the last words of a dying
// runtime are there as well: in the foreground to a person, or to the journal (see
// server_journal.go), and else to a file that is not on any disk.
//
// Readers of it must not matter to the server. One may stand still, or be
// gone; the folder may be full. So an entry is only put into a queue, from where
// somebody takes it who may be blocked, and entries that do not fit are counted. Events
// that repeat, as with a disk that fails, must not matter either: each message is
// written ten times a minute, and the file has a size.
//
// No entry has a stack in it: what is logged is expected, and a place in the source is enough
// for the rest. What is not expected ends the process, and the runtime says where it was.

const (
	// logSize is what the file may grow to, in bytes: some thousand lines, with
	// room for the trace that the runtime leaves. As much is kept of what was
	// before.
	logSize = 1 << 20
	// logPending is how much may wait to be written, in bytes: more than a start has to say,
	// and less than a socket takes at once.
	logPending = 64 << 10
	// logRepeats is how often a message is written within a minute.
	logRepeats = 10
	// lastWords is how long a server that ends waits for its last entries to be
	// written. Requests wait for the next one meanwhile.
	lastWords = 200 * time.Millisecond
)

// logLevels are what log_level can be. Each has the entries of those behind it.
var logLevels = []string{"debug", "info", "warn", "error"}

// logLevel is one of these as zap knows it; none is info.
func logLevel(name string) zapcore.Level {
	level, _ := zapcore.ParseLevel(name)
	return level
}

// newLog makes a log that out takes, from a level on.
func newLog(out *logOutput, level zap.AtomicLevel, encoding func(zapcore.EncoderConfig) zapcore.Encoder) *zap.Logger {
	config := zap.NewProductionEncoderConfig()
	config.TimeKey = "time"
	config.EncodeTime = zapcore.ISO8601TimeEncoder
	out.encoder = encoding(config)
	core := zapcore.NewSamplerWithOptions(zapcore.NewCore(out.encoder, out, level), time.Minute, logRepeats, 0,
		zapcore.SamplerHook(func(_ zapcore.Entry, d zapcore.SamplingDecision) {
			if d&zapcore.LogDropped != 0 {
				out.leaveOut()
			}
		}))
	return zap.New(core, zap.AddCaller(), zap.ErrorOutput(out))
}

// openLog sets up the server's log.
func (s *server) openLog(foreground bool) {
	s.level.SetLevel(logLevel(s.dev.LogLevel))
	if !foreground {
		f := &logFile{path: statePath(s.dev.ID, ".log"), fd: unix.Stderr}
		f.open() // or later
		s.log = newLog(&logOutput{write: f.write}, s.level, zapcore.NewJSONEncoder)
		return
	}
	s.journal, _ = journal.StderrIsJournalStream()
	socket := &journalSocket{path: filepath.Join(journalDir, "socket")}
	if !s.journal || socket.connect() != nil { // it takes lines, too
		s.log = newLog(&logOutput{write: func(p []byte) error { return writeAll(unix.Stderr, p) }}, s.level, zapcore.NewConsoleEncoder)
		return
	}
	s.log = newLog(&logOutput{write: socket.write}, s.level, func(config zapcore.EncoderConfig) zapcore.Encoder {
		return newJournalEncoder(config, &s.dev)
	})
}

// logPlace says where to read the log.
func (s *server) logPlace() string {
	if !s.foreground {
		return statePath(s.dev.ID, ".log")
	}
	if s.journal {
		group, err := controlGroup(os.Getpid())
		if unit := filepath.Base(group); err == nil && strings.HasSuffix(unit, ".service") {
			return "journalctl -u " + unit
		}
	}
	return "standard error of process " + strconv.Itoa(os.Getpid())
}

// logOutput takes entries without ever waiting.
type logOutput struct {
	write   func(entry []byte) error // may wait
	encoder zapcore.Encoder

	mu struct {
		sync.Mutex
		pending [][]byte
		size    int           // of these, in bytes
		lost    int           // entries, since that was last said
		idle    chan struct{} // closed when nothing is pending any more, nil while that is so
	}
}

// Write implements zapcore.WriteSyncer.
func (o *logOutput) Write(entry []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.size+len(entry) > logPending {
		o.mu.lost++
		return len(entry), nil
	}
	o.mu.pending = append(o.mu.pending, bytes.Clone(entry))
	o.mu.size += len(entry)
	if o.mu.idle == nil {
		o.mu.idle = make(chan struct{})
		go o.drain()
	}
	return len(entry), nil
}

// leaveOut counts an entry that is not written.
func (o *logOutput) leaveOut() {
	o.mu.Lock()
	o.mu.lost++
	o.mu.Unlock()
}

// drain writes what is pending, and first how much is not.
func (o *logOutput) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.mu.pending) > 0 {
		some, lost := o.mu.pending, o.mu.lost
		o.mu.pending, o.mu.size = nil, 0
		o.mu.Unlock()
		more := o.writeSome(some, lost)
		o.mu.Lock()
		o.mu.lost += more
	}
	close(o.mu.idle)
	o.mu.idle = nil
}

// writeSome writes entries, and in front that some are missing. It returns how many more are
// missing then, or fewer.
func (o *logOutput) writeSome(some [][]byte, lost int) (more int) {
	for _, entry := range some {
		if lost+more > 0 && o.write(o.gap(lost+more)) == nil {
			more = -lost
		}
		if o.write(entry) != nil {
			more++
		}
	}
	return more
}

// gap is the entry for those that are missing.
func (o *logOutput) gap(lost int) []byte {
	b, err := o.encoder.EncodeEntry(zapcore.Entry{Level: zap.WarnLevel, Time: time.Now(), Message: "messages are missing here: they repeat themselves, or could not be written"},
		[]zapcore.Field{zap.Int("count", lost)})
	if err != nil {
		return nil
	}
	defer b.Free()
	return bytes.Clone(b.Bytes())
}

// Sync implements zapcore.WriteSyncer: it waits until everything is written, or
// not for ever.
func (o *logOutput) Sync() error {
	o.mu.Lock()
	idle := o.mu.idle
	o.mu.Unlock()
	if idle == nil {
		return nil
	}
	select {
	case <-idle:
		return nil
	case <-time.After(lastWords):
		return fmt.Errorf("the log takes longer than %v", lastWords)
	}
}

// exit ends the server as it is, with its log written.
func (s *server) exit(code int) {
	s.log.Sync()
	os.Exit(code)
}

// logFile is a log of bounded size that has a descriptor of its own, which others
// write to, too: the runtime, and while one server follows another both.
type logFile struct {
	path string
	fd   int
	made bool
}

// open puts the file behind the descriptor.
func (f *logFile) open() error {
	fd, err := unix.Open(f.path, unix.O_CREAT|unix.O_APPEND|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Dup3(fd, f.fd, 0)
	f.made = err == nil
	return err
}

// write writes lines to the file, or to a new one if it is full.
func (f *logFile) write(p []byte) error {
	if !f.made {
		if err := f.open(); err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return err
	}
	if st.Size+int64(len(p)) > logSize {
		os.Rename(f.path, f.path+".1")
		if f.open() != nil {
			// Better no past than no bound.
			if err := unix.Ftruncate(f.fd, 0); err != nil {
				return err
			}
		}
	}
	return writeAll(f.fd, p)
}

// writeAll writes to a descriptor that may be anything, and not ours alone.
func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		switch err {
		case nil:
			p = p[n:]
		case unix.EINTR:
		case unix.EAGAIN: // somebody has made it so
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1); err != nil && err != unix.EINTR {
				return err
			}
		default:
			return err
		}
	}
	return nil
}
