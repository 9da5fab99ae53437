package pmem

import (
	"errors"
	"testing"

	"ublk-pcache/internal/bytesize"
)

func TestParseSpec(t *testing.T) {
	for text, want := range map[string]Spec{
		"/dev/dax0.0":               {Path: "/dev/dax0.0"},
		"a":                         {Path: "a"},
		"a,size=1G":                 {Path: "a", Size: 1 << 30},
		"a,size=512m":               {Path: "a", Size: 512 << 20},
		"a,volatile":                {Path: "a", Volatile: true},
		"a,size=1G,volatile":        {Path: "a", Size: 1 << 30, Volatile: true},
		"a,volatile,size=1G":        {Path: "a", Size: 1 << 30, Volatile: true},
		"a,b":                       {Path: "a,b"},
		"a,b,size=1G":               {Path: "a,b", Size: 1 << 30},
		"a,size=1G,b":               {Path: "a,size=1G,b"},
		"a,volatile,volatile":       {Path: "a,volatile", Volatile: true},
		"a,size=1G,size=2G":         {Path: "a,size=1G", Size: 2 << 30},
		"a,Volatile":                {Path: "a,Volatile"},
		"a,volatile ":               {Path: "a,volatile "},
		"a,volatile/b":              {Path: "a,volatile/b"},
		"":                          {},
		",volatile":                 {Volatile: true},
		"a,size=536870912,volatile": {Path: "a", Size: 512 << 20, Volatile: true},
	} {
		got, err := ParseSpec(text)
		if got != want || err != nil {
			t.Errorf("%q is %+v, %v, want %+v", text, got, err, want)
		}
		if again, err := ParseSpec(got.String()); again != want || err != nil {
			t.Errorf("%+v is written as %q, which is %+v, %v", got, got, again, err)
		}
	}
	for text, want := range map[string]error{
		"a,size=":                  bytesize.ErrSyntax,
		"a,size=1X,volatile":       bytesize.ErrSyntax,
		"a,volatile,size=-1G":      bytesize.ErrSyntax,
		"a,size=9999999999T":       bytesize.ErrSyntax,
		"a,size=1M":                ErrTooSmall,
		"a,size=536870913":         ErrMisaligned,
		"a,size=1G,volatile,size=": bytesize.ErrSyntax,
	} {
		if s, err := ParseSpec(text); !errors.Is(err, want) {
			t.Errorf("%q is %+v, %v, want %v", text, s, err, want)
		}
	}
}
