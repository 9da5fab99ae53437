package ublk

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/uring"
)

const controlPath = "/dev/ublk-control"

// control sends the driver's control commands, one at a time. It is cheap and
// short-lived. Each operation opens its own, so that no other has to wait for
// a command that blocks (START_DEV waits for every queue, DEL_DEV for every
// opener).
//
// The driver refuses to run these commands without blocking, so io_uring gives
// them to a worker thread, which reads and writes the argument long after
// submission. The argument is therefore in mapped memory.
type control struct {
	fd   int
	ring *uring.Ring
	arg  []byte
}

// argSize holds the largest argument, devInfo; the mapping is a page anyway.
const argSize = 4096

func openControl() (*control, error) {
	if os.Geteuid() != 0 {
		return nil, ErrNotRoot
	}
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			return nil, ErrNoDriver
		}
		return nil, fmt.Errorf("open %s: %w", controlPath, err)
	}
	c := &control{fd: fd}
	if c.ring, err = uring.New(uring.Options{Entries: 1, SQE128: true}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if c.arg, err = uring.AlignedBuffer(argSize); err != nil {
		c.ring.Close()
		unix.Close(fd)
		return nil, err
	}
	return c, nil
}

func (c *control) close() {
	c.ring.Close()
	uring.FreeBuffer(c.arg)
	unix.Close(c.fd)
}

// anyID as a device number lets the driver choose; noQueue says that a command
// is not about one queue.
const (
	anyID   = ^uint32(0)
	noQueue = ^uint16(0)
)

// command runs one command and returns the driver's errno as it is. n is the
// length of the argument in c.arg.
func (c *control) command(op, id uint32, data uint64, n int) error {
	sqe := c.ring.SQE()
	cmd := (*ctrlCmd)(sqe.PrepareCommand(c.fd, op))
	cmd.devID = id
	cmd.queueID = noQueue
	cmd.data = data
	if n > 0 {
		cmd.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(c.arg))))
		cmd.len = uint16(n)
	}
	if err := c.ring.Wait(1); err != nil {
		return err
	}
	cqe, _ := c.ring.Next()
	if cqe.Res < 0 {
		return syscall.Errno(-cqe.Res)
	}
	return nil
}

func (c *control) features() (uint64, error) {
	const size = 8
	if err := c.command(cmdGetFeatures, anyID, 0, size); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
			return 0, fmt.Errorf("%w: the ublk driver cannot list its features (Linux 6.5 is needed)", ErrTooOld)
		}
		return 0, fmt.Errorf("ask the ublk driver for its features: %w", err)
	}
	return *(*uint64)(unsafe.Pointer(unsafe.SliceData(c.arg))), nil
}

// requireFeatures checks for the features that this package needs.
func (c *control) requireFeatures() error {
	have, err := c.features()
	if err != nil {
		return err
	}
	return checkFeatures(have)
}

func checkFeatures(have uint64) error {
	for _, f := range []struct {
		bit  uint64
		name string
	}{
		{featureUserRecovery, "USER_RECOVERY"},
		{featureUserRecoveryReissue, "USER_RECOVERY_REISSUE"},
		{featureCmdIoctlEncode, "CMD_IOCTL_ENCODE"},
	} {
		if have&f.bit == 0 {
			return fmt.Errorf("%w: the ublk driver does not offer UBLK_F_%s", ErrTooOld, f.name)
		}
	}
	return nil
}

func (c *control) info(id uint32) (devInfo, error) {
	if err := c.command(cmdGetDevInfo, id, 0, devInfoSize); err != nil {
		return devInfo{}, deviceError("look up", id, err)
	}
	return *(*devInfo)(unsafe.Pointer(unsafe.SliceData(c.arg))), nil
}

func (c *control) add(info devInfo) (devInfo, error) {
	p := (*devInfo)(unsafe.Pointer(unsafe.SliceData(c.arg)))
	*p = info
	if err := c.command(cmdAddDev, info.devID, 0, devInfoSize); err != nil {
		return devInfo{}, addError(info.devID, err)
	}
	return *p, nil
}

func (c *control) params(id uint32) (params, error) {
	p := (*params)(unsafe.Pointer(unsafe.SliceData(c.arg)))
	*p = params{len: paramsSize}
	if err := c.command(cmdGetParams, id, 0, paramsSize); err != nil {
		return params{}, deviceError("read the parameters of", id, err)
	}
	return *p, nil
}

func (c *control) setParams(id uint32, p params) error {
	p.len = paramsSize
	p.types = paramTypeBasic | paramTypeDiscard
	*(*params)(unsafe.Pointer(unsafe.SliceData(c.arg))) = p
	return deviceError("set the parameters of", id, c.command(cmdSetParams, id, 0, paramsSize))
}

// start makes the disk appear. It returns when every tag of every queue has
// been fetched and the partition table has been looked for.
func (c *control) start(id uint32) error {
	return deviceError("start", id, c.command(cmdStartDev, id, uint64(os.Getpid()), 0))
}

// stop removes the disk, after waiting for requests in flight.
func (c *control) stop(id uint32) error {
	return deviceError("stop", id, c.command(cmdStopDev, id, 0, 0))
}

// tryStop is stop, or ErrInUse if somebody has the disk open.
func (c *control) tryStop(id uint32) error {
	err := c.command(cmdTryStopDev, id, 0, 0)
	if errors.Is(err, unix.EBUSY) {
		err = ErrInUse
	}
	return deviceError("stop", id, err)
}

// delete frees the device's number, after waiting for the last descriptor of
// its character device and of its disk.
func (c *control) delete(id uint32) error {
	return deviceError("delete", id, c.command(cmdDelDev, id, 0, 0))
}

func (c *control) startRecovery(id uint32) error {
	return deviceError("recover", id, c.command(cmdStartUserRecovery, id, 0, 0))
}

// endRecovery lets requests through again. It returns when every tag of every
// queue has been fetched.
func (c *control) endRecovery(id uint32) error {
	return deviceError("finish recovering", id, c.command(cmdEndUserRecovery, id, uint64(os.Getpid()), 0))
}
