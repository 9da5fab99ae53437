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
			if term.IsTerminal(int(os.Stderr.Fd())) {
				return showProgress(id, done)
			}
			return <-done
		},
	}
}

// showProgress draws what is left of the dirty data until done.
func showProgress(id int, done <-chan error) error {
	st, err := ask(id, command{Do: "status"})
	if err != nil {
		return err
	}
	total := st.DirtyBytes
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
			if st, err := ask(id, command{Do: "status"}); err == nil {
				bar.Set64(min(max(0, total-st.DirtyBytes+st.RoundBytes), total))
			}
		}
	}
}
