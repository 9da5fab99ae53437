package main

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const (
	rulesFile     = "../../contrib/prometheus/ublk-pcache.rules.yml"
	rulesTestFile = "../../contrib/prometheus/ublk-pcache.rules.test.yml"
	boardFile     = "../../contrib/grafana/ublk-pcache.json"
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

// target is a query of a panel of the board.
type target struct{ Expr, LegendFormat string }

// board is what boardFile asks for: by its panels, and for its variables.
func board(t *testing.T) (targets []target, variables []string) {
	t.Helper()
	var read struct {
		Templating struct {
			List []struct{ Query any }
		}
		Panels []struct{ Targets []target }
	}
	if err := json.Unmarshal([]byte(textOf(t, boardFile)), &read); err != nil {
		t.Fatalf("%s: %v", boardFile, err)
	}
	for _, v := range read.Templating.List {
		if q, ok := v.Query.(map[string]any); ok {
			variables = append(variables, q["query"].(string))
		}
	}
	for _, p := range read.Panels {
		targets = append(targets, p.Targets...)
	}
	return targets, variables
}

var (
	usedMetrics = regexp.MustCompile(`ublk_pcache_(\w+)(?:\{([^}]*)\})?`)
	usedMatches = regexp.MustCompile(`(\w+) *=`)
	// Labels stand in lists, as the last word of label_values, and in texts.
	usedLabels = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right) *\(([\w, ]+)\)|label_values\(.*, (\w+)\)|\{\{ *(\w+) *\}\}|\$labels\.(\w+)`)
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
	told := namesIn(between(docs, "\n### Alerts and a board\n", "\n## "))
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

// TestBoard: what it asks for is there, and docs/admin.md names it.
func TestBoard(t *testing.T) {
	described := describedMetrics()
	targets, variables := board(t)
	if len(targets) == 0 || len(variables) == 0 {
		t.Errorf("%s asks for %v and %v", boardFile, targets, variables)
	}
	for _, q := range targets {
		mustExist(t, q.LegendFormat, q.Expr+q.LegendFormat, described)
	}
	for _, q := range variables {
		mustExist(t, "a variable", q, described)
	}
	if file := strings.TrimPrefix(boardFile, "../../"); !strings.Contains(textOf(t, "../../docs/admin.md"), file) {
		t.Errorf("docs/admin.md does not tell of %s", file)
	}
}
