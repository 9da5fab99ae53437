// A plugin that counts the instructions of a whole machine into a file that is mapped: three
// numbers, for static programs, which the servers are, for the kernel, and for all other
// programs. Behind them are those of static programs by address, one number for each 16
// bytes.

#include "plugin.h"

enum { SERVER, KERNEL, OTHERS, GROUPS };

// Programs that are linked for a fixed address lie below this one, all others far behind.
static const uint64_t fixed = 64 << 20;

static uint64_t *counters;

// translated adds to a counter without a lock: one thread emulates all processors.
static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	uint64_t at = qemu_plugin_tb_vaddr(tb);
	int group = at >> 63 ? KERNEL : at < fixed ? SERVER : OTHERS;
	uint64_t n = qemu_plugin_tb_n_insns(tb);
	qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &counters[group], n);
	if (group == SERVER)
		qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &counters[GROUPS + at / 16], n);
}

// The argument is out=FILE.
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	if (argc != 1 || strncmp(argv[0], "out=", 4) || !(counters = map_counters(argv[0] + 4, GROUPS + fixed / 16)))
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
