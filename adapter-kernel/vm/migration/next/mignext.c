// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test-only: asks the kernel's vfio_mig_get_next_state() for the next state between
 * any two, for every set of features, and shows the answers in debugfs:
 * one line "FEATURES FROM TO => NEXT" or "FEATURES FROM TO => -ERRNO" each.
 */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/vfio.h>

#define STATES (VFIO_DEVICE_STATE_PRE_COPY_P2P + 1)

static struct dentry *file;

static int mignext_show(struct seq_file *seq, void *unused)
{
	struct vfio_device *device = kzalloc(sizeof(*device), GFP_KERNEL);
	u32 features, from, to;

	if (!device)
		return -ENOMEM;
	for (features = 0; features < 8; features++) {
		device->migration_flags = features;
		for (from = 0; from < STATES; from++) {
			/* One number more than there are states. */
			for (to = 0; to <= STATES; to++) {
				enum vfio_device_mig_state next = 99;
				int ret = vfio_mig_get_next_state(device, from, to, &next);

				seq_printf(seq, "%u %u %u => %d\n", features, from, to,
					   ret ? ret : (int)next);
			}
		}
	}
	kfree(device);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(mignext);

static int __init mignext_init(void)
{
	file = debugfs_create_file("mignext", 0400, NULL, NULL, &mignext_fops);
	return PTR_ERR_OR_ZERO(file);
}

static void __exit mignext_exit(void)
{
	debugfs_remove(file);
}

module_init(mignext_init);
module_exit(mignext_exit);
MODULE_DESCRIPTION("Shows what vfio_mig_get_next_state answers");
MODULE_LICENSE("GPL");
