/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What kernels before 7.3 lack or have in another form: each by the release that changed
 * it. `kernels` lists the releases that are built for.
 */
#ifndef DIRTY_COMPAT_H
#define DIRTY_COMPAT_H
#include <linux/iommu.h>
#include <linux/irqdomain.h>
#include <linux/mm.h>
#include <linux/mm_inline.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
static inline int dirty_remaps_interrupts(struct device *dev, void *data)
{
	return device_iommu_capable(dev, IOMMU_CAP_INTR_REMAP);
}

static inline bool iommu_group_has_isolated_msi(struct iommu_group *group)
{
	return irq_domain_check_msi_remap() ||
	       iommu_group_for_each_dev(group, NULL, dirty_remaps_interrupts);
}

/* Page tables were not charged to a memory cgroup. */
#define iommu_map(domain, iova, paddr, size, prot, gfp) \
	iommu_map(domain, iova, paddr, size, prot)
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
/* The tags of an address were the task's, not the mm's. */
#define untagged_addr_remote(mm, addr)	untagged_addr(addr)
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 5, 0)
/*
 * The zero page was pinned as any other. It is reserved, and the module unpins no reserved
 * page: so that pin is given back at once, as the real driver did.
 */
static inline long dirty_gup(struct mm_struct *mm, unsigned long vaddr, unsigned long npages,
			     unsigned int flags, struct page **pages)
{
	long got = pin_user_pages_remote(mm, vaddr, npages, flags, pages, NULL, NULL), k;

	for (k = 0; k < got; k++)
		if (is_zero_pfn(page_to_pfn(pages[k])))
			unpin_user_page(pages[k]);
	return got;
}

static inline void dirty_ungup(struct page **pages, unsigned long npages)
{
	unsigned long k;

	for (k = 0; k < npages; k++)
		if (!is_zero_pfn(page_to_pfn(pages[k])))
			unpin_user_page(pages[k]);
}
#else
static inline long dirty_gup(struct mm_struct *mm, unsigned long vaddr, unsigned long npages,
			     unsigned int flags, struct page **pages)
{
	return pin_user_pages_remote(mm, vaddr, npages, flags, pages, NULL);
}

static inline void dirty_ungup(struct page **pages, unsigned long npages)
{
	unpin_user_pages(pages, npages);
}
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
static inline struct iommu_domain *iommu_paging_domain_alloc(struct device *dev)
{
	return iommu_domain_alloc(dev->bus) ?: ERR_PTR(-EIO);
}
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
/* A page table entry was looked up alone. Kernels from 6.10 on passed the vma. */
struct follow_pfnmap_args {
	struct vm_area_struct *vma;
	unsigned long address;
	spinlock_t *lock;
	pte_t *ptep;
	unsigned long pfn;
	bool writable;
};

static inline int follow_pfnmap_start(struct follow_pfnmap_args *args)
{
	int ret = follow_pte(args->vma->vm_mm, args->address, &args->ptep, &args->lock);

	if (!ret) {
		args->pfn = pte_pfn(*args->ptep);
		args->writable = pte_write(*args->ptep);
	}
	return ret;
}

static inline void follow_pfnmap_end(struct follow_pfnmap_args *args)
{
	pte_unmap_unlock(args->ptep, args->lock);
}
#endif

/* How many pfns the entry that was found has from its pfn on. */
static inline u64 dirty_followed(const struct follow_pfnmap_args *args)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0)
	return (args->pfn | (~args->addr_mask >> PAGE_SHIFT)) + 1 - args->pfn;
#else
	return 1; /* the size of an entry was not told */
#endif
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
/* How many of these pages are consecutive, in one array of struct page too. */
static inline size_t num_pages_contiguous(struct page **pages, size_t npages)
{
	size_t n = 1;

	while (n < npages && pages[n] == pages[0] + n &&
	       page_to_pfn(pages[n]) == page_to_pfn(pages[0]) + n)
		n++;
	return n;
}
#endif

/*
 * Before 6.13 only iommufd could ask for a domain that tracks dirty pages, and before 6.7
 * there was none.
 */
#define DIRTY_HAS_TRACKING	(LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0))

#endif
