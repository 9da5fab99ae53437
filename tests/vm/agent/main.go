// Command agent is the first and only resident program of a test machine: it is /init of the initramfs, brings the
// guest up (modules, root file system, shared folder, pmem namespace), and then runs what the host asks it to run.
//
// It is two processes. Process 1 does nothing but reap: servers that put themselves into the background become its
// children, and a test that asks whether a server is gone must not see a zombie. A process that reaps everything would
// also steal the exit statuses os/exec waits for, so the requests are served by a child of its own.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() == 1 {
		fmt.Println("agent:", initialise())
		os.Exit(1) // the kernel panics, which ends the machine
	}
	serve(steps(modules, disks, sharedFolder, namespace))
}

// initialise makes the disk the root, starts the worker and reaps; it returns only when that has failed. It must be
// process 1 that changes the root: the kernel looks for modprobe in the root of that process.
func initialise() error {
	if err := steps(kernelFileSystems, initramfsModules, enterRoot); err != nil {
		return err
	}
	worker := exec.Command("/proc/self/exe")
	worker.Stdout, worker.Stderr = os.Stdout, os.Stderr
	if err := worker.Start(); err != nil {
		return err
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case pid == worker.Process.Pid:
			return errors.New("the worker is gone")
		}
	}
}

// steps takes one step after the other; each needs those before it.
func steps(list ...func() error) error {
	for _, step := range list {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

func kernelFileSystems() error {
	for _, m := range []struct{ kind, target string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := mount(m.kind, m.target, m.kind, 0, ""); err != nil {
			return err
		}
	}
	return nil
}

// initramfsModules loads /modules/* in the order of their names, which is the order of their dependencies.
func initramfsModules() error {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	sort.Strings(files)
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	return nil
}

// enterRoot makes the disk image the root. The two virtio disks are probed in the order of their PCI slots: vda is the
// user land, vdb the kernel's modules.
func enterRoot() error {
	if err := mount("/dev/vda", "/root", "ext4", unix.MS_NOATIME, ""); err != nil {
		return err
	}
	if err := mount("/dev/vdb", "/root/usr/lib/modules", "ext4", unix.MS_RDONLY, ""); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		if err := mount(dir, "/root"+dir, "", unix.MS_MOVE, ""); err != nil {
			return err
		}
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("make the disk the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("make the disk the root: %w", err)
	}
	for _, dir := range []string{"/tmp", "/run", "/dev/shm"} {
		if err := mount("tmpfs", dir, "tmpfs", 0, "mode=1777"); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return err
	}
	os.Setenv("PATH", "/share:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	return os.WriteFile("/proc/sys/kernel/printk", []byte("4"), 0)
}

func command(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func modules() error {
	return command("modprobe", "-a", "virtio_console", "9p", "9pnet_virtio", "nfit", "nd_pmem", "dax_pmem", "device_dax", "ublk_drv")
}

// disks binds the NVMe controllers to their driver one after the other. Left to itself the kernel probes them, and the
// namespaces of each, concurrently, and names them in any order.
func disks() error {
	if err := os.WriteFile("/sys/bus/pci/drivers_autoprobe", []byte("0"), 0); err != nil {
		return err
	}
	if err := command("modprobe", "nvme"); err != nil {
		return err
	}
	const nvmeClass = "0x010802"
	classes, err := filepath.Glob("/sys/bus/pci/devices/*/class") // sorted, so in the order of their slots
	if err != nil {
		return err
	}
	next := 0
	for _, name := range classes {
		if class, err := os.ReadFile(name); err != nil || strings.TrimSpace(string(class)) != nvmeClass {
			continue
		}
		address := filepath.Base(filepath.Dir(name))
		if err := os.WriteFile("/sys/bus/pci/drivers/nvme/bind", []byte(address), 0); err != nil {
			return fmt.Errorf("bind the disk %s: %w", address, err)
		}
		if _, err := appear(fmt.Sprintf("/dev/nvme%dn1", next)); err != nil {
			return err
		}
		next++
	}
	return nil
}

// sharedFolder mounts the host's folder. Without a cache the guest sees at once what the host puts there and the other
// way round; 512 KiB messages make up for it when a program is loaded from it.
func sharedFolder() error {
	return mount("share", "/share", "9p", 0, "trans=virtio,version=9p2000.L,cache=none,msize=524288")
}

// namespace makes /dev/dax0.0 out of a pmem region that has no namespace yet, which the kernel presents as one of mode
// raw. One that was made in an earlier boot over the same files is left as it is.
func namespace() error {
	mode, err := os.ReadFile("/sys/bus/nd/devices/namespace0.0/mode")
	if err != nil || strings.TrimSpace(string(mode)) != "raw" {
		return err
	}
	return command("ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", "devdax", "--map=mem")
}

// appear waits for a device node that some thread of the kernel is about to make.
func appear(pattern string) (string, error) {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0], nil
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("%s did not appear in 10 s", pattern)
		}
	}
}
