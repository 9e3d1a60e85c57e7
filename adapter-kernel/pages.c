// SPDX-License-Identifier: GPL-2.0-only
/* Pins pages of an address space, and unpins them. */
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include "compat.h"
#include "glue.h"

/* So few pages need no memory for pointers to them. */
#define PIN_FEW 16UL
/*
 * The most pages that are pinned while the mmap lock is held. A caller may exceed its
 * limit of locked memory by so many, until they are charged.
 */
#define PIN_MAX 8192ULL
/* The most page table entries of a device's memory that are read meanwhile. */
#define PIN_ENTRIES 4096

/* Whether a pfn is not of a page that can be pinned and charged. */
static bool is_special(u64 pfn)
{
	return !pfn_valid(pfn) || PageReserved(pfn_to_page(pfn));
}

enum dirty_page_kind dirty_page_kind(u64 pfn)
{
	if (!pfn_valid(pfn))
		return DIRTY_PAGE_NONE;
	return PageReserved(pfn_to_page(pfn)) ? DIRTY_PAGE_RESERVED : DIRTY_PAGE_NORMAL;
}

struct page *dirty_page(u64 pfn)
{
	return pfn_to_page(pfn);
}

/* The pages of a folio from this one on. */
static unsigned long left_in_folio(struct page *page)
{
	struct folio *folio = page_folio(page);

	return folio_nr_pages(folio) - folio_page_idx(folio, page);
}

/* Runs of pages that have been pinned. */
struct pinned {
	struct dirty_run *runs;
	unsigned long n;
	unsigned long max;
	u64 npages;
};

/* Appends pages of one kind; false if there is no room for another run. */
static bool append(struct pinned *to, u64 pfn, u64 npages, enum dirty_page_kind kind)
{
	struct dirty_run *last = to->n ? &to->runs[to->n - 1] : NULL;

	if (last && last->pfn + last->npages == pfn && last->kind == kind)
		last->npages += npages;
	else if (to->n < to->max)
		to->runs[to->n++] = (struct dirty_run) { pfn, npages, kind };
	else
		return false;
	to->npages += npages;
	return true;
}

/*
 * Stores the pfn at vaddr of a VM_PFNMAP mapping, and returns how many pfns
 * follow in the same page table entry, itself included; -EAGAIN if the mmap lock
 * was dropped, or another errno.
 */
static long follow_pfnmap(struct vm_area_struct *vma, struct mm_struct *mm,
			  unsigned long vaddr, bool write, u64 *pfn)
{
	struct follow_pfnmap_args args = { .vma = vma, .address = vaddr };
	long ret = follow_pfnmap_start(&args);

	if (ret) {
		bool unlocked = false;
		unsigned int flags = FAULT_FLAG_REMOTE | (write ? FAULT_FLAG_WRITE : 0);

		ret = fixup_user_fault(mm, vaddr, flags, &unlocked);
		if (unlocked)
			return -EAGAIN;
		if (!ret)
			ret = follow_pfnmap_start(&args);
		if (ret)
			return ret;
	}
	*pfn = args.pfn;
	if ((write && !args.writable) || !is_special(args.pfn))
		ret = -EFAULT;
	else
		ret = dirty_followed(&args);
	follow_pfnmap_end(&args);
	return ret;
}

/*
 * Takes the page table entries of a VM_PFNMAP mapping, as they are: it pins nothing.
 * If vaddr is not in such a mapping, `error` is the answer.
 */
static long pin_pfnmap(struct mm_struct *mm, unsigned long vaddr, u64 npages, bool write,
		       struct pinned *to, long error)
{
	unsigned int entries = 0;
	long ret;

	vaddr = untagged_addr_remote(mm, vaddr);
	do {
		unsigned long at = vaddr + (to->npages << PAGE_SHIFT);
		struct vm_area_struct *vma = vma_lookup(mm, at);
		u64 pfn;

		ret = error;
		if (!vma || !(vma->vm_flags & VM_PFNMAP))
			break;
		ret = follow_pfnmap(vma, mm, at, write, &pfn);
		if (ret == -EAGAIN) {
			entries = 0;
			continue;
		}
		if (ret <= 0)
			break;
		ret = min_t(u64, ret, npages - to->npages);
		if (!append(to, pfn, ret, dirty_page_kind(pfn)))
			break;
		cond_resched();
	} while (++entries < PIN_ENTRIES && to->npages < npages);
	return to->npages ? 0 : ret;
}

/*
 * Pins memory. `pages` has room for `room` pages. The pages that are asked for at a
 * time fill the runs that are left, if folios stay as large as the last one.
 */
static long pin_memory(struct mm_struct *mm, unsigned long vaddr, u64 npages, bool write,
		       struct page **pages, unsigned long room, struct pinned *to)
{
	unsigned int flags = FOLL_LONGTERM | (write ? FOLL_WRITE : 0), order = 0;

	while (to->npages < npages) {
		unsigned long at = vaddr + (to->npages << PAGE_SHIFT);
		u64 left = npages - to->npages, want = (to->max - to->n) << order;
		long got, k, len;

		if (to->npages && want < min(left, PIN_FEW))
			break;
		/* Up to a multiple of `room`, so that no huge page is looked up twice. */
		want = min3(left, want, room - (at >> PAGE_SHIFT) % room);
		got = dirty_gup(mm, at, want, flags, pages);
		if (got <= 0)
			return to->npages ? 0 : got ?: -EFAULT;
		for (k = 0; k < got; k += len) {
			long most = min_t(u64, got - k, left_in_folio(pages[k]));
			bool reserved = PageReserved(pages[k]);

			len = num_pages_contiguous(pages + k, most);
			if (!append(to, page_to_pfn(pages[k]), len,
				    reserved ? DIRTY_PAGE_RESERVED : DIRTY_PAGE_NORMAL)) {
				dirty_ungup(pages + k, got - k);
				return 0;
			}
		}
		order = folio_order(page_folio(pages[got - 1]));
		cond_resched();
	}
	return 0;
}

/* Pins pages of an mm; returns how many runs it has stored, at least one, or an errno. */
long dirty_pin(struct mm_struct *mm, unsigned long vaddr, u64 npages, bool write,
	       struct dirty_run *runs, unsigned long max)
{
	struct pinned pinned = { .runs = runs, .max = max };
	struct page *few[PIN_FEW], **many = NULL;
	long ret;

	if (!mmget_not_zero(mm))
		return -ENODEV;
	cond_resched();
	npages = min(npages, PIN_MAX);
	if (npages > PIN_FEW)
		many = (struct page **)__get_free_page(GFP_DIRTY);
	mmap_read_lock(mm);
	if (many)
		ret = pin_memory(mm, vaddr, npages, write, many, PAGE_SIZE / sizeof(*many),
				 &pinned);
	else
		ret = pin_memory(mm, vaddr, npages, write, few, PIN_FEW, &pinned);
	if (ret)
		ret = pin_pfnmap(mm, vaddr, npages, write, &pinned, ret);
	mmap_read_unlock(mm);
	free_page((unsigned long)many);
	mmput(mm);
	return ret ?: pinned.n;
}

u64 dirty_unpin(u64 pfn, u64 npages, bool write)
{
	u64 normal = 0;

	while (npages) {
		u64 n = 0;

		/* Special pages hold no pin; the others are unpinned in runs. */
		while (n < npages && !is_special(pfn + n))
			n += left_in_folio(pfn_to_page(pfn + n));
		n = min(n, npages);
		if (n) {
			unpin_user_page_range_dirty_lock(pfn_to_page(pfn), n, write);
			normal += n;
			cond_resched();
		} else {
			n = 1;
		}
		pfn += n;
		npages -= n;
	}
	return normal;
}
