package mountinfo

import (
	"reflect"
	"strings"
	"testing"
)

// escape is what the kernel does (seq_path and mangle with " \t\n\\").
func escape(s string) string {
	return strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(s)
}

func line(point, source string) string {
	return "41 23 8:17 / " + escape(point) + " rw,relatime shared:7 master:2 - ext4 " + escape(source) + " rw,errors=continue"
}

func TestParse(t *testing.T) {
	for _, name := range []string{
		"plain", `a"b`, "caf\xe9", "a b", "tab\there", "line\nbreak", `back\slash`, `\040`, `\`, "\xff\xfe", "no\u00a0break", "next\u0085line",
		"em\u2003space", "return\r", "feed\fv\v", "-", " - ", "'`$", "#",
	} {
		want := []Mount{{ID: 41, Parent: 23, Major: 8, Minor: 17, Point: "/mnt/" + name, Type: "ext4", Source: name, Options: "rw,errors=continue"}}
		if got := Parse(line("/mnt/"+name, name) + "\n"); !reflect.DeepEqual(got, want) {
			t.Errorf("%q is read as %+v", name, got)
		}
	}
	// No optional fields, a source that is empty, options with spaces in them.
	got := Parse("1 0 0:2 / / rw - rootfs  rw,x=a - b c\n")
	if want := []Mount{{ID: 1, Minor: 2, Point: "/", Type: "rootfs", Options: "rw,x=a - b c"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("without optional fields: %+v", got)
	}
}

// What is no mount costs that line alone.
func TestParseNonsense(t *testing.T) {
	good := line("/a", "b")
	for _, bad := range []string{"", "x", strings.Repeat(" ", 20), "x" + good, strings.Replace(good, "8:17", "8", 1), strings.Replace(good, " - ", " ", 1),
		strings.Replace(good, " /a ", " a ", 1), strings.TrimSuffix(good, " b rw,errors=continue"), strings.Replace(good, "8:17", "8:-1", 1)} {
		if got := Parse(bad + "\n" + good + "\n" + bad); len(got) != 1 || got[0].Point != "/a" {
			t.Errorf("next to %q: %+v", bad, got)
		}
	}
	if got := Parse(line("/"+strings.Repeat("x", 1<<20), "")); len(got) != 1 {
		t.Error("a line of a MiB is lost")
	}
}

func TestUnescape(t *testing.T) {
	for escaped, want := range map[string]string{
		"": "", `\134040`: `\040`, `a\`: `a\`, `a\04`: `a\04`, `a\09x`: `a\09x`, `\777`: `\777`, `\043x`: "#x", `\+12`: `\+12`,
		"/mnt": "/mnt", `/my\040disk`: "/my disk", `/a\134b`: `/a\b`, `/\011\012`: "/\t\n", `/\377`: "/\xff",
		`/end\04`: `/end\04`, `/\999`: `/\999`, `/\`: `/\`, `/"`: `/"`,
		`/a\040b`: "/a b", `/a\134040`: `/a\040`, `\011\012`: "\t\n", `/a\0`: `/a\0`, `/a\999`: `/a\999`, `/a\777`: `/a\777`, `\303\244`: "ä", `"`: `"`,
	} {
		if got := Unescape(escaped); got != want {
			t.Errorf("%q is %q, want %q", escaped, got, want)
		}
	}
}

func TestRead(t *testing.T) {
	all, err := Read("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.Point == "/proc" && m.Type == "proc" && m.Major == 0 {
			return
		}
	}
	t.Errorf("no /proc in %+v", all)
}
