package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// What a shell offers while somebody types. It asks as whoever types, who need not be root and
// then cannot read state files: so devices are found by their nodes, other programs' as well,
// and names by the links of the udev rule.

// devDir is nodeDir but in tests.
var devDir = nodeDir

const noFiles = cobra.ShellCompDirectiveNoFileComp

// completeDevice offers devices by number and name, where one is not given yet.
func completeDevice(cmd *cobra.Command, args []string, _ string) (found []cobra.Completion, _ cobra.ShellCompDirective) {
	if id := cmd.Flags().Lookup("id"); len(args) > 0 || id != nil && id.Changed {
		return nil, noFiles
	}
	nodes, _ := filepath.Glob(filepath.Join(devDir, node+"*"))
	for _, path := range nodes {
		number := strings.TrimPrefix(filepath.Base(path), node)
		if _, err := strconv.Atoi(number); err == nil { // and not a partition
			found = append(found, cobra.CompletionWithDesc(number, nodeDir+node+number))
		}
	}
	links, _ := os.ReadDir(filepath.Join(devDir, filepath.Base(linkDir)))
	for _, link := range links {
		if !aPartition.MatchString(link.Name()) {
			found = append(found, link.Name())
		}
	}
	return found, noFiles
}

// completeSetting offers devices first, then settings, and the values of one that has a choice of
// them.
func completeSetting(cmd *cobra.Command, args []string, begun string) (found []cobra.Completion, _ cobra.ShellCompDirective) {
	if len(args) == 0 && !cmd.Flags().Changed("id") {
		return completeDevice(cmd, args, begun)
	}
	if name, _, hasValue := strings.Cut(begun, "="); hasValue {
		if k := knobNamed(name); k != nil {
			for _, value := range k.choices {
				found = append(found, name+"="+value)
			}
		}
		return found, noFiles
	}
	for _, k := range knobs {
		found = append(found, cobra.CompletionWithDesc(k.name+"=", k.help))
	}
	return found, noFiles | cobra.ShellCompDirectiveNoSpace
}

// completeColumns offers columns behind those that are there.
func completeColumns(_ *cobra.Command, _ []string, begun string) (found []cobra.Completion, _ cobra.ShellCompDirective) {
	given := begun[:strings.LastIndexAny(begun, ",+")+1]
	for _, c := range columns {
		found = append(found, given+c.name)
	}
	return found, noFiles | cobra.ShellCompDirectiveNoSpace
}

// completeNothing is for what only its user knows.
func completeNothing(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, noFiles
}
