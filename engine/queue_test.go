package engine

import (
	"errors"
	"testing"
	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// TestRefusesRequests: what a queue does not do.
func TestRefusesRequests(t *testing.T) {
	mem := pmem.Heap(ondisk.MinSize)
	formatSmall(t, mem, 8, false, 70)
	disk := backing.NewFake(8<<20, 512, 1)
	defer disk.Close()
	r := newRig(t, mem, disk, 1)
	defer r.kill()
	for _, req := range []*Request{
		{Op: Read, Off: 100, Buf: make([]byte, 512)},
		{Op: Write, Off: 512, Buf: make([]byte, 100)},
		{Op: Write, Off: 0, Buf: nil},
		{Op: Read, Off: 8 << 20, Buf: make([]byte, 512)},
		{Op: Read, Off: -512, Buf: make([]byte, 512)},
		{Op: Write, Off: 4<<20 - 512, Buf: make([]byte, 1024)},
	} {
		if err := r.do(0, req); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes at %d: %v", len(req.Buf), req.Off, err)
		}
	}
}
