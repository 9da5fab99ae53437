package backing

import (
	"syscall"

	"golang.org/x/sys/unix"
	"ublk-pcache/internal/uring"
)

// zeroing is a way to make a range read as zeros, the best first. A lane begins
// with the first and goes on to the next, for good, when one is not supported.
// That can also be one that has worked before: some drivers learn only from a
// refusal what their device cannot do (block/blk-lib.c of Linux 6.12,
// blkdev_issue_write_zeroes).
type zeroing uint8

const (
	// punchHole deallocates: blocks of a file, and on a block device the
	// blocks that its command for writing zeros frees. A device without that
	// command refuses it (block/fops.c of Linux 6.12, blkdev_fallocate), so it
	// never transfers data.
	punchHole zeroing = iota

	// zeroRange works on every block device: the block layer writes pages of
	// zeros where the device cannot. In a file it leaves blocks allocated.
	zeroRange

	// writeZeros is for file systems that know neither.
	writeZeros
)

// zeroPiece is how many bytes writeZeros writes at once: enough for the cost of
// a write not to show. The memory is never touched, so it costs nothing.
const zeroPiece = 1 << 20

func (f *flight) issueZero(sqe *uring.SQE, o *op) {
	o.by = f.zeroing
	switch o.by {
	case punchHole:
		sqe.PrepareFallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, o.off, o.n)
	case zeroRange:
		sqe.PrepareFallocate(f.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, o.off, o.n)
	case writeZeros:
		o.buf = f.zeros[:min(o.n, zeroPiece)]
		sqe.PrepareWrite(f.fd, o.buf, o.off)
	}
}

// zeroMore takes the result of an OpZero and reports whether it must be issued
// again: in another way, or for the rest of the range. Many may be in flight
// when the first of them is refused, so each remembers by.
func (f *flight) zeroMore(o *op, res int32) bool {
	switch {
	case res == -int32(syscall.EOPNOTSUPP) && o.by < writeZeros:
		f.zeroing = max(f.zeroing, o.by+1)
		return true
	case o.by == writeZeros && res > 0:
		o.off, o.n, o.buf = o.off+int64(res), o.n-int64(res), nil
		return o.n > 0
	}
	return false
}

// punches reports whether a file's file system can punch holes, by punching
// one behind its end, where there is nothing.
func punches(fd int, size int64) bool {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size, fileBlock) == nil
}
