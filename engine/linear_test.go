package engine

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"ublk-pcache/backing"
	"ublk-pcache/ondisk"
)

var (
	linearSeed   = flag.Uint64("linear.seed", 0, "seed of the linearizability test; 0 draws one")
	linearRounds = flag.Int("linear.rounds", 8, "rounds of each case of the linearizability test, each ended by a crash")
	linearOps    = flag.Int("linear.ops", 60, "requests per client and round of the linearizability test")
)

// access is what one request did to one sector. A request is not atomic, its
// sectors are: each of them is a register with a history of its own.
type access struct {
	lba     int64
	write   bool
	maybe   bool   // a write that was not answered before the crash
	version uint64 // written, or read
}

// register is a sector: whatever was written last is read. It begins with a
// write, which stands for what the round before has left. A write that was not
// answered may have happened, at a moment before the crash, and never after.
var register = porcupine.NondeterministicModel{
	Init: func() []any { return []any{uint64(0)} },
	Step: func(state, input, _ any) []any {
		switch a := input.(access); {
		case a.maybe:
			return []any{state, a.version}
		case a.write || a.version == state.(uint64):
			return []any{a.version}
		default:
			return nil
		}
	},
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		bySector := map[int64][]porcupine.Operation{}
		for _, op := range history {
			lba := op.Input.(access).lba
			bySector[lba] = append(bySector[lba], op)
		}
		var parts [][]porcupine.Operation
		for _, ops := range bySector {
			parts = append(parts, ops)
		}
		return parts
	},
}

// testimony is what the clients of a round have seen. Time is a counter.
type testimony struct {
	clock, version atomic.Int64
	mu             struct {
		sync.Mutex
		ops []porcupine.Operation
	}
}

func (h *testimony) add(client int, r *Request, version uint64, begin int64, answered bool) {
	end := h.clock.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	lba := r.Off / sectorSize
	for i := range int64(r.size() / sectorSize) {
		a := access{lba: lba + i, write: r.Op != Read, maybe: !answered, version: version}
		if r.Op == Read {
			a.version, _ = stamp(r.Buf[i*sectorSize:], lba+i)
		}
		h.mu.ops = append(h.mu.ops, porcupine.Operation{ClientId: client, Call: begin, Return: end, Input: a})
	}
}

// check returns why the history is not linearizable, nil if it is.
func (h *testimony) check() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	model := register.ToModel()
	for _, ops := range model.Partition(h.mu.ops) {
		// Milliseconds are what it takes; the limit is for a hang.
		if result := porcupine.CheckOperationsTimeout(model, ops, 5*time.Minute); result != porcupine.Ok {
			return fmt.Errorf("a history that is not linearizable (%v):%s", result, tell(ops))
		}
	}
	return nil
}

func tell(ops []porcupine.Operation) string {
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	var s strings.Builder
	for _, op := range ops {
		a := op.Input.(access)
		fmt.Fprintf(&s, "\n%6d to %6d: client %d, sector %d, ", op.Call, op.Return, op.ClientId, a.lba)
		switch {
		case a.maybe:
			fmt.Fprintf(&s, "writes %d, not answered", a.version)
		case a.write:
			fmt.Fprintf(&s, "writes %d", a.version)
		default:
			fmt.Fprintf(&s, "reads %d", a.version)
		}
	}
	return s.String()
}

// contest is one case: clients that all write to the same few sectors, on a
// cache that others keep full.
type contest struct {
	queues, clients int
	durable, crc    bool
	gcPercent       int
	around          bool // also the modes that go around the cache, and the disk takes all that is written
}

// spots are where the contested sectors are: the start, both sides of a stripe
// boundary, the middle of a stripe.
var spots = [...]int64{0, stripeSectors - 6, stripeSectors, 2*stripeSectors + 5000}

const (
	spotSectors = 6
	// linearSectors is the device: what is contested in three stripes, and
	// behind them what fills the cache.
	linearSectors = 12 * stripeSectors
)

// TestLinearizable: whatever the clients see while requests overlap, and
// whatever is left of them after a crash, is what some order of the requests
// gives, with each one at a moment between its beginning and its end. The
// server dies in the middle of its stores; on durable memory the power fails
// as often.
func TestLinearizable(t *testing.T) {
	seed := *linearSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-linear.seed)", seed)
	for i, c := range []contest{
		{queues: 1, clients: 4, durable: true, gcPercent: 0},
		{queues: 2, clients: 6, durable: false, gcPercent: 0, around: true},
		{queues: 3, clients: 6, durable: true, crc: true, gcPercent: 0},
		{queues: 4, clients: 8, durable: false, crc: true, gcPercent: 90},
		{queues: 2, clients: 6, durable: true, gcPercent: 0, around: true},
	} {
		t.Run(fmt.Sprintf("%dq-%dc", c.queues, c.clients), func(t *testing.T) { c.run(t, seed+uint64(i)) })
	}
}

func (c contest) run(t *testing.T, seed uint64) {
	dice := rand.New(rand.NewPCG(seed, 0))
	mem := newMedium(c.durable)
	formatSmall(t, mem, uint32(4+c.queues), c.crc, c.gcPercent)
	disk := backing.NewFake(linearSectors*sectorSize, sectorSize, seed)
	defer func() { disk.Close() }()
	h := &testimony{}
	requests, misses := int64(0), uint64(0)
	for range *linearRounds {
		delays := rand.New(rand.NewPCG(dice.Uint64(), 1))
		disk.Script(func(op backing.Op) (f backing.Fault) {
			if delays.IntN(2) == 0 {
				f.Delay = time.Duration(delays.IntN(1000)) * time.Microsecond
			}
			// A failed round of write-back is a pause for most of a round here.
			if op.Kind == backing.OpRead && delays.IntN(50) == 0 || delays.IntN(1000) == 0 && !c.around {
				f.Err = syscall.EIO
			}
			return f
		})
		// The log soon goes on in another segment, whoever wrote it so far.
		if err := relog(mem, relogging{
			PerKset: 1 + dice.IntN(ondisk.MaxKeys), Room: dice.Uint32N(maxRoom), Numbered: dice.IntN(2) * dice.IntN(1000),
		}); err != nil {
			t.Fatal(err)
		}
		r := newRig(t, mem, disk, c.queues)
		h = c.recovered(t, r, h)
		if t.Failed() {
			r.kill()
			return
		}

		var dead atomic.Bool
		// fillers also write back all the time, so that contested sectors are
		// soon collected and missed again.
		var clients, fillers sync.WaitGroup
		for id := range c.clients {
			dice := rand.New(rand.NewPCG(dice.Uint64(), 2))
			clients.Go(func() { c.client(t, r, h, id, &dead, dice) })
		}
		fill := rand.New(rand.NewPCG(dice.Uint64(), 3))
		fillers.Go(func() { c.filler(r, &dead, fill) })
		fillers.Go(func() {
			for !dead.Load() {
				r.Flush(context.Background())
			}
		})
		mode := rand.New(rand.NewPCG(dice.Uint64(), 4))
		fillers.Go(func() { c.changeModes(t, r, &dead, mode) })
		ended := make(chan struct{})
		go func() { clients.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(time.Duration(dice.IntN(200)) * time.Millisecond):
		}

		// What is answered from here on counts as not answered.
		dead.Store(true)
		lost := dice
		if !c.durable || dice.IntN(2) == 0 {
			lost = nil
		}
		after := disk
		mem.crash(lost, func() { after = disk.Crash() })
		r.kill()
		clients.Wait()
		fillers.Wait()
		requests, misses = requests+h.clock.Load()/2, misses+r.Status().Misses
		disk.Close()
		disk, mem = after, mem.restarted()
	}
	r := newRig(t, mem, disk, c.queues)
	c.recovered(t, r, h)
	r.kill()
	t.Logf("%d contested requests, %d misses", requests, misses)
}

// recovered reads every contested sector, as the last thing in the history of
// the round that a crash has ended, and begins the next one with what it found.
func (c contest) recovered(t *testing.T, r *rig, h *testimony) *testimony {
	next := &testimony{}
	next.version.Store(h.version.Load())
	for i, lba := range spots {
		req := &Request{Op: Read, Off: lba * sectorSize, Buf: make([]byte, spotSectors*sectorSize)}
		begin := h.clock.Add(1)
		for r.do(i%c.queues, req) != nil {
		}
		if err := stamps(req); err != nil {
			t.Error(err)
		}
		h.add(-1, req, 0, begin, true)
		for i := range int64(spotSectors) {
			v, _ := stamp(req.Buf[i*sectorSize:], lba+i)
			next.mu.ops = append(next.mu.ops, porcupine.Operation{ClientId: -1, Input: access{lba: lba + i, write: true, version: v}})
		}
	}
	if err := h.check(); err != nil {
		t.Error(err)
	}
	return next
}

// stamps checks that what was read is whole sectors, and the right ones.
func stamps(r *Request) error {
	for i := range int64(len(r.Buf) / sectorSize) {
		if _, err := stamp(r.Buf[i*sectorSize:][:sectorSize], r.Off/sectorSize+i); err != nil {
			return err
		}
	}
	return nil
}

func (c contest) client(t *testing.T, r *rig, h *testimony, id int, dead *atomic.Bool, dice *rand.Rand) {
	for range *linearOps {
		if dice.IntN(2) == 0 {
			// Else all would be over before the first write-back.
			time.Sleep(time.Duration(dice.IntN(2000)) * time.Microsecond)
		}
		lba, n := spots[dice.IntN(len(spots))], int64(spotSectors)
		if dice.IntN(4) > 0 {
			skip := dice.Int64N(spotSectors)
			lba, n = lba+skip, 1+dice.Int64N(spotSectors-skip)
		}
		req := &Request{Op: Read, Off: lba * sectorSize}
		var version uint64 // that of zeros, unless it is a write
		switch dice.IntN(8) {
		case 0:
			req.Op, req.Len, req.FUA = Zero, int(n)*sectorSize, dice.IntN(2) == 0
		case 1, 2, 3:
			version = uint64(h.version.Add(1))
			req.Op, req.Buf, req.FUA = Write, stamped(lba, int(n), version), dice.IntN(8) == 0
		default:
			req.Buf = make([]byte, n*sectorSize)
		}
		begin := h.clock.Add(1)
		err := r.do(dice.IntN(c.queues), req)
		switch {
		case dead.Load() || err == errKilled:
			if req.Op != Read {
				h.add(id, req, version, begin, false)
			}
			return
		case err != nil && (!errors.Is(err, syscall.EIO) || c.around && req.Op != Read):
			t.Errorf("op %d: %v", req.Op, err)
			continue
		case err != nil:
			if req.Op != Read { // in a mode that answers from the disk
				h.add(id, req, version, begin, false)
			}
			continue
		}
		if req.Op == Read {
			if err := stamps(req); err != nil {
				t.Error(err)
			}
		}
		h.add(id, req, version, begin, true)
	}
}

// filler writes where nobody looks, so that segments are written back,
// collected and filled again.
func (c contest) filler(r *rig, dead *atomic.Bool, dice *rand.Rand) {
	buf := make([]byte, ondisk.StripeSize)
	for !dead.Load() {
		n := (1 + dice.IntN(len(buf)/sectorSize)) * sectorSize
		req := &Request{Op: Write, Off: (3 + dice.Int64N(9)) * ondisk.StripeSize, Buf: buf[:n]}
		if dice.IntN(8) == 0 {
			req.Op, req.Buf, req.Len = Zero, nil, n
		}
		if err := r.do(dice.IntN(c.queues), req); err != nil && !errors.Is(err, syscall.EIO) {
			return
		}
	}
}

// changeModes changes the mode all the time, and now and then breaks that off.
func (c contest) changeModes(t *testing.T, r *rig, dead *atomic.Bool, dice *rand.Rand) {
	modes := []ondisk.Mode{ondisk.WriteBack, ondisk.WriteOnly, ondisk.WriteThrough}
	if c.around {
		modes = append(modes, ondisk.WriteAround, ondisk.PassThrough)
	}
	for !dead.Load() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(1+dice.IntN(50))*time.Millisecond)
		mode := modes[dice.IntN(len(modes))]
		err := r.Set(ctx, func(s *Settings) error { s.Mode = mode; return nil })
		<-ctx.Done() // some requests meet each mode
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, syscall.EIO) && !dead.Load() {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
}
