package main

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ublk-pcache/engine"
	"ublk-pcache/internal/bytesize"
	"ublk-pcache/pmem"
	"ublk-pcache/ublk"
)

// statusJSON is what status --json prints. Fields are only ever added. Sizes
// are in bytes, positions "segment:offset"; counts begin with the server.
type statusJSON struct {
	listed
	Persistence     string `json:"persistence"` // persistent, on-sync, volatile, unknown
	Doubt           string `json:"persistence_doubt,omitempty"`
	Health          string `json:"health"` // ok, degraded, failed
	Error           string `json:"error,omitempty"`
	Log             string `json:"log"` // where the server's is; empty if it does not tell
	Segments        int    `json:"segments"`
	SegmentsUsed    int    `json:"segments_used"`
	SegmentsWindow  int    `json:"segments_window"` // of those
	GCPercent       int    `json:"gc_percent"`
	Settings        values `json:"settings"` // as set takes them
	DataCRC         bool   `json:"data_crc"`
	KeyHead         string `json:"key_head"`
	DirtyTail       string `json:"dirty_tail"`
	KeyTail         string `json:"key_tail"`
	DirtyBytes      int64  `json:"dirty_bytes"`
	CleanBytes      int64  `json:"clean_bytes"`
	Extents         int64  `json:"extents"`
	IndexBytes      int64  `json:"index_bytes"`
	Reads           uint64 `json:"reads"`
	ReadBytes       uint64 `json:"read_bytes"`
	ReadHits        uint64 `json:"read_hits"`
	ReadMisses      uint64 `json:"read_misses"`
	WindowHits      uint64 `json:"window_hits"`    // of the hits
	GhostHits       uint64 `json:"ghost_hits"`     // of the misses
	BypassedBytes   uint64 `json:"bypassed_bytes"` // of the misses, those of streams
	PromotedBytes   uint64 `json:"promoted_bytes"` // from the window to the log
	AgainBytes      uint64 `json:"again_bytes"`    // from the end of the log to its head
	Writes          uint64 `json:"writes"`
	WriteBytes      uint64 `json:"write_bytes"`
	Flushes         uint64 `json:"flushes"`
	Zeros           uint64 `json:"zeros"`      // discards and writes of zeroes
	ZeroBytes       int64  `json:"zero_bytes"` // to be zeroed on the backing device
	WaitingRequests int    `json:"waiting_requests"`
	LongestWaitMS   int64  `json:"longest_wait_ms"`
	DirectWrites    uint64 `json:"direct_writes"`       // of those, what went to the disk alone
	DirectErrors    uint64 `json:"direct_write_errors"` // of these
	WriteLimit      int64  `json:"write_limit_bytes_per_second"`
	WrittenBack     uint64 `json:"written_back_bytes"`
	MemoryErrors    uint64 `json:"memory_errors"`
	DiskReadErrors  uint64 `json:"disk_read_errors"`
	WritebackErrors uint64 `json:"writeback_errors"`

	BadSegments []uint32    `json:"bad_segments"`
	BadMemory   []badMemory `json:"bad_memory"` // the first that were met
	MoreBad     int         `json:"bad_memory_more"`
}

// silentJSON is what status --json prints if no server tells more.
type silentJSON struct {
	listed
	Error string `json:"error"`
}

// badMemory is a place of the cache that could not be read, or not be stored to.
type badMemory struct {
	What       string `json:"what"`
	Offset     int64  `json:"offset"`
	Length     int64  `json:"length"`
	Segment    int    `json:"segment"` // -1 for none
	DiskOffset int64  `json:"disk_offset"`
	DiskLength int64  `json:"disk_length"` // 0 for what is no data
	Error      string `json:"error"`
}

func newStatusCmd() *cobra.Command {
	var asJSON, dm bool
	cmd := &cobra.Command{
		Use:   "status [ID]",
		Short: "Show how a cache is, or how all are",
		Example: `  ublk-pcache status
  ublk-pcache status data --json`,
	}
	arguments := givenDevice(cmd)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		switch args = arguments(args); {
		case dm && asJSON:
			return usagef("give --json or --dm: one or the other is printed")
		case dm && len(args) == 0:
			return usagef("give the device: --dm tells of one")
		}
		return takes(0, 1)(cmd, args)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		out := cmd.OutOrStdout()
		if args = arguments(args); len(args) == 0 {
			return printAll(out, asJSON)
		}
		id, err := deviceID(args[0])
		if err != nil {
			return err
		}
		if dm {
			return printDM(out, id)
		}
		return tellDevice(out, asJSON, id)
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object, or without ID an array of them")
	cmd.Flags().BoolVar(&dm, "dm", false, "print the line that 'dmsetup status' prints for dm-pcache")
	return cmd
}

// printAll prints the status of all devices, which are asked at once.
func printAll(out io.Writer, asJSON bool) error {
	devices, err := allDevices()
	if err != nil {
		return err
	}
	found := make([]told, len(devices))
	wrong := make([]error, len(devices))
	var asked sync.WaitGroup
	for i, d := range devices {
		asked.Go(func() { found[i], wrong[i] = statusOf(d.ID) })
	}
	asked.Wait()
	all := []told{}
	for i, s := range found {
		if s != nil {
			all = append(all, s)
		} else if errors.Is(wrong[i], errNoDevice) {
			wrong[i] = nil // it has been removed meanwhile
		}
	}
	if asJSON {
		return errors.Join(append(wrong, printJSON(out, all))...)
	}
	for i, s := range all {
		if i > 0 {
			fmt.Fprintln(out)
		}
		wrong = append(wrong, s.print(out))
	}
	return errors.Join(wrong...)
}

// statusOf asks the server of a device. One that does not answer, or a state file that is no
// good, is an error, and the rest is told all the same.
func statusOf(id int) (told, error) {
	r, unanswered := ask(id, command{Do: "status"})
	d, broken := readState(id)
	if errors.Is(broken, errDamaged) {
		d = &device{ID: id, damage: broken}
	} else if broken != nil {
		return nil, broken
	}
	l, err := describe(d)
	if err != nil {
		return nil, err
	}
	if unanswered != nil {
		return &silentJSON{l, oneLine(unanswered)}, unanswered
	}
	s := newStatusJSON(l, r.Status)
	s.Persistence, s.Doubt, s.Log = string(r.Persistence), r.Doubt, r.Log
	if r.LogLevel != "" {
		s.Settings[logLevelName] = r.LogLevel
	}
	// The server may not see the file system below a loop device or an overlay.
	if p, why := pmem.PersistenceOf(d.PMEM); p == pmem.Volatile {
		s.Persistence, s.Doubt = string(p), why
	}
	return s, broken
}

func newStatusJSON(l listed, s *engine.Status) *statusJSON {
	bad := []badMemory{}
	for _, p := range s.BadPlaces {
		bad = append(bad, badMemory{p.What, p.Off, p.Len, p.Segment, p.DiskOff, p.DiskLen, p.Err})
	}
	return &statusJSON{
		BadSegments: append([]uint32{}, s.BadSegments...), BadMemory: bad, MoreBad: s.MoreBad,
		listed: l, Health: string(s.State), Error: s.Error,
		Segments: s.Segments, SegmentsUsed: s.UsedSegments, SegmentsWindow: s.WindowSegments, GCPercent: s.Settings.GCPercent, Settings: textsOf(&s.Settings), DataCRC: s.DataCRC,
		KeyHead: s.KeyHead.String(), DirtyTail: s.DirtyTail.String(), KeyTail: s.KeyTail.String(),
		DirtyBytes: s.DirtyBytes, CleanBytes: s.CleanBytes, Extents: s.Extents, IndexBytes: s.IndexBytes,
		Reads: s.Reads, ReadBytes: s.ReadBytes, ReadHits: s.Hits, ReadMisses: s.Misses,
		WindowHits: s.WindowHits, GhostHits: s.GhostHits, BypassedBytes: s.Bypassed, PromotedBytes: s.Promoted, AgainBytes: s.Again,
		Writes: s.Writes, WriteBytes: s.WriteBytes, Flushes: s.Flushes,
		Zeros: s.Zeros, ZeroBytes: s.ZeroBytes,
		DirectWrites: s.DirectWrites, DirectErrors: s.DirectWriteErrors, WriteLimit: s.WriteLimit,
		WaitingRequests: s.Waiting, LongestWaitMS: s.LongestWait.Milliseconds(), WrittenBack: s.WrittenBack,
		MemoryErrors: s.MemoryErrors, DiskReadErrors: s.DiskReadErrors, WritebackErrors: s.WritebackErrors,
	}
}

// rows begins a table, with what list knows.
func (l *listed) rows(out io.Writer) (row func(name, format string, args ...any), flush func() error) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row = func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	server := "no server"
	if l.PID != 0 {
		server = fmt.Sprintf("server %d, version %s", l.PID, orUnknown(l.Version))
	}
	if l.Name != "" {
		row("name", "%s", l.Name)
	}
	row("device", "%s, %s%s, %s", l.Device, unlessNone(l.Size > 0, bytesize.Text(l.Size)+", "), l.State, server)
	row("pmem", "%s", l.PMEM)
	row("backing", "%s", l.Backing)
	return row, w.Flush
}

func (s *silentJSON) print(out io.Writer) error {
	_, flush := s.rows(out)
	return flush()
}

func (s *statusJSON) print(out io.Writer) error {
	row, flush := s.rows(out)
	row("persistence", "%s", s.Persistence)
	if s.Doubt != "" {
		row("", "%s", s.Doubt)
	}
	row("health", "%s", s.Health)
	if s.Error != "" {
		row("", "%s", s.Error)
	}
	row("segments", "%d of %d used, %d of them by the window, the others collected at %d %%", s.SegmentsUsed, s.Segments, s.SegmentsWindow, s.GCPercent)
	row("settings", "%s", s.Settings.line())
	row("data", "%s dirty, %s to be zeroed, %s clean, checksums %s", bytesize.Text(s.DirtyBytes), bytesize.Text(s.ZeroBytes), bytesize.Text(s.CleanBytes), onOff(s.DataCRC))
	row("log", "head %s, dirty tail %s, key tail %s", s.KeyHead, s.DirtyTail, s.KeyTail)
	row("index", "%d extents in %s", s.Extents, bytesize.Text(s.IndexBytes))
	row("reads", "%d (%s), %d hits, %d of them in the window, %d misses", s.Reads, bytesize.Text(int64(s.ReadBytes)), s.ReadHits, s.WindowHits, s.ReadMisses)
	row("kept", "%s from the window, %s at the log's end, %d misses had just left, %s of streams passed by", bytesize.Text(int64(s.PromotedBytes)), bytesize.Text(int64(s.AgainBytes)), s.GhostHits, bytesize.Text(int64(s.BypassedBytes)))
	row("writes", "%d (%s), %d of them around the cache, %d flushes, %d zeroed ranges", s.Writes, bytesize.Text(int64(s.WriteBytes)), s.DirectWrites, s.Flushes, s.Zeros)
	if s.WriteLimit > 0 {
		row("", "slowed to %s a second, since the cache is filling up", bytesize.Text(s.WriteLimit))
	}
	row("written back", "%s", bytesize.Text(int64(s.WrittenBack)))
	row("waiting", "%d requests for space, longest so far %v", s.WaitingRequests, time.Duration(s.LongestWaitMS)*time.Millisecond)
	if n := len(s.BadSegments); n > 0 {
		row("bad segments", "%d, not used any more: %v", n, s.BadSegments)
	}
	for _, p := range s.BadMemory {
		where := fmt.Sprintf("%s at byte %d", p.What, p.Offset)
		if p.DiskLength > 0 {
			where += fmt.Sprintf(", bytes %d to %d of the device", p.DiskOffset, p.DiskOffset+p.DiskLength)
		}
		row("bad memory", "%s: %s", where, p.Error)
	}
	if s.Log != "" {
		row("its log", "%s", s.Log)
	}
	row("errors", "%d pmem, %d backing reads, %d write-back, %d writes around the cache", s.MemoryErrors, s.DiskReadErrors, s.WritebackErrors, s.DirectErrors)
	return flush()
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// printDM prints the status of dm-pcache: start, length and target as dmsetup
// adds them, then the fields of dm_pcache_status (drivers/md/dm-pcache/
// dm_pcache.c, Linux 7.3). The superblock's flags are 0 on every machine that
// this runs on. The segments of the window are not among the used ones: dm-pcache
// has no window, and would find them free.
func printDM(out io.Writer, id int) error {
	r, err := ask(id, command{Do: "status"})
	if err != nil {
		return err
	}
	info, err := ublk.Lookup(id)
	if err != nil {
		return err
	}
	s := r.Status
	_, err = fmt.Fprintf(out, "0 %d pcache 0 %d %d %d %d %x %v %v %v\n", info.Size>>9,
		s.Segments, s.Segments, s.UsedSegments-s.WindowSegments, s.Settings.GCPercent, uint32(s.InfoFlags), s.KeyHead, s.DirtyTail, s.KeyTail)
	return err
}
