package engine

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func TestGoldenImages(t *testing.T) {
	for name, want := range map[string]string{
		"small-crc":   "62a81938d76b6e6374f160aa65ce823c30fb7a9107a97c2db0ca7fb7759d9803",
		"small-nocrc": "6a7695aa6137be5d99053f8c7953a0d2dbe02b01534093d77dec956d7232e384",
	} {
		t.Run(name, func(t *testing.T) {
			mem := pmem.Heap(551550976)
			unpack(t, name+".pmem", func(p []byte, off int64) { store(t, mem, p, off) })
			disk := backing.NewFake(16<<20, 512, 1)
			defer func() { disk.Close() }()
			unpack(t, name+".backing", func(p []byte, off int64) { disk.WriteAt(p, off) })

			// As the kernel left it, and again after our own restart and flush.
			for range 2 {
				r := newRig(t, mem, disk, 2)
				sum := sha256.New()
				for off := int64(0); off < disk.Size(); off += 1 << 20 {
					sum.Write(r.read(t, off, 1<<20))
				}
				if got := hex.EncodeToString(sum.Sum(nil)); got != want {
					t.Fatalf("device has sha256 %s, want %s", got, want)
				}
				if err := r.Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
				if err := r.kill(); err != nil {
					t.Fatal(err)
				}
			}
			all := make([]byte, disk.Size())
			disk.ReadAt(all, 0)
			if got := sha256.Sum256(all); hex.EncodeToString(got[:]) != want {
				t.Fatalf("after a flush the disk alone has sha256 %x, want %s", got, want)
			}
		})
	}
}

// unpack reads a file of a golden archive of the ondisk package, skipping
// zeroes.
func unpack(t *testing.T, name string, put func(p []byte, off int64)) {
	t.Helper()
	base, _, _ := strings.Cut(name, ".")
	f, err := os.Open("../ondisk/testdata/" + base + ".tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := tar.NewReader(z)
	for {
		h, err := files.Next()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if h.Name == name {
			break
		}
	}
	zero, buf := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(buf)) {
		n, err := io.ReadFull(files, buf)
		if !bytes.Equal(buf[:n], zero[:n]) {
			put(buf[:n], off)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestOpenRefuses: what replay must not accept.
func TestOpenRefuses(t *testing.T) {
	build := func() (*pmem.Region, *backing.Fake) {
		mem := pmem.Heap(ondisk.MinSize)
		formatSmall(t, mem, 8, false, 70)
		disk := backing.NewFake(8<<20, 512, 1)
		c := open(t, mem, disk)
		turn(t, c.Queue(0), &Request{Op: Write, Off: 6 << 20, Buf: make([]byte, 4096)})
		c.Close()
		return mem, disk
	}
	refuse := func(name string, mem *pmem.Region, disk *backing.Fake, want error) {
		t.Helper()
		if _, err := Open(mem, fakeDisk{disk}, Options{Queues: 1, Log: &testLog{}}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		disk.Close()
	}
	mem, disk := build()
	disk.Close()
	refuse("smaller disk", mem, backing.NewFake(4<<20, 512, 1), ErrDiskTooSmall)

	// rekey writes the first kset again with one key changed.
	rekey := func(mem *pmem.Region, change func(*ondisk.Key)) {
		l, err := ondisk.ReadLayout(mem, mem.Size())
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, ondisk.MaxKsetSize)
		mem.ReadAt(buf, l.Offset(0, 0))
		var k ondisk.Kset
		if err := ondisk.DecodeKset(buf, &k); err != nil {
			t.Fatal(err)
		}
		change(&k.Keys[0])
		store(t, mem, ondisk.EncodeKset(buf, k.Seq, k.Keys), l.Offset(0, 0))
	}
	mem, disk = build()
	rekey(mem, func(k *ondisk.Key) { k.Gen++ })
	refuse("generation of the future", mem, disk, ErrKeyGeneration)

	mem, disk = build()
	rekey(mem, func(k *ondisk.Key) { k.Seg, k.Gen = 0, 0 })
	refuse("data in the log", mem, disk, ErrKeyInLog)

}
