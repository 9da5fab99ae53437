package ondisk

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sparse is a device that keeps only the pages that are not zero. Ranges can
// be made unreadable.
type sparse struct {
	size   int64
	pages  map[int64]*[4096]byte
	poison map[int64]int64 // offset → length

	onSync func() // called before each Sync
	writes int    // how many more WriteAt and Zero calls succeed; negative: all
}

var errPoison = errors.New("poisoned")

func newSparse(size int64) *sparse {
	return &sparse{size: size, pages: map[int64]*[4096]byte{}, poison: map[int64]int64{}, writes: -1}
}

func (s *sparse) Size() int64 { return s.size }
func (s *sparse) Fence()      {}
func (s *sparse) Sync() error {
	if s.onSync != nil {
		s.onSync()
	}
	return nil
}

func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > s.size {
		return 0, io.EOF
	}
	for at, n := range s.poison {
		if off < at+n && at < off+int64(len(p)) {
			return 0, errPoison
		}
	}
	n := int(min(int64(len(p)), s.size-off))
	for done := 0; done < n; {
		in := int((off + int64(done)) % 4096)
		part := p[done:min(n, done+4096-in)]
		if page := s.pages[(off+int64(done))/4096]; page != nil {
			copy(part, page[in:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (s *sparse) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > s.size {
		panic("write outside the device")
	}
	if s.writes == 0 {
		return 0, errPoison
	}
	s.writes--
	for done := 0; done < len(p); {
		at := off + int64(done)
		in := at % 4096
		part := p[done:min(len(p), done+4096-int(in))]
		page := s.pages[at/4096]
		if page == nil && !isZero(part) {
			page = new([4096]byte)
			s.pages[at/4096] = page
		}
		if page != nil {
			copy(page[in:], part)
		}
		done += len(part)
	}
	return len(p), nil
}

func (s *sparse) Zero(off, n int64) error {
	_, err := s.WriteAt(make([]byte, n), off)
	return err
}

// clone copies the content, not the faults.
func (s *sparse) clone() *sparse {
	c := newSparse(s.size)
	for i, page := range s.pages {
		copied := *page
		c.pages[i] = &copied
	}
	return c
}

// flip inverts one bit.
func (s *sparse) flip(off int64, bit uint) {
	var b [1]byte
	if _, err := s.ReadAt(b[:], off); err != nil {
		panic(err)
	}
	b[0] ^= 1 << bit
	s.WriteAt(b[:], off)
}

var goldenCache = map[string]*sparse{}

// golden returns a fresh copy of an image that the 7.3 kernel wrote, by its
// name in one of the archives.
func golden(t testing.TB, name string) *sparse {
	t.Helper()
	if s := goldenCache[name]; s != nil {
		return s.clone()
	}
	cache, _, _ := strings.Cut(name, ".")
	f, err := os.Open(filepath.Join("testdata", cache+".tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewReader(z)
	chunk := make([]byte, 1<<20)
	for {
		h, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		s := newSparse(h.Size)
		for off := int64(0); off < h.Size; off += int64(len(chunk)) {
			p := chunk[:min(int64(len(chunk)), h.Size-off)]
			if _, err := io.ReadFull(archive, p); err != nil {
				t.Fatal(err)
			}
			if isZero(p) {
				continue
			}
			for i := 0; i < len(p); i += 4096 {
				s.WriteAt(p[i:min(len(p), i+4096)], off+int64(i))
			}
		}
		goldenCache[h.Name] = s
	}
	return goldenCache[name].clone()
}
