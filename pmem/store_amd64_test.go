package pmem

import "testing"

// TestNarrowStores does TestStores as a processor without the wide ones.
func TestNarrowStores(t *testing.T) {
	was := wide
	defer func() { wide = was }()
	wide = false
	TestStores(t)
}
