//go:build vm

package guest

import (
	"encoding/json"
	"testing"
)

// A setting given to add is set on the cache that is there, too, and stays as it is where none is given.
func TestGCPercentOfAnOldCache(t *testing.T) {
	wipe(t, disk)
	for _, c := range []struct {
		args []string
		want int
	}{{nil, 70}, {[]string{"--gc-percent", "40"}, 40}, {nil, 40}} {
		d := add(t, append(c.args, "-p", dax, "-b", disk)...)
		var status struct {
			GCPercent int `json:"gc_percent"`
		}
		if err := json.Unmarshal([]byte(pcache(t, "status", "--json", d.id)), &status); err != nil || status.GCPercent != c.want {
			t.Errorf("with %q gc_percent is %d, want %d (%v)", c.args, status.GCPercent, c.want, err)
		}
		d.del(t)
	}
}
