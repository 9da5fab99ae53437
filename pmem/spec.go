package pmem

import (
	"fmt"
	"strings"

	"ublk-pcache/internal/bytesize"
)

// Spec is a region as a user names it.
type Spec struct {
	Path     string
	Size     int64 // in bytes: a missing file is made of this size, an existing one must have it; 0 for any
	Volatile bool  // the region may be lost in a power cut or a reboot
}

// ParseSpec reads PATH[,size=SIZE][,volatile], the options in any order. A path
// may have commas: text that is no option, or the same option again, belongs to
// it.
func ParseSpec(text string) (Spec, error) {
	s := Spec{Path: text}
	for {
		i := strings.LastIndexByte(s.Path, ',')
		if i < 0 {
			break
		}
		value, sized := strings.CutPrefix(s.Path[i+1:], "size=")
		switch {
		case sized && s.Size == 0:
			var err error
			if s.Size, err = parseSize(value); err != nil {
				return Spec{}, fmt.Errorf("pmem %s: %w", s.Path[:i], err)
			}
		case s.Path[i+1:] == "volatile" && !s.Volatile:
			s.Volatile = true
		default:
			return s, nil
		}
		s.Path = s.Path[:i]
	}
	return s, nil
}

// String is what ParseSpec reads.
func (s Spec) String() string {
	text := s.Path
	if s.Size != 0 {
		text += fmt.Sprintf(",size=%d", s.Size)
	}
	if s.Volatile {
		text += ",volatile"
	}
	return text
}

func parseSize(text string) (int64, error) {
	size, err := bytesize.Parse(text)
	if err != nil {
		return 0, err
	}
	return size, checkSize(size)
}

func checkSize(size int64) error {
	switch {
	case size < MinSize:
		return fmt.Errorf("%w: %d bytes", ErrTooSmall, size)
	case size%pageSize != 0:
		return fmt.Errorf("%w: %d bytes, not a multiple of %d", ErrMisaligned, size, pageSize)
	}
	return nil
}
