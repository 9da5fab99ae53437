package main

import (
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// progressEvery is how often the progress bar asks the server.
const progressEvery = 200 * time.Millisecond

func newFlushCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "flush ID",
		Short: "Write all dirty data to the backing device",
		Long: `Write all data that is dirty now to the backing device. Returns when that has
confirmed its flush; the data stays in the cache, clean.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			id, err := deviceID(args[0])
			if err != nil {
				return err
			}
			done := make(chan error, 1)
			go func() {
				_, err := ask(id, command{Do: "flush"})
				done <- err
			}()
			return showProgress(done, func() (int64, error) {
				r, err := ask(id, command{Do: "status"})
				if err != nil {
					return 0, err
				}
				return r.Status.DirtyBytes - r.Status.RoundBytes, nil
			})
		},
	}
}

// showProgress waits until done, and meanwhile draws how much is left of the
// dirty data if somebody sits in front of it.
func showProgress(done <-chan error, left func() (int64, error)) error {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return <-done
	}
	total, err := left()
	if err != nil {
		return err
	}
	if total == 0 {
		return <-done
	}
	bar := progressbar.DefaultBytes(total, "flushing")
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err == nil {
				bar.Finish()
			}
			bar.Close()
			return err
		case <-tick.C:
			if now, err := left(); err == nil {
				bar.Set64(min(max(0, total-now), total))
			}
		}
	}
}
