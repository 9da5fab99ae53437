package main

import (
	"errors"
	"fmt"

	"ublk-pcache/ondisk"
	"ublk-pcache/pmem"
)

// formatting is how much of what a region holds may be given up for a new cache.
// All commands that make one have the answer from here.
type formatting struct {
	clean, all     bool   // what holds no dirty data, not even perhaps; whatever it is
	byClean, byAll string // what the user has to give for that
}

// formatCommand is what format may do, addCommand what add may. run may do nothing:
// when the cache has gone, somebody should know.
func formatCommand(force bool) formatting {
	return formatting{force, force, "--force", "--force"}
}

func addCommand(format, force bool) formatting {
	return formatting{format, format && force, "--format", "--format --force"}
}

func runCommand(pmem string) formatting {
	by := "ublk-pcache format --force " + pmem
	return formatting{byClean: by, byAll: by}
}

// formatting is that of the command that starts the server.
func (o *serveOptions) formatting(pmem string) formatting {
	if o.Existing {
		return runCommand(pmem)
	}
	return addCommand(o.Format, o.Force)
}

// check looks at a region and returns why no cache may be made there, nil if one
// may. backing is the disk, empty if that is not known.
func (f formatting) check(r *pmem.Region, backing string) error {
	if f.all {
		return nil
	}
	h := ondisk.Survey(r, r.Size(), r.Durable())
	if h.Kind == ondisk.HoldsNothing || h.Harmless && f.clean {
		return nil
	}
	status := exitRefused
	if h.Kind == ondisk.HoldsDamage {
		status = exitDamaged
	}
	return exitWith(status, f.refusal(h, r, backing))
}

// refusal says what is found, and what can be done about it.
func (f formatting) refusal(h *ondisk.Holding, r *pmem.Region, backing string) error {
	path, giveUp := r.Path(), f.byAll
	if h.Harmless {
		giveUp = f.byClean
	}
	switch {
	case h.Kind == ondisk.HoldsForeign:
		return fmt.Errorf("%s holds no cache, but is not blank (to overwrite what is there: %s)", path, giveUp)
	case h.Kind == ondisk.HoldsUnknown:
		return &remedied{
			fmt.Errorf("%s: %w, so nothing tells whether it holds a cache", path, h.Err),
			fmt.Sprintf("look with 'ublk-pcache check %s'; to overwrite what is there: %s", path, giveUp),
		}
	case h.Kind == ondisk.HoldsCache && h.Harmless:
		return fmt.Errorf("%s holds a cache without dirty data (to give up what it holds: %s)", path, giveUp)
	case h.Kind == ondisk.HoldsCache:
		return fmt.Errorf("%s holds a cache with %s that its backing device does not have (add it and flush it first, or save them with '%s'; to give them up: %s)", path, ondisk.Unwritten(h.Dirty, h.Zeros), writebackLine(path, backing), giveUp)
	}
	found := fmt.Sprintf("in which %s can be found", ondisk.Unwritten(h.Dirty, h.Zeros))
	if h.Harmless {
		found = "without dirty data"
	}
	return &remedied{
		fmt.Errorf("%s holds a damaged cache, %s: %w", path, found, h.Err),
		fmt.Sprintf("%s; to give up what it holds: %s", damageRemedies(h.Err, h.Mendable, path, backing), giveUp),
	}
}

// damageRemedies names what helps a damaged cache, in the order of their use.
func damageRemedies(damage error, mendable bool, path, backing string) string {
	if errors.Is(damage, ondisk.ErrSize) {
		return "a file that was cut short has lost the rest: restore it from a copy"
	}
	look := fmt.Sprintf("look with 'ublk-pcache check %s'", path)
	if !mendable {
		return look
	}
	return look + ", " + saveOrMend(path, backing)
}

func saveOrMend(path, backing string) string {
	return fmt.Sprintf("save its dirty data with '%s' or mend it with 'ublk-pcache repair %s'", writebackLine(path, backing), path)
}

func writebackLine(path, backing string) string {
	if backing == "" {
		backing = "BACKING"
	}
	return fmt.Sprintf("ublk-pcache writeback %s -b %s", path, backing)
}
