package main

import (
	"fmt"
	"runtime/debug"
)

// version is of the release that this becomes, as CHANGELOG.md has it. A build that is not
// released is told apart by its revision.
const version = "0.1.0"

// longVersion is the version with what the Go toolchain knows of the sources that the program
// is made of: nothing where it has found no git.
func longVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return version
	}
	known := map[string]string{}
	for _, s := range info.Settings {
		known[s.Key] = s.Value
	}
	revision := known["vcs.revision"]
	if revision == "" {
		return version
	}
	changed := ""
	if known["vcs.modified"] == "true" {
		changed = ", changed"
	}
	return fmt.Sprintf("%s (%.12s%s)", version, revision, changed)
}

// versionServing is of the server of a device, as far as its state file tells.
func versionServing(id int) string {
	d, err := readState(id)
	if err != nil {
		return orUnknown("")
	}
	return orUnknown(d.Version)
}

// orUnknown is a server's version, of which those before 0.1.0 do not tell.
func orUnknown(version string) string {
	if version == "" {
		return "unknown"
	}
	return version
}
