package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestJSONIsDocumented: docs/admin.md names every field that a command prints for programs, and no other.
func TestJSONIsDocumented(t *testing.T) {
	text := textOf(t, "../../docs/admin.md")
	section := between(text, "\n## JSON\n", "\n## ")
	for name, forms := range map[string][]any{
		"status":    {statusJSON{}, silentJSON{}, badMemory{}},
		"list":      {overview{}},
		"del":       {removed{}},
		"upgrade":   {replaced{}},
		"format":    {formatted{}},
		"check":     {checked{}},
		"repair":    {repaired{}},
		"writeback": {saved{}, extent{}},
		"estimate":  {estimated{}},
	} {
		told := namesIn(between(section, "\n### "+name+"\n", "\n### "))
		printed := map[string]bool{}
		for _, form := range forms {
			fieldsOf(reflect.TypeOf(form), printed)
		}
		for field := range printed {
			if !told[field] {
				t.Errorf("%s --json prints %s, of which docs/admin.md does not tell", name, field)
			}
		}
		for field := range told {
			if !printed[field] {
				t.Errorf("docs/admin.md tells of %s, which %s --json does not print", field, name)
			}
		}
	}
}

// textOf reads a file of the source.
func textOf(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// between is what a text has behind one mark, up to another.
func between(text, begin, end string) string {
	_, text, _ = strings.Cut(text, begin)
	text, _, _ = strings.Cut(text, end)
	return text
}

// namesIn are those in the first cells of a table's rows.
func namesIn(table string) map[string]bool {
	names := map[string]bool{}
	for line := range strings.Lines(table) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
				names[m[1]] = true
			}
		}
	}
	return names
}

// fieldsOf adds the names that the fields of a type have in JSON.
func fieldsOf(form reflect.Type, names map[string]bool) {
	for i := range form.NumField() {
		f := form.Field(i)
		switch tag, _, _ := strings.Cut(f.Tag.Get("json"), ","); {
		case tag != "":
			names[tag] = true
		case f.Anonymous:
			fieldsOf(f.Type, names)
		case f.IsExported():
			names[f.Name] = true
		}
	}
}

// TestOfflineJSON: commands that are about a cache tell programs the same as people, also of what fails.
func TestOfflineJSON(t *testing.T) {
	read := func(cmd *cobra.Command, form any, args ...string) error {
		t.Helper()
		out, err := execute(cmd, append(args, "--json")...)
		d := json.NewDecoder(strings.NewReader(out))
		d.DisallowUnknownFields()
		if wrong := d.Decode(form); wrong != nil || d.More() {
			t.Fatalf("%s prints %q, %v; %v", cmd.Name(), out, wrong, err)
		}
		return err
	}
	path := filepath.Join(t.TempDir(), "pmem")
	var made formatted
	if err := read(newFormatCmd(), &made, path+",size=512M"); err != nil || made != (formatted{path, "file", 31, true, 70}) {
		t.Errorf("format: %+v, %v", made, err)
	}
	image := goldenImage(t, "small-crc")
	var sound checked
	if err := read(newCheckCmd(), &sound, image); err != nil || sound.PMEM != image || sound.Dirty == 0 || sound.DirtyBytes == 0 || len(sound.Problems) > 0 {
		t.Errorf("check: %+v, %v", sound, err)
	}
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 4096+20); err != nil { // of the superblock
		t.Fatal(err)
	}
	var wrong checked
	if err := read(newCheckCmd(), &wrong, image); exitStatus(err) != exitDamaged || len(wrong.Problems) != 1 || !strings.Contains(wrong.Problems[0], "superblock") {
		t.Errorf("check of a damaged one: %+v, %v", wrong, err)
	}
	var dry, mended repaired
	if err := read(newRepairCmd(), &dry, image); exitStatus(err) != exitDamaged || len(dry.Mended) != 1 || dry.Result != "" {
		t.Errorf("repair without a place: %+v, %v", dry, err)
	}
	toCopy := newRepairCmd()
	toCopy.SetArgs([]string{image, filepath.Join(t.TempDir(), "copy")})
	toCopy.SetOut(io.Discard)
	toCopy.SilenceErrors, toCopy.SilenceUsage = true, true
	if err := toCopy.Execute(); statusAfter(toCopy, err) != fsckMended {
		t.Errorf("repair that mends ends with %d, %v", statusAfter(toCopy, err), err)
	}
	if err := read(newRepairCmd(), &mended, image, "--in-place"); err != nil || !mended.InPlace || mended.Result != "mended" || len(mended.Mended) != 1 || len(mended.Remains) > 0 {
		t.Errorf("repair: %+v, %v", mended, err)
	}
}
