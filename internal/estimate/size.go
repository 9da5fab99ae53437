package estimate

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"ublk-pcache/internal/bytesize"
	"ublk-pcache/ondisk"
)

// Size is that of a cache: percent of the blocks that a trace touches, or bytes, 0 for the
// other.
type Size struct {
	Percent float64
	Bytes   int64
}

func (s Size) String() string {
	if s.Bytes == 0 {
		return strconv.FormatFloat(s.Percent, 'g', -1, 64) + "%"
	}
	const units = "KMGTP"
	n, unit := s.Bytes>>10, 0
	for n&1023 == 0 && unit < len(units)-1 {
		n, unit = n>>10, unit+1
	}
	return fmt.Sprintf("%d%ciB", n, units[unit])
}

// ParseSizes reads sizes with commas between them: percents, with or without %, or bytes with
// a unit, as package bytesize has them.
func ParseSizes(text string) (sizes []Size, err error) {
	for part := range strings.SplitSeq(text, ",") {
		s, err := parseSize(part)
		if err != nil {
			return nil, err
		}
		sizes = append(sizes, s)
	}
	return sizes, nil
}

// leastBytes tells a size from a typing error; what a cache takes is more.
const leastBytes = 1 << 20

func parseSize(text string) (s Size, err error) {
	refused := fmt.Errorf("%q is no size of a cache: give percents of what the trace touches, up to 100, or up to 16TiB as in 16GiB", text)
	if last := len(text) - 1; last >= 0 && unicode.IsLetter(rune(text[last])) {
		s.Bytes, err = bytesize.Parse(text)
		if err != nil || s.Bytes < leastBytes || s.Bytes > ondisk.MaxSegments*ondisk.SegmentSize {
			return Size{}, refused
		}
		return s, nil
	}
	s.Percent, err = strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
	if err != nil || !(s.Percent > 0 && s.Percent <= 100) {
		return s, refused
	}
	return s, nil
}
