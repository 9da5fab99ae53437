//go:build vm

package tests

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ublk-pcache/tests/stamp"
	"ublk-pcache/tests/vm"
)

var cutRounds = flag.Int("cut.rounds", 1, "how often TestPowerCutOfFiles cuts the power")

// chains are who has the cache from one power cut to the next. The last one finds what it must and stops in good order.
var chains = []struct {
	crc   bool
	sides []string
}{
	{false, []string{"kernel", "server", "kernel", "server"}},
	{true, []string{"server", "server", "kernel", "server"}},
}

// The power goes while the kernel's target or the server is at work, at a random moment, and the machine comes up with
// the other one, or the same. What the server had acknowledged is there, flushed or not; of the kernel's, what it had
// flushed. And each opens what the other left in the middle of anything.
func TestPowerCut(t *testing.T) {
	if *kernelFlag != "" && *kernelFlag != pcacheKernel || *guestFlag != "" {
		return
	}
	share := t.TempDir()
	build(t, share)
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for i, chain := range chains {
		t.Run(fmt.Sprintf("data_crc=%t", chain.crc), func(t *testing.T) {
			state, promise, before := t.TempDir(), "acknowledged", ""
			for n, side := range chain.sides {
				l := life{state: state, share: share, journal: fmt.Sprintf("journal-%d-%d", i, n)}
				if err := os.Mkdir(filepath.Join(share, l.journal), 0o755); err != nil {
					t.Fatal(err)
				}
				if n < len(chain.sides)-1 {
					l.requests = 200 + rnd.Int64N(1500)
				}
				l.args = []string{
					"guest.test", "-test.v", "-test.run=^TestAroundPowerCuts$", fmt.Sprintf("-seed=%d", rnd.Uint64()|1),
					"-cut.side=" + side, fmt.Sprintf("-cut.data-crc=%t", chain.crc), fmt.Sprintf("-cut.last=%t", l.requests == 0),
					"-cut.journal=/share/" + l.journal, "-cut.before=" + before, "-cut.promise=" + promise,
				}
				if err := l.run(t); err != nil {
					t.Fatalf("seed %d, boot %d: %v", seed, n, err)
				}
				before, promise = "/share/"+l.journal, map[string]string{"kernel": "flushed", "server": "acknowledged"}[side]
			}
		})
	}
}

// The power goes while files are made on ext4 and XFS, on one device over device-dax, and while the raw device of another
// cache is worked on that is a plain file, again and again. Each time the file systems mount and are whole, every file that
// was synced is there, and of the plain file's device everything that was flushed, or written with FUA.
func TestPowerCutOfFiles(t *testing.T) {
	if *kernelFlag != "" && *kernelFlag != pcacheKernel || *guestFlag != "" {
		return
	}
	share, state := t.TempDir(), t.TempDir()
	build(t, share)
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	before := ""
	for n := range *cutRounds + 1 {
		l := life{state: state, share: share, journal: fmt.Sprintf("files-%d", n)}
		if err := os.Mkdir(filepath.Join(share, l.journal), 0o755); err != nil {
			t.Fatal(err)
		}
		if n < *cutRounds {
			l.requests = 20 + rnd.Int64N(300)
		}
		l.args = []string{
			"guest.test", "-test.v", "-test.run=^TestAroundPowerCutsOfFiles$", fmt.Sprintf("-seed=%d", rnd.Uint64()|1),
			fmt.Sprintf("-cut.last=%t", l.requests == 0), "-cut.journal=/share/" + l.journal, "-cut.before=" + before,
		}
		if err := l.run(t); err != nil {
			t.Fatalf("seed %d, boot %d: %v", seed, n, err)
		}
		before = "/share/" + l.journal
	}
}

// A life of the machine is from one boot to the next.
type life struct {
	state, share string
	args         []string
	journal      string // folder in share
	requests     int64  // that the journal has when the power goes; 0 for not at all
}

func (l life) run(t *testing.T) error {
	start := time.Now()
	m, err := vm.Boot(vm.Standard(pcacheKernel, l.state, l.share))
	if err != nil {
		return err
	}
	defer m.Kill()
	cut, ended := make(chan bool, 1), make(chan struct{})
	go func() { cut <- l.cutPower(m, ended) }()
	var out bytes.Buffer
	code, err := m.Run(*limit, &out, &out, nil, l.args...)
	close(ended)
	t.Logf("%v:\n%s", time.Since(start).Round(time.Second), &out)
	switch cut := <-cut; {
	case cut && errors.Is(err, vm.ErrDied):
		return nil
	case err != nil:
		return fmt.Errorf("%w\nconsole:\n%s", err, m.Console())
	case code != 0 || l.requests != 0:
		return fmt.Errorf("the test ended by itself, exit status %d", code)
	}
	return m.Halt()
}

// cutPower kills the machine once the load has made so many requests, in the middle of some others, and reports whether
// it came to that before the end.
func (l life) cutPower(m *vm.Machine, ended <-chan struct{}) bool {
	for {
		select {
		case <-ended:
			return false
		case <-time.After(time.Millisecond):
		}
		n, err := stamp.Requests(filepath.Join(l.share, l.journal))
		if l.requests > 0 && err == nil && n >= l.requests {
			m.Kill()
			return true
		}
	}
}
