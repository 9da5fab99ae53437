//go:build promtool

package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBoardHasData: each query of the board makes something of what the exporter tells of a device, and the first tells that
// from one without a server. promtool answers them as Prometheus would: make alerts.
func TestBoardHasData(t *testing.T) {
	ownStateDir(t)
	s := someStatus()
	s.WriteLimit = 1 << 20
	served(t, func(context.Context, command) (reply, error) { return reply{Status: s}, nil })
	if err := someDevice(4).save(); err != nil {
		t.Fatal(err)
	}
	type series struct {
		Series string `json:"series"`
		Values string `json:"values"`
	}
	type sample struct {
		Labels string  `json:"labels"`
		Value  float64 `json:"value"`
	}
	type query struct {
		Expr    string   `json:"expr"`
		At      string   `json:"eval_time"`
		Samples []sample `json:"exp_samples"`
	}
	var input []series
	for line := range strings.Lines(scraped(t, newCollector(time.Minute))) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "#") {
			continue
		}
		metric, value := line[:strings.LastIndex(line, " ")], line[strings.LastIndex(line, " ")+1:]
		name, labels, _ := strings.Cut(metric, "{")
		step := "0"
		if strings.HasSuffix(name, "_total") {
			step = "60"
		}
		input = append(input, series{name + `{instance="here",` + labels, value + "+" + step + "x10"})
	}
	var queries []query
	ask := func(expr, device string, value float64) {
		expr = strings.NewReplacer("$instance", "here", "$device", device, "$__rate_interval", "5m").Replace(expr)
		queries = append(queries, query{expr, "10m", []sample{{"{}", value}}})
	}
	targets, _ := board(t)
	for _, q := range targets {
		ask("count(("+q.Expr+") >= 0)", "ublkb3", 1) // which what is no number is not
	}
	ask("sum("+targets[0].Expr+")", "ublkb3", 1)
	ask("sum("+targets[0].Expr+")", "ublkb4", 3)
	text, err := json.Marshal(map[string]any{ // which is YAML, too
		"tests": []any{map[string]any{"interval": "1m", "input_series": input, "promql_expr_test": queries}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "board.yml")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("promtool", "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
