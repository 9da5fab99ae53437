package vm

import (
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"
)

// Debian's kernels come without dm-pcache, but their source package has it. It is compiled, unchanged, as the suite
// itself would do it: with the suite's compiler against the suite's headers, in a tree of unpacked packages that serves
// as the root. So the host needs no compiler, and its age does not matter.

// compilerSuites are the suites whose kernel has dm-pcache in its source (Linux 6.18 and later), each with the one that
// has the compiler for it.
var compilerSuites = map[string]string{"trixie-backports": "trixie"}

// compilerTools are what make and its rules call; the compiler itself comes with the kernel's headers.
var compilerTools = []string{"bash", "binutils", "coreutils", "dash", "findutils", "gawk", "grep", "make", "sed", "tar", "xz-utils"}

// seriesPattern is the part of a release that the name of its source package has.
var seriesPattern = regexp.MustCompile(`^\d+\.\d+`)

//go:embed module.go
var recipeModule string

// Module returns the file of dm-pcache for the kernel of a suite's machines, building what the cache does not hold.
func Module(suite string) (file string, err error) {
	if err := installTools(); err != nil {
		return "", err
	}
	_, kernel, err := images(suite)
	if err != nil {
		return "", err
	}
	release, err := kernel.release()
	if err != nil {
		return "", err
	}
	err = withCache(func(cache string) error {
		dir := filepath.Join(cache, "dm-pcache-"+suite+"-"+recipeHash(recipeModule, recipeFetch, release))
		file = dir + "/dm-pcache.ko"
		err := cached(dir, func(dir string) error { return buildModule(dir, suite, release) })
		if err != nil {
			return fmt.Errorf("build dm-pcache for %s (if that is no longer in the archive, delete %s): %w", release, kernel.dir, err)
		}
		return nil
	})
	return file, err
}

func buildModule(dir, suite, release string) error {
	address, err := mirror()
	if err != nil {
		return err
	}
	logf("compiling dm-pcache for %s", release)
	return scratch(dir, func(tmp string) error {
		tree, err := compilerTree(tmp, address, suite, release)
		if err != nil {
			return err
		}
		if err := compileModule(tree, release); err != nil {
			return err
		}
		return os.Rename(tree+"/build/md/dm-pcache/dm-pcache.ko", dir+"/dm-pcache.ko")
	})
}

// compilerTree unpacks a root with the compiler, the kernel's headers, and the archive of its source.
func compilerTree(tmp, address, suite, release string) (tree string, err error) {
	p, err := openPackages(tmp+"/apt", address, suite, compilerSuites[suite])
	if err != nil {
		return "", err
	}
	if err := p.downloadWithDependencies(append(compilerTools, "linux-headers-"+release)...); err != nil {
		return "", err
	}
	if err := p.download(sourcePackage(release)); err != nil {
		return "", err
	}
	tree = tmp + "/tree"
	for _, step := range []func(tree string) error{plainTree, p.unpack, finishTree, compilerFiles} {
		if err := step(tree); err != nil {
			return "", err
		}
	}
	return tree, nil
}

// sourcePackage names the package with the source of a release of the kernel.
func sourcePackage(release string) string { return "linux-source-" + seriesPattern.FindString(release) }

func compileModule(tree, release string) error {
	source := sourcePackage(release)
	if err := os.Mkdir(tree+"/build", 0o755); err != nil {
		return err
	}
	drivers := source + "/drivers/md/"
	if _, err := output("tar", "-xJf", tree+"/usr/src/"+source+".tar.xz", "-C", tree+"/build",
		"--strip-components=2", "--wildcards", drivers+"dm-pcache/*", drivers+"dm*.h"); err != nil {
		return err
	}
	// Without the kernel's own type information make adds none to the module, which takes one program less.
	headers := "/usr/src/linux-headers-" + release
	if err := os.RemoveAll(tree + headers + "/vmlinux"); err != nil {
		return err
	}
	_, err := output("chroot", tree, "make", "-C", headers, "M=/build/md/dm-pcache", "CONFIG_DM_PCACHE=m", "-j4", "modules")
	return err
}

// compilerFiles makes what programs expect to find outside of packages. Nothing is mounted, so that it takes no more
// than a container usually may.
func compilerFiles(tree string) error {
	if err := unix.Mknod(tree+"/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		return fmt.Errorf("make /dev/null: %w", err)
	}
	// objtool looks up where its stack is, to be able to explain an overflow; it does not mind whose stack it is.
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(tree+"/proc/self", 0o755); err != nil {
		return err
	}
	return os.WriteFile(tree+"/proc/self/maps", maps, 0o644)
}
