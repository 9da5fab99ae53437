package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// The exporter answers whoever can reach its address, so it tells numbers, names and paths, takes
// nothing, and holds no client for long.

const (
	// maxScrapes are answered at a time: more than anybody has of Prometheus.
	maxScrapes = 4
	// clientTime is how long a client may take to ask, and to take an answer.
	clientTime = 10 * time.Second
	// idleTime is how long a connection may rest between scrapes, which are a minute apart.
	idleTime = 2 * time.Minute
)

func newExporterCmd() *cobra.Command {
	var listen, textfile string
	cmd := &cobra.Command{
		Use:   "exporter --listen ADDRESS",
		Short: "Tell Prometheus how all caches are",
		Long: `Tell Prometheus how all caches are: http://ADDRESS/metrics has what status tells,
of all devices. ADDRESS is HOST:PORT, and what can reach it can read it; or the
path of a unix socket, which root alone and the group of the process can use.
It needs root's files and no capability; systemd/ublk-pcache-exporter.service
runs it with no more than that.

Where node_exporter runs, its textfile collector can be given them: with
--textfile they are written once, to a file that appears whole.`,
		Example: `  ublk-pcache exporter --listen 127.0.0.1:9965
  ublk-pcache exporter --textfile /var/lib/node_exporter/ublk-pcache.prom`,
		Args: takes(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all := prometheus.NewRegistry()
			all.MustRegister(newCollector(scrapePatience))
			switch {
			case (listen == "") == (textfile == ""):
				return usagef("give --listen ADDRESS or --textfile FILE: %s", line(cmd))
			case textfile != "":
				if err := prometheus.WriteToTextfile(textfile, all); err != nil {
					return fmt.Errorf("write the metrics: %w", err)
				}
				return nil
			}
			l, err := listenAt(listen)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "ublk-pcache: metrics at %v\n", l.Addr())
			daemon.SdNotify(false, daemon.SdNotifyReady)
			ctx, stop := untilBrokenOff()
			defer stop()
			return export(ctx, l, all)
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "", "HOST:PORT, or the path of a unix socket")
	f.StringVar(&textfile, "textfile", "", "write them to a file, and end")
	return cmd
}

// listenAt listens at a path or at HOST:PORT.
func listenAt(address string) (net.Listener, error) {
	path, isPath := strings.CutPrefix(address, "unix:")
	if !isPath && !strings.Contains(address, "/") {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen: %w (give HOST:PORT of this machine that is free, or the path of a socket)", err)
		}
		return l, nil
	}
	// The socket that a former one has left is in the way; one that somebody has, and anything
	// else, is not taken.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return nil, fmt.Errorf("listen: %s: somebody listens there already (end that, or give another)", path)
		} else if errors.Is(err, unix.ECONNREFUSED) {
			os.Remove(path)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

// export serves the metrics until ctx ends.
func export(ctx context.Context, l net.Listener, all prometheus.Gatherer) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(all, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes}))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ublk-pcache: see /metrics")
	})
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: clientTime, ReadTimeout: clientTime, WriteTimeout: scrapePatience + clientTime, IdleTimeout: idleTime,
		MaxHeaderBytes: 8 << 10,
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		ending, cancel := context.WithTimeout(context.Background(), scrapePatience)
		defer cancel()
		if server.Shutdown(ending) != nil {
			server.Close() // who still asks can ask again
		}
		close(stopped)
	})
	err := server.Serve(l)
	if !stop() {
		<-stopped
		return nil
	}
	return err
}
