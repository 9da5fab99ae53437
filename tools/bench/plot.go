package main

import (
	"fmt"
	"image/color"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// colours are those of Okabe and Ito, which all eyes can tell apart.
var colours = []color.Color{
	color.RGBA{0, 114, 178, 255}, color.RGBA{230, 159, 0, 255}, color.RGBA{0, 158, 115, 255},
	color.RGBA{204, 121, 167, 255}, color.RGBA{120, 120, 120, 255},
}

// plot writes the plots of the page.
func (m *measured) plot(folder string) error {
	var jobs []string
	for _, h := range hits {
		jobs = append(jobs, fmt.Sprintf("%s\n%d×%d", h.name, h.depth, h.jobs))
	}
	err := bars(filepath.Join(folder, "hits.svg"), "Hits: requests per second, as a multiple of dm-pcache's", jobs, caches,
		func(job int, target string) float64 { return m.ratio(hits[job], target, "dm-pcache") })
	if err != nil {
		return err
	}
	units := []string{"burst-sec", "drained-sec"}
	return bars(filepath.Join(folder, "drain.svg"), "2048 random writes in front of a hard disk: seconds", []string{"acknowledged", "on the disk"}, with("disk"),
		func(i int, target string) float64 { return m.median(units[i], "Burst/target=%s", target) })
}

// bars writes a chart with a group of bars for each name, one bar for each target.
func bars(file, title string, names, targets []string, value func(group int, target string) float64) error {
	const width = 9 // points
	p := plot.New()
	p.Title.Text = title
	p.NominalX(names...)
	p.Y.Min, p.Y.Max = 0, 0
	p.Legend.Top = true
	for i, t := range targets {
		var values plotter.Values
		for group := range names {
			values = append(values, value(group, t))
		}
		p.Y.Max = max(p.Y.Max, 1.3*slices.Max(values)) // room for the legend
		chart, err := plotter.NewBarChart(values, vg.Points(width))
		if err != nil {
			return err
		}
		chart.Color, chart.LineStyle.Width = colours[i], 0
		chart.Offset = vg.Points(width * (float64(i) - float64(len(targets)-1)/2))
		p.Add(chart)
		p.Legend.Add(t, chart)
	}
	groups := float64(len(names)*len(targets)+len(names)*2) * width
	return p.Save(vg.Points(groups)+4*vg.Centimeter, 9*vg.Centimeter, file)
}
