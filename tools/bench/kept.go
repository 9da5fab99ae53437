package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// What make bench-hits found: what is missed of traces.

// kept is what was found.
type kept struct {
	date   string
	traces []played
}

// played is a trace in caches of some sizes.
type played struct {
	name   string
	blocks int64 // accesses
	sizes  []missed
}

// missed is how much was, as parts of all accesses.
type missed struct {
	percent                   float64 // of what the trace touches, which is the size of the cache
	engine, lru, s3fifo, fifo float64
	stored                    int64 // bytes
}

const replayLine = "%s %f%% blocks %d missed %d ratio %f lru %f s3fifo %f fifo %f stored %d"

func readKept(name string) (*kept, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	k := &kept{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if date, ok := strings.CutPrefix(line, "date: "); ok {
			k.date = date
			continue
		}
		var trace string
		var blocks, n int64
		var m missed
		if _, err := fmt.Sscanf(line, replayLine, &trace, &m.percent, &blocks, &n, &m.engine, &m.lru, &m.s3fifo, &m.fifo, &m.stored); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", name, line, err)
		}
		if last := len(k.traces) - 1; last < 0 || k.traces[last].name != trace {
			k.traces = append(k.traces, played{name: trace, blocks: blocks})
		}
		p := &k.traces[len(k.traces)-1]
		p.sizes = append(p.sizes, m)
	}
	if len(k.traces) == 0 {
		return nil, fmt.Errorf("%s has no trace", name)
	}
	return k, nil
}

func (k *kept) report(b *strings.Builder) {
	fmt.Fprintf(b, "## What is kept\n\n"+
		"What is missed of traces of disks, in percent of the accesses, each of one block of 4 KiB, read or written; %s. The sizes\n"+
		"are percent of the blocks that a trace touches. The engine plays each block as one of 64 KiB, on a region and a disk that keep no\n"+
		"data (`tests/replay`). The textbook algorithms have as many blocks as all segments of the region would have room for, whatever\n"+
		"the engine keeps free. Stored is what the engine has stored into the region, in GiB, with its log.\n\n", k.date)
	for _, p := range k.traces {
		fmt.Fprintf(b, "%s, %d accesses:\n\n"+
			"| size | ublk-pcache | LRU | S3-FIFO | FIFO | ÷ the better of LRU and S3-FIFO | stored |\n|--:|--:|--:|--:|--:|--:|--:|\n", p.name, p.blocks)
		for _, m := range p.sizes {
			fmt.Fprintf(b, "| %g %% | %.1f | %.1f | %.1f | %.1f | %.2f | %.1f |\n", m.percent, 100*m.engine, 100*m.lru, 100*m.s3fifo, 100*m.fifo,
				m.engine/min(m.lru, m.s3fifo), float64(m.stored)/(1<<30))
		}
		fmt.Fprintf(b, "\n![%s](%s)\n\n", p.name, p.file())
	}
}

// file is the name of the plot.
func (p *played) file() string { return "kept-" + p.name + ".svg" }

func (k *kept) plot(folder string) error {
	for _, t := range k.traces {
		p := plot.New()
		p.Title.Text = t.name + ": accesses that miss, in percent"
		p.X.Label.Text = "size of the cache, in percent of what is touched"
		p.Y.Min = 0
		p.Legend.Top = true
		for i, line := range []struct {
			name string
			of   func(missed) float64
		}{
			{"ublk-pcache", func(m missed) float64 { return m.engine }},
			{"LRU", func(m missed) float64 { return m.lru }},
			{"S3-FIFO", func(m missed) float64 { return m.s3fifo }},
			{"FIFO", func(m missed) float64 { return m.fifo }},
		} {
			var points plotter.XYs
			for _, m := range t.sizes {
				points = append(points, plotter.XY{X: m.percent, Y: 100 * line.of(m)})
			}
			l, dots, err := plotter.NewLinePoints(points)
			if err != nil {
				return err
			}
			l.Color, dots.Color = colours[i], colours[i]
			dots.Shape, dots.Radius = plotutil.Shape(i), vg.Points(3)
			p.Add(l, dots)
			p.Legend.Add(line.name, l, dots)
		}
		if err := p.Save(14*vg.Centimeter, 9*vg.Centimeter, filepath.Join(folder, t.file())); err != nil {
			return err
		}
	}
	return nil
}
