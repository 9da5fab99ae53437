package main

import (
	"strings"
	"testing"
)

// TestListColumns: each column says what its head says, and what nobody tells is marked as that.
func TestListColumns(t *testing.T) {
	live := overview{
		listed: listed{ID: 3, Name: "data", Device: "/dev/ublkb3", PMEM: "/dev/dax0.0", Backing: "/dev/sdb", Size: 3 << 30, State: "live", Version: "0.1.0", PID: 77},
		Health: "ok", Mode: "writeback", DirtyBytes: 5 << 20, Segments: 64, SegmentsUsed: 48, Reads: 1000, ReadHits: 999,
	}
	dead := overview{listed: listed{ID: 4, PMEM: "/dev/dax1.0", Backing: "/dev/sdc", State: "dead"}}
	for _, c := range []struct{ columns, head, live, dead string }{
		{shownColumns, "ID NAME DEVICE SIZE STATE HEALTH MODE DIRTY USED HITS PMEM BACKING VERSION",
			"3 data /dev/ublkb3 3.0_GiB live ok writeback 5.0_MiB 75.0% 99.9% /dev/dax0.0 /dev/sdb 0.1.0",
			"4 - - - dead - - - - - /dev/dax1.0 /dev/sdc -"},
		{"pid", "PID", "77", "-"},
		{"Hits,id", "HITS ID", "99.9% 3", "- 4"},
	} {
		shown, err := chosenColumns(c.columns)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := printList(&out, shown, []overview{live, dead}); err != nil {
			t.Fatal(err)
		}
		var got []string
		for line := range strings.Lines(strings.ReplaceAll(out.String(), " GiB", "_GiB")) {
			got = append(got, strings.Join(strings.Fields(strings.ReplaceAll(line, " MiB", "_MiB")), " "))
		}
		if want := []string{c.head, c.live, c.dead}; strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("-o %s shows\n%s", c.columns, out.String())
		}
	}
}

// TestChosenColumns: + adds to those that are shown anyhow, and a column that is not there is refused with those that are.
func TestChosenColumns(t *testing.T) {
	usual, err := chosenColumns(shownColumns)
	if err != nil {
		t.Fatal(err)
	}
	more, err := chosenColumns("+pid")
	if err != nil || len(more) != len(usual)+1 || more[len(usual)].name != "pid" {
		t.Errorf("+pid chooses %d columns, %v", len(more), err)
	}
	for _, text := range []string{"", "id,", "id,colour", "+", "id,+pid", " id"} {
		_, err := chosenColumns(text)
		fails(t, err, "no column", "id, name, device", "pid")
	}
}
