package estimate

import (
	"fmt"
	"strconv"
	"strings"

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
// a unit, such as 16GiB or 16G.
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

func parseSize(text string) (s Size, err error) {
	refused := fmt.Errorf("%q is no size of a cache: give percents of what the trace touches, up to 100, or up to 16TiB as in 16GiB", text)
	short := strings.TrimSuffix(strings.ToUpper(text), "IB")
	if n := len(short) - 1; n > 0 {
		if unit := strings.IndexByte("MGT", short[n]); unit >= 0 {
			count, err := strconv.ParseInt(short[:n], 10, 64)
			shift := 20 + 10*unit
			if err != nil || count < 1 || count > ondisk.MaxSegments*ondisk.SegmentSize>>shift {
				return s, refused
			}
			return Size{Bytes: count << shift}, nil
		}
	}
	s.Percent, err = strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
	if err != nil || !(s.Percent > 0 && s.Percent <= 100) {
		return s, refused
	}
	return s, nil
}
