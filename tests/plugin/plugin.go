// Package plugin builds the plugins with which QEMU counts instructions: thread for a thread of a program under qemu-user,
// machine for a whole machine. Each says in its source, in folder c, what its arguments are.
package plugin

import (
	"fmt"
	"os/exec"
)

// Build builds a plugin, by its name, as the file so. It is for commands that run in the folder of the module, and needs
// gcc.
func Build(name, so string) error {
	out, err := exec.Command("gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", so, "tests/plugin/c/"+name+".c").CombinedOutput()
	if err != nil {
		return fmt.Errorf("build the plugin %s: %w\n%s", name, err, out)
	}
	return nil
}
