package main

import (
	"context"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// progressEvery is how often the progress bar asks the server.
const progressEvery = 200 * time.Millisecond

func newFlushCmd() *cobra.Command {
	return onDevices(&cobra.Command{
		Use:   "flush ID",
		Short: "Write all dirty data to the backing device",
		Long: `Write all data that is dirty now to the backing device. Returns when that has
confirmed its flush; the data stays in the cache, clean.`,
		Example: `  ublk-pcache flush 0
  ublk-pcache flush --all`,
	}, func(id int, asJSON bool) (told, error) {
		err := askShowing(context.Background(), id, command{Do: "flush"})
		if err != nil || !asJSON {
			return nil, err
		}
		return statusOf(id)
	})
}

// askShowing is askUntil for a command that may have to wait until dirty data has been
// written back.
func askShowing(ctx context.Context, id int, cmd command) error {
	done := make(chan error, 1)
	go func() {
		_, err := askUntil(ctx, id, cmd)
		done <- err
	}()
	return showProgress(done, func() (int64, error) {
		r, err := ask(id, command{Do: "status"})
		if err != nil {
			return 0, err
		}
		return r.Status.DirtyBytes - r.Status.RoundBytes, nil
	})
}

// showProgress waits until done, and meanwhile draws how much is left of the
// dirty data if that takes a while and somebody sits in front of it.
func showProgress(done <-chan error, left func() (int64, error)) error {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return <-done
	}
	total, err := left()
	if err != nil || total <= 0 {
		return <-done
	}
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	select {
	case err := <-done:
		return err
	case <-tick.C:
	}
	bar := progressbar.DefaultBytes(total, "flushing")
	for {
		select {
		case err := <-done:
			if err == nil {
				bar.Finish()
			} else if !bar.IsFinished() {
				bar.Exit() // the error gets a line of its own
			}
			return err
		case <-tick.C:
			if now, err := left(); err == nil {
				bar.Set64(min(max(0, total-now), total))
			}
		}
	}
}
