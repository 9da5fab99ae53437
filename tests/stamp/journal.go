package stamp

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
)

// A Journal remembers outside of a machine what a Device inside must hold, for when the machine loses power and every
// process in it its memory. It lies in a folder that a write reaches before it returns and that survives the machine.
//
// A request is in the journal from before it is issued, and noted as acknowledged before the range is anybody else's.
// So what a sector may hold afterwards is what the last request that was promised to last left there, or what a later one
// did; nothing else, and nothing older.
type Journal struct {
	requests *os.File // a record for each generation after first
	flushed  *os.File // a generation: it and all before it were acknowledged when a flush began that succeeded
	first    uint32
}

// A record is the first sector, the sector behind the last, and a state, 4 bytes each. The state has the flag zeroed if
// that is what the request does.
const recordSize = 12

const (
	stateIssued       = 1 << 0
	stateAcknowledged = 1 << 1
	stateDurable      = 1 << 2 // it need not be flushed
)

func (j *Journal) issue(s span, flag uint32) error { return j.write(s, flag|stateIssued) }

func (j *Journal) acknowledge(s span, flag uint32) error {
	return j.write(s, flag|stateIssued|stateAcknowledged)
}

func (j *Journal) write(s span, state uint32) error {
	if j == nil {
		return nil
	}
	var p [recordSize]byte
	binary.LittleEndian.PutUint32(p[0:], uint32(s.from))
	binary.LittleEndian.PutUint32(p[4:], uint32(s.to))
	binary.LittleEndian.PutUint32(p[8:], state)
	_, err := j.requests.WriteAt(p[:], int64(s.generation-j.first)*recordSize)
	return err
}

func (j *Journal) flush(generation uint32) error {
	if j == nil {
		return nil
	}
	_, err := j.flushed.WriteAt(binary.LittleEndian.AppendUint32(nil, generation), 0)
	return err
}

// A Promise says which requests a power cut may not undo.
type Promise bool

const (
	OnceAcknowledged Promise = true  // all that were acknowledged
	OnceFlushed      Promise = false // those that were acknowledged before a flush, or durable by themselves
)

// Requests is how many requests, at least, the journal in dir has.
func Requests(dir string) (int64, error) {
	info, err := os.Stat(dir + "/requests")
	if err != nil {
		return 0, err
	}
	return info.Size() / recordSize, nil
}

// Recover describes size bytes from base on after a power cut, by the journal that the device had until then in the
// folder before; without one ("") it must hold zeros. Every sector is compared with what it may hold, and must hold what
// was found from now on, by a new journal in the folder dir. What says how much was at stake.
func Recover(device ReadWriterAt, base, size int64, before, dir string, promise Promise) (d *Device, what string, err error) {
	d, what = New(device, base, size), "nothing had to last"
	var doubts map[int64][]uint32
	if before != "" {
		if doubts, what, err = d.replay(before, promise); err != nil {
			return nil, "", err
		}
	}
	if err := d.settle(doubts); err != nil {
		return nil, what, err
	}
	if err := d.writeContents(dir); err != nil {
		return nil, what, err
	}
	d.journal = &Journal{first: d.mu.last + 1}
	for name, file := range map[string]**os.File{"requests": &d.journal.requests, "flushed": &d.journal.flushed} {
		if *file, err = os.Create(filepath.Join(dir, name)); err != nil {
			return nil, what, err
		}
	}
	return d, what, nil
}

// replay brings the generations up to what the promised requests of a journal left, and returns for each sector that
// later requests may have changed what it may hold besides.
func (d *Device) replay(dir string, promise Promise) (doubts map[int64][]uint32, what string, err error) {
	if err := d.readContents(dir); err != nil {
		return nil, "", err
	}
	records, err := os.ReadFile(dir + "/requests")
	if err != nil {
		return nil, "", err
	}
	mark, err := os.ReadFile(dir + "/flushed")
	if err != nil {
		return nil, "", err
	}
	flushed := binary.LittleEndian.Uint32(append(mark, 0, 0, 0, 0)) // 0 before the first flush
	doubts = map[int64][]uint32{}
	var promised, other int
	for ; len(records) >= recordSize; records = records[recordSize:] {
		d.mu.last++
		from, to := int64(binary.LittleEndian.Uint32(records[0:])), int64(binary.LittleEndian.Uint32(records[4:]))
		state := binary.LittleEndian.Uint32(records[8:])
		if state == 0 {
			continue // the power went before it was issued, but others after it were
		}
		left := d.mu.last | state&zeroed
		sure := state&stateAcknowledged != 0 && (promise == OnceAcknowledged || state&stateDurable != 0 || d.mu.last <= flushed)
		if sure {
			promised++
		} else {
			other++
		}
		for i := from; i < to; i++ {
			if sure {
				d.mu.generations[i] = left
				delete(doubts, i)
			} else {
				doubts[i] = append(doubts[i], left)
			}
		}
	}
	return doubts, fmt.Sprintf("%d requests had to last, %d might, with %d sectors", promised, other, len(doubts)), nil
}

// settle reads everything and takes for each sector in doubt what is there, if it may be.
func (d *Device) settle(doubts map[int64][]uint32) error {
	buf, err := Buffer(maxRequest)
	if err != nil {
		return err
	}
	var wrong []string
	for off := int64(0); off < d.Size(); off += maxRequest {
		part := buf[:min(maxRequest, d.Size()-off)]
		if _, err := d.io.ReadAt(part, d.base+off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(part), d.base+off, err)
		}
		for i := range int64(len(part) / sectorSize) {
			sector, data := off/sectorSize+i, part[i*sectorSize:][:sectorSize]
			w := compare(data, sector, d.mu.generations[sector])
			for _, generation := range doubts[sector] {
				if w != "" && compare(data, sector, generation) == "" {
					w, d.mu.generations[sector] = "", generation
				}
			}
			if w != "" {
				wrong = append(wrong, w)
			}
		}
	}
	return describe(wrong)
}

// The contents, which a journal is the continuation of, are the last generation and that of each sector, 4 bytes each.
func (d *Device) readContents(dir string) error {
	data, err := os.ReadFile(dir + "/contents")
	if err != nil {
		return err
	}
	if want := 4 * (1 + len(d.mu.generations)); len(data) != want {
		return fmt.Errorf("%s/contents has %d bytes, not %d: it is of a device of another size", dir, len(data), want)
	}
	d.mu.last = binary.LittleEndian.Uint32(data)
	for i := range d.mu.generations {
		d.mu.generations[i] = binary.LittleEndian.Uint32(data[4*(1+i):])
	}
	return nil
}

func (d *Device) writeContents(dir string) error {
	data := binary.LittleEndian.AppendUint32(nil, d.mu.last)
	for _, generation := range d.mu.generations {
		data = binary.LittleEndian.AppendUint32(data, generation)
	}
	return os.WriteFile(dir+"/contents", data, 0o644)
}
