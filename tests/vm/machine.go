// Package vm boots a real kernel with a real ublk driver, device-dax and NVMe on a machine that has none of them, in
// QEMU's software emulation, and runs programs in there.
//
// Software emulation, even where hardware virtualisation would work: what a test sees is then the same on every
// machine, and a laptop finds the races that the build machine finds. Everything slows down by 10 to 50 times, evenly.
//
// A machine is a kernel, a root image that every boot finds as it was built, and a folder of the caller's with the pmem
// and the disks as sparse files. Kill is a power cut: what has reached those files stays, everything else is gone, and
// the next Boot over the same folder goes on from there.
package vm

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"ublk-pcache/tests/vm/wire"
)

// Config describes a machine.
type Config struct {
	Suite string // Debian suite whose newest kernel runs: trixie-backports (7.3 and later), bookworm-backports (6.12)
	State string // folder of the pmem and disk files; they are made if they are not there
	Share string // folder of the host that is /share in the guest, first on its PATH
	Pmem  int64  // bytes of /dev/dax0.0; a multiple of 16 MiB less namespaceOverhead
	Disks []Disk // /dev/nvme0n1, /dev/nvme1n1, …

	// Measured has the host give the machine all of its memory at once, and the pmem not as a file: its content is gone
	// with the machine. Otherwise the first store to each page, and the first after the host has written the file back,
	// waits for the host's file system, which costs ten times as much as the store.
	Measured bool

	// Plugin is one of the emulator, with its arguments. Then one thread emulates all processors, and an instruction takes
	// a nanosecond of the machine's time, whatever the host does meanwhile.
	Plugin string
}

// A Disk is an NVMe controller with one namespace.
type Disk struct {
	Size      int64 // bytes
	BlockSize int   // bytes per logical block, 512 or 4096
	IOPS      int   // requests per second, at most; 0 for as many as the emulator can
}

// namespaceOverhead is what a pmem namespace takes from its region for its own header and alignment.
const namespaceOverhead = 2 << 20

// label is the size of the label area that makes namespaces possible. QEMU takes it off the end of the file, and the
// kernel wants the rest aligned to 16 MiB.
const label = 128 << 10

// Standard is the machine that tests, demo and people use: the smallest pmem the format allows plus a little (exactly
// the size of the golden images), a disk eight times as large, one with 4096-byte blocks, and one of the golden images'
// size.
func Standard(suite, state, share string) Config {
	return Config{
		Suite: suite, State: state, Share: share,
		Pmem:  528<<20 - namespaceOverhead,
		Disks: []Disk{{Size: 4 << 30, BlockSize: 512}, {Size: 1 << 30, BlockSize: 4096}, {Size: 16 << 20, BlockSize: 512}},
	}
}

// A Machine runs from Boot until Halt or Kill. Run may be called from one goroutine at a time, Kill from any.
type Machine struct {
	run     string // socket, initramfs and console of this boot
	console string // what Console says once run is gone
	qemu    *exec.Cmd
	gone    chan struct{} // closed when QEMU has ended

	port net.Conn
	out  *gob.Encoder
	in   *gob.Decoder

	killing sync.Once
}

// bootLimit is how long a boot may take; 10 s are usual on two cores, and a build machine may be busy.
const bootLimit = 3 * time.Minute

// bootAttempts: emulating two processors at once, QEMU 7.2 now and then has one of them run into the breakpoint with
// which the kernel guards code that it patches, after the kernel has taken it out again. Nearly all patching is done
// while booting, so a boot that ends in just this way is repeated, and seeing it three times in a row means something.
const bootAttempts = 3

// Boot builds what is missing (minutes, the first time), starts the machine and waits until it takes requests.
func Boot(c Config) (*Machine, error) {
	if err := installTools(); err != nil {
		return nil, err
	}
	root, kernel, err := images(c.Suite)
	if err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		run, err := os.MkdirTemp("", "ublk-pcache-vm-")
		if err != nil {
			return nil, err
		}
		m := &Machine{run: run, gone: make(chan struct{})}
		if err = m.boot(c, root, kernel); err == nil {
			return m, nil
		}
		m.Kill()
		if attempt == bootAttempts || !strings.Contains(m.Console(), "Oops: int3") {
			return nil, fmt.Errorf("boot the %s machine: %w\n%s", c.Suite, err, m.Console())
		}
		logf("the emulator tripped over patched code; booting again")
	}
}

func (m *Machine) boot(c Config, root string, kernel kernelImage) error {
	if err := m.initramfs(kernel); err != nil {
		return err
	}
	args, err := m.arguments(c, root, kernel)
	if err != nil {
		return err
	}
	if err := m.start(args); err != nil {
		return err
	}
	if err := m.connect(); err != nil {
		return err
	}
	return m.ready()
}

// initramfs writes the initramfs of this boot, so that the agent in it is always the one in the source.
func (m *Machine) initramfs(kernel kernelImage) error {
	if err := Build("build", "-o", m.run+"/agent", "ublk-pcache/tests/vm/agent"); err != nil {
		return err
	}
	modules, err := kernel.initramfs()
	if err != nil {
		return err
	}
	f, err := os.Create(m.run + "/initramfs")
	if err != nil {
		return err
	}
	return errors.Join(writeInitramfs(f, m.run+"/agent", modules), f.Close())
}

func (m *Machine) arguments(c Config, root string, kernel kernelImage) ([]string, error) {
	pmem := fmt.Sprintf("id=pmem,share=on,size=%d", c.Pmem+namespaceOverhead+label)
	ram := "memory-backend-ram,id=ram,size=3G"
	if c.Measured {
		pmem = "memory-backend-memfd,prealloc=on," + pmem
		ram += ",prealloc=on"
	} else {
		file := c.State + "/pmem"
		if err := sparse(file, c.Pmem+namespaceOverhead+label); err != nil {
			return nil, err
		}
		pmem = "memory-backend-file,mem-path=" + file + "," + pmem
	}
	threads := "multi"
	if c.Plugin != "" {
		threads = "single"
	}
	args := []string{
		// The emulator copies byte by byte where a CPU has fast string operations, so this one has none.
		"-accel", "tcg,thread=" + threads, "-machine", "q35,nvdimm=on,memory-backend=ram", "-cpu", "max,-erms,-fsrm", "-smp", "2",
		"-m", "3G,slots=2,maxmem=64G", "-nodefaults", "-display", "none", "-no-reboot",
		"-serial", "file:" + m.run + "/console",
		"-kernel", kernel.kernel(), "-initrd", m.run + "/initramfs",
		// An oops ends the machine, and the test with it, instead of leaving half a kernel behind. Programs are always
		// at the same addresses: the emulator (7.2) translates a page of code anew for every address it is seen at, keeps
		// all of that, and looks through it with every word that is written to the page once it is used for something
		// else. After 1,500 runs of a program with its own C library, filling the free memory took 121 s instead of 6.
		"-append", "console=ttyS0 quiet mitigations=off nokaslr norandmaps tsc=reliable nowatchdog oops=panic panic=-1",
		"-drive", "if=virtio,format=raw,snapshot=on,file=" + root,
		"-drive", "if=virtio,format=raw,readonly=on,file=" + kernel.modules(),
		"-object", ram,
		"-object", pmem,
		"-device", fmt.Sprintf("nvdimm,memdev=pmem,label-size=%d", label),
		"-virtfs", "local,security_model=none,mount_tag=share,path=" + c.Share,
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,server=on,wait=off,path=" + m.run + "/agent.sock",
		"-device", "virtserialport,chardev=agent",
	}
	if c.Plugin != "" {
		args = append(args, "-icount", "shift=0,sleep=off", "-plugin", c.Plugin)
	}
	for i, d := range c.Disks {
		name := fmt.Sprintf("%s/disk%d", c.State, i+1)
		if err := sparse(name, d.Size); err != nil {
			return nil, err
		}
		args = append(args,
			// The host is not the machine that loses power, so its page cache is as good as a disk.
			"-drive", fmt.Sprintf("if=none,id=disk%d,format=raw,cache=unsafe,discard=unmap,throttling.iops-total=%d,file=%s", i+1, d.IOPS, name),
			"-device", fmt.Sprintf("nvme,id=nvme%d,serial=disk%[1]d", i+1),
			"-device", fmt.Sprintf("nvme-ns,bus=nvme%d,drive=disk%[1]d,logical_block_size=%d,physical_block_size=%[2]d", i+1, d.BlockSize))
	}
	return args, nil
}

// sparse makes a file of the given size that takes no room yet; one that is there stays as it is.
func sparse(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != 0 && info.Size() != size {
		return fmt.Errorf("%s has %d bytes, the machine wants %d: remove it or use another folder", name, info.Size(), size)
	}
	return f.Truncate(size)
}

// start starts QEMU so that it ends with this process whatever happens to it. The kernel ties that to the thread that
// started the child, so a thread is kept for it.
func (m *Machine) start(args []string) error {
	var said bytes.Buffer
	m.qemu = exec.Command("qemu-system-x86_64", args...)
	m.qemu.Stdout, m.qemu.Stderr = &said, &said
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer close(m.gone)
		err := m.qemu.Start()
		started <- err
		if err == nil {
			m.qemu.Wait()
		}
		if said.Len() > 0 {
			logf("qemu: %s", bytes.TrimSpace(said.Bytes()))
		}
	}()
	return <-started
}

// connect waits for QEMU to listen on the agent's socket.
func (m *Machine) connect() error {
	for deadline := time.Now().Add(bootLimit); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", m.run+"/agent.sock")
		if err == nil {
			m.port, m.out, m.in = conn, gob.NewEncoder(conn), gob.NewDecoder(conn)
			return nil
		}
		select {
		case <-m.gone:
			return errors.New("qemu ended at once")
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("reach qemu: %w", err)
		}
	}
}

// ready waits for the agent's first frame.
func (m *Machine) ready() error {
	m.port.SetReadDeadline(time.Now().Add(bootLimit))
	defer m.port.SetReadDeadline(time.Time{})
	var f wire.Frame
	if err := m.in.Decode(&f); err != nil {
		return fmt.Errorf("wait for the agent: %w", err)
	}
	if f.Failure != "" {
		return errors.New(f.Failure)
	}
	return nil
}

// ErrDied says that the machine ended, or stopped answering, while a program ran in it.
var ErrDied = errors.New("the machine died")

// Run runs a program in the guest and returns its exit status; its output goes to stdout and stderr as it appears.
// After limit the machine counts as hung: it is killed. An error that is not ErrDied means that the program could not be
// started.
func (m *Machine) Run(limit time.Duration, stdout, stderr io.Writer, env []string, args ...string) (int, error) {
	if err := m.out.Encode(wire.Request{Args: args, Env: env}); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrDied, err)
	}
	m.port.SetReadDeadline(time.Now().Add(limit))
	for {
		var f wire.Frame
		if err := m.in.Decode(&f); err != nil {
			m.Kill()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return 0, fmt.Errorf("%w: %v did not end in %v", ErrDied, args, limit)
			}
			return 0, fmt.Errorf("%w: %w", ErrDied, err)
		}
		stdout.Write(f.Stdout)
		stderr.Write(f.Stderr)
		switch {
		case f.Failure != "":
			return 0, fmt.Errorf("in the guest: %s", f.Failure)
		case f.Exited:
			return f.Code, nil
		}
	}
}

// Console returns what the kernel has printed in this boot, until Kill and after it.
func (m *Machine) Console() string {
	if m.console != "" {
		return m.console
	}
	text, err := os.ReadFile(m.run + "/console")
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// haltLimit is how long writing back dirty pages and resetting may take.
const haltLimit = 30 * time.Second

// Halt writes back the guest's dirty pages, resets it and waits for the end. A guest that cannot even do that is killed
// and reported.
func (m *Machine) Halt() error {
	err := m.out.Encode(wire.Request{Halt: true})
	select {
	case <-m.gone:
	case <-time.After(haltLimit):
		err = fmt.Errorf("the guest did not end in %v\n%s", haltLimit, m.Console())
	}
	m.Kill()
	return err
}

// Kill ends the machine like a power cut and removes what this boot has left outside the state folder.
func (m *Machine) Kill() {
	m.killing.Do(func() {
		if m.qemu != nil && m.qemu.Process != nil {
			m.qemu.Process.Kill()
			<-m.gone
		}
		if m.port != nil {
			m.port.Close()
		}
		m.console = m.Console()
		os.RemoveAll(m.run)
	})
}
