// SPDX-License-Identifier: GPL-2.0-only
/* The dirty pages of IOMMU domains that track them. */
#include "compat.h"
#include "glue.h"
#include "tracking.h"

#if DIRTY_HAS_TRACKING
#include <uapi/linux/iommufd.h>

struct iommu_domain *dirty_alloc_tracking(struct device *dev)
{
	return iommu_paging_domain_alloc_flags(dev, IOMMU_HWPT_ALLOC_DIRTY_TRACKING);
}

/*
 * Reads and clears dirty bits. `gather` receives the range from the first to the last
 * page that was dirty.
 */
static int read_and_clear(struct iommu_domain *domain, u64 iova, u64 size,
			  struct iommu_iotlb_gather *gather)
{
	struct iommu_dirty_bitmap dirty;

	iommu_dirty_bitmap_init(&dirty, NULL, gather);
	return domain->dirty_ops->read_and_clear_dirty(domain, iova, size, 0, &dirty);
}

/*
 * Whether the dirty bits of a new domain can be read. In a kernel without
 * CONFIG_IOMMUFD_DRIVER some drivers switch tracking on, but cannot read.
 */
bool dirty_can_track(struct iommu_domain *domain)
{
	struct iommu_iotlb_gather gather;

	return domain->dirty_ops &&
	       !read_and_clear(domain, domain->geometry.aperture_start,
			       1ULL << __ffs(domain->pgsize_bitmap), &gather);
}

int dirty_set_tracking(struct iommu_domain *domain, bool on)
{
	return domain->dirty_ops->set_dirty_tracking(domain, on);
}

/*
 * Calls mark(context, first, last) for each range that was written, and clears its
 * dirty bits. A range may be larger than what was asked for: a large page of the IOMMU
 * has one bit. If the bits cannot be read, all is marked.
 *
 * Drivers tell each dirty page to an iova_bitmap, which writes to user memory only, and
 * says nothing of pages that it could not write. So none is passed. Drivers also add
 * what they clear to a gather, which knows the first and the last address. If at most
 * two pages are looked at, that says which of them were dirty.
 */
void dirty_read_and_clear(struct iommu_domain *domain, u64 iova, u64 npages,
			  dirty_mark_t mark, void *context)
{
	u64 last = iova + (npages << PAGE_SHIFT) - 1, at = iova;
	u64 pair = 2ULL << __ffs(domain->pgsize_bitmap);
	struct iommu_iotlb_gather all, gather;

	iommu_iotlb_gather_init(&all);
	while (at >= iova && at <= last) {
		/* Aligned, so that a large page is never looked at with another. */
		u64 size = min(pair - (at & (pair - 1)), last - at + 1), next = at + size;

		if (read_and_clear(domain, at, size, &gather)) {
			mark(context, iova, last);
			break;
		}
		if (gather.start <= gather.end) {
			u64 found = rounddown_pow_of_two(gather.end - gather.start + 1);
			/* Some drivers tell a large page from `at` on, but clear its bit. */
			u64 first = round_down(gather.start, found);

			mark(context, first, gather.end);
			iommu_iotlb_gather_add_range(&all, first, gather.end - first + 1);
			next = max(next, first + found);
		}
		at = next;
		cond_resched();
	}
	/* What is under way to a page whose bit is cleared reaches memory. */
	if (all.start <= all.end)
		iommu_iotlb_sync(domain, &all);
}

#else

struct iommu_domain *dirty_alloc_tracking(struct device *dev)
{
	return ERR_PTR(-EOPNOTSUPP);
}

bool dirty_can_track(struct iommu_domain *domain)
{
	return false;
}

/* The core calls the two below only for domains that track. */
int dirty_set_tracking(struct iommu_domain *domain, bool on)
{
	return -EOPNOTSUPP;
}

void dirty_read_and_clear(struct iommu_domain *domain, u64 iova, u64 npages,
			  dirty_mark_t mark, void *context)
{
	mark(context, iova, iova + (npages << PAGE_SHIFT) - 1);
}

#endif
