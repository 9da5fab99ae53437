package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ublk-pcache/internal/estimate"
)

// estimated is a cache that was tried, as estimate shows it. Bytes are the trace's own.
type estimated struct {
	Trace      string  `json:"trace"`
	Size       string  `json:"size"` // as it was asked for
	CacheBytes int64   `json:"cache_bytes"`
	Raised     bool    `json:"raised"` // cache_bytes is more than was asked for, since no cache is smaller
	Touched    int64   `json:"touched_bytes"`
	Blocks     int64   `json:"blocks"` // accesses, each of one block of 4 KiB
	Missed     int64   `json:"missed"`
	Ratio      float64 `json:"miss_ratio"`
	ReadBlocks int64   `json:"read_blocks"`
	ReadMissed int64   `json:"read_missed"`
	LRU        int64   `json:"lru_missed"`
	S3FIFO     int64   `json:"s3fifo_missed"`
	FIFO       int64   `json:"fifo_missed"`
	Stored     int64   `json:"stored_bytes"`
}

func newEstimateCmd() *cobra.Command {
	var asJSON bool
	sizes := "5,10,25,50"
	cmd := &cobra.Command{
		Use:   "estimate TRACE…",
		Short: "Tell how much a cache of some size would miss",
		Long: `Tell how much a cache of some size would miss of what a trace asks of a disk,
before there is such a cache. It tries the same cache that would serve the disk,
on memory that keeps no data. Beside it is what textbook algorithms would miss
in as much room.

To record a trace, as root, until ^C, while the disk is used as it is every day:

  blktrace -d /dev/sdX -o - | blkparse -i - > sdX.trace
  ublk-pcache estimate sdX.trace --sizes 16GiB,64GiB,5,25

Lines of 'R|W offset length' in bytes, the CSV of the MSR Cambridge traces and
fio's iologs (versions 2 and 3) are taken, too, all of them compressed with gzip
or not. A trace that is shorter than what fills the cache shows mostly what an
empty cache misses.

A size is bytes, or percent of the blocks that the trace touches. It is counted
in blocks of 4 KiB; one that is not in the cache as a whole is missed, whether
it is read or written. A write that misses does not wait for the disk.`,
		Example: `  ublk-pcache estimate sdX.trace --sizes 16GiB,64GiB,5,25`,
		Args:    takes(1, -1),
		// It is for anybody, and asks nothing of the machine.
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := estimate.ParseSizes(sizes)
			if err != nil {
				return &usageError{err}
			}
			tried, err := tryAll(args, all)
			switch {
			case err != nil:
				return err
			case asJSON:
				return printJSON(cmd.OutOrStdout(), tried)
			}
			return printEstimated(cmd.OutOrStdout(), tried)
		},
	}
	cmd.Flags().StringVar(&sizes, "sizes", sizes, "percents of what the trace touches, or bytes such as 16GiB")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	return cmd
}

func tryAll(paths []string, sizes []estimate.Size) (tried []estimated, err error) {
	for _, path := range paths {
		t, err := estimate.Load(path)
		if err != nil {
			return nil, err
		}
		for _, size := range sizes {
			r, err := t.Play(size, t.Scaled(size))
			if err != nil {
				return nil, err
			}
			tried = append(tried, estimated{
				Trace: t.Name, Size: size.String(), CacheBytes: r.CacheBytes(), Raised: r.Raised, Touched: t.TouchedBytes(),
				Blocks: t.Blocks, Missed: r.Missed, Ratio: float64(r.Missed) / float64(t.Blocks),
				ReadBlocks: r.ReadBlocks, ReadMissed: r.ReadMissed, LRU: r.LRU, S3FIFO: r.S3FIFO, FIFO: r.FIFO,
				Stored: r.Stored / int64(r.Scale),
			})
		}
	}
	return tried, nil
}

func printEstimated(out io.Writer, tried []estimated) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "TRACE\tTOUCHES\tSIZE\tCACHE\tMISSED\tOF READS\tLRU\tS3-FIFO\tFIFO")
	for _, e := range tried {
		fmt.Fprintf(w, "%s\t%d MiB\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Trace, e.Touched>>20, e.Size, e.cache(), percent(e.Missed, e.Blocks),
			percent(e.ReadMissed, e.ReadBlocks), percent(e.LRU, e.Blocks), percent(e.S3FIFO, e.Blocks), percent(e.FIFO, e.Blocks))
	}
	return w.Flush()
}

// cache is how large a cache was tried.
func (e *estimated) cache() string {
	text := fmt.Sprintf("%d MiB", e.CacheBytes>>20)
	if e.Raised {
		text += " (the least)"
	}
	return text
}

func percent(n, of int64) string {
	if of == 0 {
		return "–"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(n)/float64(of))
}
