package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"
	"go.uber.org/zap/buffer"
	"go.uber.org/zap/zapcore"

	"ublk-pcache/engine"
)

// A server whose standard error is the journal sends it entries in its own protocol
// (systemd.io/JOURNAL_NATIVE_PROTOCOL), a datagram of fields for each. So what somebody
// looks for is found by priority, device or message id, and not by words, which may change.
//
// The datagrams are sent from here and not by go-systemd's journal.Send. Its socket is not
// connected, and the kernel calls such a one writable however full the journal's queue is
// (net/unix/af_unix.c, unix_dgram_poll; 6.18): while the journal stands still, Send tries again
// and again and takes a whole processor. A connected one sleeps. What is too large Send puts
// into /dev/shm, which a server has left; and no test can give it another journal.

// journalDir is where the journal of this process listens; a unit with LogNamespace= has that of
// its namespace mounted there. A variable, for tests.
var journalDir = "/run/systemd/journal"

// An event is what kind of thing an entry tells of, beside those that the engine has.
type event int

const (
	serverStarted   event = iota // with a new device
	serverRecovered              // a device whose server had died
	serverUpgraded               // it took the place of another
	upgradeFailed                // and the device waits
	serverFailed                 // and the device waits
	endRefused                   // a server that was told to end goes on
	deviceRemoved                // and its server ends
	deviceStopped                // by another process
	settingsChanged
	events // how many there are
)

// The message ids, of which docs/admin.md tells. They never change: who waits for one would
// not hear of it again.
var (
	messageIDs = [events]string{
		serverStarted:   "10e572d683c948c0883a0acb30b4bd39",
		serverRecovered: "80536241b51e4609908b16547f2cf50f",
		serverUpgraded:  "f9b7d1f71ed043b0a3dfc3340d5702c1",
		upgradeFailed:   "eb7d1cb315f54650bb85cdeaa97bc43e",
		serverFailed:    "b6b244fd26dd45dd9a6461216d8f64ae",
		endRefused:      "8ca3956acbef432b8041c8b7ac0a67a1",
		deviceRemoved:   "266f1382ce3e47848ca64b6eff5fbb4d",
		deviceStopped:   "a05ffaad92174cd285fbc29d297cd79b",
		settingsChanged: "9a4487aceb334917bb971604659f05c5",
	}
	engineIDs = [engine.Events]string{
		engine.WritebackFails:     "317801e5dbaa48809a17c4a6d53b6bd4",
		engine.WritebackDefers:    "f8f892ac0d0944d185ba361da45ef931",
		engine.WritebackWorks:     "e4336aca0d524d64ba4eee8c13dcb364",
		engine.BadMemory:          "4258073d95f948e6aa5a13430af069e8",
		engine.LogDamaged:         "95169b82a77c4d3688b1905a31393846",
		engine.LogMended:          "7a60d6c876a048a39dd94f31fb44421c",
		engine.WritesFail:         "7beec1417996437fbf9dafa513a08b0a",
		engine.PowerCutTookWrites: "d4443d39c37542579503fda39e9a4430",
		engine.DiskWasChanged:     "614f62ee065e4bf483543109d3339324",
	}
)

const messageIDKey = "MESSAGE_ID"

// withID is a field that the journal alone gets: elsewhere it would only take room.
func withID(id string) zap.Field {
	return zap.Field{Key: messageIDKey, Type: zapcore.SkipType, String: id}
}

func (e event) id() zap.Field { return withID(messageIDs[e]) }

// fieldPrefix begins the names of the fields that are ours.
const fieldPrefix = "UBLK_PCACHE_"

// journalEncoder makes datagrams of entries. No logger has fields of its own, so it takes those
// of an entry alone.
type journalEncoder struct {
	zapcore.Encoder                 // of the text
	fields          zapcore.Encoder // of the fields, in JSON
	device          *device         // whose each entry is
}

func newJournalEncoder(config zapcore.EncoderConfig, d *device) zapcore.Encoder {
	// The journal has them for itself.
	config.TimeKey, config.LevelKey, config.CallerKey = "", "", ""
	config.ConsoleSeparator = " "
	text := zapcore.NewConsoleEncoder(config)
	config.MessageKey = ""
	return journalEncoder{text, zapcore.NewJSONEncoder(config), d}
}

func (j journalEncoder) Clone() zapcore.Encoder {
	return journalEncoder{j.Encoder.Clone(), j.fields.Clone(), j.device}
}

// EncodeEntry implements zapcore.Encoder.
func (j journalEncoder) EncodeEntry(e zapcore.Entry, fields []zapcore.Field) (*buffer.Buffer, error) {
	text, err := j.Encoder.EncodeEntry(e, fields)
	if err != nil {
		return nil, err
	}
	defer text.Free()
	encoded, err := j.fields.EncodeEntry(e, fields)
	if err != nil {
		return nil, err
	}
	defer encoded.Free()
	ours := map[string]json.RawMessage{}
	if err := json.Unmarshal(encoded.Bytes(), &ours); err != nil {
		return nil, fmt.Errorf("fields of an entry: %w", err)
	}
	out := datagrams.Get()
	put := func(name, value string) {
		if value != "" {
			appendField(out, name, value)
		}
	}
	put("MESSAGE", strings.TrimSuffix(text.String(), "\n"))
	put("PRIORITY", strconv.Itoa(priority(e.Level)))
	put("SYSLOG_IDENTIFIER", "ublk-pcache")
	if e.Caller.Defined {
		put("CODE_FILE", e.Caller.File)
		put("CODE_LINE", strconv.Itoa(e.Caller.Line))
		put("CODE_FUNC", e.Caller.Function)
	}
	for _, f := range fields {
		if f.Key == messageIDKey {
			put(messageIDKey, f.String)
		}
	}
	put(fieldPrefix+"DEVICE", nodeDir+node+strconv.Itoa(j.device.ID))
	put(fieldPrefix+"NAME", j.device.Name)
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		var value string
		if json.Unmarshal(ours[name], &value) != nil { // it is no string
			value = string(ours[name])
		}
		put(fieldPrefix+strings.ToUpper(name), value)
	}
	return out, nil
}

var datagrams = buffer.NewPool()

// appendField adds a field to a datagram: what has an end of line in it with its length.
func appendField(to *buffer.Buffer, name, value string) {
	to.AppendString(name)
	if strings.Contains(value, "\n") {
		to.AppendString("\n")
		var length [8]byte
		binary.LittleEndian.PutUint64(length[:], uint64(len(value)))
		to.Write(length[:])
	} else {
		to.AppendString("=")
	}
	to.AppendString(value)
	to.AppendString("\n")
}

// priority is syslog's for a level (syslog(3)).
func priority(l zapcore.Level) int {
	switch {
	case l <= zap.DebugLevel:
		return 7
	case l == zap.InfoLevel:
		return 6
	case l == zap.WarnLevel:
		return 4
	}
	return 3
}

// journalSocket sends to the journal. While that does not take what is there, a write waits.
type journalSocket struct {
	path string
	conn *net.UnixConn // nil: not connected
}

func (j *journalSocket) connect() (err error) {
	j.conn, err = net.DialUnix("unixgram", nil, &net.UnixAddr{Name: j.path, Net: "unixgram"})
	return err
}

// write sends a datagram. If the journal's socket is another by now, it goes to that.
func (j *journalSocket) write(entry []byte) error {
	if j.conn != nil {
		if _, err := j.conn.Write(entry); err == nil {
			return nil
		}
		j.conn.Close()
	}
	if err := j.connect(); err != nil {
		return err
	}
	_, err := j.conn.Write(entry)
	return err
}
