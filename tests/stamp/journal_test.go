package stamp

import (
	"strings"
	"testing"
)

// dying is a memory that loses power in a request: it may or may not have been done, and is never acknowledged.
type dying struct {
	*memory
	done bool
}

type powerLoss struct{}

func (d dying) WriteAt(p []byte, off int64) (int, error) {
	if d.done {
		d.memory.WriteAt(p, off)
	}
	panic(powerLoss{})
}

// dieIn makes a request that the power cuts short.
func dieIn(t *testing.T, request func()) {
	t.Helper()
	defer func() {
		if r := recover(); r != (powerLoss{}) {
			t.Fatalf("the power did not go: %v", r)
		}
	}()
	request()
}

// After a power cut a sector holds what was promised or what came later, and nothing else will do.
func TestRecoverAfterPowerCut(t *testing.T) {
	const size = 1 << 20
	buf := make([]byte, 8*sectorSize)
	for _, c := range []struct {
		name    string
		promise Promise
		work    func(t *testing.T, d *Device, m *memory) // until the power goes
		cut     func(m *memory, before []byte)           // what it does to the memory; before is from the last flush
		want    string                                   // in the error; "" for none
	}{
		{name: "nothing lost", promise: OnceAcknowledged},
		{name: "acknowledged lost", promise: OnceAcknowledged, cut: func(m *memory, before []byte) { m.data = before }, want: "stale"},
		{name: "unflushed lost", promise: OnceFlushed, cut: func(m *memory, before []byte) { m.data = before }},
		{name: "flushed lost", promise: OnceFlushed, cut: func(m *memory, _ []byte) { clear(m.data[:sectorSize]) }, want: "lost"},
		{name: "durable lost", promise: OnceFlushed, work: func(t *testing.T, d *Device, m *memory) {
			if err := d.WriteDurable(m, buf[:sectorSize], 0); err != nil {
				t.Fatal(err)
			}
		}, cut: func(m *memory, before []byte) { copy(m.data[:sectorSize], before) }, want: "stale"},
		{name: "part of the unflushed lost", promise: OnceFlushed, cut: func(m *memory, before []byte) {
			copy(m.data[2*sectorSize:][:sectorSize], before[2*sectorSize:])
		}},
		{name: "torn in a sector", promise: OnceFlushed, cut: func(m *memory, before []byte) {
			copy(m.data[2*sectorSize:][:8], before[2*sectorSize:])
		}, want: "torn"},
		{name: "issued and done", promise: OnceAcknowledged, work: func(t *testing.T, d *Device, m *memory) {
			d.io = dying{m, true}
			dieIn(t, func() { d.Write(buf, 0) })
		}},
		{name: "issued and not done", promise: OnceAcknowledged, work: func(t *testing.T, d *Device, m *memory) {
			d.io = dying{m, false}
			dieIn(t, func() { d.Write(buf, 0) })
		}},
		{name: "zeros lost", promise: OnceAcknowledged, work: func(t *testing.T, d *Device, m *memory) {
			if err := d.Zero(0, sectorSize, func(off, n int64) error { return m.zero(off, n, 0) }); err != nil {
				t.Fatal(err)
			}
		}, cut: func(m *memory, before []byte) { copy(m.data[:sectorSize], before) }, want: "stale"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := &memory{data: make([]byte, size)}
			first, second := t.TempDir(), t.TempDir()
			d, _, err := Recover(m, 0, size, "", first, c.promise)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Write(buf, 0); err != nil {
				t.Fatal(err)
			}
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
			before := append([]byte(nil), m.data...)
			if err := d.Write(buf, 0); err != nil {
				t.Fatal(err)
			}
			if c.work != nil {
				c.work(t, d, m)
			}
			if c.cut != nil {
				c.cut(m, before)
			}
			if n, err := Requests(first); err != nil || n < 2 {
				t.Errorf("the journal has %d requests (%v)", n, err)
			}
			d, what, err := Recover(m, 0, size, first, second, c.promise)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("%s: got %v, want %q", what, err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			// What was found must stay.
			if err := d.Verify(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
		})
	}
}
