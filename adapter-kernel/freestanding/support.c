// SPDX-License-Identifier: GPL-2.0-only
/* The C half of the stand-in for the `kernel` crate. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/build_bug.h>
#include <linux/mm.h>
#include <linux/printk.h>
#include <linux/slab.h>
#include "../glue.h"

void *dirty_kmalloc(size_t size, bool account);
void dirty_warn(const char *text, size_t len);

/* As the stand-in's PAGE_SHIFT and the alignment that it counts on. */
static_assert(PAGE_SHIFT == 12);
static_assert(ARCH_KMALLOC_MINALIGN >= 8);

/* Memory that dirty_free() frees. */
void *dirty_kmalloc(size_t size, bool account)
{
	return kmalloc(size, account ? GFP_DIRTY : GFP_KERNEL);
}

void dirty_warn(const char *text, size_t len)
{
	pr_warn("%.*s", (int)len, text);
}
