package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"ublk-pcache/engine"
)

// A server takes commands on a unix socket in stateDir, where only root comes:
// one connection, one JSON request, one JSON reply, both on a line.

// command is a request to a server.
type command struct {
	Do        string `json:"do"` // status, flush, set, del
	GCPercent int    `json:"gc_percent,omitempty"`
	Force     bool   `json:"force,omitempty"`
}

// reply is a server's answer. An empty Error is success.
type reply struct {
	Error  string         `json:"error,omitempty"`
	Status *engine.Status `json:"status,omitempty"`
}

const (
	// commandSize is more than any command needs, in bytes.
	commandSize = 4096
	// commandTime is how long a client may take to send one.
	commandTime = 5 * time.Second
)

// ask sends a command to the server of a device and returns its answer.
func ask(id int, cmd command) (*engine.Status, error) {
	d, err := readState(id)
	if err != nil {
		return nil, err
	}
	conn, err := net.Dial("unix", statePath(id, ".sock"))
	if err != nil {
		if d.alive() {
			return nil, fmt.Errorf("the server of device %d (pid %d) does not answer: %w", id, d.PID, err)
		}
		return nil, fmt.Errorf("the server of device %d is dead: bring it back with 'ublk-pcache recover %d', or remove the device with 'ublk-pcache del %d'", id, id, id)
	}
	defer conn.Close()
	if err := json.NewEncoder(conn).Encode(cmd); err != nil {
		return nil, fmt.Errorf("send to the server of device %d: %w", id, err)
	}
	var r reply
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return nil, fmt.Errorf("the server of device %d died before it answered: %w", id, err)
	}
	if r.Error != "" {
		return nil, errors.New(r.Error)
	}
	return r.Status, nil
}

// listen opens the control socket.
func (s *server) listen() error {
	path := statePath(s.dev.ID, ".sock")
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("open the control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go s.converse(conn)
		}
	}()
	return nil
}

func (s *server) converse(conn net.Conn) {
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(commandTime))
	var cmd command
	if err := json.NewDecoder(io.LimitReader(conn, commandSize)).Decode(&cmd); err != nil {
		json.NewEncoder(conn).Encode(reply{Error: "malformed command"})
		return
	}
	conn.SetReadDeadline(time.Time{})
	r, err := s.obey(cmd)
	if err != nil {
		r.Error = oneLine(err)
	}
	json.NewEncoder(conn).Encode(r)
	if cmd.Do == "del" && err == nil {
		close(s.gone)
	}
}

func (s *server) obey(cmd command) (reply, error) {
	switch cmd.Do {
	case "status":
		st := s.cache.Status()
		return reply{Status: &st}, nil
	case "flush":
		return reply{}, s.cache.Flush(context.Background())
	case "set":
		return reply{}, s.cache.SetGCPercent(cmd.GCPercent)
	case "del":
		return reply{}, s.remove(cmd.Force)
	default:
		return reply{}, fmt.Errorf("unknown command %q", cmd.Do)
	}
}
