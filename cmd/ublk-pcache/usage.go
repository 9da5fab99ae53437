package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The command line: what cobra finds wrong with it is said here in our words, which name what
// is missing and the command that was meant.

// usageError is about the command line, and nothing that was asked of the machine.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// line is how a command is called.
func line(cmd *cobra.Command) string { return cmd.Root().Name() + " " + cmd.Use }

// operands are what a command's line has in capitals and without an option before it: what its
// arguments stand for.
func operands(cmd *cobra.Command) (names []string) {
	option := false
	for _, word := range strings.Fields(cmd.Use)[1:] {
		name := strings.Trim(word, "[].…")
		if !option && name == strings.ToUpper(name) {
			names = append(names, name)
		}
		option = strings.HasPrefix(name, "-")
	}
	return names
}

// takes lets a command have from least to most arguments, any number where most is negative.
func takes(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			missing := operands(cmd)[len(args)]
			if missing == "ID" {
				missing = "the device"
			}
			return usagef("give %s: %s", missing, line(cmd))
		case most >= 0 && len(args) > most:
			return usagef("%q is one too many: %s", args[most], line(cmd))
		}
		return nil
	}
}

// givenDevice has a command take a device as its first argument or, as with ublk and rublk, behind
// -n. What it returns puts that in front of the arguments.
func givenDevice(cmd *cobra.Command) (arguments func(args []string) []string) {
	given := cmd.Flags().StringP("id", "n", "", "the device, in place of `ID`")
	cmd.ValidArgsFunction = completeDevice
	cmd.RegisterFlagCompletionFunc("id", completeDevice)
	return func(args []string) []string {
		if !cmd.Flags().Changed("id") {
			return args
		}
		return append([]string{*given}, args...)
	}
}

// onDevice has a command take a device and at least so many arguments more, none at all where
// more is 0.
func onDevice(cmd *cobra.Command, more int, do func(id int, args []string) error) *cobra.Command {
	arguments := givenDevice(cmd)
	most := -1
	if more == 0 {
		most = 1
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		return takes(1+more, most)(cmd, arguments(args))
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		args = arguments(args)
		id, err := deviceID(args[0])
		if err != nil {
			return err
		}
		return do(id, args[1:])
	}
	return cmd
}

// onDevices is onDevice for a command that can be about all of ours, with -a, one after the
// other. One that fails keeps it from none of the others. What do has to tell may be nothing, with no JSON asked for.
func onDevices(cmd *cobra.Command, do func(id int, asJSON bool) (told, error)) *cobra.Command {
	var all bool
	var asJSON *bool
	onDevice(cmd, 0, func(id int, _ []string) error {
		it, err := do(id, *asJSON)
		if it == nil {
			return err
		}
		return errors.Join(tell(cmd.OutOrStdout(), *asJSON, it), err)
	})
	asJSON = jsonFlag(cmd, "a JSON object, or with --all an array of them")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all devices of this program, one after the other, in place of ID")
	argsOfOne, runOfOne := cmd.Args, cmd.RunE
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if !all {
			return argsOfOne(cmd, args)
		}
		if cmd.Flags().Changed("id") {
			return usagef("give --all or a device: %s", line(cmd))
		}
		return takes(0, 0)(cmd, args)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !all {
			return runOfOne(cmd, args)
		}
		devices, err := allDevices()
		if err != nil {
			return err
		}
		out, done := cmd.OutOrStdout(), []told{}
		var failed []error
		for _, d := range devices {
			if !d.still() {
				continue // it has gone while the others were seen to
			}
			it, err := do(d.ID, *asJSON)
			failed = append(failed, err)
			switch {
			case it == nil:
			case *asJSON:
				done = append(done, it)
			default:
				failed = append(failed, it.print(out))
			}
		}
		if *asJSON {
			failed = append(failed, printJSON(out, done))
		}
		return errors.Join(failed...)
	}
	return cmd
}

// flagError says what is wrong with the options of a command.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var empty *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	help := fmt.Sprintf("see '%s --help'", cmd.CommandPath())
	switch {
	case errors.As(err, &unknown):
		dash := "--"
		if unknown.GetSpecifiedShortnames() != "" {
			dash = "-"
		}
		return usagef("no option %s%s (%s)", dash, unknown.GetSpecifiedName(), help)
	case errors.As(err, &empty):
		return usagef("--%s has no value (%s)", empty.GetFlag().Name, help)
	case errors.As(err, &invalid):
		f := invalid.GetFlag()
		return usagef("--%s %s: give %s (%s)", f.Name, invalid.GetValue(), valueOf(f), help)
	}
	return usagef("%w (%s)", err, help)
}

// valueOf is what the value of an option can be, where its type says it.
func valueOf(f *pflag.Flag) string {
	switch f.Value.Type() {
	case "int":
		return "a whole number"
	case "bool":
		return "true or false, or leave the value out"
	}
	return "another value"
}

// unknownCommand is for the root, which has no arguments that are not commands.
func unknownCommand(root *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	help := "see 'ublk-pcache --help'"
	if meant := root.SuggestionsFor(args[0]); len(meant) > 0 {
		help = "perhaps " + strings.Join(meant, " or ")
	}
	return usagef("no command %q (%s)", args[0], help)
}

// addGroup adds commands that the help has under a title.
func addGroup(root *cobra.Command, id, title string, commands ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: id, Title: title})
	for _, cmd := range commands {
		cmd.GroupID = id
	}
	root.AddCommand(commands...)
}
