// Command replay tells how many blocks of a trace the engine misses with caches of some sizes, and what textbook algorithms
// would in as much room:
//
//	go run ./tests/replay [-sizes 5,10,25,50] [-block 65536] TRACE.gz …
//
// For each trace and size it prints one line:
//
//	NAME SIZE% blocks N missed N ratio 0.1234 lru 0.1234 s3fifo 0.1234 fifo 0.1234 stored BYTES
//
// Blocks are accesses of one block each, read or written; one that is not in the cache as a whole is missed. The textbook
// algorithms have as many blocks as all segments of the region would have room for. Stored is what the engine has stored
// into the region: data, log and records. How a trace is played is in internal/estimate.
package main

import (
	"flag"
	"fmt"
	"os"

	"ublk-pcache/internal/estimate"
)

var (
	sizes = flag.String("sizes", "5,10,25,50", "percents of the blocks that a trace touches, or sizes such as 16GiB")
	block = flag.Int("block", 64<<10, "bytes that one block of 4 KiB becomes, a power of 2")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "replay:", err)
		os.Exit(1)
	}
}

func run() error {
	all, err := estimate.ParseSizes(*sizes)
	if err != nil {
		return err
	}
	if flag.NArg() == 0 {
		return fmt.Errorf("give a trace: lines of 'R|W offset length', what blkparse prints, MSR Cambridge CSV or a fio iolog, gzip or not")
	}
	for _, path := range flag.Args() {
		t, err := estimate.Load(path)
		if err != nil {
			return err
		}
		for _, size := range all {
			r, err := t.Play(size, *block)
			if err != nil {
				return err
			}
			if r.Raised {
				fmt.Fprintf(os.Stderr, "replay: %s at %v would have less than the %d segments that a cache needs: it has these\n", t.Name, size, r.Segments)
			}
			ratio := func(missed int64) float64 { return float64(missed) / float64(t.Blocks) }
			fmt.Printf("%s %v blocks %d missed %d ratio %.4f lru %.4f s3fifo %.4f fifo %.4f stored %d\n",
				t.Name, size, t.Blocks, r.Missed, ratio(r.Missed), ratio(r.LRU), ratio(r.S3FIFO), ratio(r.FIFO), r.Stored)
		}
	}
	return nil
}
