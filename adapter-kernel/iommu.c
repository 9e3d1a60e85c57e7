// SPDX-License-Identifier: GPL-2.0-only
/* IOMMU domains: attach, map, unmap, and the dirty pages of those that track. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/iommu.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <uapi/linux/iommufd.h>
#include "glue.h"

static bool allow_unsafe_interrupts;
module_param(allow_unsafe_interrupts, bool, 0644);
MODULE_PARM_DESC(allow_unsafe_interrupts,
		 "Take groups whose interrupts are not isolated.");

static bool disable_hugepages;
module_param(disable_hugepages, bool, 0644);
MODULE_PARM_DESC(disable_hugepages, "Map page by page, never in larger ones.");

struct new_domain {
	struct iommu_domain *domain;
	bool dirty_tracking;	/* is wanted */
};

static int alloc_domain(struct device *dev, void *data)
{
	struct new_domain *new = data;

	new->domain = ERR_PTR(-EOPNOTSUPP);
	if (new->dirty_tracking)
		new->domain = iommu_paging_domain_alloc_flags(dev, IOMMU_HWPT_ALLOC_DIRTY_TRACKING);
	if (new->domain == ERR_PTR(-EOPNOTSUPP))
		new->domain = iommu_paging_domain_alloc(dev);
	return 1; /* stop: one device stands for its group */
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
static bool can_track(struct iommu_domain *domain)
{
	struct iommu_iotlb_gather gather;

	return domain->dirty_ops &&
	       !read_and_clear(domain, domain->geometry.aperture_start,
			       1ULL << __ffs(domain->pgsize_bitmap), &gather);
}

/* Finds the MSI window that software has to map; whether there is one. */
static bool software_msi(struct list_head *regions, phys_addr_t *base)
{
	struct iommu_resv_region *region;
	bool found = false;

	list_for_each_entry(region, regions, list) {
		if (region->type == IOMMU_RESV_MSI)
			return false; /* the hardware maps its own */
		if (region->type == IOMMU_RESV_SW_MSI) {
			*base = region->start;
			found = true;
		}
	}
	return found;
}

static void free_regions(struct list_head *regions)
{
	struct iommu_resv_region *region, *next;

	list_for_each_entry_safe(region, next, regions, list) {
		list_del(&region->list);
		kfree(region);
	}
}

/* Reserves the group's MSI window in a domain in which nothing is mapped yet. */
static int map_msi(struct iommu_group *group, struct iommu_domain *domain)
{
	LIST_HEAD(regions);
	phys_addr_t base;
	int ret = iommu_get_group_resv_regions(group, &regions);

	if (!ret && software_msi(&regions, &base)) {
		ret = iommu_get_msi_cookie(domain, base);
		if (ret == -ENODEV)
			ret = 0;
	}
	free_regions(&regions);
	return ret;
}

int dirty_domain_attach(struct iommu_group *group, bool dirty_tracking,
			struct iommu_domain **domain, struct dirty_domain_info *info)
{
	struct new_domain allocated = { ERR_PTR(-ENODEV), dirty_tracking };
	struct iommu_domain *new;
	int ret;

	iommu_group_for_each_dev(group, &allocated, alloc_domain);
	new = allocated.domain;
	if (IS_ERR(new))
		return PTR_ERR(new);
	ret = iommu_attach_group(new, group);
	if (ret)
		goto free;
	ret = map_msi(group, new);
	if (ret) {
		iommu_detach_group(new, group);
		goto free;
	}
	info->pgsize_bitmap = new->pgsize_bitmap;
	info->first = new->geometry.aperture_start;
	info->last = new->geometry.aperture_end;
	info->kind = (unsigned long)new->ops;
	info->coherent = new->ops->enforce_cache_coherency &&
			 new->ops->enforce_cache_coherency(new);
	info->dirty_tracking = dirty_tracking && can_track(new);
	info->isolated_msi = READ_ONCE(allow_unsafe_interrupts) ||
			     iommu_group_has_isolated_msi(group);
	*domain = new;
	return 0;
free:
	iommu_domain_free(new);
	return ret;
}

bool dirty_domain_join(struct iommu_group *group, struct iommu_domain *old,
		       struct iommu_domain *domain)
{
	iommu_detach_group(old, group);
	if (!iommu_attach_group(domain, group)) {
		iommu_domain_free(old);
		return true;
	}
	/* If this fails too, the group's DMA stays blocked. */
	if (iommu_attach_group(old, group))
		pr_warn("a group could not return to its domain\n");
	return false;
}

void dirty_domain_detach(struct iommu_group *group, struct iommu_domain *domain, bool last)
{
	iommu_detach_group(domain, group);
	if (last)
		iommu_domain_free(domain);
}

/* Stores up to max ranges in which nothing may be mapped; returns how many exist. */
int dirty_reserved(struct iommu_group *group, struct dirty_range *ranges, int max)
{
	struct iommu_resv_region *region;
	LIST_HEAD(regions);
	int n = 0, ret = iommu_get_group_resv_regions(group, &regions);

	if (!ret) {
		list_for_each_entry(region, &regions, list) {
			if (region->type == IOMMU_RESV_DIRECT_RELAXABLE || !region->length)
				continue;
			if (n < max) {
				ranges[n].first = region->start;
				ranges[n].last = region->start + region->length - 1;
			}
			n++;
		}
	}
	free_regions(&regions);
	return ret ?: n;
}

int dirty_map(struct iommu_domain *domain, u64 iova, u64 pfn, u64 npages, u32 prot)
{
	u64 step = READ_ONCE(disable_hugepages) ? 1 : npages, done = 0;
	int ret = 0;

	while (!ret && done < npages) {
		cond_resched();
		ret = iommu_map(domain, iova + (done << PAGE_SHIFT), (pfn + done) << PAGE_SHIFT,
				step << PAGE_SHIFT, prot | IOMMU_CACHE, GFP_DIRTY);
		if (!ret)
			done += step;
	}
	if (ret && done)
		iommu_unmap(domain, iova, done << PAGE_SHIFT);
	return ret;
}

void dirty_unmap(struct iommu_domain *domain, u64 iova, u64 npages)
{
	cond_resched();
	iommu_unmap(domain, iova, npages << PAGE_SHIFT);
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

u64 dirty_iova_to_phys(struct iommu_domain *domain, u64 iova)
{
	return iommu_iova_to_phys(domain, iova);
}
