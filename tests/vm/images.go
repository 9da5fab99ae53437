package vm

import (
	"crypto/sha256"
	_ "embed"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The images are a cache: anything in it can be deleted at any time, and an image is either complete or not there. It
// is built in a folder of another name and renamed; the name it gets holds a hash of the recipe (this file and the one
// that fetches), so a changed recipe is a different image. A newer kernel in the archive is not: delete the folder to
// get it.

//go:embed images.go
var recipeImages string

//go:embed fetch.go
var recipeFetch string

// userland is what tests and people use inside. Nothing is implied: packages are unpacked, so even those that every
// Debian system has must be named.
var userland = []string{
	"base-files", "bash", "coreutils", "dash", "diffutils", "findutils", "gawk", "grep", "gzip", "hostname", "libc-bin",
	"mount", "ncurses-base", "procps", "psmisc", "sed", "strace", "tar", "util-linux", "xz-utils",
	"apt", "bcache-tools", "daxctl", "dmsetup", "e2fsprogs", "fio", "kmod", "ndctl", "nvme-cli", "rpm", "systemd", "udev", "xfsprogs",
}

// moduleFolders are the parts of a kernel's module tree that go into a guest, with whatever they depend on.
var moduleFolders = regexp.MustCompile(`^kernel/(arch/x86/crypto|crypto|lib|drivers/(acpi/nfit|block|char/virtio_console|dax|md|nvdimm|nvme|virtio)|` +
	`fs/(9p|ext4|fuse|overlayfs|xfs)|net/9p)`)

// initramfsModules are needed before the guest has its root disk.
var initramfsModules = regexp.MustCompile(`/(virtio_pci|virtio_blk|ext4|crc32c_generic|crc32c-intel|crc32c-x86)\.ko(\.xz)?$`)

// kernelImage is one kernel, ready to boot: files in one folder.
type kernelImage struct{ dir string }

func (k kernelImage) kernel() string  { return k.dir + "/vmlinuz" }
func (k kernelImage) modules() string { return k.dir + "/modules.img" }

// release is the kernel's name for itself, as uname -r says it.
func (k kernelImage) release() (string, error) {
	text, err := os.ReadFile(k.dir + "/release")
	return string(text), err
}

// initramfs are the modules to load first, in that order.
func (k kernelImage) initramfs() ([]string, error) { return filepath.Glob(k.dir + "/initramfs/*.ko") }

// CacheDir is where images are kept: $UBLK_PCACHE_CACHE, or ublk-pcache in the user's cache folder.
func CacheDir() (string, error) {
	if dir := os.Getenv("UBLK_PCACHE_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "ublk-pcache"), err
}

// images returns the root image and the kernel of a suite, building what the cache does not hold.
func images(suite string) (root string, k kernelImage, err error) {
	err = withCache(func(cache string) error {
		hash := recipeHash(recipeImages, recipeFetch)
		root = filepath.Join(cache, "root-"+hash)
		if err := cached(root, buildRoot); err != nil {
			return fmt.Errorf("build the guest's root image: %w", err)
		}
		k.dir = filepath.Join(cache, suite+"-"+hash)
		if err := cached(k.dir, func(dir string) error { return buildKernel(dir, suite) }); err != nil {
			return fmt.Errorf("build the image of the %s kernel: %w", suite, err)
		}
		return nil
	})
	return root + "/root.img", k, err
}

func recipeHash(recipe ...string) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(recipe, ""))))[:12]
}

// withCache calls use with the folder of the images. Several processes may ask at once; one after the other gets it.
func withCache(use func(cache string) error) error {
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(cache+"/lock", os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	return use(cache)
}

// cached calls build with a new folder unless dir exists, and renames that folder to dir when build succeeds. What an
// interrupted build or an older recipe left behind goes away first.
func cached(dir string, build func(dir string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	name := filepath.Base(dir)
	stale, err := filepath.Glob(filepath.Join(filepath.Dir(dir), name[:strings.LastIndex(name, "-")]+"-*"))
	if err != nil {
		return err
	}
	for _, old := range stale {
		if err := os.RemoveAll(old); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(dir+".new", 0o755); err != nil {
		return err
	}
	if err := build(dir + ".new"); err != nil {
		return err
	}
	return os.Rename(dir+".new", dir)
}

// scratch calls build with a folder that is removed afterwards.
func scratch(parent string, build func(dir string) error) error {
	dir := filepath.Join(parent, "scratch")
	defer os.RemoveAll(dir)
	return build(dir)
}

func buildRoot(dir string) error {
	address, err := mirror()
	if err != nil {
		return err
	}
	logf("fetching the guest's user land from %s", address)
	return scratch(dir, func(tmp string) error {
		p, err := openPackages(tmp+"/apt", address, "bookworm")
		if err != nil {
			return err
		}
		if err := p.downloadWithDependencies(userland...); err != nil {
			return err
		}
		tree := tmp + "/tree"
		if err := plainTree(tree); err != nil {
			return err
		}
		if err := p.unpack(tree); err != nil {
			return err
		}
		if err := p.register(tree); err != nil {
			return err
		}
		if err := finishTree(tree); err != nil {
			return err
		}
		return makeImage(dir+"/root.img", tree, 256<<20)
	})
}

// plainTree makes the folders and links that installing base-files would make.
func plainTree(tree string) error {
	for _, dir := range []string{"dev", "etc", "mnt", "proc", "root", "run", "share", "sys", "tmp", "usr/bin", "usr/lib/modules", "usr/lib64", "usr/sbin", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o755); err != nil {
			return err
		}
	}
	for _, dir := range []string{"bin", "lib", "lib64", "sbin"} {
		if err := os.Symlink("usr/"+dir, filepath.Join(tree, dir)); err != nil {
			return err
		}
	}
	return nil
}

// finishTree does what maintainer scripts would have done and something inside relies on.
func finishTree(tree string) error {
	for link, target := range map[string]string{"usr/bin/awk": "gawk", "etc/mtab": "/proc/mounts"} {
		if err := os.Symlink(target, filepath.Join(tree, link)); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd":   "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n_apt:x:42:65534::/:/bin/false\n",
		"etc/group":    "root:x:0:\nnogroup:x:65534:\n",
		"etc/hosts":    "127.0.0.1 localhost\n",
		"etc/hostname": "guest\n",
	} {
		if err := os.WriteFile(filepath.Join(tree, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, dir := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(tree, dir)); err != nil {
			return err
		}
	}
	return nil
}

// makeImage turns a tree into an ext4 image with the given free space, without mounting anything.
func makeImage(image, tree string, free int64) error {
	used, err := output("du", "-s", "-k", "--apparent-size", tree)
	if err != nil {
		return err
	}
	var kib int64
	if _, err := fmt.Sscan(used, &kib); err != nil {
		return fmt.Errorf("size of %s: %w", tree, err)
	}
	size := fmt.Sprintf("%dk", kib+kib/4+free>>10)
	_, err = output("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0", "-d", tree, image, size)
	return err
}

func buildKernel(dir, suite string) error {
	address, err := mirror()
	if err != nil {
		return err
	}
	logf("fetching the newest kernel of %s from %s", suite, address)
	return scratch(dir, func(tmp string) error {
		p, err := openPackages(tmp+"/apt", address, suite)
		if err != nil {
			return err
		}
		if err := p.downloadKernel(); err != nil {
			return err
		}
		tree := tmp + "/tree"
		if err := plainTree(tree); err != nil {
			return err
		}
		if err := p.unpack(tree); err != nil {
			return err
		}
		return takeKernel(dir, tree, tmp+"/chosen")
	})
}

// takeKernel makes a kernel image in dir from a tree of unpacked packages: the kernel, an image with the wanted modules
// and their dependencies, and those among them that the initramfs loads.
func takeKernel(dir, tree, chosen string) error {
	// Kernels up to 6.x are packaged the first way, 7.x the second.
	kernel, err := single(tree+"/boot/vmlinuz-*", tree+"/usr/lib/modules/*/vmlinuz")
	if err != nil {
		return err
	}
	if err := os.Rename(kernel, dir+"/vmlinuz"); err != nil {
		return err
	}
	all, err := single(tree + "/usr/lib/modules/*")
	if err != nil {
		return err
	}
	version := filepath.Base(all)
	if err := os.WriteFile(dir+"/release", []byte(version), 0o644); err != nil {
		return err
	}
	if _, err := output("depmod", "-b", tree, version); err != nil {
		return err
	}
	order, err := loadOrder(all + "/modules.dep")
	if err != nil {
		return err
	}

	to := filepath.Join(chosen, "lib/modules", version)
	for _, m := range order.closure(moduleFolders) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, m)), 0o755); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(all, m), filepath.Join(to, m)); err != nil {
			return err
		}
	}
	// Emulated code would take seconds to decompress what takes none here.
	if _, err := output("find", to, "-name", "*.xz", "-exec", "xz", "-d", "{}", "+"); err != nil {
		return err
	}
	for _, name := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if err := os.Rename(filepath.Join(all, name), filepath.Join(to, name)); err != nil {
			return err
		}
	}
	if _, err := output("depmod", "-b", chosen, version); err != nil {
		return err
	}

	if err := os.Mkdir(dir+"/initramfs", 0o755); err != nil {
		return err
	}
	for i, m := range order.closure(initramfsModules) {
		m = strings.TrimSuffix(m, ".xz")
		name := fmt.Sprintf("%s/initramfs/%03d-%s", dir, i, filepath.Base(m))
		if err := os.Link(filepath.Join(to, m), name); err != nil {
			return err
		}
	}
	return makeImage(dir+"/modules.img", filepath.Dir(to), 1<<20)
}

// dependencies is modules.dep: for each module, by path, all modules it needs.
type dependencies map[string][]string

func loadOrder(name string) (dependencies, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	d := dependencies{}
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		module, needs, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("%s: %q is not a module with its dependencies", name, line)
		}
		d[module] = strings.Fields(needs)
	}
	return d, nil
}

// closure lists the modules whose path matches, each after all that it needs.
func (d dependencies) closure(wanted *regexp.Regexp) []string {
	var list []string
	seen := map[string]bool{}
	var add func(module string)
	add = func(module string) {
		if seen[module] {
			return
		}
		seen[module] = true
		for _, m := range d[module] {
			add(m)
		}
		list = append(list, module)
	}
	for _, module := range slices.Sorted(maps.Keys(d)) {
		if wanted.MatchString(module) {
			add(module)
		}
	}
	return list
}

// single expands patterns that have exactly one match between them.
func single(patterns ...string) (string, error) {
	var found []string
	for _, p := range patterns {
		matches, err := filepath.Glob(p)
		if err != nil {
			return "", err
		}
		found = append(found, matches...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%d files match %s, want one", len(found), strings.Join(patterns, " or "))
	}
	return found[0], nil
}
