package estimate

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFile: a trace has its file's name, and an error the whole path.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sda.trace.txt")
	if _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for text, says := range map[string]string{"R 0 4096\n": "", "hello\n": path + ": line 1: "} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		switch made, err := Load(path); {
		case says == "" && (err != nil || made.Name != "sda"):
			t.Errorf("%+v, %v", made, err)
		case says != "" && (err == nil || !strings.HasPrefix(err.Error(), says)):
			t.Error(err)
		}
	}
}
