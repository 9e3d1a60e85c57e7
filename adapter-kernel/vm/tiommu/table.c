// SPDX-License-Identifier: GPL-2.0-only
#include <linux/bits.h>
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/mm.h>
#include "table.h"

#define BITS		9		/* of IOVA for each level */
#define ENTRIES		(1 << BITS)
#define TOP		3		/* the root's level */
#define ENTRY_LEAF	BIT_ULL(3)	/* maps a page */
#define ENTRY_TABLE	BIT_ULL(4)	/* leads to a table of the level below */
#define ENTRY_PHYS	GENMASK_ULL(51, 12)
#define ENTRY_SHIFT	GENMASK_ULL(61, 56)

/* log2 of the bytes of one entry of a level. */
static unsigned int level_shift(unsigned int level)
{
	return PAGE_SHIFT + level * BITS;
}

/* The level of pages of 2^shift bytes. */
static unsigned int page_level(unsigned int shift)
{
	return (shift - PAGE_SHIFT) / BITS;
}

/* How many entries a page of 2^shift bytes takes. */
static unsigned int page_entries(unsigned int shift)
{
	return 1 << (shift - PAGE_SHIFT) % BITS;
}

static unsigned int slot(u64 iova, unsigned int level)
{
	return (iova >> level_shift(level)) & (ENTRIES - 1);
}

static unsigned int entry_shift(u64 entry)
{
	return (entry & ENTRY_SHIFT) >> __builtin_ctzll(ENTRY_SHIFT);
}

static u64 *table_below(u64 entry)
{
	return phys_to_virt(entry & ENTRY_PHYS);
}

u64 table_phys(u64 entry)
{
	return entry & ENTRY_PHYS;
}

u64 *table_new(gfp_t gfp)
{
	return (u64 *)get_zeroed_page(gfp);
}

static void free_level(u64 *table, unsigned int level)
{
	unsigned int k;

	for (k = 0; level && k < ENTRIES; k++)
		if (table[k] & ENTRY_TABLE)
			free_level(table_below(table[k]), level - 1);
	free_page((unsigned long)table);
}

void table_free(u64 *root)
{
	free_level(root, TOP);
}

static bool is_empty(u64 *table, unsigned int level)
{
	unsigned int k;

	for (k = 0; k < ENTRIES; k++) {
		if (table[k] & ENTRY_LEAF)
			return false;
		if ((table[k] & ENTRY_TABLE) && !is_empty(table_below(table[k]), level - 1))
			return false;
	}
	return true;
}

int table_map(u64 *root, u64 iova, u64 phys, unsigned int shift, u64 access, gfp_t gfp)
{
	unsigned int level = page_level(shift), n = page_entries(shift), l, k;
	u64 *table = root, *entry;

	for (l = TOP; l > level; l--) {
		entry = &table[slot(iova, l)];
		if (!*entry) {
			u64 *below = table_new(gfp);

			if (!below)
				return -ENOMEM;
			*entry = virt_to_phys(below) | ENTRY_TABLE;
		}
		if (*entry & ENTRY_LEAF)
			return -EADDRINUSE;
		table = table_below(*entry);
	}
	entry = &table[slot(iova, level)];
	for (k = 0; k < n; k++) {
		if (!entry[k])
			continue;
		/* A table of smaller pages that are gone may be in the way. */
		if ((entry[k] & ENTRY_LEAF) || !is_empty(table_below(entry[k]), level - 1))
			return -EADDRINUSE;
		free_level(table_below(entry[k]), level - 1);
		entry[k] = 0;
	}
	for (k = 0; k < n; k++)
		entry[k] = phys | access | ENTRY_LEAF | (u64)shift << __builtin_ctzll(ENTRY_SHIFT);
	return 0;
}

u64 *table_find(u64 *root, u64 iova, unsigned int *shift)
{
	u64 *table = root, *entry;
	unsigned int l;

	for (l = TOP;; l--) {
		entry = &table[slot(iova, l)];
		*shift = level_shift(l);
		if (!*entry)
			return NULL;
		if (*entry & ENTRY_LEAF)
			break;
		table = table_below(*entry);
	}
	*shift = entry_shift(*entry);
	/* The first of the page's entries, which has its dirty bit. */
	return entry - (slot(iova, l) & (page_entries(*shift) - 1));
}

void table_unmap(u64 *entry, unsigned int shift)
{
	memset(entry, 0, page_entries(shift) * sizeof(*entry));
}
