package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ublk-pcache/engine"
	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

func newDumpCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "dump PMEM",
		Short: "Print all metadata and the log of a cache that is not in use",
		Example: `  ublk-pcache dump /dev/dax0.0
  ublk-pcache dump --json /srv/cache.img`,
		Args: takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := pmem.Open(args[0], pmem.ReadOnly)
			if err != nil {
				return err
			}
			defer r.Close()
			out := bufio.NewWriter(cmd.OutOrStdout())
			if asJSON {
				err = dump(r, &jsonDump{w: out})
			} else {
				err = dump(r, textDump{out})
			}
			if flushed := out.Flush(); flushed != nil {
				return flushed
			}
			if err != nil {
				return fmt.Errorf("%s: %w", r.Path(), err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

// dumper prints the parts of a cache in this order, head and end once.
type dumper interface {
	head(h *dumpHead) error
	kset(k *dumpKset) error
	end(e *dumpEnd) error
}

// The fields of the JSON form; the text form shows the same. A record of which
// both copies are lost is null.
type (
	dumpHead struct {
		Segments    uint32           `json:"segments"`
		Identity    *dumpIdentity    `json:"identity"`
		Fingerprint *dumpFingerprint `json:"fingerprint"`
		Settings    *dumpSettings    `json:"settings"`
		Info        *dumpInfo        `json:"cache_info"`
		KeyTail     *dumpPosition    `json:"key_tail"`
		DirtyTail   *dumpPosition    `json:"dirty_tail"`
		Chain       []dumpSegment    `json:"chain"`
		Damaged     []string         `json:"damaged_copies"`
	}
	// dumpCopy is where the newest copy of a record stands.
	dumpCopy struct {
		Slot uint8 `json:"slot"`
		Seq  uint8 `json:"seq"`
	}
	dumpIdentity struct {
		dumpCopy
		UUID        string `json:"uuid"`
		BackingSize int64  `json:"backing_size"`
		Serial      string `json:"serial"`
	}
	dumpFingerprint struct {
		dumpCopy
		State     string   `json:"state"` // unknown, known, changed
		Sum       uint32   `json:"sum"`   // this and what follows: of a known one
		Size      int64    `json:"backing_size"`
		DirtyTail []string `json:"dirty_tail"` // the two places it holds for
	}
	dumpSettings struct {
		dumpCopy
		Values values `json:"values"` // as set takes them
	}
	dumpInfo struct {
		dumpCopy
		FirstSegment uint32 `json:"first_segment"`
		Segments     uint32 `json:"segments"`
		DataCRC      bool   `json:"data_crc"`
		GCPercent    int    `json:"gc_percent"`
	}
	dumpPosition struct {
		dumpCopy
		Segment uint32 `json:"segment"`
		Offset  uint32 `json:"offset"`
	}
	dumpSegment struct {
		dumpCopy
		ID         int    `json:"id"`
		Physical   uint32 `json:"physical"`
		Generation uint64 `json:"generation"`
	}
	dumpKset struct {
		Segment uint32    `json:"segment"`
		Offset  uint32    `json:"offset"`
		Seq     uint64    `json:"seq"`
		Next    *uint32   `json:"next_segment,omitempty"` // of a LAST record
		Keys    []dumpKey `json:"keys"`
	}
	dumpKey struct {
		Offset        uint64 `json:"offset"`
		Length        uint32 `json:"length"`
		State         string `json:"state"` // see keyState
		Segment       uint32 `json:"segment"`
		SegmentOffset uint32 `json:"segment_offset"`
		Generation    uint64 `json:"generation"`
		CRC           uint32 `json:"crc"`
	}
	dumpEnd struct {
		Ksets   int    `json:"ksets"` // LAST records not counted
		Keys    int    `json:"keys"`
		Clean   int    `json:"clean"`
		Segment uint32 `json:"segment"`
		Offset  uint32 `json:"offset"`
		Damage  string `json:"damage,omitempty"`
	}
)

// dump prints as much as can be read, and returns what keeps the rest from it.
func dump(r *pmem.Region, d dumper) error {
	l, broken := ondisk.ReadLayout(r, r.Size())
	if err := d.head(newDumpHead(l)); err != nil {
		return err
	}
	var end dumpEnd
	if broken != nil {
		end.Damage = oneLine(broken)
		if err := d.end(&end); err != nil {
			return err
		}
		return broken
	}
	unflushed := false
	log, err := l.WalkLog(r, l.KeyTail, func(at ondisk.Position, k *ondisk.Kset) error {
		unflushed = unflushed || at == l.DirtyTail
		out := dumpKset{Segment: at.Seg, Offset: at.Off, Seq: k.Seq, Keys: []dumpKey{}}
		if k.Last {
			out.Next = &k.Next
		} else {
			end.Ksets++
		}
		for i := range k.Keys {
			key := &k.Keys[i]
			end.Keys++
			if key.Flags&ondisk.KeyClean != 0 {
				end.Clean++
			}
			state := keyState(key, l.Gens[key.Seg], unflushed)
			out.Keys = append(out.Keys, dumpKey{key.Off, key.Len, state, key.Seg, key.SegOff, key.Gen, key.CRC})
		}
		return d.kset(&out)
	})
	if err != nil {
		return err
	}
	end.Segment, end.Offset = log.Pos.Seg, log.Pos.Off
	if log.Damage == nil {
		return d.end(&end)
	}
	end.Damage = log.Damage.Error()
	if err := d.end(&end); err != nil {
		return err
	}
	return log.Damage
}

// keyState says what a key's data is: dead (its segment was recycled since),
// clean (it came from the backing device), flushed (it was written there; the
// key lies before dirty_tail), or dirty (it exists in the cache alone).
func keyState(k *ondisk.Key, generation uint64, unflushed bool) string {
	switch {
	case k.Gen < generation:
		return "dead"
	case k.Flags&ondisk.KeyClean != 0:
		return "clean"
	case !unflushed:
		return "flushed"
	}
	return "dirty"
}

func newDumpHead(l *ondisk.Layout) *dumpHead {
	h := &dumpHead{Segments: l.Superblock.Segments, Chain: []dumpSegment{}, Damaged: []string{}}
	if id := l.Identity; id != nil {
		h.Identity = &dumpIdentity{dumpCopy(l.IdentityCopies.Newest), hex.EncodeToString(id.UUID[:]), id.BackingSize, id.Serial}
	}
	if l.FingerprintCopies.Valid() {
		f := l.Fingerprint
		h.Fingerprint = &dumpFingerprint{dumpCopy(l.FingerprintCopies.Newest), f.State.String(), f.Sum, f.Size,
			[]string{f.DirtyTail[0].String(), f.DirtyTail[1].String()}}
	}
	if l.SettingsCopies.Valid() {
		h.Settings = &dumpSettings{dumpCopy(l.SettingsCopies.Newest), textsOf(&engine.Settings{Settings: l.Settings, GCPercent: l.Info.Flags.GCPercent()})}
	}
	if l.InfoCopies.Valid() {
		i := l.Info
		h.Info = &dumpInfo{dumpCopy(l.InfoCopies.Newest), i.FirstSegment, i.Segments, i.Flags.DataCRC(), i.Flags.GCPercent()}
	}
	if l.KeyTailCopies.Valid() {
		h.KeyTail = &dumpPosition{dumpCopy(l.KeyTailCopies.Newest), l.KeyTail.Seg, l.KeyTail.Off}
	}
	if l.DirtyTailCopies.Valid() {
		h.DirtyTail = &dumpPosition{dumpCopy(l.DirtyTailCopies.Newest), l.DirtyTail.Seg, l.DirtyTail.Off}
	}
	for id := range l.Gens {
		h.Chain = append(h.Chain, dumpSegment{dumpCopy(l.GenAt[id]), id, l.Chain[id], l.Gens[id]})
	}
	for _, note := range l.DamagedCopies {
		h.Damaged = append(h.Damaged, note.String())
	}
	return h
}

type textDump struct{ w io.Writer }

func (d textDump) head(h *dumpHead) error {
	p := func(format string, args ...any) { fmt.Fprintf(d.w, format, args...) }
	p("superblock   %d segments\n", h.Segments)
	if id := h.Identity; id != nil {
		p("identity     %s of a backing device of %d bytes, serial %q %v\n", id.UUID, id.BackingSize, id.Serial, id.dumpCopy)
	} else {
		p("identity     none\n")
	}
	if f := h.Fingerprint; f == nil {
		p("fingerprint  none\n")
	} else if f.State != ondisk.FingerprintKnown.String() {
		p("fingerprint  %s %v\n", f.State, f.dumpCopy)
	} else {
		p("fingerprint  %08x of a backing device of %d bytes, with dirty_tail at %s or %s %v\n",
			f.Sum, f.Size, f.DirtyTail[0], f.DirtyTail[1], f.dumpCopy)
	}
	if s := h.Settings; s == nil {
		p("settings     none\n")
	} else {
		p("settings     %s %v\n", s.Values.line(), s.dumpCopy)
	}
	if i := h.Info; i != nil {
		p("cache_info   %d segments from %d, data crc %s, gc at %d %% %v\n", i.Segments, i.FirstSegment, onOff(i.DataCRC), i.GCPercent, i.dumpCopy)
	} else {
		p("cache_info   lost\n")
	}
	tail := func(name string, t *dumpPosition) {
		if t != nil {
			p("%-12s %d:%d %v\n", name, t.Segment, t.Offset, t.dumpCopy)
		} else {
			p("%-12s lost\n", name)
		}
	}
	tail("key_tail", h.KeyTail)
	tail("dirty_tail", h.DirtyTail)
	for _, s := range h.Chain {
		p("segment %-4d physical %d, generation %d %v\n", s.ID, s.Physical, s.Generation, s.dumpCopy)
	}
	for _, s := range h.Damaged {
		p("damaged      %s\n", s)
	}
	return nil
}

func (c dumpCopy) String() string { return fmt.Sprintf("(copy %d, seq %d)", c.Slot, c.Seq) }

func (d textDump) kset(k *dumpKset) error {
	if k.Next != nil {
		fmt.Fprintf(d.w, "last %d:%d, number %d: on to segment %d\n", k.Segment, k.Offset, k.Seq, *k.Next)
		return nil
	}
	fmt.Fprintf(d.w, "kset %d:%d, number %d: %d keys\n", k.Segment, k.Offset, k.Seq, len(k.Keys))
	for _, key := range k.Keys {
		fmt.Fprintf(d.w, "  %12d +%-8d at %d:%d, generation %d, crc %08x, %s\n",
			key.Offset, key.Length, key.Segment, key.SegmentOffset, key.Generation, key.CRC, key.State)
	}
	return nil
}

func (d textDump) end(e *dumpEnd) error {
	if e.Damage != "" {
		fmt.Fprintf(d.w, "damage       %s\n", e.Damage)
	}
	_, err := fmt.Fprintf(d.w, "log          %d keys (%d clean) in %d ksets, head at %d:%d\n", e.Keys, e.Clean, e.Ksets, e.Segment, e.Offset)
	return err
}

// jsonDump prints one object, kset by kset, so that a log of any length fits
// into memory.
type jsonDump struct {
	w     io.Writer
	ksets int
}

func (d *jsonDump) head(h *dumpHead) error {
	p, err := json.Marshal(h)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(d.w, "%s,\n\"ksets\":[", bytes.TrimSuffix(p, []byte("}")))
	return err
}

func (d *jsonDump) kset(k *dumpKset) error {
	p, err := json.Marshal(k)
	if err != nil {
		return err
	}
	comma := ","
	if d.ksets == 0 {
		comma = ""
	}
	d.ksets++
	_, err = fmt.Fprintf(d.w, "%s\n%s", comma, p)
	return err
}

func (d *jsonDump) end(e *dumpEnd) error {
	p, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(d.w, "],\n\"log\":%s}\n", p)
	return err
}
