// SPDX-License-Identifier: GPL-2.0-only
/*
 * Positive controls: one defect of each kind that the sanitizers must report,
 * so that their silence about the module means something.
 */
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>

static DEFINE_MUTEX(first);
static DEFINE_MUTEX(second);
static int sink;

static void use_after_free(void)
{
	volatile int *p = kmalloc(64, GFP_KERNEL);

	if (!p)
		return;
	kfree((void *)p);
	sink = *p;
}

static void inverted_locks(void)
{
	mutex_lock(&first);
	mutex_lock(&second);
	mutex_unlock(&second);
	mutex_unlock(&first);
	mutex_lock(&second);
	mutex_lock(&first);
	mutex_unlock(&first);
	mutex_unlock(&second);
}

/* Many, because kmemleak finds the addresses of the last ones in the allocator. */
static noinline void leak(void)
{
	int k;

	for (k = 0; k < 1000; k++)
		memset(kmalloc(1000, GFP_KERNEL), k, 1000);
}

static int __init control_init(void)
{
	leak();
	inverted_locks();
	use_after_free(); /* last, because its taint turns lockdep off */
	return 0;
}

static void __exit control_exit(void)
{
}

module_init(control_init);
module_exit(control_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Defects that the sanitizers must find");
