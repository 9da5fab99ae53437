package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

// someStatus is of a cache that is in use.
func someStatus() *engine.Status {
	return &engine.Status{
		State: engine.Degraded, Segments: 64, UsedSegments: 40, WindowSegments: 8, Settings: engine.Settings{Settings: ondisk.DefaultSettings()},
		DirtyBytes: 4096, Reads: 10, Hits: 7, Misses: 3, LongestWait: 1500 * time.Millisecond, BadSegments: []uint32{3}, MoreBad: 2,
	}
}

// scraped are the metrics that a collector has now.
func scraped(t *testing.T, c *collector) string {
	t.Helper()
	all := prometheus.NewPedanticRegistry()
	all.MustRegister(c)
	file := filepath.Join(t.TempDir(), "metrics")
	if err := prometheus.WriteToTextfile(file, all); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func mustHave(t *testing.T, text string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains("\n"+text, "\n"+line+"\n") {
			t.Errorf("there is no %q in\n%s", line, text)
		}
	}
}

// TestMetrics: each device has its own, in names and units as Prometheus has them, and one without a server is down.
func TestMetrics(t *testing.T) {
	ownStateDir(t)
	served(t, func(context.Context, command) (reply, error) { return reply{Status: someStatus()}, nil })
	named, err := readState(3)
	if err != nil {
		t.Fatal(err)
	}
	named.Name = "data"
	if err := named.save(); err != nil {
		t.Fatal(err)
	}
	if err := someDevice(4).save(); err != nil {
		t.Fatal(err)
	}
	c := newCollector(time.Minute)
	mustHave(t, scraped(t, c),
		`ublk_pcache_up{device="ublkb3",name="data"} 1`,
		`ublk_pcache_up{device="ublkb4",name=""} 0`,
		`ublk_pcache_info{backing="/dev/nvme0n1",device="ublkb3",mode="writeback",name="data",pmem="/dev/dax0.0",version="`+version+`"} 1`,
		`ublk_pcache_health{device="ublkb3",health="degraded",name="data"} 1`,
		`ublk_pcache_health{device="ublkb3",health="ok",name="data"} 0`,
		`ublk_pcache_cache_bytes{device="ublkb3",name="data"} 1.073741824e+09`,
		`ublk_pcache_dirty_bytes{device="ublkb3",name="data"} 4096`,
		`ublk_pcache_longest_wait_seconds{device="ublkb3",name="data"} 1.5`,
		`ublk_pcache_write_limit_bytes_per_second{device="ublkb3",name="data"} +Inf`,
		`ublk_pcache_bad_places{device="ublkb3",name="data"} 2`,
		`ublk_pcache_reads_total{device="ublkb3",name="data"} 10`,
		`ublk_pcache_read_hits_total{device="ublkb3",name="data"} 7`,
	)
	all := prometheus.NewPedanticRegistry()
	all.MustRegister(c)
	if problems, err := testutil.GatherAndLint(all); err != nil || len(problems) > 0 {
		t.Errorf("promtool would say %v, %v", problems, err)
	}
}

// TestSilentServerIsDown: a server that hangs keeps no scrape waiting, is asked once while it does, and is up when it answers.
func TestSilentServerIsDown(t *testing.T) {
	ownStateDir(t)
	asked, answer := make(chan struct{}, 100), make(chan struct{})
	served(t, func(context.Context, command) (reply, error) {
		asked <- struct{}{}
		<-answer
		return reply{Status: someStatus()}, nil
	})
	c := newCollector(50 * time.Millisecond)
	var scrapes sync.WaitGroup
	for range 3 {
		scrapes.Go(func() { mustHave(t, scraped(t, c), `ublk_pcache_up{device="ublkb3",name=""} 0`) })
	}
	scrapes.Wait()
	<-asked
	if len(asked) > 0 {
		t.Errorf("it was asked %d times more", len(asked))
	}
	c.mu.Lock()
	q := c.mu.open[3]
	c.mu.Unlock()
	close(answer)
	<-q.answered
	c.patience = time.Minute
	mustHave(t, scraped(t, c), `ublk_pcache_up{device="ublkb3",name=""} 1`)
}

// TestExport: metrics are told to who asks for them, at a path as at a port; a socket that somebody has is not taken away.
func TestExport(t *testing.T) {
	ownStateDir(t)
	path := filepath.Join(t.TempDir(), "socket")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	_, err = listenAt("unix:" + path)
	fails(t, err, path, "somebody listens there already")
	left.Close()
	for _, address := range []string{"127.0.0.1:0", path} {
		l, err := listenAt(address)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		all := prometheus.NewRegistry()
		all.MustRegister(newCollector(time.Minute))
		go func() { ended <- export(ctx, l, all) }()
		transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial(l.Addr().Network(), l.Addr().String())
		}}
		for page, want := range map[string]int{"/metrics": 200, "/": 200, "/other": 404} {
			r, err := (&http.Client{Transport: transport}).Get("http://ublk-pcache" + page)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, r.Body)
			r.Body.Close()
			if r.StatusCode != want {
				t.Errorf("%s of %s: %s", page, address, r.Status)
			}
		}
		transport.CloseIdleConnections()
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = listenAt(file)
	fails(t, err, "listen", file)
	if text, err := os.ReadFile(file); string(text) != "text" {
		t.Errorf("a file where a socket was wanted is %q now, %v", text, err)
	}
	_, err = listenAt("nowhere")
	fails(t, err, "listen", "HOST:PORT")
}

// TestMetricsAreDocumented: docs/admin.md names every metric, and no other.
func TestMetricsAreDocumented(t *testing.T) {
	text := textOf(t, "../../docs/admin.md")
	told := namesIn(between(text, "\n## Prometheus\n", "\n##"))
	delete(told, "ublk_pcache_…")
	for name := range describedMetrics() {
		if !told[name] {
			t.Errorf("docs/admin.md does not tell of %s", name)
		}
		delete(told, name)
	}
	for name := range told {
		t.Errorf("docs/admin.md tells of %s, which there is not", name)
	}
}

// describedMetrics are those that the exporter has, and their labels.
func describedMetrics() map[string][]string {
	descs := make(chan *prometheus.Desc, 100)
	newCollector(time.Minute).Describe(descs)
	close(descs)
	labels := map[string][]string{}
	for d := range descs {
		labels[between(d.String(), `fqName: "ublk_pcache_`, `"`)] = strings.Split(between(d.String(), "variableLabels: {", "}"), ",")
	}
	return labels
}
