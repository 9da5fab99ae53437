//go:build vm

package guest

import (
	"bytes"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What add says to do with a pmem block device leaves all that is on it where it was, with either place for the kernel's
// page structures.
func TestNamespaceToDevdax(t *testing.T) {
	t.Cleanup(func() { namespaceMode(t, "devdax") })
	command := regexp.MustCompile(`ndctl create-namespace -f -e NAMESPACE -m devdax --map=MAP`)
	for _, place := range []string{"mem", "dev"} {
		must(t, "ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", "fsdax", "--map="+place)
		size, err := strconv.ParseInt(strings.TrimSpace(must(t, "blockdev", "--getsize64", "/dev/pmem0")), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, size)
		for at := int64(0); at < size; at += 1 << 20 {
			copy(data[at:], "byte "+strconv.FormatInt(at, 10))
		}
		if err := os.WriteFile("/dev/pmem0", data, 0); err != nil {
			t.Fatal(err)
		}
		must(t, "sync", "/dev/pmem0")
		r := run(t, "ublk-pcache", "add", "-p", "/dev/pmem0", "-b", disk)
		r.mustRefuse(t, []string{"/dev/pmem0", command.String()})
		line := strings.NewReplacer("NAMESPACE", "namespace0.0", "MAP", place).Replace(command.FindString(r.stderr))
		must(t, strings.Fields(line)...)
		text, err := os.ReadFile("/sys/bus/dax/devices/dax0.0/size")
		if err != nil {
			t.Fatal(err)
		}
		if daxSize := strings.TrimSpace(string(text)); daxSize != strconv.FormatInt(size, 10) {
			t.Errorf("--map=%s: %s bytes became %s", place, strconv.FormatInt(size, 10), daxSize)
			continue
		}
		f, err := os.Open(dax)
		if err != nil {
			t.Fatal(err)
		}
		mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mem, data) {
			t.Errorf("--map=%s: the content has moved", place)
		}
		unix.Munmap(mem)
	}
}
