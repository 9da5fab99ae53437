package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEstimate: of a trace that reads 16 MiB twice and writes 4 MiB elsewhere.
func TestEstimate(t *testing.T) {
	var lines strings.Builder
	for range 2 {
		for off := 0; off < 16<<20; off += 64 << 10 {
			fmt.Fprintf(&lines, "R %d %d\n", off, 64<<10)
		}
	}
	fmt.Fprintf(&lines, "W %d %d\n", 32<<20, 4<<20)
	path := filepath.Join(t.TempDir(), "vda.trace")
	if err := os.WriteFile(path, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := execute(newEstimateCmd(), path, "--sizes", "100,1GiB", "--json")
	var got []estimated
	if err != nil || json.Unmarshal([]byte(out), &got) != nil || len(got) != 2 {
		t.Fatal(out, err)
	}
	for i, e := range got {
		stored := e.Stored
		e.Stored = 0
		want := estimated{
			Trace: "vda", Size: []string{"100%", "1GiB"}[i], CacheBytes: []int64{31 << 20, 63 << 24}[i], Raised: i == 0,
			Touched: 20 << 20, Blocks: 9 << 10, Missed: 5 << 10, Ratio: 5. / 9, ReadBlocks: 8 << 10, ReadMissed: 4 << 10,
			LRU: 5 << 10, S3FIFO: 5 << 10, FIFO: 5 << 10,
		}
		if e != want || stored < 20<<20 || stored > 21<<20 {
			t.Errorf("%+v, stored %d", e, stored)
		}
	}
	out, err = execute(newEstimateCmd(), path, "--sizes", "100")
	if err != nil || !strings.Contains(out, "vda    20 MiB   100%  31 MiB (the least)  55.6 %  50.0 %    55.6 %  55.6 %   55.6 %\n") {
		t.Errorf("%s%v", out, err)
	}
	_, err = execute(newEstimateCmd(), path, "--sizes", "0")
	fails(t, err, `"0" is no size of a cache`)
	_, err = execute(newEstimateCmd(), path+".not")
	fails(t, err, "no such file")
}
