package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/internal/uring"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// serveOptions is what a server is told.
type serveOptions struct {
	Device     device `json:"device"`
	PMEM       seen   `json:"pmem"`
	Backing    seen   `json:"backing"`
	Recover    bool   `json:"recover"`
	Chosen     bool   `json:"chosen,omitempty"` // of Recover: BACKING was given, not remembered
	Foreground bool   `json:"foreground"`
	Format     bool   `json:"format"`
	Force      bool   `json:"force"`
	Existing   bool   `json:"existing"`             // make no new cache
	AnyQueues  bool   `json:"any_queues,omitempty"` // their number was not asked for
	DataCRC    *bool  `json:"data_crc,omitempty"`   // nil: as it is, or the default for the kind of region
	Settings   values `json:"settings,omitempty"`   // the others are as they are, or the defaults

	Changed engine.Choice `json:"changed,omitempty"`

	// Upgrade makes the new server follow the one that starts it, at this end of
	// the log (see server_upgrade.go).
	Upgrade *engine.Head `json:"upgrade,omitempty"`
	Socket  bool         `json:"socket,omitempty"` // it is handed over, too

	Exit bool `json:"exit,omitempty"` // the caller takes an answer with an exit status; others do not

	// Where the caller of a server in a unit waits (see unit.go).
	Answer   string `json:"answer,omitempty"`
	AnswerFD int    `json:"answer_fd,omitempty"`
}

// server is one running device and everything under it.
type server struct {
	dev    device
	log    *zap.Logger
	level  zap.AtomicLevel // of the log; dev has what it was at first
	region *pmem.Region
	disk   *backing.Device
	cache  *engine.Cache
	ublk   *ublk.Device
	socket *net.UnixListener // nil: it could not be opened yet
	made   bool              // PMEM was made by this process

	foreground bool
	journal    bool           // standard error is
	warnings   []string       // for whoever asked for the device
	proven     string         // provenBy, when the cache was bound
	signals    chan os.Signal // that ask for the device to go

	clients   chan struct{} // one for each command that is being served
	upgrading sync.Mutex
	removal   struct {
		sync.Mutex
		done bool
		next *next // an upgrade has started it, and it has not taken over
	}
}

func unstarted(o serveOptions) *server {
	s := &server{
		dev: o.Device, foreground: o.Foreground, level: zap.NewAtomicLevel(),
		signals: make(chan os.Signal, 1),
		clients: make(chan struct{}, maxClients),
	}
	// From the beginning: a server that has taken a device over is not to die of
	// one.
	signal.Notify(s.signals, os.Interrupt, syscall.SIGTERM)
	// The terminal that it was started from may go, and so may whoever reads what it
	// prints.
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	return s
}

// start brings a device up. Everything that can be refused is refused before the
// first byte is written, by the driver, too; the files in the folder of state
// files, which may be full, are made before. So nothing fails once the disk is there,
// and a device that was there before is never taken away: without a server it waits.
// A start that fails before that leaves nothing behind.
func start(o serveOptions) (_ *server, err error) {
	s := unstarted(o)
	if _, err := ublk.Features(); err != nil {
		return nil, err
	}
	spec, err := o.region()
	if err != nil {
		return nil, err
	}
	s.dev.PMEM = spec.Path
	ofCache, ofServer := o.Settings.apart(logLevelName)
	if len(ofServer) > 0 {
		s.dev.LogLevel = ofServer[logLevelName]
	}
	var nameless error
	if !o.Recover {
		s.dev.Mark = newMark()
		err = reserve(&s.dev)
		if o.Existing && errors.Is(err, errNameTaken) { // a service is there to be served
			nameless, s.dev.Name = err, ""
			err = reserve(&s.dev)
		}
		if err != nil {
			return nil, err
		}
		defer closeOnError(&err, s.dev.remove)
	}
	s.openLog(o.Foreground)
	defer closeOnError(&err, s.log.Sync)
	if nameless != nil {
		s.log.Warn("the device has only a number", zap.Error(nameless))
	}
	s.reportMounts()
	if err := protect(s.dev.Queues); err != nil {
		return nil, err
	}
	if err := s.openFiles(&o, spec); err != nil {
		return nil, err
	}
	defer closeOnError(&err, s.closeFiles)
	if o.Recover {
		if err := s.keepsPromise(); err != nil {
			return nil, err
		}
	}
	make, err := s.plan(&o)
	if err != nil {
		return nil, err
	}
	device, err := s.prepareDevice(o.Recover)
	if err != nil {
		return nil, err
	}
	defer closeOnError(&err, func() error { return device.discard() })
	if err := s.listen(o.Recover); err != nil {
		return nil, err
	}
	defer closeOnError(&err, s.closeSocket)

	if err := s.openCache(&o, make); err != nil {
		return nil, err
	}
	defer closeOnError(&err, s.cache.Close)
	if !o.Recover && s.disk.Identity() == "" {
		s.warn(fmt.Sprintf("nothing tells backing device %s from another of its size: make sure that this path always leads to it", s.dev.Backing))
	}
	if len(ofCache) > 0 {
		if err := s.setUnlessSignalled(ofCache); err != nil {
			return nil, err
		}
	}
	if err := s.dev.tellUdev(); err != nil && !o.Recover {
		return nil, fmt.Errorf("tell udev the name: %w", err)
	} else if err != nil {
		s.log.Warn(noLink, zap.Error(err))
	}
	s.dev.servedByUs()
	if err := s.dev.save(); err != nil {
		return nil, err
	}
	select {
	case <-s.signals: // nobody waits for it any more
		return nil, errInterrupted
	default:
	}
	var udev *udevEvents
	if !o.Recover { // which udev has seen
		udev = hearUdev()
	}
	if s.ublk, err = device.start(s.handler); err != nil {
		return nil, err
	}
	udev.awaitDisk(s.dev.Device, s.signals)
	s.accept() // what is done to a device is done to one that is ready
	how := serverStarted
	if o.Recover {
		how = serverRecovered
	}
	s.log.Info("serving", how.id(), zap.String("version", longVersion()), zap.Any("state", s.dev), zap.Bool("recovered", o.Recover))
	return s, nil
}

// setUnlessSignalled is set for a server that does not serve yet: a signal ends a drain.
func (s *server) setUnlessSignalled(v values) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.set(ctx, v) }()
	select {
	case err := <-done:
		return err
	case <-s.signals:
		cancel()
		<-done
		return errInterrupted
	}
}

func (s *server) warn(line string) {
	s.log.Warn(line)
	s.warnings = append(s.warnings, line)
}

func (s *server) engineOptions() engine.Options {
	// The place in the source is the engine's.
	log := logger{s.log.WithOptions(zap.AddCallerSkip(1))}
	return engine.Options{Queues: s.dev.Queues, WritebackDepth: s.dev.Writeback, Log: log}
}

func closeOnError(err *error, close func() error) {
	if *err != nil {
		close()
	}
}

// pendingDevice is all of a block device but the disk.
type pendingDevice struct {
	start   func(ublk.NewHandler) (*ublk.Device, error)
	discard func() error
}

// prepareDevice makes a new device that start shows, or what takes over the one of
// a dead server.
func (s *server) prepareDevice(recover bool) (*pendingDevice, error) {
	if recover {
		if _, err := s.dev.lookup(); err != nil {
			return nil, err
		}
		device, err := ublk.Prepare(s.dev.ID, s.fatal)
		if err != nil {
			return nil, err
		}
		return &pendingDevice{start: device.TakeOver, discard: nothing}, nil // the end of the process does it
	}
	// A discard becomes zeros on the disk, too. If they had to be transferred,
	// the one that mkfs begins with would be as much work as filling the disk.
	discard := 0
	if s.disk.ZeroesCheaply() {
		discard = engine.MaxZero
	}
	device, err := ublk.Create(ublk.Config{
		ID: s.dev.ID, Queues: s.dev.Queues, Depth: s.dev.Depth,
		Size: s.disk.Size(), BlockSize: s.disk.BlockSize(), ChunkSize: ondisk.StripeSize,
		MaxDiscard: discard, MaxZeroes: engine.MaxZero,
		VolatileCache: !s.region.Durable(),
		Mark:          s.dev.Mark,
	}, s.fatal)
	if err != nil {
		return nil, err
	}
	s.dev.Device = device.Path()
	p := &pendingDevice{discard: device.Discard}
	p.start = func(h ublk.NewHandler) (*ublk.Device, error) {
		p.discard = nothing // Start does it itself
		return device.Start(h)
	}
	return p, nil
}

func nothing() error { return nil }

func (s *server) handler(q *ublk.Queue) ublk.Handler {
	return newHandler(s.cache.Queue(q.ID()), q, s.disk)
}

// fatal ends the server because of a queue. Without its loops a device hangs;
// the end of the process is what lets the driver keep the requests for the next
// server.
func (s *server) fatal(err error) {
	s.log.Error("a queue has failed, the server ends (ublk-pcache recover continues)", serverFailed.id(), zap.Error(err))
	s.exit(1)
}

const (
	// endPatience is how long a server that is told to end tries: those who have
	// just unmounted the device, or closed it, may not be quite done.
	endPatience = time.Second
	// endStep is how often. On a kernel before 7.0 each look goes through all
	// processes.
	endStep = 250 * time.Millisecond
)

// wait returns when the device is gone and everybody who asked for something
// has an answer. A signal asks for the device to go. It is refused while
// somebody uses that, and then forgotten: nobody expects the device to vanish at
// some later moment.
func (s *server) wait() {
	for {
		select {
		case <-s.ublk.Done():
			s.ended()
			for range maxClients {
				s.clients <- struct{}{}
			}
			s.log.Sync()
			return
		case <-s.signals:
			if err := s.end(); err != nil {
				s.log.Warn("told to end, refused, the server goes on", endRefused.id(), zap.Error(s.dev.removalError(err)))
			}
		}
	}
}

// end removes the device, if it is free within endPatience.
func (s *server) end() error {
	for begin := time.Now(); ; time.Sleep(endStep) {
		if _, err := s.remove(false); err == nil || time.Since(begin) > endPatience {
			return err
		}
	}
}

// ended is called when all queues have ended, which may be nobody's doing here. A
// device that another process has stopped is gone for good; one that it has
// quiesced waits for the next server.
func (s *server) ended() {
	s.removal.Lock() // held by a removal, and to the end by an upgrade
	done := s.removal.done
	s.removal.Unlock()
	if done {
		return
	}
	if info, err := s.dev.lookup(); err == nil && info.State != ublk.Dead {
		s.fatal(errors.New("another process has quiesced the device"))
	}
	s.log.Error("another process has stopped the device, the server ends", deviceStopped.id())
	s.remove(true)
}

const (
	// removalPatience is how long a removal waits for the disk: for the 16 MiB of
	// write-back that may be under way, and not so long that whoever removes the
	// device of a dead disk gives up.
	removalPatience = 5 * time.Second
	// lettingGo is how long what comes after that may take, if everybody answers.
	lettingGo = time.Second
)

// remove ends the device in the order of dependency: no requests, then no
// cache, then no device, then no trace. Once there are no requests there is no
// way back, whatever fails then. The disk, or those who have the device open, may
// keep something from ending in time: it is left to the end of the process, and
// returned.
func (s *server) remove(force bool) (left []string, err error) {
	s.removal.Lock()
	defer s.removal.Unlock()
	if s.removal.done {
		return nil, nil
	}
	if force {
		// Requests that wait for a disk which does not answer would keep the
		// driver from letting go.
		defer time.AfterFunc(removalPatience, s.cache.Abort).Stop()
	}
	if err := s.ublk.Stop(force); err != nil {
		return nil, err
	}
	s.removal.done = true // whatever comes now
	if n := s.removal.next; n != nil && !n.kill() {
		left = append(left, fmt.Sprintf("the server that was to follow, process %d, holds cache and backing device until it ends", n.cmd.Process.Pid))
	}
	defer time.AfterFunc(removalPatience, s.cache.Abort).Stop()
	failed := s.cache.Status().State == engine.Failed
	// A cache that has failed already is no reason for its device to stay.
	if err = s.cache.Close(); failed || errors.Is(err, engine.ErrAborted) {
		err = nil
	} else if failure := s.rebind(); failure != nil {
		s.log.Warn("cannot record what the backing device is known by now", zap.Error(failure))
	}
	deleted, ok := inTime(func() error {
		if _, err := s.dev.lookup(); errors.Is(err, ublk.ErrNoDevice) {
			return nil // another process has deleted it, and its number may be in use again
		}
		return s.ublk.Delete()
	})
	if !ok {
		left = append(left, s.dev.numberHeld())
	}
	err = errors.Join(err, deleted, s.region.Close())
	closed, ok := inTime(s.disk.Close)
	// Nobody hears of the answer to a read any more whose queue has ended.
	if !ok || s.disk.Waiting() > lettingGo {
		left = append(left, fmt.Sprintf("backing device %s does not answer, process %d, or the kernel for it, holds it until it does", s.dev.Backing, os.Getpid()))
	}
	err = errors.Join(err, closed)
	st := s.cache.Status()
	s.log.Info("removed", deviceRemoved.id(), zap.Int64("dirty_bytes", st.DirtyBytes), zap.Int64("zero_bytes", st.ZeroBytes), zap.Strings("left", left), zap.Error(err))
	s.log.Sync() // which may make the file
	s.dev.remove()
	return left, err
}

// inTime calls f and reports whether it ended in time, and how.
func inTime(f func() error) (err error, ok bool) {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err, true
	case <-time.After(lettingGo):
		return nil, false
	}
}

// hangsAfter is how long a disk may take for one operation: more than any that
// is well needs, and less than the 30 s after which a SCSI one is given up.
const hangsAfter = 5 * time.Second

// status is how the cache is, and the disk: while that does not answer, the
// cache has no error to show.
func (s *server) status() *engine.Status {
	st := s.cache.Status()
	if st.Cause != nil {
		st.Error = oneLine(st.Cause)
	}
	if waiting := s.disk.Waiting(); waiting > hangsAfter && st.State != engine.Failed {
		st.State = engine.Degraded
		st.Error = fmt.Sprintf("backing device %s has not answered for %v", s.dev.Backing, waiting.Round(time.Second))
	}
	return &st
}

// logger is the log as the engine sees it.
type logger struct{ *zap.Logger }

func (l logger) Info(e engine.Event, msg string, err error) {
	l.Logger.Info(msg, withID(engineIDs[e]), zap.Error(err))
}

func (l logger) Error(e engine.Event, msg string, err error) {
	l.Logger.Error(msg, withID(engineIDs[e]), withRemedy(err))
}

// withRemedy is an error in the log, nil for none.
func withRemedy(err error) zap.Field {
	if err == nil {
		return zap.Skip()
	}
	return zap.String("error", oneLine(err))
}

// protect keeps the server working when memory is short, as far as it is not
// inherited (see launch.go), and its memory to itself.
func protect(queues int) error {
	// Queue threads hold their P while they sleep; the collector, write-back,
	// the ring of the backing device and the control socket need their own.
	runtime.GOMAXPROCS(queues + 6)
	if err := unlimited(); err != nil {
		return err
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("lock memory: %w (raise RLIMIT_MEMLOCK)", err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return fmt.Errorf("leave the out-of-memory killer's list: %w", err)
	}
	// A core would hold what users are writing, and be written while they wait,
	// perhaps to a file system on the very disk that has just lost its server.
	// RLIMIT_CORE does not keep it from a program that collects cores.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("leave no core: %w", err)
	}
	return nil
}

// mostFiles is how many files a server may have open, if it can choose: rings,
// queues and clients need some hundred.
const mostFiles = 65536

// unlimited lifts the limits that whoever started the server had for programs of
// their own. One of a file's size would make write-back to a file fail, one of
// processor time would end the server.
func unlimited() error {
	for limit, name := range map[int]string{
		unix.RLIMIT_FSIZE: "RLIMIT_FSIZE", unix.RLIMIT_CPU: "RLIMIT_CPU", unix.RLIMIT_AS: "RLIMIT_AS",
		unix.RLIMIT_DATA: "RLIMIT_DATA", unix.RLIMIT_MEMLOCK: "RLIMIT_MEMLOCK", unix.RLIMIT_NPROC: "RLIMIT_NPROC",
	} {
		if err := raise(limit, unix.RLIM_INFINITY); err != nil {
			return fmt.Errorf("lift %s: %w (raise it for whoever starts the server)", name, err)
		}
	}
	raise(unix.RLIMIT_NOFILE, mostFiles) // with fewer there is less room for clients
	return nil
}

// raise makes a limit at least n.
func raise(limit int, n uint64) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(limit, &l); err != nil || l.Cur >= n {
		return err
	}
	return unix.Setrlimit(limit, &unix.Rlimit{Cur: n, Max: max(n, l.Max)})
}

// disk is the backing device as the engine sees it.
type disk struct{ *backing.Device }

// Buffer returns page-aligned memory, as O_DIRECT wants it.
func (disk) Buffer(n int) []byte {
	b, err := uring.AlignedBuffer(n)
	if err != nil {
		panic(fmt.Sprintf("out of memory for transfer buffers: %v", err))
	}
	return b
}
