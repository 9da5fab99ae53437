package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ublk-pcache/internal/bytesize"
	"ublk-pcache/ublk"
)

// listed is a device as state file and driver know it.
type listed struct {
	ID      int    `json:"id"`
	Name    string `json:"name"` // empty if it has none
	Device  string `json:"device"`
	PMEM    string `json:"pmem"`
	Backing string `json:"backing"`
	Size    int64  `json:"size_bytes"` // 0 without a device
	State   string `json:"state"`      // starting, live, dead (recover it), gone or damaged (del it)
	Version string `json:"version"`    // of the server, or of the last one; empty of one that does not tell
	PID     int    `json:"pid"`        // 0 without a server
}

// overview is a device as list --json shows it: with what is most asked for of what its
// server tells, each as in status --json.
type overview struct {
	listed
	Health       string `json:"health"` // empty without a server, silent if it does not answer
	Error        string `json:"error,omitempty"`
	Mode         string `json:"mode"`
	DirtyBytes   int64  `json:"dirty_bytes"`
	Segments     int    `json:"segments"`
	SegmentsUsed int    `json:"segments_used"`
	Reads        uint64 `json:"reads"`
	ReadHits     uint64 `json:"read_hits"`
}

// silent is the health of a cache whose server does not answer.
const silent = "silent"

// unknown is what list has for what nobody tells.
const unknown = "-"

// column is one of list.
type column struct {
	name string
	text func(o *overview) string // empty for what nobody tells
}

var columns = []column{
	{"id", func(o *overview) string { return strconv.Itoa(o.ID) }},
	{"name", func(o *overview) string { return o.Name }},
	{"device", func(o *overview) string { return o.Device }},
	{"size", func(o *overview) string { return unlessNone(o.Size > 0, bytesize.Text(o.Size)) }},
	{"state", func(o *overview) string { return o.State }},
	{"health", func(o *overview) string { return o.Health }},
	{"mode", func(o *overview) string { return o.Mode }},
	{"dirty", func(o *overview) string { return unlessNone(o.Segments > 0, bytesize.Text(o.DirtyBytes)) }},
	{"used", func(o *overview) string { return share(uint64(o.SegmentsUsed), uint64(o.Segments)) }},
	{"hits", func(o *overview) string { return share(o.ReadHits, o.Reads) }},
	{"pmem", func(o *overview) string { return o.PMEM }},
	{"backing", func(o *overview) string { return o.Backing }},
	{"version", func(o *overview) string { return o.Version }},
	{"pid", func(o *overview) string { return unlessNone(o.PID > 0, strconv.Itoa(o.PID)) }},
}

// shownColumns are those that list has unless others are asked for.
const shownColumns = "id,name,device,size,state,health,mode,dirty,used,hits,pmem,backing,version"

func unlessNone(some bool, text string) string {
	if !some {
		return ""
	}
	return text
}

// share is a part of a whole in percent, empty where there is no whole.
func share(part, whole uint64) string {
	return unlessNone(whole > 0, fmt.Sprintf("%.1f%%", 100*float64(part)/float64(whole)))
}

// chosenColumns reads what -o is given: names of columns, behind a + those that are shown in
// addition to the usual ones.
func chosenColumns(text string) (chosen []column, err error) {
	if more, also := strings.CutPrefix(text, "+"); also {
		text = shownColumns + "," + more
	}
	for name := range strings.SplitSeq(text, ",") {
		i := slices.IndexFunc(columns, func(c column) bool { return strings.EqualFold(c.name, name) })
		if i < 0 {
			return nil, usagef("-o %s: no column %q: there are %s", text, name, columnNames())
		}
		chosen = append(chosen, columns[i])
	}
	return chosen, nil
}

func columnNames() string {
	var names []string
	for _, c := range columns {
		names = append(names, c.name)
	}
	return strings.Join(names, ", ")
}

func newListCmd() *cobra.Command {
	var asJSON bool
	output := shownColumns
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show all devices, also those whose server has died",
		Long: `Show all devices, also those whose server has died, a line for each.

The columns are ` + columnNames() + `:
used is how much of the cache holds data, hits how many of the reads since the server
began needed no disk, pid the server's. A server that does not answer within some
seconds has the health ` + silent + `, and what nobody tells is ` + unknown + `.`,
		Aliases: []string{"ls"},
		Example: `  ublk-pcache list
  ublk-pcache list -o +pid
  ublk-pcache list -o name,dirty,hits`,
		Args: takes(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			shown, err := chosenColumns(output)
			if err != nil {
				return err
			}
			all, err := overviews()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), all)
			}
			return printList(cmd.OutOrStdout(), shown, all)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", output, "the columns to show, or with + in front those to add")
	cmd.RegisterFlagCompletionFunc("output", completeColumns)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array, of everything")
	return cmd
}

func printList(out io.Writer, shown []column, all []overview) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(cell func(c *column) string) {
		for i := range shown {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, cell(&shown[i]))
		}
		fmt.Fprintln(w)
	}
	row(func(c *column) string { return strings.ToUpper(c.name) })
	for _, o := range all {
		row(func(c *column) string {
			if text := c.text(&o); text != "" {
				return text
			}
			return unknown
		})
	}
	return w.Flush()
}

// allDevices are ours, in the order of their numbers.
func allDevices() ([]*device, error) {
	devices, err := readStates()
	if err != nil {
		return nil, err
	}
	devices = append(devices, withoutState(devices)...)
	slices.SortFunc(devices, func(a, b *device) int { return a.ID - b.ID })
	return devices, nil
}

// overviews asks all servers at once, so that one that does not answer makes none wait.
func overviews() ([]overview, error) {
	devices, err := allDevices()
	if err != nil {
		return nil, err
	}
	all := make([]overview, len(devices))
	var asked sync.WaitGroup
	for i, d := range devices {
		l, err := describe(d)
		if err != nil {
			return nil, err
		}
		all[i].listed = l
		if l.State == "live" {
			asked.Go(func() { all[i].ask() })
		}
	}
	asked.Wait()
	return all, nil
}

// ask adds what the server tells.
func (o *overview) ask() {
	r, err := ask(o.ID, command{Do: "status"})
	if err != nil {
		if o.Error = oneLine(err); exitStatus(err) == exitNoServer {
			o.Health = silent
		}
		return
	}
	s := r.Status
	o.Health, o.Error, o.Mode = string(s.State), s.Error, s.Settings.Mode.String()
	o.DirtyBytes, o.Segments, o.SegmentsUsed, o.Reads, o.ReadHits = s.DirtyBytes, s.Segments, s.UsedSegments, s.Reads, s.Hits
}

// withoutState are our devices without a state file. Where the driver cannot be asked
// there are none.
func withoutState(known []*device) (others []*device) {
	all, _ := ublk.List()
	for _, info := range all {
		if isOurs(info) && !slices.ContainsFunc(known, func(d *device) bool { return d.ID == info.ID }) {
			others = append(others, &device{ID: info.ID, damage: unusable(info.ID, errMissing)})
		}
	}
	return others
}

// describe finds out how a device is, from its server and from the driver.
func describe(d *device) (listed, error) {
	if d.damage != nil {
		b, err := deviceOfDriver(d.ID, false)
		if err != nil {
			return listed{}, err
		}
		if !b.alive() { // which the driver notices later
			b.PID = 0
		}
		return listed{ID: b.ID, Device: b.Device, State: "damaged", PID: b.PID}, nil
	}
	l := listed{ID: d.ID, Name: d.Name, Device: d.Device, PMEM: d.PMEM, Backing: d.Backing, PID: d.PID, Version: d.Version}
	alive := d.alive()
	if !alive {
		l.PID = 0
	}
	info, err := d.lookup()
	l.Size = info.Size
	switch {
	case errors.Is(err, ublk.ErrNoDevice) && alive:
		l.State = "starting"
	case errors.Is(err, ublk.ErrNoDevice):
		l.State = "gone"
	case err != nil:
		return l, err
	case alive && info.State == ublk.Live:
		l.State = "live"
	case alive:
		l.State = "starting"
	default:
		l.State = "dead"
	}
	return l, nil
}
