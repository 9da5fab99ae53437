package bytesize

import (
	"errors"
	"math"
	"testing"
)

// TestParse: what people write is taken, what could be meant otherwise is not.
func TestParse(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "4194304": 4 << 20, "512B": 512, "512 B": 512, "600M": 600 << 20, "4m": 4 << 20, "1GiB": 1 << 30, "1 GiB": 1 << 30, "3.0 GiB": 3 << 30,
		"1.5g": 3 << 29, "0.5KiB": 512, "7TIB": 7 << 40, "8191P": 8191 << 50, "7EiB": 7 << 60, "9223372036854775807": math.MaxInt64,
	} {
		if got, err := Parse(text); err != nil || got != want {
			t.Errorf("%q is %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "B", "iB", "K", "M", "GiB", " ", "-1", "+1", "-1G", "1X", "1MB", "1 MB", "1KB", "4iB", "10iB", "1e3", "0x10", "1_0", "1/2", "1.G", ".5G", "1.2.3G", "1  G", " 1G", "1G ",
		"9223372036854775808", "8E", "9999999999T", "NaN", "Inf", "\u0661G",
	} {
		if got, err := Parse(text); !errors.Is(err, ErrSyntax) {
			t.Errorf("%q is %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"0.5", "1.3GiB", "0.0001K"} {
		if got, err := Parse(text); !errors.Is(err, ErrBroken) {
			t.Errorf("%q is %d, %v", text, got, err)
		}
	}
}

// TestText: a size that is one whole and a digit behind the point is read as it is written.
func TestText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 600 << 20: "600.0 MiB", 3 << 29: "1.5 GiB", 1 << 40: "1.0 TiB", math.MaxInt64: "8.0 EiB"} {
		got := Text(n)
		if got != want {
			t.Errorf("%d is written as %q, want %q", n, got, want)
		}
		if read, err := Parse(got); n < math.MaxInt64 && (read != n || err != nil) {
			t.Errorf("%q is read as %d, %v", got, read, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("1.5 GiB")
	f.Add("512 B")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := Parse(text)
		if err == nil && n < 0 || err != nil && !errors.Is(err, ErrSyntax) && !errors.Is(err, ErrBroken) {
			t.Errorf("%q is %d, %v", text, n, err)
		}
	})
}
