// A plugin that counts instructions by address into a file that is mapped: those of the
// thread that has called one function of the program, until it calls another.

#include "plugin.h"

static uint64_t base, size, begin, end;
static uint64_t *counters; // for each 16 bytes of the program, and a last one for what lies elsewhere
static unsigned counted = -1;

// executed adds the instructions of a block to the counter of its beginning: what is
// between two jumps belongs together.
static void executed(unsigned thread, void *block)
{
	uintptr_t v = (uintptr_t)block;
	if (thread == counted)
		counters[v >> 16] += v & 0xffff;
}

static void begun(unsigned thread, void *unused)
{
	counted = thread;
}

static void ended(unsigned thread, void *unused)
{
	counted = -1;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	uint64_t at = qemu_plugin_tb_vaddr(tb);
	uint64_t counter = (at - base < size ? at - base : size) / 16;
	if (at == begin)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, begun, WITHOUT_REGISTERS, NULL);
	else if (at == end)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, ended, WITHOUT_REGISTERS, NULL);
	qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, WITHOUT_REGISTERS,
		(void *)(uintptr_t)(counter << 16 | qemu_plugin_tb_n_insns(tb)));
}

// The arguments are out=FILE, base=ADDRESS and size=BYTES of the program, a multiple of
// 16, and begin=ADDRESS and end=ADDRESS of the functions.
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	const char *file = NULL;
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "out=", 4))
			file = argv[i] + 4;
		else if (!strncmp(argv[i], "base=", 5))
			base = strtoull(argv[i] + 5, NULL, 0);
		else if (!strncmp(argv[i], "size=", 5))
			size = strtoull(argv[i] + 5, NULL, 0);
		else if (!strncmp(argv[i], "begin=", 6))
			begin = strtoull(argv[i] + 6, NULL, 0);
		else if (!strncmp(argv[i], "end=", 4))
			end = strtoull(argv[i] + 4, NULL, 0);
	}
	if (!file || !size || !(counters = map_counters(file, size / 16 + 1)))
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
