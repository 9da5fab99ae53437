package estimate

import (
	"strings"
	"testing"
)

// TestTextbook plays letters to each algorithm. A capital is a hit; each case was worked out
// by hand.
func TestTextbook(t *testing.T) {
	for _, c := range []struct {
		name     string
		make     func(capacity, blocks int) policy
		capacity int
		want     string
	}{
		{"fifo", newFIFO, 2, "abAAcabBd"},
		{"lru", newLRU, 2, "abAAcAb"},
		{"lru of three", newLRU, 3, "abcAdbAecA"},
		{"one hit is not enough for main", newS3FIFO, 2, "aAbca"},
		{"two are, and a ghost goes there at once", newS3FIFO, 2, "aAAbcACbcAb"},
		{"there are no more ghosts than blocks", newS3FIFO, 2, "abcdafga"},
		{"hits of a newcomer give no rounds in main", newS3FIFO, 2, "aAAbcbca"},
		{"three hits in main are three rounds, and four are no more", newS3FIFO, 2, "aAAbcbAAAAcdcdcdCa"},
	} {
		p := c.make(c.capacity, 26)
		got := []byte(strings.ToLower(c.want))
		for i, b := range got {
			if p.access(int32(b - 'a')) {
				got[i] = b - 'a' + 'A'
			}
		}
		if string(got) != c.want {
			t.Errorf("%s: %s, not %s", c.name, got, c.want)
		}
	}
}
