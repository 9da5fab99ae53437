// A plugin of QEMU (its interface of version 1, include/qemu/qemu-plugin.h) that counts
// the instructions of a whole machine into a file that is mapped: three numbers, for
// static programs, which the servers are, for the kernel, and for all other programs. It
// declares what it needs of the interface itself: Debian has no package for that.

#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
typedef struct qemu_info_t qemu_info_t;

enum { ADD_U64 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);

EXPORT int qemu_plugin_version = 1;

enum { SERVER, KERNEL, OTHERS, GROUPS };

// Programs that are linked for a fixed address lie below this one, all others far behind.
static const uint64_t fixed = 64 << 20;

static uint64_t *counters;

// translated adds to a counter without a lock: one thread emulates all processors.
static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	uint64_t at = qemu_plugin_tb_vaddr(tb);
	int group = at >> 63 ? KERNEL : at < fixed ? SERVER : OTHERS;
	qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &counters[group], qemu_plugin_tb_n_insns(tb));
}

// The argument is out=FILE.
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	size_t bytes = GROUPS * sizeof(uint64_t);
	int fd = argc == 1 && !strncmp(argv[0], "out=", 4) ? open(argv[0] + 4, O_RDWR | O_CREAT | O_TRUNC, 0644) : -1;
	if (fd < 0 || ftruncate(fd, bytes))
		return 1;
	counters = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (counters == MAP_FAILED)
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
