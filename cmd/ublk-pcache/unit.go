package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/unit"
	"github.com/coreos/go-systemd/v22/util"
	godbus "github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ublk-pcache/ublk"
)

// A process that was started from a login belongs to that login: systemd kills it
// at logout where KillUserProcesses is set, and freezes it with the user's slice
// before the machine sleeps, under everybody's mounts. So where systemd runs, a
// server of add or recover gets a unit of its own, in the system's slice. That
// also starts it again when it dies: the unit's command begins a device once, for
// the add that waits for it, and after that continues the one that the unit has.
//
// The add waits on a socket in the abstract namespace, since no descriptor can be
// handed to a unit. The first to call there as root is told what to serve, and
// answered for. The unit's command has no path in it: systemd expands what looks
// like a variable, and (257) reads it otherwise than it has written it down.

// reachSystemd returns a connection to systemd, if it runs here, sees the same
// files as we do, and has its units call us: names in the abstract namespace are
// those of one network.
func reachSystemd() (systemd *dbus.Conn, ok bool) {
	if !util.IsRunningSystemd() {
		return nil, false
	}
	for _, ns := range []string{"mnt", "pid", "net"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink("/proc/1/ns/" + ns)
		if err1 != nil || err2 != nil || ours != its {
			return nil, false
		}
	}
	systemd, err := dbus.NewSystemdConnectionContext(context.Background())
	return systemd, err == nil
}

// longestUnit is what a name may have of a path, which may be long in escapes, with
// room for the rest in the 255 bytes that systemd takes.
const longestUnit = 150

// unitOf names the unit of a server by its pmem, of which each has its own. Beyond
// the first it has a number.
func unitOf(pmem string, n int) string {
	name := "ublk-pcache-" + unit.UnitNamePathEscape(pmem)
	if len(name) > longestUnit {
		name = fmt.Sprintf("%s-%x", name[:longestUnit], sha256.Sum256([]byte(pmem)))
	}
	if n > 1 {
		name += fmt.Sprintf("-%d", n)
	}
	return name + ".service"
}

// spawnUnit starts a server in a unit and returns its answer.
func spawnUnit(systemd *dbus.Conn, self string, o serveOptions) (answer string, err error) {
	interrupted, stop := untilBrokenOff()
	defer stop()
	o.Answer = "@ublk-pcache-" + rand.Text()
	caller, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.Answer, Net: "unix"})
	if err != nil {
		return "", fmt.Errorf("listen for the server: %w", err)
	}
	defer caller.Close()
	ended := make(chan string, 1)
	if err := startUnit(interrupted, systemd, self, &o, ended); err != nil {
		return "", err
	}
	config, err := json.Marshal(o)
	if err != nil {
		return "", err
	}
	type said struct {
		text []byte
		err  error
	}
	heard := make(chan said, 1)
	go func() {
		text, err := exchange(caller, config)
		heard <- said{text, err}
	}()
	var s said
	select {
	case s = <-heard:
	case result := <-ended:
		// The server's answer comes before the end of a job that fails, and after
		// that of one that is done: then there is nothing to break off.
		if result == "done" {
			stop()
			s = <-heard
			break
		}
		select {
		case s = <-heard:
		case <-time.After(lettingGo):
		}
		if len(s.text) == 0 {
			return "", fmt.Errorf("%s did not start: %s (see 'journalctl -u %s')", o.Device.Unit, result, o.Device.Unit)
		}
	case <-interrupted.Done():
		return "", takeBackUnit(systemd, o, ended)
	}
	switch {
	case s.err != nil:
		return "", fmt.Errorf("wait for %s: %w", o.Device.Unit, s.err)
	case len(s.text) == 0:
		return "", fmt.Errorf("the server died before it was ready (see 'journalctl -u %s')", o.Device.Unit)
	}
	return string(s.text), nil
}

// unitPatience is how long a unit may keep its name: systemd notices a moment later
// that a server has ended, and a server that waits to try again notices after
// retryPause that its device has gone.
const unitPatience = 5 * time.Second

// startUnit starts the unit of a server and names it in o. A unit of that name
// which ends is waited for, one with a server that lives is not. One that tries in
// vain to continue its device may do so for long: whoever continues that device by
// hand gets another unit, and the first ends when it finds that out.
func startUnit(ctx context.Context, systemd *dbus.Conn, self string, o *serveOptions, ended chan<- string) error {
	begin := time.Now()
	for n := 1; ; {
		o.Device.Unit = unitOf(o.PMEM.Path, n)
		config, err := json.Marshal(serveOptions{Answer: o.Answer, Device: device{Unit: o.Device.Unit}})
		if err != nil {
			return err
		}
		_, err = systemd.StartTransientUnitContext(ctx, o.Device.Unit, "fail", unitProperties(o, self, string(config)), ended)
		if err == nil {
			return nil
		}
		var refused godbus.Error
		exists := errors.As(err, &refused) && refused.Name == unitExists
		late := time.Since(begin) > unitPatience
		if ctx.Err() != nil {
			return errInterrupted
		}
		if !exists || late && !o.Recover {
			return fmt.Errorf("start %s: %w (see 'systemctl status %s')", o.Device.Unit, err, o.Device.Unit)
		}
		if err := refuseServed(o); err != nil {
			return err
		}
		if late {
			n++
		} else {
			time.Sleep(deathStep)
		}
	}
}

// unitExists is systemd's error for a name that a unit has.
const unitExists = "org.freedesktop.systemd1.UnitExists"

// refuseServed refuses a unit in which a server lives, of another device or of the one
// that is to be continued.
func refuseServed(o *serveOptions) error {
	devices, err := readStates()
	if err != nil {
		return err
	}
	for _, d := range devices {
		switch {
		case d.Unit != o.Device.Unit || !d.alive():
		case o.Recover && d.ID == o.Device.ID:
			return d.servedError()
		default:
			return fmt.Errorf("%s belongs to device %s, process %d (remove that first: ublk-pcache del %d)", d.Unit, d.title(), d.PID, d.ID)
		}
	}
	return nil
}

// exchange tells the server what to serve and returns what it says, up to its end.
func exchange(caller *net.UnixListener, config []byte) ([]byte, error) {
	for {
		conn, err := caller.AcceptUnix()
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		if refuseStranger(conn) == nil {
			caller.Close()     // a later caller is the next server, and goes on
			conn.Write(config) // a server that has died says nothing
			return io.ReadAll(conn)
		}
	}
}

// takeBackUnit is takeBack for a server in a unit. One that continues a device would
// be started again.
func takeBackUnit(systemd *dbus.Conn, o serveOptions, ended <-chan string) error {
	if o.Recover {
		return fmt.Errorf("interrupted: %s goes on to continue device %s (see 'systemctl status %s')", o.Device.Unit, o.Device.title(), o.Device.Unit)
	}
	if err := systemd.KillUnitWithTarget(context.Background(), o.Device.Unit, dbus.Main, int32(o.breakOff())); err != nil {
		return fmt.Errorf("interrupted, but %s cannot be ended: %w", o.Device.Unit, err)
	}
	if _, ok := inTime(func() error { <-ended; return nil }); !ok {
		return o.lateEnd(o.Device.Unit)
	}
	return errInterrupted
}

// unitProperties are those of systemd/ublk-pcache@.service, which says why.
func unitProperties(o *serveOptions, self, config string) []dbus.Property {
	property := func(name string, value any) dbus.Property {
		return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
	}
	type statuses struct{ Exit, Signal []int32 }
	type exec struct {
		Path             string
		Args             []string
		UncleanIsFailure bool
	}
	return []dbus.Property{
		property("ExecStart", []exec{{Path: self, Args: []string{"@ublk-pcache", "unit", config}}}),
		dbus.PropDescription(fmt.Sprintf("Persistent-memory cache on %s for %s", o.PMEM.Path, o.Device.Backing)),
		dbus.PropSlice("system.slice"),
		dbus.PropType("notify"),
		property("NotifyAccess", "all"),
		property("DefaultDependencies", false),
		dbus.PropBefore("local-fs-pre.target", "shutdown.target"),
		dbus.PropConflicts("shutdown.target"),
		property("CollectMode", "inactive-or-failed"),
		property("TimeoutStartUSec", uint64(math.MaxUint64)), // whoever waits for it can break it off
		property("Restart", "always"),
		property("RestartPreventExitStatus", statuses{Exit: []int32{0, exitFinal}, Signal: []int32{int32(unix.SIGTERM)}}),
		property("RestartUSec", uint64((100 * time.Millisecond).Microseconds())),
		property("StartLimitIntervalUSec", uint64((30 * time.Second).Microseconds())),
		property("StartLimitBurst", uint32(20)),
		property("RefuseManualStop", true),
		property("IgnoreOnIsolate", true),
		property("KillMode", "process"),
		property("SendSIGKILL", false),
		property("TimeoutStopUSec", uint64((15 * time.Second).Microseconds())),
		property("OOMScoreAdjust", int32(-1000)),
		property("LimitMEMLOCK", uint64(math.MaxUint64)),
		property("LimitNOFILE", uint64(mostFiles)),
		property("PrivateMounts", true),
	}
}

// newUnitCmd is what a unit of spawnUnit runs, each time that it is started.
func newUnitCmd() *cobra.Command {
	return configCmd("unit", func(o serveOptions) error {
		conn := caller(o.Answer)
		if conn == nil {
			return goOn(o.Device.Unit)
		}
		asked, err := hearOptions(conn)
		if err != nil { // its caller has gone, or stands still
			conn.Close()
			return goOn(o.Device.Unit)
		}
		err = begin(asked, conn)
		fmt.Fprint(conn, asked.refusal(err))
		if asked.Recover {
			return err // the device waits
		}
		return finalError{err}
	})
}

// caller returns a connection to the add that waits for its server, if one does:
// when it has ended, anybody may take the name.
func caller(name string) *net.UnixConn {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil
	}
	if refuseStranger(conn) != nil {
		conn.Close()
		return nil
	}
	return conn
}

// callerPatience is how long the caller may take to say what to serve, which it does
// at once.
const callerPatience = 10 * time.Second

// hearOptions returns what the caller wants served.
func hearOptions(conn *net.UnixConn) (o serveOptions, err error) {
	conn.SetReadDeadline(time.Now().Add(callerPatience))
	if err := json.NewDecoder(conn).Decode(&o); err != nil {
		return o, fmt.Errorf("hear what to serve: %w", err)
	}
	return o, conn.SetReadDeadline(time.Time{})
}

// begin becomes the server that the caller at the other end of conn waits for.
func begin(o serveOptions, conn *net.UnixConn) error {
	f, err := conn.File()
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil { // inherited, not closed
		return fmt.Errorf("keep the connection to the caller: %w", err)
	}
	o.Foreground, o.AnswerFD = true, int(f.Fd())
	_, err = launch(o)
	return err
}

// goOn becomes the server that continues the device of a unit whose server died. A
// disk that is missing need not appear under its old name, so it is looked for each
// time that systemd tries again.
func goOn(unit string) error {
	devices, err := readStates()
	if err != nil {
		return err
	}
	for _, d := range devices {
		if d.Unit != unit || d.damage != nil || d.alive() {
			continue
		}
		info, err := d.lookup()
		if errors.Is(err, ublk.ErrNoDevice) || err == nil && info.State == ublk.Dead {
			return finalError{fmt.Errorf("device %s has lost its disk, nothing can be continued (remove what is left: ublk-pcache del %d)", d.title(), d.ID)}
		}
		if err == nil {
			err = appear(d.PMEM)
		}
		if err != nil {
			return err
		}
		o := recovery(d, info)
		o.Foreground, o.Device.Unit = true, unit
		_, err = launch(o)
		return err
	}
	return finalError{fmt.Errorf("no device of %s waits for a server", unit)}
}
