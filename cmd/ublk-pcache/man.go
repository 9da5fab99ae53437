//go:build man

package main

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Man pages are made of what --help has, so that they do not tell otherwise, and of the files in man.
// The program that writes them knows one command more than the one that is installed, which does
// not need what makes them: make man.

//go:embed man
var manTexts embed.FS

func init() {
	more = append(more, &cobra.Command{
		Use:    "man FOLDER",
		Short:  "Write the man pages",
		Hidden: true,
		Args:   takes(1, 1),
		// It is for whoever builds.
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE:              func(cmd *cobra.Command, args []string) error { return writeMan(cmd.Root(), args[0]) },
	})
}

func writeMan(root *cobra.Command, folder string) error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	overview, err := manTexts.ReadFile("man/overview.md")
	if err != nil {
		return err
	}
	root.DisableAutoGenTag = true
	root.Long = string(overview)
	for _, cmd := range root.Commands() {
		cmd.Long = asMarkdown(cmd.Long)
		if cmd.Name() == "completion" { // whose help is for those who pack programs
			root.RemoveCommand(cmd)
		}
	}
	head := &doc.GenManHeader{Section: "8", Source: "ublk-pcache " + version, Manual: "System Administration"}
	if err := doc.GenManTree(root, head, folder); err != nil {
		return fmt.Errorf("write the man pages: %w", err)
	}
	const conf = "ublk-pcache.conf.5"
	text, err := manTexts.ReadFile("man/" + conf + ".md")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, conf), md2man.Render(text), 0o644)
}

// asMarkdown keeps the lines of lists and examples, which --help has indented by two spaces.
func asMarkdown(help string) string {
	var text strings.Builder
	for line := range strings.Lines(help) {
		if strings.HasPrefix(line, "  ") {
			line = "  " + line
		}
		text.WriteString(line)
	}
	return text.String()
}
