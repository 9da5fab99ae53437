package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"ublk-pcache/backing"
	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// goldenImage unpacks the pmem image of a cache that the kernel wrote, with
// its holes.
func goldenImage(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open("../../ondisk/testdata/" + name + ".tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewReader(z)
	h, err := archive.Next()
	if err != nil || h.Name != name+".pmem" {
		t.Fatal(h, err)
	}
	path := filepath.Join(t.TempDir(), h.Name)
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Truncate(h.Size); err != nil {
		t.Fatal(err)
	}
	chunk, zeros := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < h.Size; {
		n, err := io.ReadFull(archive, chunk[:min(int64(len(chunk)), h.Size-off)])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(chunk[:n], zeros[:n]) {
			if _, err := out.WriteAt(chunk[:n], off); err != nil {
				t.Fatal(err)
			}
		}
		off += int64(n)
	}
	return path
}

// execute runs one as main does and returns what it printed.
func execute(cmd *cobra.Command, args ...string) (string, error) {
	var out bytes.Buffer
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.Execute()
	if errors.Is(err, errMended) { // which is no failure
		err = nil
	}
	return out.String(), err
}

// fails makes sure that an error is one line with each of the words, as it is shown.
func fails(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one with %q", words)
		return
	}
	for _, w := range words {
		if line := oneLine(err); !strings.Contains(line, w) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %q, want a line with %q", line, words)
		}
	}
}

func TestOfflineGolden(t *testing.T) {
	for name, want := range map[string]dumpEnd{
		"small-crc":   {Ksets: 4, Keys: 217, Clean: 122, Offset: 8776},
		"small-nocrc": {Ksets: 8, Keys: 214, Clean: 111, Offset: 8752},
	} {
		image := goldenImage(t, name)
		before, err := os.Stat(image)
		if err != nil {
			t.Fatal(err)
		}

		out, err := execute(newDumpCmd(), image, "--json")
		var got struct {
			dumpHead
			Ksets []dumpKset `json:"ksets"`
			Log   dumpEnd    `json:"log"`
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatal(err)
		}
		keys := 0
		for _, k := range got.Ksets {
			keys += len(k.Keys)
		}
		if got.Log != want || len(got.Ksets) != want.Ksets || keys != want.Keys || len(got.Chain) != 32 ||
			got.Info.DataCRC != (name == "small-crc") || got.Identity != nil || *got.KeyTail != *got.DirtyTail {
			t.Errorf("%s: %+v, %d ksets with %d keys, %+v", name, got.Log, len(got.Ksets), keys, got.dumpHead)
		}

		text, err := execute(newDumpCmd(), image)
		if err != nil || strings.Count(text, "\n  ") != want.Keys || strings.Count(text, ", clean\n") != want.Clean {
			t.Errorf("%s: dump prints %d lines, %v", name, strings.Count(text, "\n"), err)
		}
		if out, err := execute(newCheckCmd(), image); err != nil || !strings.Contains(out, "in order") || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: check: %q, %v", name, out, err)
		}
		_, err = execute(newFormatCmd(), image+",volatile")
		fails(t, err, image, "bytes of dirty data", "--force")

		if after, err := os.Stat(image); err != nil || !after.ModTime().Equal(before.ModTime()) {
			t.Errorf("%s: the image was changed: %v", name, err)
		}
	}
}

func TestCheckDamaged(t *testing.T) {
	image := goldenImage(t, "small-crc")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// The magic number of the second kset, and the newest generation of
	// segment 0.
	if _, err := f.WriteAt([]byte{0}, 32768+24+101*40+8); err != nil {
		t.Fatal(err)
	}
	out, err := execute(newCheckCmd(), image)
	fails(t, err, image, "problems found: 1")
	if !strings.Contains(out, "the log is damaged at 0:4064") {
		t.Errorf("check prints %q", out)
	}
	_, err = execute(newDumpCmd(), image)
	fails(t, err, image, "the log is damaged at 0:4064")
	if _, err := f.WriteAt([]byte{0}, 20480+8192+16); err != nil {
		t.Fatal(err)
	}
	out, err = execute(newDumpCmd(), image, "--json")
	fails(t, err, image, "generation")
	if !json.Valid([]byte(out)) {
		t.Errorf("no JSON: %q", out)
	}
	_, err = execute(newFormatCmd(), image+",volatile")
	fails(t, err, image, "a damaged cache", "--force")
}

func TestFormatCommand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache.img")
	_, err := execute(newFormatCmd(), path)
	fails(t, err, path, "size=")
	_, err = execute(newFormatCmd(), path+",size=512M,volatile", "--gc-percent", "91")
	fails(t, err, "91", "0 to 90")
	if _, err := os.Stat(path); err == nil {
		t.Error("a refused format leaves a file behind")
	}
	out, err := execute(newFormatCmd(), path+",size=512M,volatile", "--gc-percent", "40")
	if err != nil || strings.Count(out, "\n") != 1 {
		t.Fatalf("%q, %v", out, err)
	}

	r, err := pmem.Open(path+",volatile", pmem.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ondisk.ReadLayout(r, r.Size())
	if err != nil || !l.Info.Flags.DataCRC() || l.Info.Flags.GCPercent() != 40 {
		t.Errorf("%+v, %v", l, err)
	}
	for _, cmd := range []*cobra.Command{newFormatCmd(), newDumpCmd(), newCheckCmd()} {
		_, err := execute(cmd, path+",volatile")
		fails(t, err, path, "in use by another process")
	}
	r.Close()

	_, err = execute(newFormatCmd(), path+",volatile")
	fails(t, err, path, "without dirty data", "--force")
	if _, err := execute(newFormatCmd(), path+",volatile", "--force", "--data-crc=false"); err != nil {
		t.Fatal(err)
	}
	if out, err := execute(newDumpCmd(), path); err != nil || !strings.Contains(out, "data crc off, gc at 70 %") {
		t.Errorf("%q, %v", out, err)
	}

	// What is left of a cache.
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 24), 4096); err != nil {
		t.Fatal(err)
	}
	_, err = execute(newFormatCmd(), path+",volatile")
	fails(t, err, path, "a damaged cache, without dirty data", "superblock", "--force")
	_, err = execute(newCheckCmd(), path)
	fails(t, err, path, "problems found: 1")
}

// newServer opens a region and a backing device, both new files, as start does.
func newServer(t *testing.T) *server {
	t.Helper()
	return newServerIn(t, t.TempDir())
}

func newServerIn(t *testing.T, dir string) *server {
	t.Helper()
	back := filepath.Join(dir, "backing")
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(back, 4<<20); err != nil {
		t.Fatal(err)
	}
	s := &server{dev: device{PMEM: filepath.Join(dir, "cache"), Backing: back, Queues: 1}, log: zap.NewNop()}
	var err error
	if s.disk, err = backing.Open(back); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.disk.Close() })
	if s.region, err = pmem.Open(s.dev.PMEM+",size=512M,volatile", pmem.ReadWrite); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.region.Close() })
	return s
}

// format makes the cache that is planned for a blank region, and does not open it.
// It is bound to no file, as older versions leave it: tests go on with copies.
func (s *server) format(t *testing.T) {
	t.Helper()
	make, err := s.plan(&serveOptions{})
	if err == nil {
		make.Identity.Serial = ""
		err = ondisk.Format(s.region, *make)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestPlanRefuses: what a new cache cannot be is refused before it is made.
func TestPlanRefuses(t *testing.T) {
	s := newServer(t)
	refused := func(o serveOptions, words ...string) {
		t.Helper()
		_, err := s.plan(&o)
		fails(t, err, words...)
		if blank, err := ondisk.Blank(s.region, s.region.Size()); !blank {
			t.Errorf("a refused cache was formatted (%v)", err)
		}
	}
	most := engine.MaxQueues(int(ondisk.SegmentsIn(s.region.Size())))
	s.dev.Queues = most + 1
	refused(serveOptions{}, s.dev.PMEM, fmt.Sprintf("--queues %d", most+1), fmt.Sprintf("1 to %d", most))
	refused(serveOptions{Format: true, Force: true}, s.dev.PMEM, "--queues")
	s.dev.Queues = most
	for _, choice := range []engine.Choice{engine.Overwrite, engine.Discard} {
		refused(serveOptions{Changed: choice}, s.dev.PMEM, "--changed="+string(choice))
	}
	s.format(t)
	c, err := engine.Open(s.region, disk{s.disk}, engine.Options{Queues: s.dev.Queues, Log: logger{s.log}})
	if err != nil {
		t.Fatalf("as many queues as a plan allows: %v", err)
	}
	c.Close()
	other := s.region.Durable() // a plain file has checksums
	_, err = s.plan(&serveOptions{DataCRC: &other})
	fails(t, err, s.dev.PMEM, fmt.Sprintf("--data-crc=%t, not %t", !other, other))
}

// TestDumpFingerprint: dump shows the record from the first opening on.
func TestDumpFingerprint(t *testing.T) {
	s := newServer(t)
	s.format(t)
	for _, want := range []string{"fingerprint  none", "of a backing device of 4194304 bytes, with dirty_tail at 0:0 or 0:0"} {
		s.region.Close()
		out, err := execute(newDumpCmd(), s.dev.PMEM)
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("dump does not say %q: %.400s %v", want, out, err)
		}
		if s.region, err = pmem.Open(s.dev.PMEM+",volatile", pmem.ReadWrite); err != nil {
			t.Fatal(err)
		}
		c, err := engine.Open(s.region, disk{s.disk}, engine.Options{Queues: 1, Log: logger{s.log}})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// TestOpenErrors: each choice there is, and no other, is named in one line.
func TestOpenErrors(t *testing.T) {
	s := &server{dev: device{ID: 3, PMEM: "/dev/dax0.0", Backing: "/dev/sdx"}}
	changed := fmt.Errorf("%w, which holds 512 bytes of dirty data", engine.ErrChanged)
	fails(t, s.openError(&serveOptions{}, changed), "/dev/dax0.0", "/dev/sdx", "512 bytes", "--changed=overwrite", "--changed=discard")
	err := s.openError(&serveOptions{Recover: true}, changed)
	fails(t, err, "/dev/dax0.0", "/dev/sdx", "device 3", "512 bytes", "recover --changed=overwrite", "waits")
	if strings.Contains(err.Error(), "discard") {
		t.Errorf("recover offers to give up what has been promised: %v", err)
	}
	fails(t, s.openError(&serveOptions{Changed: engine.Discard}, engine.ErrUnchanged), "/dev/sdx", "--changed=discard", "--format --force")

	_, err = execute(newAddCmd(), "-p", "p", "-b", "b", "-q", "1", "--changed=merge")
	fails(t, err, "--changed=merge", "overwrite", "discard")
	_, err = execute(newRecoverCmd(), "3", "--changed=discard")
	fails(t, err, "--changed=discard", "overwrite", "del --force 3")
}

// TestFormatKeepsDataFromOthers: no new cache where everybody could read it,
// whatever is forced, and the file stays as it is.
func TestFormatKeepsDataFromOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, pmem.MinSize); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o604, 0o602, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{path + ",volatile"}, {path + ",volatile", "--force"}} {
			_, err := execute(newFormatCmd(), args...)
			fails(t, err, path, mode.String(), "chmod o= "+path)
		}
		_, err := execute(newCheckCmd(), path)
		fails(t, err, "problems found") // it is still blank
	}
	if err := os.Chmod(path, 0o660); err != nil {
		t.Fatal(err)
	}
	if _, err := execute(newFormatCmd(), path+",volatile"); err != nil {
		t.Error(err)
	}
}
