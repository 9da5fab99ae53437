package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
)

// Metrics for Prometheus: what status tells, in the names and units that its users expect
// (base units, _total of what only grows). What grows begins anew with each server, which
// rate() knows of.
//
// A scrape has some seconds, and what a server that hangs is asked ends later (ask.go). So each
// device is asked by itself, one that has not answered in time is down for this scrape, and while
// a question is open nobody asks another.

// scrapePatience is how long a server may take: below the 10 s that a scrape has by default.
const scrapePatience = 5 * time.Second

// The labels of each metric: the kernel's name of the device, and its owner's, which may be empty.
var labels = []string{"device", "name"}

// metric is one that a server tells.
type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(s *engine.Status) float64
}

func newDesc(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc("ublk_pcache_"+name, help, slices.Concat(labels, more), nil)
}

func gauge(name, help string, value func(s *engine.Status) float64) metric {
	return metric{newDesc(name, help), prometheus.GaugeValue, value}
}

func counter(name, help string, value func(s *engine.Status) uint64) metric {
	return metric{newDesc(name+"_total", help), prometheus.CounterValue, func(s *engine.Status) float64 { return float64(value(s)) }}
}

var (
	descInfo   = newDesc("info", "What the device is made of, and by which version it is served.", "pmem", "backing", "mode", "version")
	descUp     = newDesc("up", "Whether the server has answered.")
	descHealth = newDesc("health", "1 for the state of the cache: ok, degraded or failed.", "health")
	descSize   = newDesc("size_bytes", "Size of the device.")
)

var healths = []engine.State{engine.Healthy, engine.Degraded, engine.Failed}

var metrics = []metric{
	gauge("cache_bytes", "Size of all segments of the cache.", func(s *engine.Status) float64 { return float64(s.Segments) * ondisk.SegmentSize }),
	gauge("used_bytes", "Size of the segments that hold data or log.", func(s *engine.Status) float64 { return float64(s.UsedSegments) * ondisk.SegmentSize }),
	gauge("window_bytes", "Of these, size of the segments that hold what misses have read.", func(s *engine.Status) float64 { return float64(s.WindowSegments) * ondisk.SegmentSize }),
	gauge("dirty_bytes", "Data that the backing device does not have yet.", func(s *engine.Status) float64 { return float64(s.DirtyBytes) }),
	gauge("clean_bytes", "Data that the backing device has as well.", func(s *engine.Status) float64 { return float64(s.CleanBytes) }),
	gauge("unzeroed_bytes", "What is to be zeroed on the backing device yet.", func(s *engine.Status) float64 { return float64(s.ZeroBytes) }),
	gauge("index_bytes", "Memory of the index.", func(s *engine.Status) float64 { return float64(s.IndexBytes) }),
	gauge("extents", "Extents in the index.", func(s *engine.Status) float64 { return float64(s.Extents) }),
	gauge("waiting_requests", "Requests that wait for space in the cache.", func(s *engine.Status) float64 { return float64(s.Waiting) }),
	gauge("longest_wait_seconds", "The longest that a request has waited for space.", func(s *engine.Status) float64 { return s.LongestWait.Seconds() }),
	gauge("write_limit_bytes_per_second", "What writers are slowed to, +Inf where they are not.", func(s *engine.Status) float64 {
		if s.WriteLimit == 0 {
			return math.Inf(1)
		}
		return float64(s.WriteLimit)
	}),
	gauge("bad_segments", "Segments that are not used any more, since their memory is bad.", func(s *engine.Status) float64 { return float64(len(s.BadSegments)) }),
	gauge("bad_places", "Places of bad memory that were met.", func(s *engine.Status) float64 { return float64(len(s.BadPlaces) + s.MoreBad) }),

	counter("reads", "Reads.", func(s *engine.Status) uint64 { return s.Reads }),
	counter("read_bytes", "Bytes that were read.", func(s *engine.Status) uint64 { return s.ReadBytes }),
	counter("read_hits", "Reads that needed no backing device.", func(s *engine.Status) uint64 { return s.Hits }),
	counter("read_misses", "Reads that needed it.", func(s *engine.Status) uint64 { return s.Misses }),
	counter("window_hits", "Of the hits, those in the window.", func(s *engine.Status) uint64 { return s.WindowHits }),
	counter("ghost_hits", "Of the misses, those of what had just left the window.", func(s *engine.Status) uint64 { return s.GhostHits }),
	counter("promoted_bytes", "Bytes that were kept from the window since they were hit.", func(s *engine.Status) uint64 { return s.Promoted }),
	counter("again_bytes", "Bytes that were kept at the end of the log since they were hit.", func(s *engine.Status) uint64 { return s.Again }),
	counter("bypassed_bytes", "Bytes that were read from the backing device and not kept.", func(s *engine.Status) uint64 { return s.Bypassed }),
	counter("writes", "Writes.", func(s *engine.Status) uint64 { return s.Writes }),
	counter("written_bytes", "Bytes that were written.", func(s *engine.Status) uint64 { return s.WriteBytes }),
	counter("direct_writes", "Of the writes, those that went to the backing device alone.", func(s *engine.Status) uint64 { return s.DirectWrites }),
	counter("direct_write_errors", "Of these, those that failed.", func(s *engine.Status) uint64 { return s.DirectWriteErrors }),
	counter("flushes", "Flushes.", func(s *engine.Status) uint64 { return s.Flushes }),
	counter("zeros", "Discards and writes of zeroes.", func(s *engine.Status) uint64 { return s.Zeros }),
	counter("written_back_bytes", "Bytes that were written to the backing device.", func(s *engine.Status) uint64 { return s.WrittenBack }),
	counter("memory_errors", "Accesses of the cache that failed.", func(s *engine.Status) uint64 { return s.MemoryErrors }),
	counter("backing_read_errors", "Reads of the backing device that failed.", func(s *engine.Status) uint64 { return s.DiskReadErrors }),
	counter("writeback_errors", "Rounds of write-back that failed.", func(s *engine.Status) uint64 { return s.WritebackErrors }),
}

// question is one to a server, with all who wait for its answer.
type question struct {
	asked    time.Time
	answered chan struct{}
	status   *engine.Status // once it is answered; nil if there was no answer
}

// collector is all devices at the time of a scrape (prometheus.Collector). It asks state files and
// servers alone, for which no capability is needed. Any goroutine.
type collector struct {
	patience time.Duration
	mu       struct {
		sync.Mutex
		open map[int]*question // by device
	}
}

func newCollector(patience time.Duration) *collector {
	c := &collector{patience: patience}
	c.mu.open = map[int]*question{}
	return c
}

func (c *collector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descInfo, descUp, descHealth, descSize} {
		to <- d
	}
	for _, m := range metrics {
		to <- m.desc
	}
}

func (c *collector) Collect(to chan<- prometheus.Metric) {
	devices, err := readStates()
	if err != nil {
		to <- prometheus.NewInvalidMetric(descUp, err)
		return
	}
	var asked sync.WaitGroup
	for _, d := range devices {
		asked.Go(func() { c.collectDevice(to, d) })
	}
	asked.Wait()
}

func (c *collector) collectDevice(to chan<- prometheus.Metric, d *device) {
	of := []string{node + strconv.Itoa(d.ID), d.Name}
	put := func(desc *prometheus.Desc, kind prometheus.ValueType, value float64, more ...string) {
		to <- prometheus.MustNewConstMetric(desc, kind, value, slices.Concat(of, more)...)
	}
	if bytes := sizeOf(d.ID); bytes > 0 {
		put(descSize, prometheus.GaugeValue, float64(bytes))
	}
	s := c.status(d.ID)
	if s == nil {
		put(descInfo, prometheus.GaugeValue, 1, d.PMEM, d.Backing, "", d.Version)
		put(descUp, prometheus.GaugeValue, 0)
		return
	}
	put(descInfo, prometheus.GaugeValue, 1, d.PMEM, d.Backing, s.Settings.Mode.String(), d.Version)
	put(descUp, prometheus.GaugeValue, 1)
	for _, h := range healths {
		is := 0.0
		if s.State == h {
			is = 1
		}
		put(descHealth, prometheus.GaugeValue, is, string(h))
	}
	for _, m := range metrics {
		put(m.desc, m.kind, m.value(s))
	}
}

// sizeOf is that of a device in bytes, 0 if there is none.
func sizeOf(id int) int64 {
	text, _ := os.ReadFile(fmt.Sprintf("/sys/block/%s%d/size", node, id))
	sectors, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return sectors << 9
}

// status is what the server of a device answers in time, nil if it does not.
func (c *collector) status(id int) *engine.Status {
	c.mu.Lock()
	q := c.mu.open[id]
	if q == nil {
		q = &question{asked: time.Now(), answered: make(chan struct{})}
		c.mu.open[id] = q
		go c.ask(id, q)
	}
	c.mu.Unlock()
	select {
	case <-q.answered:
		return q.status
	case <-time.After(c.patience - time.Since(q.asked)):
		return nil
	}
}

func (c *collector) ask(id int, q *question) {
	// A server that is being replaced does not answer, and the next one does.
	for range 2 {
		r, err := ask(id, command{Do: "status"})
		if err == nil {
			q.status = r.Status
		}
		if !errors.Is(err, errNoAnswer) {
			break
		}
	}
	c.mu.Lock()
	delete(c.mu.open, id)
	c.mu.Unlock()
	close(q.answered)
}
