package vm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// tools are the programs of the host that building and running a machine takes, with the Debian package each is in.
var tools = []struct{ program, pkg string }{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"mke2fs", "e2fsprogs"},
	{"depmod", "kmod"},
	{"xz", "xz-utils"},
}

// output runs a program of the host and returns what it prints. An error shows what it said.
func output(args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	// Debian keeps mke2fs and depmod in /usr/sbin, which is not on everybody's PATH.
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "PATH="+searchPath())
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

func searchPath() string { return os.Getenv("PATH") + ":/usr/sbin:/sbin" }

// installTools installs what is missing. Nothing is skipped for want of a tool: a machine that cannot have it fails.
func installTools() error {
	if err := os.Setenv("PATH", searchPath()); err != nil {
		return err
	}
	var missing []string
	for _, t := range tools {
		if _, err := exec.LookPath(t.program); err != nil {
			missing = append(missing, t.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("the test machine needs %s: install with apt-get, or run this as root once", strings.Join(missing, " "))
	}
	logf("installing %s", strings.Join(missing, " "))
	if _, err := output("apt-get", "update"); err != nil {
		return err
	}
	_, err := output(append([]string{"apt-get", "install", "-y", "--no-install-recommends"}, missing...)...)
	return err
}

func logf(format string, args ...any) { fmt.Fprintf(os.Stderr, "vm: "+format+"\n", args...) }

// Build runs a build of the go tool for machines; it never takes a C compiler.
func Build(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
