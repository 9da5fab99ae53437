package vm

import (
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Debian's kernels come without dm-pcache and without the programs that the kernel is tested with, but their source
// package has them. They are compiled, unchanged, as the suite itself would do it: with the suite's compiler against the
// suite's headers, in a tree of unpacked packages that serves as the root. So the host needs no compiler, and its age
// does not matter.

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
	return compiled(suite, "dm-pcache.ko", recipeModule, func(tmp, release string) (string, error) {
		tree, err := compilerTree(tmp, suite, release, "linux-headers-"+release)
		if err != nil {
			return "", err
		}
		return tree + "/build/drivers/md/dm-pcache/dm-pcache.ko", compileModule(tree, release)
	})
}

// TestServer returns the file of the ublk server that the kernel is tested with, which has a null target, among others.
func TestServer(suite string) (file string, err error) {
	return compiled(suite, "kublk", recipeModule, func(tmp, release string) (string, error) {
		tree, err := compilerTree(tmp, suite, release, "gcc", "libc6-dev", "linux-libc-dev", "liburing-dev")
		if err != nil {
			return "", err
		}
		return tree + "/build/tools/testing/selftests/ublk/kublk", compileTestServer(tree, release)
	})
}

// compiled returns a file that is compiled from the source of the kernel of a suite's machines, as the cache holds it or
// else as build makes it.
func compiled(suite, name, recipe string, build func(tmp, release string) (made string, err error)) (file string, err error) {
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
		dir := filepath.Join(cache, strings.TrimSuffix(name, ".ko")+"-"+suite+"-"+recipeHash(recipe, recipeFetch, release))
		file = filepath.Join(dir, name)
		err := cached(dir, func(dir string) error {
			logf("compiling %s for %s", name, release)
			return scratch(dir, func(tmp string) error {
				made, err := build(tmp, release)
				if err != nil {
					return err
				}
				return os.Rename(made, filepath.Join(dir, name))
			})
		})
		if err != nil {
			return fmt.Errorf("build %s for %s (if that is no longer in the archive, delete %s): %w", name, release, kernel.dir, err)
		}
		return nil
	})
	return file, err
}

// compilerTree unpacks a root with the compiler, what else it takes, and the archive of the kernel's source.
func compilerTree(tmp, suite, release string, more ...string) (tree string, err error) {
	address, err := mirror()
	if err != nil {
		return "", err
	}
	p, err := openPackages(tmp+"/apt", address, suite, compilerSuites[suite])
	if err != nil {
		return "", err
	}
	if err := p.downloadWithDependencies(slices.Concat(compilerTools, more)...); err != nil {
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

// unpackSource unpacks parts of the kernel's source below /build of the tree.
func unpackSource(tree, release string, parts ...string) error {
	source := sourcePackage(release)
	if err := os.Mkdir(tree+"/build", 0o755); err != nil {
		return err
	}
	for i := range parts {
		parts[i] = source + "/" + parts[i]
	}
	_, err := output(append([]string{"tar", "-xJf", tree + "/usr/src/" + source + ".tar.xz", "-C", tree + "/build",
		"--strip-components=1", "--wildcards"}, parts...)...)
	return err
}

func compileModule(tree, release string) error {
	if err := unpackSource(tree, release, "drivers/md/dm-pcache/*", "drivers/md/dm*.h"); err != nil {
		return err
	}
	// Without the kernel's own type information make adds none to the module, which takes one program less.
	headers := "/usr/src/linux-headers-" + release
	if err := os.RemoveAll(tree + headers + "/vmlinux"); err != nil {
		return err
	}
	_, err := output("chroot", tree, "make", "-C", headers, "M=/build/drivers/md/dm-pcache", "CONFIG_DM_PCACHE=m", "-j4", "modules")
	return err
}

// compileTestServer links it statically: the guest's C library is older than the suite's.
func compileTestServer(tree, release string) error {
	if err := unpackSource(tree, release, "tools/testing/selftests/ublk/*"); err != nil {
		return err
	}
	_, err := output("chroot", tree, "sh", "-c", "cd /build/tools/testing/selftests/ublk && "+
		"gcc -O3 -D_GNU_SOURCE -static -o kublk $(ls *.c | grep -v metadata_size) -luring -lpthread -lm")
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
