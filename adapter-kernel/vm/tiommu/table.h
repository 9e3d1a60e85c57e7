/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A page table like those of hardware: four levels of 512 entries, 48 bits of
 * IOVA. A page of 2^k bytes takes one or more neighbouring entries of a level.
 */
#ifndef TIOMMU_TABLE_H
#define TIOMMU_TABLE_H
#include <linux/types.h>

/* In an entry that maps a page. */
#define ENTRY_READ	BIT_ULL(0)
#define ENTRY_WRITE	BIT_ULL(1)
#define ENTRY_DIRTY	BIT_ULL(2)

/* Makes an empty table; NULL without memory. */
u64 *table_new(gfp_t gfp);
/* Frees a table and those below it. */
void table_free(u64 *root);
/*
 * Maps a page of 2^shift bytes, to which iova and phys are aligned. ENOMEM, or
 * EADDRINUSE if a part is mapped.
 */
int table_map(u64 *root, u64 iova, u64 phys, unsigned int shift, u64 access, gfp_t gfp);
/*
 * Finds the entry of the page at iova; NULL if none is mapped. *shift is log2 of
 * the page's bytes, or of the bytes of the empty entry that was met.
 */
u64 *table_find(u64 *root, u64 iova, unsigned int *shift);
/* Removes the page that table_find has found. */
void table_unmap(u64 *entry, unsigned int shift);
/* The physical address of the page of an entry. */
u64 table_phys(u64 entry);

#endif
