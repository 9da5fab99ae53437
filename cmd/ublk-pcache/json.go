package main

import (
	"encoding/json"
	"errors"
	"io"

	"github.com/spf13/cobra"
)

// What commands tell programs. A thing has one form, whichever command tells of it, and fields are
// only ever added; docs/admin.md names them all. Where something fails, the line on stderr and the
// exit status say so, with --json as without.

// told is what a command has to tell: to people by print, to programs as JSON.
type told interface {
	print(out io.Writer) error
}

// jsonFlag has a command take --json.
func jsonFlag(cmd *cobra.Command, what string) (given *bool) {
	return cmd.Flags().Bool("json", false, "print "+what)
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// tell tells it to either.
func tell(out io.Writer, asJSON bool, it told) error {
	if asJSON {
		return printJSON(out, it)
	}
	return it.print(out)
}

// tellDevice tells how a device is.
func tellDevice(out io.Writer, asJSON bool, id int) error {
	s, err := statusOf(id)
	if s == nil {
		return err
	}
	return errors.Join(tell(out, asJSON, s), err)
}
