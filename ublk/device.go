// Package ublk makes block devices whose requests are served by this process,
// through Linux's ublk driver (drivers/block/ublk_drv.c). It knows the
// driver's commands, the loop that moves requests, and how a device outlives
// its server; it does not know what the requests are for.
//
// Add makes a new device and Recover takes over one whose server has died.
// Either way, each queue gets a Handler, a thread and a ring of its own (see
// Queue). The disk is there, as Device.Path, when the call returns.
//
// # Death and recovery
//
// Every device is made with USER_RECOVERY and USER_RECOVERY_REISSUE. When the
// server dies, the disk stays: new requests wait, and the next server gets
// the requests that were with the dead one. So it may see a write that has
// been carried out already. A user of the disk notices a pause. Where the
// driver has QUIESCE (6.16), it is asked for as well, so that a server can be
// told to finish the requests that it holds, and go.
//
// # How data moves
//
// The driver copies: a write's data is in the request's buffer when the
// handler gets it, and a read's data is taken from there when it is completed.
// Each tag has a buffer of the largest request. That is one copy more than
// necessary, but works on every kernel, and only Request.Buf would change with
// another way.
package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MaxIO is the largest request, in bytes: big enough that its fixed cost does
// not show, and small enough that the buffers of a deep queue, all touched,
// are 128 MiB.
const MaxIO = 1 << 20

// Config describes a device to add.
type Config struct {
	ID            int   // device number, or -1 for the first free one
	Queues        int   // 1 to 4096; the driver lowers it to the number of CPUs
	Depth         int   // requests in flight per queue, 1 to 4096
	Size          int64 // bytes, a multiple of BlockSize
	BlockSize     int   // logical block size in bytes: 512, 1024, 2048 or 4096
	ChunkSize     int   // bytes; no Read and no Write crosses a multiple of it
	MaxDiscard    int   // bytes in one Discard, 0 to offer none
	MaxZeroes     int   // bytes in one WriteZeroes, 0 to offer none
	VolatileCache bool  // requests may complete before they are durable; Flush and FUA make them so

	// The driver keeps Mark for as long as the device exists: it tells whose
	// device it is.
	Mark uint64
}

// physicalShift is the advertised physical block size, smallest and optimal
// I/O size: 4 KiB, the unit of page cache and file systems. A larger optimal
// size would make mkfs lay out stripes that are not there.
const physicalShift = 12

// check refuses values that the driver would accept although they are
// wrong, or would take for others.
func (c *Config) check() error {
	if c.ID < -1 || c.ID > MaxID || c.Queues < 1 || c.Queues > maxQueues || c.Depth < 1 || c.Depth > maxQueueDepth {
		return fmt.Errorf("%w: number %d, %d queues of depth %d", ErrGeometry, c.ID, c.Queues, c.Depth)
	}
	if c.BlockSize < 1<<sectorShift || c.BlockSize > 1<<physicalShift || bits.OnesCount(uint(c.BlockSize)) != 1 ||
		c.Size <= 0 || c.Size%int64(c.BlockSize) != 0 || c.ChunkSize%c.BlockSize != 0 {
		return fmt.Errorf("%w: %d bytes in blocks of %d and chunks of %d", ErrGeometry, c.Size, c.BlockSize, c.ChunkSize)
	}
	for _, limit := range []int{c.MaxDiscard, c.MaxZeroes} {
		if limit < 0 || limit > math.MaxUint32 || limit%c.BlockSize != 0 {
			return fmt.Errorf("%w: requests of up to %d bytes without data, in blocks of %d", ErrGeometry, limit, c.BlockSize)
		}
	}
	return nil
}

func (c *Config) params() params {
	p := params{
		logicalBSShift:  uint8(bits.TrailingZeros(uint(c.BlockSize))),
		physicalBSShift: physicalShift,
		ioMinShift:      physicalShift,
		ioOptShift:      physicalShift,
		maxSectors:      MaxIO >> sectorShift,
		chunkSectors:    uint32(c.ChunkSize >> sectorShift),
		devSectors:      uint64(c.Size >> sectorShift),

		discardGranularity:    uint32(c.BlockSize),
		maxDiscardSectors:     uint32(c.MaxDiscard >> sectorShift),
		maxWriteZeroesSectors: uint32(c.MaxZeroes >> sectorShift),
		maxDiscardSegments:    1, // the driver takes no other number
	}
	if c.VolatileCache {
		p.attrs |= attrVolatileCache | attrFUA
	}
	return p
}

// NewHandler makes the handler of one queue. It is called for each queue in
// order, on the caller's goroutine, before any request arrives. The handler
// may use the queue's Wake, Lend and Entry.
type NewHandler func(q *Queue) Handler

// Device is a device served by this process.
type Device struct {
	info   devInfo
	char   int
	queues []*Queue
	ready  chan error // a queue has done a step
	start  chan bool  // whether to fetch
	ended  chan struct{}
}

// Add makes a device and returns when its disk is ready for I/O. It is Create
// and Start.
func Add(cfg Config, newHandler NewHandler, fatal func(error)) (*Device, error) {
	u, err := Create(cfg, fatal)
	if err != nil {
		return nil, err
	}
	return u.Start(newHandler)
}

// Unstarted is a device that has everything but its disk: a number, and queues
// that have no handlers yet.
type Unstarted struct {
	control *control
	d       *Device
}

// Create makes a device without a disk. If the driver refuses the number,
// the geometry, or one device more, it does so here. Start or Discard must
// follow. If Create fails nothing is left behind.
//
// fatal is called when a queue cannot go on, on the queue's thread or that of
// a Wake, possibly more than once. It must end the process: the disk hangs
// until then, and can be recovered afterwards.
//
// Create raises GOMAXPROCS to four more than there are queues if it is lower,
// because a queue's thread holds its P while it waits (see uring.Ring.Turn).
func Create(cfg Config, fatal func(error)) (*Unstarted, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	u := &Unstarted{control: c}
	if err := u.create(cfg, fatal); err != nil {
		c.close()
		return nil, err
	}
	return u, nil
}

func (u *Unstarted) create(cfg Config, fatal func(error)) error {
	c := u.control
	if err := c.requireFeatures(); err != nil {
		return err
	}
	if cfg.ID >= 0 {
		if err := CheckNames(cfg.ID); err != nil {
			return err
		}
	}
	info, err := c.add(devInfo{
		nrHwQueues:    uint16(cfg.Queues),
		queueDepth:    uint16(cfg.Depth),
		maxIOBufBytes: MaxIO,
		devID:         uint32(cfg.ID), // -1 is anyID
		ublksrvPID:    int32(os.Getpid()),
		flags:         featureUserRecovery | featureUserRecoveryReissue | featureCmdIoctlEncode | featureQuiesce,
		ublksrvFlags:  cfg.Mark,
	})
	if err != nil {
		return err
	}
	u.d = &Device{info: info}
	if err := u.d.prepare(c, cfg, fatal); err != nil {
		return errors.Join(err, c.delete(info.devID))
	}
	return nil
}

func (d *Device) prepare(c *control, cfg Config, fatal func(error)) error {
	if err := d.check(); err != nil {
		return err
	}
	if err := c.setParams(d.info.devID, cfg.params()); err != nil {
		return err
	}
	if err := d.makeQueues(fatal); err != nil {
		return err
	}
	return d.openChar()
}

// Start lets the disk appear and returns when it is ready for I/O. The kernel
// reads its partition table through the handlers, before Start returns or, since
// 6.18 at the latest, soon after; opening the disk waits for that. If Start fails
// nothing is left behind.
func (u *Unstarted) Start(newHandler NewHandler) (*Device, error) {
	defer u.control.close()
	id := u.d.info.devID
	if err := u.d.bringUp(newHandler, func() error { return u.control.start(id) }); err != nil {
		return nil, errors.Join(err, u.control.delete(id))
	}
	if err := awaitNode(id); err != nil {
		// This uses the control that is open: there may be no descriptor for
		// another.
		err = errors.Join(err, u.control.stop(id))
		u.d.release()
		return nil, errors.Join(err, u.control.delete(id))
	}
	return u.d, nil
}

// Discard takes the device back.
func (u *Unstarted) Discard() error {
	defer u.control.close()
	u.d.abandon()
	unix.Close(u.d.char)
	return u.control.delete(u.d.info.devID)
}

// ID is the device's number.
func (u *Unstarted) ID() int { return u.d.ID() }

// Path is where the disk will be.
func (u *Unstarted) Path() string { return u.d.Path() }

const (
	// recoveryPatience: a dead server's device is free for recovery at once,
	// except on kernels before 6.15 when all tags of a queue were in flight;
	// then only the block layer's timeout of 30 seconds notices.
	recoveryPatience = 40 * time.Second

	// deathPatience is how long a killed process may still look alive.
	deathPatience = 2 * time.Second

	// recoveryStep is the time between two tries, a small part of the pause
	// that an upgrade makes.
	recoveryStep = time.Millisecond
)

// Recover takes over the device of a server that has died, with the same
// queues and depth (see Lookup), and returns when its disk does I/O again.
// Requests that were with the dead server are submitted again. If it fails the
// device still waits for a server. For fatal see Create.
func Recover(id int, newHandler NewHandler, fatal func(error)) (*Device, error) {
	s, err := Prepare(id, fatal)
	if err != nil {
		return nil, err
	}
	return s.TakeOver(newHandler)
}

// Successor is ready to take over a device that still has a server.
type Successor struct {
	control *control
	d       *Device
}

// Prepare is the part of a recovery that can be done while the old server is
// there: it makes the queues' memory, threads and rings. TakeOver, or the end
// of the process, must follow. fatal is as for Create.
func Prepare(id int, fatal func(error)) (*Successor, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	s := &Successor{control: c, d: &Device{}}
	if err := s.prepare(uint32(id), fatal); err != nil {
		c.close()
		return nil, err
	}
	return s, nil
}

func (s *Successor) prepare(id uint32, fatal func(error)) (err error) {
	if err := s.control.requireFeatures(); err != nil {
		return err
	}
	if s.d.info, err = s.control.info(id); err != nil {
		return err
	}
	if State(s.d.info.state) == Dead {
		return deviceError("recover", id, ErrNotRecoverable)
	}
	if err := s.d.check(); err != nil {
		return err
	}
	return s.d.makeQueues(fatal)
}

// CanLetGo returns an error if the driver does not notice at once that a server has
// let go, or if the next one would not find the device. Before 6.15 it takes a tag
// that is not in use, or the end of the process.
func (d *Device) CanLetGo() error {
	if d.info.flags&featureQuiesce == 0 {
		return fmt.Errorf("%w: to replace a running server takes Linux 6.16", ErrTooOld)
	}
	return checkChar(d.info.devID)
}

// TakeOver waits for the old server to let go, or to be dead, and continues. It is
// called once.
func (s *Successor) TakeOver(newHandler NewHandler) (*Device, error) {
	defer s.control.close()
	d, id := s.d, s.d.info.devID
	if err := s.control.waitForDeath(id); err != nil {
		d.abandon()
		return nil, err
	}
	if err := d.openChar(); err != nil {
		return nil, err
	}
	if err := d.bringUp(newHandler, func() error { return s.control.endRecovery(id) }); err != nil {
		return nil, err
	}
	return d, nil
}

// LetGo ends the queues after the turn they are at, and gives the device to the next
// server as if this one had died. Requests that the handlers hold are submitted there
// again; those that they have returned are answered. It returns when the queues have
// ended. It is called once, and not after a Stop that has succeeded; afterwards only Done,
// ID and Path may be called.
func (d *Device) LetGo() { d.leave() }

// waitForDeath starts the recovery as soon as the driver lets go of the old
// server. The driver says EBUSY both for a server that is alive and for one
// that is not quite dead.
func (c *control) waitForDeath(id uint32) error {
	begin := time.Now()
	for {
		info, err := c.info(id)
		if err != nil {
			return err
		}
		if State(info.state) == Dead {
			return deviceError("recover", id, ErrNotRecoverable)
		}
		err = c.startRecovery(id)
		if err == nil || State(info.state) != Live && errors.Is(err, unix.EINVAL) {
			// 6.12 says EINVAL when a recovery has been started before and had
			// not fetched a whole queue when it failed: there is nothing to reset
			// then, and the next steps are the same.
			return nil
		}
		waited := time.Since(begin)
		if !errors.Is(err, unix.EBUSY) || waited > recoveryPatience {
			return err
		}
		if waited > deathPatience && State(info.state) == Live && running(int(info.ublksrvPID)) {
			return deviceError("recover", id, fmt.Errorf("%w (process %d)", ErrServed, info.ublksrvPID))
		}
		time.Sleep(recoveryStep)
	}
}

// running reports whether a process exists and is no zombie.
func running(pid int) bool {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return false
	}
	// The command's name is in parentheses and may contain some itself.
	state := bytes.TrimSpace(stat[bytes.LastIndexByte(stat, ')')+1:])
	return !bytes.HasPrefix(state, []byte("Z")) && !bytes.HasPrefix(state, []byte("X"))
}

// check refuses a device that cannot be served, and prepares the runtime for
// one that can.
func (d *Device) check() error {
	if err := checkFeatures(d.info.flags); err != nil { // the driver drops what it does not know
		return err
	}
	return prepareRuntime(int(d.info.nrHwQueues))
}

// bringUp does what adding and recovering have in common once the queues are
// made: let every queue fetch its tags, start. If it fails, it has taken all
// of this back; the device itself stays.
func (d *Device) bringUp(newHandler NewHandler, start func() error) error {
	if err := d.fetch(newHandler); err != nil {
		d.leave()
		return err
	}
	if err := start(); err != nil {
		d.leave()
		return err
	}
	return nil
}

func prepareRuntime(queues int) error {
	if slices.Contains(strings.Split(os.Getenv("GODEBUG"), ","), "asyncpreemptoff=1") {
		return ErrNoPreemption
	}
	// Four to spare: one for a collection, the others for whatever else there is.
	if least := queues + 4; runtime.GOMAXPROCS(0) < least {
		runtime.GOMAXPROCS(least)
	}
	return nil
}

// openChar opens the device's character device, or ends the queues. udev may
// have it open for a moment, and only one process can, or has not made it yet;
// half a second is many times what it needs.
func (d *Device) openChar() error {
	id := d.info.devID
	for attempt := 0; ; attempt++ {
		err := checkChar(id)
		if err == nil {
			d.char, err = unix.Open(charPath(id), unix.O_RDWR|unix.O_CLOEXEC, 0)
		}
		if err == nil {
			return nil
		}
		if attempt == 10 || !errors.Is(err, unix.EBUSY) && !errors.Is(err, ErrNode) {
			d.abandon()
			return fmt.Errorf("open %s: %w", charPath(id), err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// makeQueues starts the queues' threads, and fetch lets them fetch all tags.
// These are two steps because a queue may fail to get its ring or messenger,
// and none may fetch before all queues have theirs. If a recovery fails
// between the first and the last queue's fetches, the next one, on 6.12, dies
// in the kernel (ublk_queue_reinit drops the task of a queue that has none).
func (d *Device) makeQueues(fatal func(error)) error {
	for i := range int(d.info.nrHwQueues) {
		q, err := newQueue(i, int(d.info.queueDepth), int(d.info.maxIOBufBytes), fatal)
		if err != nil {
			return err
		}
		d.queues = append(d.queues, q)
	}
	var threads sync.WaitGroup
	d.ready = make(chan error, len(d.queues))
	d.start = make(chan bool, len(d.queues))
	d.ended = make(chan struct{})
	for _, q := range d.queues {
		threads.Go(func() { q.serve(d.ready, d.start) })
	}
	go func() {
		threads.Wait()
		close(d.ended)
	}()
	err := d.await()
	if err != nil {
		d.abandon()
	}
	return err
}

// await returns when every queue has done its step.
func (d *Device) await() (err error) {
	for range d.queues {
		err = errors.Join(err, <-d.ready)
	}
	return err
}

// abandon ends queues that have fetched nothing.
func (d *Device) abandon() {
	for range d.queues {
		d.start <- false
	}
	<-d.ended
}

func (d *Device) fetch(newHandler NewHandler) error {
	for _, q := range d.queues {
		q.char, q.handler = d.char, newHandler(q)
	}
	for range d.queues {
		d.start <- true
	}
	return d.await()
}

// leave makes the queues give up the device.
func (d *Device) leave() {
	for _, q := range d.queues {
		q.leave.Store(true)
		q.Wake()
	}
	d.release()
}

// release closes the character device once the queues are done with it. Their
// buffers stay mapped: closing a ring does not wait for what the kernel still
// does with them, and there is no later moment at which it is known to be done.
func (d *Device) release() {
	<-d.ended
	unix.Close(d.char)
}

// ID is the device's number.
func (d *Device) ID() int { return int(d.info.devID) }

// Path is the disk, /dev/ublkbN.
func (d *Device) Path() string { return diskPath(d.info.devID) }

// Queues is the number of queues that the driver gave the device.
func (d *Device) Queues() int { return int(d.info.nrHwQueues) }

// Done is closed when all queues have ended cleanly: after Stop or LetGo, or when
// another process has stopped or quiesced the device. Any goroutine.
func (d *Device) Done() <-chan struct{} { return d.ended }

// Stop removes the disk, after the requests in flight, and ends the queues; no
// handler is called afterwards. While somebody has the disk open, it refuses
// with ErrInUse, unless force is set: then their next request fails. Delete
// must follow. When Done is already closed, Stop only gives the device up. It
// is not safe for concurrent use, and is not called again once it has
// succeeded.
func (d *Device) Stop(force bool) error {
	select {
	case <-d.ended:
		d.release()
		return nil
	default:
	}
	c, err := openControl()
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.stopUnused(d.info.devID, force); err != nil {
		return err
	}
	d.release()
	return nil
}

// Delete frees the device's number after Stop. It waits, without a limit, until nobody
// has the disk open any more. Any goroutine may call it; called again, it finds no
// device.
func (d *Device) Delete() error {
	c, err := openControl()
	if err != nil {
		return err
	}
	defer c.close()
	return c.delete(d.info.devID)
}
