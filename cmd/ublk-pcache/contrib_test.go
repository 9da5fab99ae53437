package main

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const (
	rulesFile     = "../../contrib/prometheus/ublk-pcache.rules.yml"
	rulesTestFile = "../../contrib/prometheus/ublk-pcache.rules.test.yml"
)

// alert is one of those in rulesFile.
type alert struct {
	Alert       string
	Expr        string
	Annotations struct{ Summary, Description string }
}

func alerts(t *testing.T) []alert {
	t.Helper()
	var rules struct{ Groups []struct{ Rules []alert } }
	if err := yaml.Unmarshal([]byte(textOf(t, rulesFile)), &rules); err != nil || len(rules.Groups) != 1 {
		t.Fatalf("%s: %d groups, %v", rulesFile, len(rules.Groups), err)
	}
	return rules.Groups[0].Rules
}

func textOf(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	usedMetrics = regexp.MustCompile(`ublk_pcache_(\w+)(?:\{([^}]*)\})?`)
	usedMatches = regexp.MustCompile(`(\w+) *=`)
	// Labels stand in lists, and in texts.
	usedLabels = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right) *\(([\w, ]+)\)|\$labels\.(\w+)`)
)

// ofPrometheus are the labels that it adds, and the rules.
var ofPrometheus = []string{"instance", "job", "alertname", "severity"}

// mustExist has each metric of ours in a text, and each label, be one that there is.
func mustExist(t *testing.T, where, text string, described map[string][]string) {
	t.Helper()
	all := slices.Concat(ofPrometheus, slices.Concat(slices.Collect(maps.Values(described))...))
	for _, m := range usedMetrics.FindAllStringSubmatch(text, -1) {
		labels, ok := described[m[1]]
		if !ok {
			t.Errorf("%s: there is no metric %s", where, m[1])
		}
		for _, l := range usedMatches.FindAllStringSubmatch(m[2], -1) {
			if !slices.Contains(slices.Concat(ofPrometheus, labels), l[1]) {
				t.Errorf("%s: %s has no label %s", where, m[1], l[1])
			}
		}
	}
	for _, m := range usedLabels.FindAllStringSubmatch(text, -1) {
		for _, l := range strings.Split(strings.Join(m[1:], ""), ",") {
			if l = strings.TrimSpace(l); !slices.Contains(all, l) {
				t.Errorf("%s: no metric has the label %s", where, l)
			}
		}
	}
}

// TestAlerts: what they ask for is there, each is tested and in docs/admin.md, and its description ends in a command line.
func TestAlerts(t *testing.T) {
	described := describedMetrics()
	tested := textOf(t, rulesTestFile)
	mustExist(t, rulesTestFile, tested, described)
	docs := textOf(t, "../../docs/admin.md")
	if file := strings.TrimPrefix(rulesFile, "../../"); !strings.Contains(docs, file) {
		t.Errorf("docs/admin.md does not tell of %s", file)
	}
	told := namesIn(between(docs, "\n### Alerts\n", "\n## "))
	for _, a := range alerts(t) {
		mustExist(t, a.Alert, a.Expr+a.Annotations.Summary+a.Annotations.Description, described)
		if !strings.Contains(tested, `alertname="`+a.Alert+`"`) {
			t.Errorf("%s is not tested", a.Alert)
		}
		if !told[a.Alert] {
			t.Errorf("docs/admin.md does not tell of %s", a.Alert)
		}
		delete(told, a.Alert)
		_, line, _ := strings.Cut(a.Annotations.Description, ": ")
		if args := strings.Fields(strings.ReplaceAll(line, "{{ $labels.device }}", "ublkb3")); len(args) < 2 {
			t.Errorf("%s: %q does not end in a command line", a.Alert, a.Annotations.Description)
		} else if args[0] == "ublk-pcache" {
			if _, err := parsed(args); err != nil {
				t.Errorf("%s: %s: %v", a.Alert, line, err)
			}
		} else if line != "systemctl restart ublk-pcache-exporter" {
			t.Errorf("%s: %q is not a command of ours", a.Alert, line)
		}
	}
	for name := range told {
		t.Errorf("docs/admin.md tells of %s, which there is not", name)
	}
}
