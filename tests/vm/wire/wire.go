// Package wire is what the host and the agent inside a virtual machine say to each other, as gob values over a
// virtio serial port. The console is not used for it: kernel messages land there at any moment, and a result that can
// be mistaken for noise (or noise for a result) is not one.
package wire

// A Request asks the agent to run one program; the agent answers with Frames, the last of which has Exited set.
// With Halt set it writes dirty pages back and resets the machine instead, and there is no answer.
type Request struct {
	Args []string
	Env  []string // "NAME=value", added to the agent's own
	Halt bool
}

// A Frame is a piece of output, or the end. The first Frame of a boot, before any Request, says that the agent is
// ready; it is Exited with Failure empty, or carries the reason why the guest could not be set up.
type Frame struct {
	Stdout, Stderr []byte

	Exited  bool
	Code    int    // exit status; 128 + n when signal n ended the program
	Failure string // the program could not be started at all
}
