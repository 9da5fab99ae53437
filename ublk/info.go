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

// State is the state of a device, as the driver sees it.
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

// Info describes a device, as the driver does, with any server or none.
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

// checkID refuses numbers that the driver would take for others: a number has 32
// bits there.
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

// lookup does not read the parameters: the driver keeps them behind a lock that
// START_DEV and STOP_DEV hold while they wait for the server
// (drivers/block/ublk_drv.c, ublk_ctrl_get_params), and a lookup must not wait
// for a server that does not answer.
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

// VolatileCache returns the VolatileCache of the Config that a device was
// made with.
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
	// A device without a disk, whose server died before the start or after the
	// stop, does not exist for TRY_STOP_DEV, and still has its number.
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
// While somebody is just opening the disk, nothing tells whether it is in use.
// The kernel opens it so, right after the start, to look for partitions. If the
// server dies then, the kernel's read waits for the next server, and every
// process that asks about the disk waits for the read, deaf to signals. Nobody
// else gets in meanwhile, so looking around is enough. The stop then makes the
// read fail, which ends the waiting.
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

// openPatience is much more than it takes to open a disk that is served.
const openPatience = time.Second

// stopUnopened stops a device that somebody has been opening for long, if it has
// no server. This takes a control of its own: the other one waits.
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

// udevQueue exists while udev has events to work on; udevadm settle looks for
// it (systemd, src/udev/udevd.c).
const udevQueue = "/run/udev/queue"

const (
	// udevPatience is how long udev may keep a disk from being stopped by
	// looking at it. It is many times what a look takes, and a short wait for
	// the answer that others have the disk open.
	udevPatience = 3 * time.Second
	udevStep     = 20 * time.Millisecond
)

// stopIfUnused stops a device or returns ErrInUse. When a writer closes the
// disk, udev opens it for a moment to see what has become of it. This does not
// count as use.
func (c *control) stopIfUnused(id uint32) error {
	for begin := time.Now(); ; time.Sleep(udevStep) {
		_, idle := os.Stat(udevQueue) // before the try, since udev may close the disk after it
		err := c.tryStopIfUnused(id)
		if !errors.Is(err, ErrInUse) || idle != nil || time.Since(begin) > udevPatience {
			return err
		}
	}
}

// tryStopIfUnused stops a device or returns ErrInUse.
//
// Since 7.0 the driver can do that in one step. Before, we look first: for an
// exclusive claim (a mount, swap, a device on top) by trying to make one, and
// for other openers in the descriptors of all processes. Somebody can come in
// between, and parts of the kernel that have it open without a claim may not say
// so. To these the stop does what force would do.
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
