package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ublk-pcache/ublk"
)

// stateDir is on a tmpfs: it is empty after a boot, as the devices are, and
// writing there never waits for a disk, one of ours least of all. A variable,
// for tests.
var stateDir = "/run/ublk-pcache"

// device is the content of a state file: everything that a server needs to
// take over from one that died, and what list shows. The file is made before
// anything else of a device, unless it is there, and so reserves its number. It
// appears whole and is replaced whole, so it is never seen half written. It has
// a second one beside it, which is the room for the next state: a folder that is
// full must not keep a device from being continued.
type device struct {
	ID        int    `json:"id"`
	Name      string `json:"name,omitempty"` // see name.go
	Device    string `json:"device"`
	PMEM      string `json:"pmem"`
	Backing   string `json:"backing"`
	Cache     string `json:"cache"`          // UUID of the cache on PMEM; empty before it is known
	Unit      string `json:"unit,omitempty"` // of systemd's, in which the server is
	Version   string `json:"version"`        // of the server; empty of one that does not tell
	Mark      uint64 `json:"mark"`           // see newMark; 0 of a server that drew none
	PID       int    `json:"pid"`
	Started   uint64 `json:"started"` // when PID was, in clock ticks since boot
	Queues    int    `json:"queues"`
	Writeback int    `json:"writeback_depth"`
	Depth     int    `json:"depth"`
	LogLevel  string `json:"log_level,omitempty"` // as set takes it; empty is info

	damage error // why only ID is known
}

var (
	// errDamaged: somebody else has written to a state file, or has removed it.
	errDamaged = errors.New("cannot be used")
	// errMissing: the state file of a device is not there.
	errMissing = errors.New("it is missing")
	// errNoDevice: nor is the device.
	errNoDevice = errors.New("no device")
)

// A mark is what the driver keeps for us with each device. By its low 48 bits the
// device is ours, whatever has become of its state file. The others are drawn for
// each device, so that a state file which has outlived its device is not taken for
// that of whoever has the number after it.
const (
	markOurs = 0x706361636865 // "pcache"
	markBits = 48
)

func newMark() uint64 { return markOurs | (1+rand.Uint64N(1<<(64-markBits)-1))<<markBits }

func isOurs(info ublk.Info) bool { return info.Mark&(1<<markBits-1) == markOurs }

// lookup asks the driver about d. If the number is another device's by now, the
// error wraps ublk.ErrNoDevice.
func (d *device) lookup() (ublk.Info, error) {
	info, err := ublk.Lookup(d.ID)
	drawn := isOurs(info) && info.Mark>>markBits != 0 // by a version that puts it into the state, too
	if err == nil && (d.Mark != 0 || drawn) && info.Mark != d.Mark {
		return ublk.Info{}, fmt.Errorf("device %s: %w, its number has been given to another (take away what is left of it: ublk-pcache del %d)", d.title(), ublk.ErrNoDevice, d.ID)
	}
	return info, err
}

// checkStateDir refuses a folder that others can write to. The files in there name
// other files and devices, which we open, format and remove as root.
func checkStateDir() error {
	info, err := os.Lstat(stateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; !info.IsDir() || int(uid) != os.Geteuid() || info.Mode()&0o022 != 0 {
		return fmt.Errorf("%s is not a folder that only root can write to (%v, user %d): move it away, it may say anything about devices", stateDir, info.Mode(), uid)
	}
	return nil
}

const (
	// stateSize is more than two paths and some numbers can take, in bytes.
	stateSize = 64 << 10
	// stateRoom is what is reserved for a state in any case, in bytes: the next one
	// may be longer, for a number that has one digit more.
	stateRoom = 8 << 10
)

func statePath(id int, ext string) string {
	return filepath.Join(stateDir, strconv.Itoa(id)+ext)
}

// reserve makes the state file of d, with d's number or, if that is negative,
// with the first that neither we nor the driver use.
func reserve(d *device) error {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return err
	}
	unlock, err := lockStates()
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.refuseNamesakeLocked(); err != nil {
		return err
	}
	if d.ID >= 0 {
		if err := ublk.CheckNames(d.ID); err != nil {
			return err
		}
		ok, err := d.create()
		if err == nil && !ok {
			err = fmt.Errorf("device %s exists already (see 'ublk-pcache list')", titleOf(d.ID))
		}
		return err
	}
	taken, err := ublk.List()
	if err != nil {
		return err
	}
	for d.ID = 0; ; d.ID++ {
		if slices.ContainsFunc(taken, func(i ublk.Info) bool { return i.ID == d.ID }) || errors.Is(ublk.CheckNames(d.ID), ublk.ErrNode) {
			continue
		}
		if ok, err := d.create(); ok || err != nil {
			return err
		}
	}
}

// refuseShared refuses a pmem or backing device that belongs to another
// device, also to one whose server is dead and holds no lock any more. It is for
// those who see all that is mounted: names may lead to one file on several ways.
func refuseShared(pmem, backing string) error {
	others, err := readStates()
	if err != nil {
		return err
	}
	for _, o := range others {
		if o.damage != nil {
			return o.damage
		}
		for _, p := range [][3]string{{"pmem", pmem, o.PMEM}, {"backing device", backing, o.Backing}} {
			if sameFile(p[1], p[2]) {
				return exitWith(exitRefused, fmt.Errorf("%s %s belongs to device %s (remove that first: ublk-pcache del %d)", p[0], p[1], o.title(), o.ID))
			}
		}
	}
	return nil
}

// sameFile reports whether two names lead to the same file or the same device.
func sameFile(a, b string) bool {
	ai, err1 := os.Stat(a)
	bi, err2 := os.Stat(b)
	if err1 != nil || err2 != nil {
		return a == b
	}
	as, bs := ai.Sys().(*syscall.Stat_t), bi.Sys().(*syscall.Stat_t)
	if ai.Mode()&fs.ModeDevice != 0 && ai.Mode().Type() == bi.Mode().Type() {
		return as.Rdev == bs.Rdev
	}
	return os.SameFile(ai, bi)
}

// create makes the file of d unless it is there. A file whose device never
// came to be, because its server died on the way, does not count. The caller has
// locked the states.
func (d *device) create() (ok bool, err error) {
	switch o, err := readState(d.ID); {
	case err == nil && !o.alive():
		if _, err := o.lookup(); errors.Is(err, ublk.ErrNoDevice) {
			o.removeLocked()
		}
	case errors.Is(err, errMissing), errors.Is(err, errForeign):
		return false, err
	}
	f, err := os.OpenFile(stateDir, unix.O_TMPFILE|os.O_WRONLY, 0o600)
	if err != nil {
		return false, err
	}
	defer f.Close()
	d.servedByUs()
	data, err := d.encode()
	if err != nil {
		return false, err
	}
	if _, err := f.Write(data); err != nil {
		return false, fmt.Errorf("make %s: %w", statePath(d.ID, ".json"), err)
	}
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, statePath(d.ID, ".json"), unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make %s: %w", statePath(d.ID, ".json"), err)
	}
	if err := d.stage(); err != nil {
		return false, errors.Join(err, d.removeLocked())
	}
	return true, nil
}

// encode fills what is reserved for a state with spaces.
func (d *device) encode() ([]byte, error) {
	data, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	return append(data, bytes.Repeat([]byte(" "), max(0, stateRoom-len(data)))...), nil
}

// save replaces the file of d, whole or not at all.
func (d *device) save() error {
	if err := d.stage(); err != nil {
		return fmt.Errorf("write %s: %w", statePath(d.ID, ".new"), err)
	}
	return d.publish()
}

// stage writes the state that publish is to publish. Room for it is needed the
// first time only.
func (d *device) stage() error {
	data, err := d.encode()
	if err != nil {
		return err
	}
	// Not truncated first: the pages that the file has are the room.
	f, err := os.OpenFile(statePath(d.ID, ".new"), os.O_CREATE|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(data, 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(data)))
}

// publish replaces the state file by what was staged. The old one is the room for
// the next.
func (d *device) publish() error {
	from, to := statePath(d.ID, ".new"), statePath(d.ID, ".json")
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE)
	if errors.Is(err, fs.ErrNotExist) { // somebody has taken the old one away
		err = os.Rename(from, to)
	}
	if err != nil {
		return fmt.Errorf("replace %s: %w", to, err)
	}
	return nil
}

// remove takes away everything of a device that is gone, unless its number has
// been given to another since d was read.
func (d *device) remove() error {
	unlock, err := lockStates()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	if now, err := readState(d.ID); err == nil && (now.PID != d.PID || now.Started != d.Started) {
		return nil
	}
	return d.removeLocked()
}

func (d *device) removeLocked() error {
	for _, ext := range []string{".sock", ".sock.new", ".log", ".log.1", ".new", udevExt} {
		os.Remove(statePath(d.ID, ext))
	}
	if err := os.Remove(statePath(d.ID, ".json")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// statesPatience is how long somebody may keep the states locked: a moment, unless
// it has been stopped in that.
const statesPatience = 10 * time.Second

// lockStates keeps others from giving numbers away and from taking back those
// whose devices have gone: both look first, and then act.
func lockStates() (unlock func(), err error) {
	dir, err := os.Open(stateDir)
	if err != nil {
		return nil, err
	}
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		switch err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			return func() { dir.Close() }, nil
		case err != unix.EWOULDBLOCK && err != unix.EINTR || time.Since(begin) > statesPatience:
			dir.Close()
			return nil, fmt.Errorf("lock %s: %w (who holds it: fuser %s)", stateDir, err, stateDir)
		}
	}
}

// servedByUs makes this process the server of d.
func (d *device) servedByUs() {
	d.Version = version
	d.PID = os.Getpid()
	d.Started = startOf(d.PID)
}

// alive reports whether the server of d runs. A number used again by another
// process is told apart by when that was started, if the file says it: what is
// known from the driver alone does not. A process that is being taken down, which
// may be long, executes nothing any more.
func (d *device) alive() bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", d.PID))
	return err == nil && (d.Started == 0 || d.Started == startOf(d.PID))
}

// startOf returns when a process was started, in clock ticks since boot, or 0 if
// there is none.
func startOf(pid int) uint64 {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// Field 22 of proc_pid_stat(5). Field 2 may have spaces and parentheses in it,
	// and no other has.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return 0
	}
	ticks, _ := strconv.ParseUint(fields[19], 10, 64)
	return ticks
}

// readState reads the state file of a device. If there is one and it is no
// good, the error wraps errDamaged.
func readState(id int) (*device, error) {
	path := statePath(id, ".json")
	d, err := decodeState(path, id)
	if err != nil {
		// It may have been replaced while it was read, and then written to as the
		// room for the next one.
		d, err = decodeState(path, id)
	}
	if errors.Is(err, fs.ErrNotExist) {
		info, err := ublk.Lookup(id)
		switch {
		case err != nil: // no device, or no driver to have one
			return nil, fmt.Errorf("%w %d (see 'ublk-pcache list')", errNoDevice, id)
		case !isOurs(info):
			return nil, foreignError(info)
		}
		return nil, unusable(id, errMissing)
	}
	if err != nil {
		return nil, unusable(id, err)
	}
	return d, nil
}

func decodeState(path string, id int) (*device, error) {
	data, err := readRegular(path)
	if err != nil {
		return nil, err
	}
	d := &device{}
	if err := json.Unmarshal(data, d); err != nil {
		return nil, err
	}
	if !d.plausible(id) {
		return nil, errors.New("it does not describe this device")
	}
	if checkName(d.Name) != nil { // another version may allow others
		d.Name = ""
	}
	if !slices.Contains(logLevels, d.LogLevel) {
		d.LogLevel = ""
	}
	return d, nil
}

// unusable says what to do about a device whose state file says nothing.
func unusable(id int, why error) error {
	return fmt.Errorf("state file %s %w: %w (remove the device with 'ublk-pcache del %d', dirty data stays in its cache, and add it again)", statePath(id, ".json"), errDamaged, why, id)
}

// errForeign: it is another program's.
var errForeign = errors.New("is a ublk device of another program")

func foreignError(info ublk.Info) error {
	whose := "whose server has died"
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", info.PID)); err == nil && info.PID > 0 {
		whose = fmt.Sprintf("process %d, %q", info.PID, bytes.TrimSpace(name))
	}
	return fmt.Errorf("%s %w, %s (if it is to go all the same: ublk-pcache del --force %d)", info.Path, errForeign, whose, info.ID)
}

// readRegular reads a file that may turn out to be anything.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("it is not a file"))
	}
	return io.ReadAll(io.LimitReader(f, stateSize))
}

// plausible reports whether d may be what a server has written for a device.
func (d *device) plausible(id int) bool {
	return d.ID == id && id <= ublk.MaxID && d.PID > 0 && filepath.IsAbs(d.PMEM) && filepath.IsAbs(d.Backing) &&
		d.Queues > 0 && d.Depth > 0 && d.Depth <= maxDepth && d.Writeback > 0 && d.Writeback <= maxWriteback
}

// deviceOfDriver is what can be told of a device without its state file: of ours, or
// anybody's.
func deviceOfDriver(id int, anybodys bool) (*device, error) {
	d := &device{ID: id, Mark: markOurs} // which no device has
	info, err := ublk.Lookup(id)
	if err == nil && (anybodys || isOurs(info)) {
		d.Device, d.PID, d.Mark = info.Path, info.PID, info.Mark
	} else if err != nil && !errors.Is(err, ublk.ErrNoDevice) {
		return nil, err
	}
	return d, nil
}

// still reports whether a device that was found before is the one that has its number now.
func (d *device) still() bool {
	now, err := readState(d.ID)
	if d.damage != nil {
		return errors.Is(err, errDamaged)
	}
	return err == nil && now.Mark == d.Mark
}

// readStates reads all state files, also those that are damaged.
func readStates() ([]*device, error) {
	files, err := filepath.Glob(filepath.Join(stateDir, "*.json"))
	if err != nil {
		return nil, err
	}
	var all []*device
	for _, f := range files {
		id, err := strconv.Atoi(strings.TrimSuffix(filepath.Base(f), ".json"))
		if err != nil || id < 0 || id > ublk.MaxID || f != statePath(id, ".json") {
			continue
		}
		d, err := readState(id)
		switch {
		case errors.Is(err, errDamaged):
			d = &device{ID: id, damage: err}
		case errors.Is(err, errNoDevice), errors.Is(err, errForeign):
			continue // it has been removed meanwhile
		case err != nil:
			return nil, err
		}
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b *device) int { return a.ID - b.ID })
	return all, nil
}
