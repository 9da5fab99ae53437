//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// smallStateDir puts a small tmpfs on the folder of the state files, and returns what fills it and what empties it.
func smallStateDir(t *testing.T) (fill, empty func()) {
	t.Helper()
	must(t, "mkdir", "-p", "-m", "700", stateDir)
	must(t, "mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=40,mode=700", "none", stateDir)
	t.Cleanup(func() { unix.Unmount(stateDir, unix.MNT_DETACH) })
	fill = func() {
		t.Helper()
		// First all space, then all inodes.
		if f, err := os.Create(stateDir + "/fill"); err == nil {
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			f.Close()
		}
		for i := 0; ; i++ {
			if err := os.WriteFile(fmt.Sprintf("%s/fill%d", stateDir, i), nil, 0o600); err != nil {
				break
			}
		}
		if err := os.WriteFile(stateDir+"/more", nil, 0o600); err == nil {
			t.Fatal("the folder is not full")
		}
	}
	return fill, func() {
		t.Helper()
		must(t, "sh", "-c", "rm -f "+stateDir+"/fill*")
	}
}

// The folder of the state files is full, and without inodes, when the server has to be replaced. Its device is mounted,
// and must be there afterwards.
func TestStateFolderFull(t *testing.T) {
	quiet := quietKernel(t)
	wipe(t, disk)
	fill, empty := smallStateDir(t)
	d := add(t, "-p", dax, "-b", disk, "-q", "2")
	must(t, "mkfs.ext4", "-q", "-F", d.path, "256M")
	dir := mount(t, d.path)
	write := func(name string) {
		t.Helper()
		if err := replace(dir+"/"+name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	write("before")
	fill()
	kill := func() {
		t.Helper()
		pid := d.entry(t).PID
		must(t, "kill", "-9", strconv.Itoa(pid))
		requireEnd(t, pid)
	}
	kill()
	pcache(t, "recover", d.id)
	write("recovered")
	pcache(t, "upgrade", d.id)
	write("upgraded")
	kill()
	pcache(t, "recover", d.id)
	write("recovered again")

	// A new device finds no room, says so, and leaves nothing.
	pmem := filepath.Join(t.TempDir(), "pmem")
	run(t, "ublk-pcache", "add", "-p", pmem+",size=512M,volatile", "-b", tinyDisk).mustRefuse(t, []string{"no space left|too many", stateDir})
	if _, err := os.Stat(pmem); err == nil {
		t.Error("the refused add has made its pmem")
	}
	if e := d.entry(t); e.State != "live" || len(list(t)) != 1 {
		t.Errorf("list shows %+v", list(t))
	}
	must(t, "umount", dir)
	must(t, "e2fsck", "-fn", d.path)
	mustHold(t, d.path, map[string]string{"before": "before", "recovered": "recovered", "upgraded": "upgraded", "recovered again": "recovered again"})
	empty()
	d.del(t)
	quiet()
}

// What the driver refuses is refused before the cache or the disk is changed, whatever add was told to do with them.
func TestRefusesBeforeWriting(t *testing.T) {
	path, setBroken := breakable(t)
	d := add(t, "-p", dax, "-b", path, "-n", "1")
	setBroken(true) // so that dirty data stays
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=64k", "seek=3000", "count=8", "oflag=direct", "status=none")
	d.del(t)
	setBroken(false)
	must(t, "dd", "if=/dev/urandom", "of="+path, "bs=4k", "count=1", "oflag=direct", "status=none")

	other := startOther(t, 0)
	cases := []refusal{}
	for _, how := range []string{"--changed=discard", "--changed=overwrite", "--format --force"} {
		cases = append(cases, refusal{"a number that another program has, " + how, nil, "add -n 0 -p " + dax + " -b " + path + " " + how, []string{"device 0|number 0|/0.json"}})
	}
	tmp := t.TempDir()
	if file := tmp + "/blocks"; os.WriteFile(file, nil, 0o600) == nil && os.Truncate(file, 64<<20) == nil {
		must(t, "modprobe", "loop")
		loop := strings.TrimSpace(must(t, "losetup", "-b", "16384", "-f", "--show", file))
		t.Cleanup(func() { must(t, "losetup", "-d", loop) })
		cases = append(cases, refusal{"a disk with blocks that are too large", nil, "add -p " + dax + " -b " + loop + " --format --force", []string{"16384"}})
	}
	refuse(t, []string{dax, path}, tmp, cases)
	other()
	d = add(t, "-p", dax, "-b", path, "--changed=overwrite")
	pcache(t, "flush", d.id)
	d.del(t)
}

// startOther serves a device of a program that we know nothing of: this one, with another folder for its state.
func startOther(t *testing.T, id int) (stop func()) {
	t.Helper()
	dir := t.TempDir()
	must(t, "sh", "-c", "umask 077; truncate -s 64M "+dir+"/disk")
	ns := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-ec", fmt.Sprintf(
		`mount -t tmpfs -o mode=755 none /run
		ublk-pcache add -p %[1]s/pmem,size=512M,volatile -b %[1]s/disk -q 1 -n %[2]d
		read end || true
		ublk-pcache del --force %[2]d`, dir, id))
	in, err := ns.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		if err := ns.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	path := fmt.Sprintf("/dev/ublkb%d", id)
	waitFor(t, func() string {
		_, err := os.Stat(path)
		if err != nil {
			return err.Error()
		}
		return ""
	})
	return stop
}

// A server keeps nothing of whoever starts it, or lets it be continued: not the folder, no descriptor, no limit, no
// environment, no blocked signal. So the file system that they were in can be unmounted, and is free then.
func TestServerStartsClean(t *testing.T) {
	wipe(t, disk, disk4K)
	must(t, "mkfs.ext4", "-q", "-F", disk4K)
	must(t, "mkdir", "-p", "/tmp/stick")
	must(t, "mount", disk4K, "/tmp/stick")
	t.Cleanup(func() { unix.Unmount("/tmp/stick", unix.MNT_DETACH) })
	backing := filepath.Join(t.TempDir(), "disk")
	must(t, "sh", "-c", "umask 077; truncate -s 64M "+backing)
	careless := func(args string) {
		t.Helper()
		defer func() {
			if text, err := os.ReadFile("/tmp/stick/out"); err == nil && t.Failed() {
				t.Logf("it said %s", text)
			}
		}()
		must(t, "sh", "-ec", `cd /tmp/stick
			exec 9>/tmp/stick/lock; flock 9
			ulimit -f 2000; ulimit -t 3000
			export STRANGE=environment
			exec env --block-signal=TERM --block-signal=INT nohup ublk-pcache `+args+" >/tmp/stick/out 2>&1 </tmp/stick/lock")
	}
	check := func(when string) {
		t.Helper()
		proc := fmt.Sprintf("/proc/%d/", device{path: "/dev/ublkb0", id: "0"}.entry(t).PID)
		if cwd, err := os.Readlink(proc + "cwd"); err != nil || cwd != "/" {
			t.Errorf("%s: the server's folder is %q (%v)", when, cwd, err)
		}
		links, err := filepath.Glob(proc + "fd/*")
		if err != nil || len(links) == 0 {
			t.Fatal(links, err)
		}
		for _, link := range links {
			if to, _ := os.Readlink(link); strings.HasPrefix(to, "/tmp/stick") {
				t.Errorf("%s: %s is %s", when, link, to)
			}
		}
		limits, err := os.ReadFile(proc + "limits")
		for _, want := range []string{"Max file size             unlimited", "Max cpu time              unlimited"} {
			if err != nil || !strings.Contains(string(limits), want) {
				t.Errorf("%s: limits (%v)\n%s\nwant %q", when, err, limits, want)
			}
		}
		if env, err := os.ReadFile(proc + "environ"); err != nil || strings.Contains(string(env), "STRANGE") {
			t.Errorf("%s: the environment is %q (%v)", when, env, err)
		}
	}
	careless("add -p " + dax + " -b " + backing)
	d := device{path: "/dev/ublkb0", id: "0"}
	t.Cleanup(func() { d.remove(t) })
	check("after add")
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=1M", "seek=40", "count=4", "oflag=direct", "status=none")
	pcache(t, "flush", d.id) // beyond what ulimit -f allowed
	pid := d.entry(t).PID
	must(t, "kill", "-9", strconv.Itoa(pid))
	requireEnd(t, pid)
	careless("recover " + d.id)
	check("after recover")
	must(t, "umount", "/tmp/stick")
	must(t, "e2fsck", "-fn", disk4K)                       // claimed by nobody
	must(t, "wipefs", "-a", "-q", disk4K)                  // which asks for it exclusively
	must(t, "kill", "-TERM", strconv.Itoa(d.entry(t).PID)) // not blocked: the device is unused and goes
	waitFor(t, func() string { return strings.Join(leftovers(t), " ") })
}

// Names lead across mounts, by symbolic links, to files that have namesakes below the mounts. What is served is what the
// user sees.
func TestLinksAcrossMounts(t *testing.T) {
	wipe(t, disk)
	top := t.TempDir()
	under := top + "/mounted"
	must(t, "mkdir", under, top+"/links")
	must(t, "sh", "-c", "umask 077; truncate -s 32M "+under+"/disk")
	must(t, "sh", "-c", "umask 077; truncate -s 512M "+under+"/pmem")
	must(t, "mkfs.ext4", "-q", "-F", disk, "2G")
	must(t, "mount", disk, under)
	t.Cleanup(func() { unix.Unmount(under, unix.MNT_DETACH) })
	must(t, "sh", "-c", "umask 077; truncate -s 64M "+under+"/disk")
	must(t, "ln", "-s", under+"/disk", top+"/links/disk")
	must(t, "ln", "-s", under+"/pmem", top+"/links/pmem")
	must(t, "ln", "-s", under, top+"/links/folder")
	for _, pmem := range []string{"links/pmem,size=600M", "links/folder/other,size=512M", "links/pmem"} {
		d := add(t, "-p", top+"/"+pmem, "-b", top+"/links/disk", "-q", "1")
		if size := strings.TrimSpace(must(t, "blockdev", "--getsize64", d.path)); size != strconv.Itoa(64<<20) {
			t.Errorf("-p %s: the device has %s bytes", pmem, size)
		}
		pid := d.entry(t).PID
		must(t, "kill", "-9", strconv.Itoa(pid))
		requireEnd(t, pid)
		pcache(t, "recover", d.id)
		d.del(t)
	}
	must(t, "umount", under)
	for name, size := range map[string]int64{"disk": 32 << 20, "pmem": 512 << 20} {
		var st unix.Stat_t
		if err := unix.Stat(under+"/"+name, &st); err != nil || st.Size != size || st.Blocks != 0 {
			t.Errorf("below the mount, %s: %+v %v", name, st, err)
		}
	}
	if _, err := os.Stat(under + "/other"); err == nil {
		t.Error("a file was made below the mount")
	}
}

// The cache is replaced by an empty one while its server is dead. A device goes on with its own cache or not at all.
func TestRecoverRefusesAnotherCache(t *testing.T) {
	wipe(t, disk)
	d := add(t, "-p", dax, "-b", disk, "-q", "1")
	must(t, "dd", "if=/dev/urandom", "of="+d.path, "bs=1M", "count=2", "oflag=direct", "status=none")
	pid := d.entry(t).PID
	must(t, "kill", "-9", strconv.Itoa(pid))
	requireEnd(t, pid)
	pcache(t, "format", "--force", dax)
	run(t, "ublk-pcache", "recover", d.id).mustRefuse(t, []string{"another cache than the one of device " + d.id, "the device waits", "del --force " + d.id})
	if e := d.entry(t); e.State != "dead" {
		t.Errorf("after the refusal the device is %s", e.State)
	}
	pcache(t, "del", "--force", d.id)
}

// An add that somebody breaks off takes back what it has begun: at once, or if it waits for a disk that hangs, when that
// answers.
func TestInterruptedAdd(t *testing.T) {
	b := newBadDisk(t, disk, "hung", badSize)
	wipe(t)
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		must(t, "dmsetup", "suspend", b.name)
		cmd := exec.Command("ublk-pcache", "add", "-p", dax, "-b", b.path)
		var said strings.Builder
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() string {
			if files, _ := filepath.Glob(stateDir + "/*.json"); len(files) == 0 {
				return "there is no server yet"
			}
			return ""
		})
		cmd.Process.Signal(signal)
		if err := cmd.Wait(); err == nil || !strings.Contains(said.String(), "interrupted") || strings.Count(said.String(), "\n") != 1 {
			t.Errorf("%v: %v, %q", signal, err, &said)
		}
		must(t, "dmsetup", "resume", b.name)
		waitFor(t, func() string { return strings.Join(leftovers(t), " ") })
	}
	d := add(t, "-p", dax, "-b", b.path)
	d.del(t)
	must(t, "dmsetup", "remove", b.name)
}

// The disk comes back under another name, and another disk has its old one: a device goes on with its own.
func TestRecoverFindsItsDisk(t *testing.T) {
	wipe(t, disk)
	make := func(name, uuid string, at int64) {
		t.Helper()
		args := []string{"dmsetup", "create", name, "--table", fmt.Sprintf("0 %d linear %s %d", 64<<20/512, disk, at/512)}
		if uuid != "" {
			args = append(args, "-u", uuid)
		}
		must(t, args...)
		must(t, "dmsetup", "mknodes")
	}
	make("first", "ublk-pcache-test-1", 0)
	t.Cleanup(func() {
		for _, name := range []string{"first", "second", "third"} {
			run(t, "dmsetup", "remove", name)
		}
	})
	d := add(t, "-p", dax, "-b", "/dev/mapper/first", "-q", "1")
	must(t, "mkfs.ext4", "-q", "-F", d.path)
	dir := mount(t, d.path)
	kill := func() {
		t.Helper()
		pid := d.entry(t).PID
		must(t, "kill", "-9", strconv.Itoa(pid))
		requireEnd(t, pid)
	}
	kill()
	must(t, "dmsetup", "rename", "first", "second")
	must(t, "dmsetup", "mknodes")
	make("first", "ublk-pcache-test-2", 1<<30)
	pcache(t, "recover", d.id)
	if err := replace(dir+"/file", []byte("written")); err != nil {
		t.Fatal(err)
	}
	pcache(t, "flush", d.id)
	kill()
	must(t, "dmsetup", "remove", "first")
	pcache(t, "recover", d.id, "-b", "/dev/mapper/second")
	if e := d.entry(t); e.Backing != "/dev/mapper/second" {
		t.Errorf("the backing device is %s", e.Backing)
	}

	// What has the old name is known by nothing, and nothing is dirty that would keep it from being taken.
	pcache(t, "flush", d.id)
	kill()
	must(t, "dmsetup", "rename", "second", "third")
	must(t, "dmsetup", "mknodes")
	make("second", "", 1<<30)
	pcache(t, "recover", d.id)
	if err := replace(dir+"/other", []byte("written, too")); err != nil {
		t.Fatal(err)
	}
	must(t, "umount", dir)
	pcache(t, "flush", d.id)
	d.del(t)
	mustHold(t, "/dev/mapper/third", map[string]string{"file": "written", "other": "written, too"})

	// Nor is it taken when the right one is nowhere.
	must(t, "dmsetup", "remove", "second")
	must(t, "dmsetup", "rename", "third", "first")
	must(t, "dmsetup", "mknodes")
	d = add(t, "-p", dax, "-b", "/dev/mapper/first", "-q", "1")
	kill()
	must(t, "dmsetup", "remove", "first")
	make("first", "", 1<<30)
	run(t, "ublk-pcache", "recover", d.id).mustRefuse(t, []string{"/dev/mapper/first", "ublk-pcache-test-1", "recover " + d.id + " -b BACKING"})
	must(t, "dmsetup", "remove", "first")
	make("first", "ublk-pcache-test-1", 0)
	pcache(t, "recover", d.id)
	d.del(t)

	// A file has nothing that it could be found by.
	wipe(t)
	files := t.TempDir()
	must(t, "sh", "-c", "umask 077; truncate -s 64M "+files+"/disk")
	d = add(t, "-p", dax, "-b", files+"/disk", "-q", "1")
	kill()
	must(t, "mv", files+"/disk", files+"/renamed")
	run(t, "ublk-pcache", "recover", d.id).mustRefuse(t, []string{files + "/disk", "recover " + d.id + " -b BACKING"})
	pcache(t, "recover", d.id, "-b", files+"/renamed")
	d.del(t)
}
