package ublk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// State is how a device is doing, as the driver sees it.
type State uint16

const (
	Dead     State = 0 // no disk: not started yet, or stopped
	Live     State = 1 // served
	Quiesced State = 2 // its server has died; requests wait for Recover
	FailIO   State = 3 // its server has died; requests fail until Recover
)

func (s State) String() string {
	switch s {
	case Dead:
		return "dead"
	case Live:
		return "live"
	case Quiesced:
		return "quiesced"
	case FailIO:
		return "fail-io"
	}
	return fmt.Sprintf("state %d", uint16(s))
}

// Info is what the driver tells about a device, whoever serves it.
type Info struct {
	ID     int
	State  State
	PID    int    // of the server, 0 if there is none
	Path   string // of the disk, which exists unless State is Dead
	Queues int
	Depth  int
	MaxIO  int   // bytes
	Size   int64 // bytes, 0 without a disk
	Mark   uint64
}

// MaxID is the largest number that a device can have (drivers/block/ublk_drv.c,
// UBLK_MINORS).
const MaxID = 1<<20 - 1

// checkID refuses numbers that the driver would take for others: it has 32 bits.
func checkID(id int) error {
	if id < 0 || id > MaxID {
		return fmt.Errorf("ublk device %d: %w (there are 0 to %d)", id, ErrNoDevice, MaxID)
	}
	return nil
}

// Lookup tells about one device. It wraps ErrNoDevice if there is none.
func Lookup(id int) (Info, error) {
	if err := checkID(id); err != nil {
		return Info{}, err
	}
	c, err := openControl()
	if err != nil {
		return Info{}, err
	}
	defer c.close()
	return c.lookup(uint32(id))
}

// List tells about all ublk devices, also those of other programs, in order of
// their numbers.
func List() ([]Info, error) {
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	defer c.close()
	// The driver has no command for this; it has a class in sysfs.
	const class = "/sys/class/ublk-char/ublkc"
	chars, err := filepath.Glob(class + "*")
	if err != nil {
		return nil, err
	}
	var all []Info
	for _, char := range chars {
		id, err := strconv.ParseUint(strings.TrimPrefix(char, class), 10, 32)
		if err != nil {
			continue
		}
		info, err := c.lookup(uint32(id))
		if errors.Is(err, ErrNoDevice) { // deleted meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, info)
	}
	slices.SortFunc(all, func(a, b Info) int { return a.ID - b.ID })
	return all, nil
}

// lookup does not read the parameters, which the driver keeps behind a lock that
// START_DEV and STOP_DEV hold while they wait for the server (drivers/block/
// ublk_drv.c, ublk_ctrl_get_params): whoever looks at a device must not wait for
// one that does not answer.
func (c *control) lookup(id uint32) (Info, error) {
	info, err := c.info(id)
	if err != nil {
		return Info{}, err
	}
	return Info{
		ID:     int(info.devID),
		State:  State(info.state),
		PID:    max(0, int(info.ublksrvPID)),
		Path:   diskPath(info.devID),
		Queues: int(info.nrHwQueues),
		Depth:  int(info.queueDepth),
		MaxIO:  int(info.maxIOBufBytes),
		Size:   sectors(info.devID) << sectorShift,
		Mark:   info.ublksrvFlags,
	}, nil
}

// VolatileCache tells what a device was made with, see Config.
func VolatileCache(id int) (bool, error) {
	c, err := openControl()
	if err != nil {
		return false, err
	}
	defer c.close()
	p, err := c.params(uint32(id))
	return p.attrs&attrVolatileCache != 0, err
}

// sectors is the size of a disk, 0 if there is none.
func sectors(id uint32) int64 {
	text, _ := os.ReadFile(filepath.Join(sysBlock(id), "size"))
	n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n
}

// sysBlock is where the kernel describes a disk.
func sysBlock(id uint32) string { return "/sys/block/" + filepath.Base(diskPath(id)) }

// Remove stops and deletes a device that this process does not serve, normally
// one whose server has died; requests that wait for a server then fail. For
// force see Device.Stop.
func Remove(id int, force bool) error {
	if err := checkID(id); err != nil {
		return err
	}
	c, err := openControl()
	if err != nil {
		return err
	}
	defer c.close()
	// A device that has no disk, since its server died before it was started or
	// after it was stopped, is none to TRY_STOP_DEV, and still has its number.
	if err := c.stopUnused(uint32(id), force); err != nil && !errors.Is(err, ErrNoDevice) {
		return err
	}
	return c.delete(uint32(id))
}

// Features is the driver's feature mask (UBLK_F_*), for diagnostics.
func Features() (uint64, error) {
	c, err := openControl()
	if err != nil {
		return 0, err
	}
	defer c.close()
	return c.features()
}

// stopUnused stops a device, unless it is in use or force is set.
//
// Whether it is in use can only be told while nobody is just opening it, and so
// the kernel does when it looks for partitions, right after the start. If the
// server has died under that, the kernel's read waits for the next server, and
// whoever asks about the disk waits for the read, deaf to signals. Nobody else
// gets in meanwhile, so that looking around is enough; the stop then makes the
// read fail, and with it the waiting end.
func (c *control) stopUnused(id uint32, force bool) error {
	if force {
		return c.stop(id)
	}
	served, err := c.served(id)
	if err != nil {
		return err
	}
	if !served {
		if err := lookUnused(id); err != nil {
			return deviceError("stop", id, err)
		}
	}
	own, err := openControl() // this one may be closed before the stop has ended
	if err != nil {
		return err
	}
	stopped := make(chan error, 1)
	go func() {
		defer own.close()
		stopped <- own.stopIfUnused(id)
	}()
	for {
		select {
		case err := <-stopped:
			return err
		case <-time.After(openPatience):
			if err := stopUnopened(id); err != nil {
				return err
			}
		}
	}
}

// openPatience is much more than opening a disk takes that is served.
const openPatience = time.Second

// stopUnopened stops a device that somebody has been opening for long, if that is
// for want of a server. This takes a control of its own: the other one waits.
func stopUnopened(id uint32) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	defer c.close()
	served, err := c.served(id)
	if err != nil || served {
		return err
	}
	if err := lookUnused(id); err != nil {
		return deviceError("stop", id, err)
	}
	return c.stop(id)
}

func (c *control) served(id uint32) (bool, error) {
	info, err := c.info(id)
	return State(info.state) != Quiesced, err
}

// udevQueue is there while udev has events to work on, and what udevadm settle
// looks for (systemd, src/udev/udevd.c).
const udevQueue = "/run/udev/queue"

const (
	// udevPatience is how long a look of udev at a disk may keep it from being
	// stopped: many times what one takes, and less than whoever asked for the
	// stop of a disk that others have open should wait for the answer.
	udevPatience = 3 * time.Second
	udevStep     = 20 * time.Millisecond
)

// stopIfUnused stops a device or returns ErrInUse. When a writer closes the disk
// udev looks what has become of it, and has it open for that moment: this is no
// use of it.
func (c *control) stopIfUnused(id uint32) error {
	for begin := time.Now(); ; time.Sleep(udevStep) {
		_, idle := os.Stat(udevQueue) // before the try: what udev had open then it may have closed since
		err := c.tryStopIfUnused(id)
		if !errors.Is(err, ErrInUse) || idle != nil || time.Since(begin) > udevPatience {
			return err
		}
	}
}

// tryStopIfUnused stops a device or returns ErrInUse.
//
// Since 7.0 the driver can do that in one step. Before, we look first: at an
// exclusive claim (a mount, swap, a device on top) by trying to make one, at
// ordinary openers by going through all processes' descriptors. Somebody can
// come in between, and parts of the kernel that have it open without a claim may
// not say so; that leaves them where force would.
func (c *control) tryStopIfUnused(id uint32) error {
	have, err := c.features()
	if err != nil {
		return err
	}
	if have&featureSafeStopDev != 0 {
		return c.tryStop(id)
	}
	if err := checkUnused(id); err != nil {
		return deviceError("stop", id, err)
	}
	return c.stop(id)
}
