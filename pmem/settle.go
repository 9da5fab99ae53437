package pmem

import (
	"errors"
	"fmt"
	"iter"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// After a sync that failed, the page cache and the file are not the same any more.
// The kernel has reported the error, once to each open file, and has taken the
// pages for written (lib/errseq.c, mm/filemap.c, 7.3). A later sync leaves them
// out and succeeds. A process that opens the file later is told nothing, and reads
// what was stored, until memory is short and it reads what the file has.
//
// The obvious way to mend that is to store the pages again, as they are, so that
// they count as changed. That is enough for most file systems. ext4 remembers with
// the page that its block has been written, also where that went wrong while the
// block was one of a new file that has never been (fs/ext4/page-io.c,
// ext4_end_io_end: "failed to convert unwritten extents", 7.3). Whatever is stored
// to such a page afterwards is written, synced, and zeros when it is read again.
// So pages are written past the page cache, which drops them, and all others are
// dropped as well.

// settleChunk is how much is written at a time, in bytes.
const settleChunk = 1 << 20

// Settle makes a region of kind File one like that no sync of which has ever
// failed: the ranges, offsets and lengths in bytes, are durable as they are, and
// elsewhere the region shows what the file has. Nobody may use it meanwhile. What
// cannot be read stays so. After an error the ranges are as they were.
func (r *Region) Settle(ranges iter.Seq2[int64, int64]) error {
	if r.kind != File {
		return nil
	}
	// An error that nobody has been told of is told to whoever opens the file
	// next. It is about what is settled here.
	_ = r.Sync()
	s := settling{r: r}
	if err := s.rewrite(ranges); err != nil {
		return fmt.Errorf("settle %s: %w", r.Path(), err)
	}
	if err := r.Sync(); err != nil {
		return err
	}
	// What is mapped is not dropped.
	if err := unix.Madvise(r.mem, unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("settle %s: unmap its pages: %w", r.Path(), err)
	}
	if err := unix.Fadvise(int(r.file.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("settle %s: drop its pages: %w", r.Path(), err)
	}
	return nil
}

type settling struct {
	r      *Region
	direct bool   // the file can be written past the page cache
	buf    []byte // on a page
}

func (s *settling) rewrite(ranges iter.Seq2[int64, int64]) (err error) {
	fd := s.r.file.Fd()
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("ask for its flags: %w", err)
	}
	if s.buf, err = unix.Mmap(-1, 0, settleChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return fmt.Errorf("mmap of %d bytes: %w", settleChunk, err)
	}
	defer unix.Munmap(s.buf)
	if _, err := unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_DIRECT); err == nil {
		s.direct = true
		defer unix.FcntlInt(fd, unix.F_SETFL, flags)
	}
	for off, n := range ranges {
		end := min((off+n+pageSize-1)&^(pageSize-1), s.r.Size())
		for off &^= pageSize - 1; off < end; off += settleChunk {
			if err := s.chunk(off, min(settleChunk, end-off)); err != nil {
				return err
			}
		}
	}
	return nil
}

// chunk stores whole pages once more.
func (s *settling) chunk(off, n int64) error {
	p := s.buf[:n]
	if _, err := s.r.ReadAt(p, off); err != nil {
		if n == pageSize {
			return nil
		}
		for page := off; page < off+n; page += pageSize {
			if err := s.chunk(page, pageSize); err != nil {
				return err
			}
		}
		return nil
	}
	if s.direct {
		err := s.write(p, off)
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		s.direct = false // its blocks are larger, or it has refused in its own way
	}
	for page := off; page < off+n; page += pageSize {
		if err := s.r.touch(page); err != nil {
			return err
		}
	}
	return nil
}

func (s *settling) write(p []byte, off int64) error {
	for rest, at := p, off; len(rest) > 0; {
		n, err := unix.Pwrite(int(s.r.file.Fd()), rest, at)
		switch {
		case err == unix.EINTR:
		case err != nil:
			// The pages have gone from the page cache before that was known.
			_, stored := s.r.WriteAt(p, off)
			return errors.Join(fmt.Errorf("write %d bytes at %d: %w", len(rest), at, err), stored)
		default:
			rest, at = rest[n:], at+int64(n)
		}
	}
	return nil
}

// touch makes the next sync write a page as it is.
func (r *Region) touch(page int64) (err error) {
	defer r.guard(armGuard(), &err)
	atomic.AddUint64((*uint64)(unsafe.Pointer(&r.mem[page])), 0)
	return nil
}
