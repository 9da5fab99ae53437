package pmem

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// After a sync that failed, the page cache and the file differ. The kernel has
// reported the error, once to each open file, and has taken the pages for written
// (lib/errseq.c, mm/filemap.c, 7.3). A later sync leaves them out and succeeds. A
// process that opens the file later is told nothing. It reads what was stored,
// until memory is short; then it reads what the file has.
//
// The obvious way to mend that is to store the pages again, as they are, so that
// they count as changed. That is enough for most file systems. But ext4 remembers
// with the page that its block has been written. It does so even if the write
// failed and the block, of a new file, has never been written (fs/ext4/page-io.c,
// ext4_end_io_end: "failed to convert unwritten extents", 7.3). Later stores to
// such a page are written and synced, and yet the page reads as zeros afterwards.
// So these pages are written past the page cache, which drops them there, and all
// others are dropped as well.
//
// The page cache keeps several pages in one folio, and drops them together, also
// those that are not written yet. So all pages of a folio that are to be kept are
// copied before one of them is written.

// folioPages is the largest number of pages in a folio, where pages have 4 KiB. A
// folio begins at a multiple of its size (include/linux/pagemap.h,
// MAX_PAGECACHE_ORDER, 7.3).
const folioPages = 512

// Settle makes a region of kind File as if no sync of it had ever failed: the
// ranges, offsets and lengths in bytes, are durable as they are, and elsewhere
// the region shows what the file has. Nobody may use it meanwhile. Bytes that
// cannot be read stay so. After an error the ranges are as they were.
func (r *Region) Settle(ranges iter.Seq2[int64, int64]) error {
	if r.kind != File {
		return nil
	}
	// The kernel tells an error that nobody has been told yet to the next
	// process that opens the file. It is about what is settled here.
	_ = r.Sync()
	s := settling{r: r, window: folioPages * int64(unix.Getpagesize())}
	if err := s.rewrite(r.pages(ranges)); err != nil {
		return fmt.Errorf("settle %s: %w", r.Path(), err)
	}
	if err := r.Sync(); err != nil {
		return err
	}
	// Pages that are mapped are not dropped.
	if err := unix.Madvise(r.mem, unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("settle %s: unmap its pages: %w", r.Path(), err)
	}
	if err := unix.Fadvise(int(r.file.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("settle %s: drop its pages: %w", r.Path(), err)
	}
	return nil
}

// extent is some pages, from byte off to end.
type extent struct{ off, end int64 }

// pages returns the pages of some ranges, in order.
func (r *Region) pages(ranges iter.Seq2[int64, int64]) (list []extent) {
	for off, n := range ranges {
		list = append(list, extent{off &^ (pageSize - 1), min((off+n+pageSize-1)&^(pageSize-1), r.Size())})
	}
	slices.SortFunc(list, func(a, b extent) int { return cmp.Compare(a.off, b.off) })
	return list
}

type settling struct {
	r      *Region
	direct bool     // the file can be written past the page cache
	window int64    // bytes that no folio leaves
	buf    []byte   // of a window, on a page
	copied []extent // the extents in buf
}

func (s *settling) rewrite(list []extent) (err error) {
	fd := s.r.file.Fd()
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("ask for its flags: %w", err)
	}
	if s.buf, err = unix.Mmap(-1, 0, int(s.window), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return fmt.Errorf("mmap of %d bytes: %w", s.window, err)
	}
	defer unix.Munmap(s.buf)
	if _, err := unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_DIRECT); err == nil {
		s.direct = true
		defer unix.FcntlInt(fd, unix.F_SETFL, flags)
	}
	for len(list) > 0 {
		end := (list[0].off/s.window + 1) * s.window
		s.copied = s.copied[:0]
		for len(list) > 0 && list[0].off < end {
			s.copy(extent{list[0].off, min(list[0].end, end)})
			if list[0].end > end {
				list[0].off = end
				break
			}
			list = list[1:]
		}
		if err := s.store(); err != nil {
			return err
		}
	}
	return nil
}

// in returns the place of an extent in the buffer.
func (s *settling) in(e extent) []byte {
	at := e.off % s.window
	return s.buf[at : at+e.end-e.off]
}

// copy copies the pages that can be read.
func (s *settling) copy(e extent) {
	if _, err := s.r.ReadAt(s.in(e), e.off); err == nil {
		s.copied = append(s.copied, e)
		return
	}
	for page := e.off; page < e.end; page += pageSize {
		e := extent{page, page + pageSize}
		if _, err := s.r.ReadAt(s.in(e), page); err == nil {
			s.copied = append(s.copied, e)
		}
	}
}

// store stores the copied pages once more.
func (s *settling) store() error {
	for _, e := range s.copied {
		if s.direct {
			err := s.write(s.in(e), e.off)
			if err == nil {
				continue
			}
			// The page cache may have dropped the pages before the write failed.
			for _, e := range s.copied {
				if _, stored := s.r.WriteAt(s.in(e), e.off); stored != nil {
					return errors.Join(err, stored)
				}
			}
			if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
				return err
			}
			s.direct = false // the file's blocks are larger, or its file system refuses
		}
		for page := e.off; page < e.end; page += pageSize {
			if err := s.r.touch(page); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *settling) write(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(int(s.r.file.Fd()), p, off)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
		}
		n = max(n, 0)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// touch makes the next sync write a page, which stays as it is.
func (r *Region) touch(page int64) (err error) {
	defer r.guard(armGuard(), &err)
	atomic.AddUint64((*uint64)(unsafe.Pointer(&r.mem[page])), 0)
	return nil
}
