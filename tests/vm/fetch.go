package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Everything inside a machine comes out of Debian packages that are unpacked and never installed, neither on the host
// nor in the guest's tree: no maintainer script runs, so nothing about the host matters and nothing on it changes.

// packages is a suite of the Debian archive, looked at through apt with a configuration of its own: its sources,
// lists, package state and cache lie in one folder. The host's apt contributes its proxy settings and the mirror.
type packages struct {
	dir   string
	suite string // preferred to the others
}

// mirror returns the address of the Debian archive that this machine's own apt uses. apt lists its sources whatever
// format they are written in, but only once it has fetched their indexes.
func mirror() (string, error) {
	find := func() string {
		list, err := output("apt-get", "indextargets", "--format", "$(COMPONENT) $(RELEASE) $(REPO_URI)", "Created-By: Packages")
		if err != nil {
			return ""
		}
		for _, line := range strings.Split(list, "\n") {
			f := strings.Fields(line)
			if len(f) == 3 && f[0] == "main" && debianSuites.MatchString(f[1]) {
				return f[2]
			}
		}
		return ""
	}
	address := find()
	if address == "" {
		if _, err := output("apt-get", "update"); err != nil {
			return "", err
		}
		address = find()
	}
	if address == "" {
		return "", fmt.Errorf("no Debian mirror in the sources of apt: add one to /etc/apt/sources.list.d")
	}
	return address, nil
}

// debianSuites are the suites whose repository has every other suite next to it. Security updates live elsewhere.
var debianSuites = regexp.MustCompile(`^(bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)(-updates|-backports)?$`)

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// openPackages fetches the index of a suite, and of others that it builds upon, into dir.
func openPackages(dir, mirror, suite string, others ...string) (*packages, error) {
	for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	source := fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s %s\nComponents: main\nArchitectures: amd64\nSigned-By: %s\n",
		mirror, suite, strings.Join(others, " "), keyring)
	for name, text := range map[string]string{"debian.sources": source, "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	p := &packages{dir: dir, suite: suite}
	_, err := p.apt("apt-get", "update")
	return p, err
}

// apt runs one of apt's programs in the folder where it keeps packages.
func (p *packages) apt(program string, args ...string) (string, error) {
	line := []string{"env", "-C", p.archives(), program}
	for _, option := range []string{
		"Dir::Etc::sourcelist=" + p.dir + "/debian.sources",
		"Dir::Etc::sourceparts=/dev/null",
		"Dir::Etc::preferences=/dev/null",
		"Dir::Etc::preferencesparts=/dev/null",
		"Dir::State=" + p.dir,
		"Dir::State::status=" + p.dir + "/status",
		"Dir::Cache=" + p.dir + "/cache",
		"APT::Architecture=amd64",
		"APT::Architectures=amd64",
		"APT::Default-Release=" + p.suite,
		// The user that apt downloads as cannot write below a private folder.
		"APT::Sandbox::User=root",
	} {
		line = append(line, "-o", option)
	}
	return output(append(line, args...)...)
}

func (p *packages) archives() string { return p.dir + "/cache/archives" }

// downloadWithDependencies fetches packages and all they depend on.
func (p *packages) downloadWithDependencies(names ...string) error {
	args := append([]string{"install", "-y", "--no-install-recommends", "--download-only"}, names...)
	_, err := p.apt("apt-get", args...)
	return err
}

// kernelParts matches the packages that a kernel's own package is split into. They carry the version in their names,
// so following them from the unversioned package finds the newest kernel of the suite.
var kernelParts = regexp.MustCompile(`\blinux-(?:base|image|binary|modules)-[0-9][^ ,]*`)

// downloadKernel fetches the newest kernel of the suite without what installing it would need.
func (p *packages) downloadKernel() error {
	seen := map[string]bool{}
	var parts []string
	for next := []string{"linux-image-amd64"}; len(next) > 0; next = next[1:] {
		about, err := p.apt("apt-cache", "--no-all-versions", "show", next[0])
		if err != nil {
			return err
		}
		for _, line := range strings.Split(about, "\n") {
			depends, ok := strings.CutPrefix(line, "Depends: ")
			if !ok {
				continue
			}
			for _, part := range kernelParts.FindAllString(depends, -1) {
				if !seen[part] {
					seen[part] = true
					parts, next = append(parts, part), append(next, part)
				}
			}
		}
	}
	if len(parts) == 0 {
		return fmt.Errorf("no kernel behind linux-image-amd64 in the index of the suite")
	}
	return p.download(parts...)
}

// download fetches packages and nothing else.
func (p *packages) download(names ...string) error {
	_, err := p.apt("apt-get", append([]string{"download"}, names...)...)
	return err
}

// unpack puts the contents of all downloaded packages into tree. Unlike dpkg-deb -x it leaves a symbolic link to a
// folder in tree (/bin → usr/bin) alone where a package brings a folder of that name.
func (p *packages) unpack(tree string) error {
	debs, err := filepath.Glob(p.archives() + "/*.deb")
	if err != nil {
		return err
	}
	for _, deb := range debs {
		from := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
		to := exec.Command("tar", "-x", "--keep-directory-symlink", "-C", tree)
		if to.Stdin, err = from.StdoutPipe(); err != nil {
			return err
		}
		from.Stderr, to.Stderr = os.Stderr, os.Stderr
		if err := from.Start(); err != nil {
			return err
		}
		if err := errors.Join(to.Run(), from.Wait()); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
	}
	return nil
}

// register makes dpkg of tree know all downloaded packages, as installed, though with no files: what is installed later may
// depend on them.
func (p *packages) register(tree string) error {
	debs, err := filepath.Glob(p.archives() + "/*.deb")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(tree+"/var/lib/dpkg/info", 0o755); err != nil {
		return err
	}
	var status strings.Builder
	for _, deb := range debs {
		about, err := output("dpkg-deb", "--field", deb)
		if err != nil {
			return err
		}
		name, err := output("dpkg-deb", "--show", "--showformat=${binary:Package}", deb)
		if err != nil {
			return err
		}
		status.WriteString("Status: install ok installed\n" + strings.TrimSpace(about) + "\n\n")
		if err := os.WriteFile(tree+"/var/lib/dpkg/info/"+name+".list", nil, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(tree+"/var/lib/dpkg/status", []byte(status.String()), 0o644)
}
