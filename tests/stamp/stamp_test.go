package stamp

import (
	"strings"
	"sync"
	"testing"
)

// memory is a device on the heap; the lock keeps the race detector away from requests that Device keeps apart itself.
type memory struct {
	mu   sync.RWMutex
	data []byte
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) zero(off, n int64, _ int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *memory) Sync() error { return nil }

func TestUnmarkInvertsMark(t *testing.T) {
	for _, sector := range []int64{0, 1, 12345, 1<<40 - 1} {
		for _, generation := range []uint32{1, 2, 1<<24 - 1} {
			if s, g := unmark(mark(sector, generation)+63, 63); s != sector || g != generation {
				t.Errorf("sector %d, generation %d came back as sector %d, generation %d", sector, generation, s, g)
			}
		}
	}
}

func TestLoadOnAnHonestDeviceVerifies(t *testing.T) {
	m := &memory{data: make([]byte, 32<<20)}
	d := New(m, 4096, 16<<20)
	written, err := Load{Depth: 8, BlockSize: 512, Seed: 1, Zero: m.zero}.Run(d, 64<<20, nil)
	if err != nil || written < 64<<20 {
		t.Fatalf("wrote %d bytes: %v", written, err)
	}
	if err := d.Verify(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	copied := &memory{data: append([]byte(nil), m.data...)}
	if err := d.On(copied).Verify(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
}

// Each way in which a device can lie is found, and called by its name.
func TestEveryKindOfDamageIsNamed(t *testing.T) {
	sector := func(m *memory, i int) []byte { return m.data[i*sectorSize:][:sectorSize] }
	for name, damage := range map[string]func(m *memory, before []byte){
		"stale":              func(m *memory, before []byte) { copy(sector(m, 7), before[7*sectorSize:][:sectorSize]) },
		"foreign":            func(m *memory, _ []byte) { copy(sector(m, 7), sector(m, 8)) },
		"lost":               func(m *memory, _ []byte) { clear(sector(m, 7)) },
		"torn":               func(m *memory, before []byte) { copy(sector(m, 7)[256:], before[7*sectorSize+256:][:256]) },
		"never acknowledged": func(m *memory, _ []byte) { fill(sector(m, 7), 7, 3) },
	} {
		t.Run(name, func(t *testing.T) {
			m := &memory{data: make([]byte, 1<<20)}
			d := New(m, 0, 1<<20)
			buf := make([]byte, 64*sectorSize)
			var before []byte
			for range 2 {
				before = append([]byte(nil), m.data...)
				if err := d.Write(buf, 0); err != nil {
					t.Fatal(err)
				}
			}
			damage(m, before)
			err := d.Verify(make([]byte, 1<<20))
			if err == nil || !strings.Contains(err.Error(), "1 wrong sectors") || !strings.Contains(err.Error(), name) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

// What was there before a zeroing is stale, and a zeroing that took place is no loss.
func TestDamageAfterZeroingIsNamed(t *testing.T) {
	m := &memory{data: make([]byte, 1<<20)}
	d := New(m, 0, 1<<20)
	if err := d.Write(make([]byte, 64*sectorSize), 0); err != nil {
		t.Fatal(err)
	}
	before := append([]byte(nil), m.data...)
	if err := d.Zero(sectorSize, 8*sectorSize, func(off, n int64) error { return m.zero(off, n, 0) }); err != nil {
		t.Fatal(err)
	}
	if err := d.Verify(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	copy(m.data[2*sectorSize:], before[2*sectorSize:][:sectorSize])
	err := d.Verify(make([]byte, 1<<20))
	if err == nil || !strings.Contains(err.Error(), "1 wrong sectors: sector 2, zeroed in generation 2: stale") {
		t.Fatalf("got %v", err)
	}
}
