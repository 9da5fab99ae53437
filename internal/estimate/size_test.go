package estimate

import (
	"slices"
	"strings"
	"testing"
)

func TestParseSizes(t *testing.T) {
	got, err := ParseSizes("5,12.5%,100,512M,16GiB,1.5,3tib,16T,1.5 GiB")
	want := []Size{{Percent: 5}, {Percent: 12.5}, {Percent: 100}, {Bytes: 512 << 20}, {Bytes: 16 << 30}, {Percent: 1.5}, {Bytes: 3 << 40}, {Bytes: 16 << 40}, {Bytes: 3 << 29}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	var names []string
	for _, s := range got {
		names = append(names, s.String())
	}
	if got := strings.Join(names, " "); got != "5% 12.5% 100% 512MiB 16GiB 1.5% 3TiB 16TiB 1536MiB" {
		t.Error(got)
	}
	for _, text := range []string{"", "5,", "0", "-1", "101", "NaN", "Inf", "x", "G", "GiB", "0G", "-1G", "17T", "9999999999999999999G", "16GB", "5 ", "1K"} {
		if got, err := ParseSizes(text); err == nil || !strings.Contains(err.Error(), "is no size of a cache: give ") {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}
