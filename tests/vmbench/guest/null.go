package main

import (
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"ublk-pcache/ublk"
)

// null answers every request at once: what is left is the driver, the ring and the loop.
type null struct{ done []ublk.Completion }

func (n *null) Submit(r *ublk.Request) { n.done = append(n.done, ublk.Completion{Tag: r.Tag}) }

func (n *null) Turn(done []ublk.Completion) []ublk.Completion {
	done = append(done, n.done...)
	n.done = n.done[:0]
	return done
}

func serveNull() {
	serve(ublk.Config{ID: -1, Queues: 2, Depth: 128, Size: 4 << 30, BlockSize: 512, ChunkSize: 4 << 20},
		func(*ublk.Queue) ublk.Handler { return &null{} })
}

// serve serves a device, whose path it prints, until it is told to end.
func serve(c ublk.Config, handler func(*ublk.Queue) ublk.Handler) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM)
	d, err := ublk.Add(c, handler, func(err error) { panic(err) })
	if err == nil {
		fmt.Println(d.Path())
		<-ended
		if err = d.Stop(true); err == nil {
			err = d.Delete()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "measure:", err)
		os.Exit(1)
	}
}
