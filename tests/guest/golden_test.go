//go:build vm

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Caches that the kernel's own target wrote, full of dirty data, are served as the kernel would serve them.
func TestGoldenImages(t *testing.T) {
	for _, image := range []struct {
		name  string
		sum   string // sha256 of the device
		head  string // end of the log
		keys  int
		clean int
		ksets int
	}{
		{"small-crc", "62a81938d76b6e6374f160aa65ce823c30fb7a9107a97c2db0ca7fb7759d9803", "0:8776", 217, 122, 4},
		{"small-nocrc", "6a7695aa6137be5d99053f8c7953a0d2dbe02b01534093d77dec956d7232e384", "0:8752", 214, 111, 8},
	} {
		t.Run(image.name, func(t *testing.T) {
			quiet := quietKernel(t)
			wipe(t, tinyDisk)
			dir := t.TempDir()
			must(t, "tar", "-xzS", "-C", dir, "-f", "/share/golden/"+image.name+".tar.gz")
			// A leftover beyond the image must not look like part of it.
			mapped(t, dax, func(mem []byte) { clear(mem); load(t, mem, filepath.Join(dir, image.name+".pmem")) })
			must(t, "dd", "if="+filepath.Join(dir, image.name+".backing"), "of="+tinyDisk, "bs=1M", "oflag=direct", "status=none")

			pcache(t, "check", dax)
			for _, words := range []string{
				fmt.Sprintf("%d keys", image.keys), fmt.Sprintf("%d clean", image.clean), fmt.Sprintf("%d ksets", image.ksets), image.head,
			} {
				if text := pcache(t, "dump", dax); !strings.Contains(text, words) {
					t.Errorf("dump does not say %q:\n%.2000s", words, text)
				}
			}
			if text := pcache(t, "dump", "--json", dax); !json.Valid([]byte(text)) {
				t.Errorf("dump --json is not JSON:\n%.2000s", text)
			}

			d := add(t, "-p", dax, "-b", tinyDisk)
			if got, _, _ := strings.Cut(must(t, "sha256sum", d.path), " "); got != image.sum {
				t.Errorf("the device's sha256 is %s, want %s", got, image.sum)
			}
			pcache(t, "flush", d.id)
			d.del(t)
			if got, _, _ := strings.Cut(must(t, "sha256sum", tinyDisk), " "); got != image.sum {
				t.Errorf("after flush the disk's sha256 is %s, want %s", got, image.sum)
			}
			quiet()
		})
	}
}

// load copies what a sparse file holds.
func load(t *testing.T, mem []byte, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for end := int64(0); ; {
		start, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if end, err = f.Seek(start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(io.NewSectionReader(f, start, end-start), mem[start:end]); err != nil {
			t.Fatal(err)
		}
	}
}
