// SPDX-License-Identifier: GPL-2.0-only
/* IOMMU domains: attach, map, unmap. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/iommu.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include "compat.h"
#include "glue.h"
#include "tracking.h"

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
		new->domain = dirty_alloc_tracking(dev);
	if (new->domain == ERR_PTR(-EOPNOTSUPP))
		new->domain = iommu_paging_domain_alloc(dev);
	return 1; /* stop: one device stands for its group */
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
	info->dirty_tracking = dirty_tracking && dirty_can_track(new);
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

u64 dirty_iova_to_phys(struct iommu_domain *domain, u64 iova)
{
	return iommu_iova_to_phys(domain, iova);
}
