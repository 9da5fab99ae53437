// Package bytesize reads and writes sizes as people have them: 4194304, 4M, 4MiB, 1.5 GiB. Units are
// powers of 1024. MB is not taken: it is 1000 times 1000 for some, and what is meant of a disk's
// size has to be certain.
package bytesize

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strings"
)

const units = "KMGTPE"

// Errors of Parse, which say what to give.
var (
	ErrSyntax = errors.New("a size is a number of bytes, or one followed by K, M, G or T, as in 4194304, 4M and 1.5GiB")
	ErrBroken = errors.New("a size is a whole number of bytes")
)

// Parse reads a size, which is not negative and below 8 EiB. Its error is ErrSyntax or ErrBroken.
func Parse(text string) (int64, error) {
	digits, shift := text, 0
	short := text
	if n := len(text) - len("iB"); n > 0 && strings.EqualFold(text[n:], "iB") {
		short = text[:n]
	}
	if bytes, ok := strings.CutSuffix(text, "B"); ok && strings.Trim(bytes, "0123456789 ") == "" {
		digits = strings.TrimSuffix(bytes, " ")
	} else if n := len(short) - 1; n > 0 {
		if unit := strings.IndexByte(units, short[n]&^0x20); unit >= 0 {
			digits, shift = strings.TrimSuffix(short[:n], " "), 10*(unit+1)
		}
	}
	if strings.Trim(digits, "0123456789.") != "" || strings.Count(digits, ".") > 1 || strings.HasPrefix(digits, ".") || strings.HasSuffix(digits, ".") {
		return 0, fmt.Errorf("%w, not %.40q", ErrSyntax, text)
	}
	n, ok := new(big.Rat).SetString(digits)
	if !ok {
		return 0, fmt.Errorf("%w, not %.40q", ErrSyntax, text)
	}
	n.Mul(n, new(big.Rat).SetInt64(1<<shift))
	switch {
	case !n.IsInt():
		return 0, fmt.Errorf("%w, not %.40q", ErrBroken, text)
	case !n.Num().IsInt64():
		return 0, fmt.Errorf("%w, below %s, not %.40q", ErrSyntax, Text(math.MaxInt64), text)
	}
	return n.Num().Int64(), nil
}

// Text writes a size in the largest unit that leaves at least one whole, with one digit
// behind the point.
func Text(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for ; v >= 1024; i++ {
		v /= 1024
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}
