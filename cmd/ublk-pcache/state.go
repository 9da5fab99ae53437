package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"ublk-pcache/ublk"
)

// stateDir is on a tmpfs: it is empty after a boot, as the devices are, and
// writing there never waits for a disk, one of ours least of all. A variable,
// for tests.
var stateDir = "/run/ublk-pcache"

// device is the content of a state file: everything that a server needs to
// take over from one that died, and what list shows. The file is made, with
// O_EXCL, before anything else of a device, and so reserves its number.
type device struct {
	ID        int    `json:"id"`
	Device    string `json:"device"`
	PMEM      string `json:"pmem"`
	Backing   string `json:"backing"`
	PID       int    `json:"pid"`
	Queues    int    `json:"queues"`
	Writeback int    `json:"writeback_depth"`
	Depth     int    `json:"depth"`
}

// checkStateDir refuses a folder that others can write to. What is in there
// names files and devices that we then open, format and remove as root.
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

func statePath(id int, ext string) string {
	return filepath.Join(stateDir, strconv.Itoa(id)+ext)
}

// reserve makes the state file of d, with d's number or, if that is negative,
// with the first that neither we nor the driver use.
func reserve(d *device) error {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return err
	}
	if err := d.refuseShared(); err != nil {
		return err
	}
	if d.ID >= 0 {
		ok, err := d.create()
		if err == nil && !ok {
			err = fmt.Errorf("device %d exists already (see 'ublk-pcache list')", d.ID)
		}
		return err
	}
	taken, err := ublk.List()
	if err != nil {
		return err
	}
	for d.ID = 0; ; d.ID++ {
		if slices.ContainsFunc(taken, func(i ublk.Info) bool { return i.ID == d.ID }) {
			continue
		}
		if ok, err := d.create(); ok || err != nil {
			return err
		}
	}
}

// refuseShared refuses a pmem or backing device that belongs to another
// device, also to one whose server is dead and holds no lock any more.
func (d *device) refuseShared() error {
	others, err := readStates()
	if err != nil {
		return err
	}
	for _, o := range others {
		for _, p := range [][3]string{{"pmem", d.PMEM, o.PMEM}, {"backing device", d.Backing, o.Backing}} {
			if sameFile(p[1], p[2]) {
				return fmt.Errorf("%s %s belongs to device %d (remove that first: ublk-pcache del %d)", p[0], p[1], o.ID, o.ID)
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
// came to be, because its server died on the way, does not count.
func (d *device) create() (ok bool, err error) {
	if o, err := readState(d.ID); err == nil && !o.alive() {
		if _, err := ublk.Lookup(d.ID); errors.Is(err, ublk.ErrNoDevice) {
			o.remove()
		}
	}
	f, err := os.OpenFile(statePath(d.ID, ".json"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	d.PID = os.Getpid()
	return true, json.NewEncoder(f).Encode(d)
}

// save replaces the file of d, whole or not at all.
func (d *device) save() error {
	data, err := json.Marshal(d)
	if err != nil {
		return err
	}
	tmp := statePath(d.ID, ".new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, statePath(d.ID, ".json"))
}

// remove takes away everything of a device that is gone.
func (d *device) remove() {
	for _, ext := range []string{".sock", ".log", ".new", ".json"} {
		os.Remove(statePath(d.ID, ext))
	}
}

// alive reports whether the server of d runs. A number used again by another
// process is told apart by what it executes.
func (d *device) alive() bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", d.PID))
	return err == nil && strings.HasPrefix(filepath.Base(exe), "ublk-pcache")
}

func readState(id int) (*device, error) {
	data, err := os.ReadFile(statePath(id, ".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no device %d (see 'ublk-pcache list')", id)
	}
	if err != nil {
		return nil, err
	}
	d := &device{}
	if err := json.Unmarshal(data, d); err != nil {
		return nil, fmt.Errorf("state file %s: %w", statePath(id, ".json"), err)
	}
	return d, nil
}

func readStates() ([]*device, error) {
	files, err := filepath.Glob(filepath.Join(stateDir, "*.json"))
	if err != nil {
		return nil, err
	}
	var all []*device
	for _, f := range files {
		id, err := strconv.Atoi(strings.TrimSuffix(filepath.Base(f), ".json"))
		if err != nil {
			continue
		}
		d, err := readState(id)
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b *device) int { return a.ID - b.ID })
	return all, nil
}
