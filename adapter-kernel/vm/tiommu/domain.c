// SPDX-License-Identifier: GPL-2.0-only
#include <linux/highmem.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <uapi/linux/iommufd.h>
#include "domain.h"
#include "table.h"

/* A write that is made when its page is unmapped. */
struct late_write {
	u64 iova;
	unsigned int len;	/* 0: there is none */
	bool dirty;		/* it was made, and nobody was told */
	u8 bytes[TIOMMU_LATE_MAX];
};

struct tiommu_domain {
	struct iommu_domain domain;
	u64 *root;
	u64 bytes;	/* that are mapped */
	bool tracking;
	bool coherent;
	struct list_head delayed;
	struct late_write late;
};

/* A part of a page that a delayed write has yet to fill. It holds the page. */
struct delayed_write {
	struct list_head list;
	struct page *page;
	unsigned int offset;
	unsigned int len;
	u8 bytes[];
};

DEFINE_MUTEX(tiommu_lock);
struct tiommu_device tiommu_devices[TIOMMU_DEVICES];
struct tiommu_counters tiommu_counters;
u64 tiommu_refuse;

static struct tiommu_domain *to_tiommu(struct iommu_domain *domain)
{
	return container_of(domain, struct tiommu_domain, domain);
}

/* Lets the delayed writes reach memory. */
static void finish_writes(struct tiommu_domain *d)
{
	struct delayed_write *write, *next;

	list_for_each_entry_safe(write, next, &d->delayed, list) {
		if (!folio_maybe_dma_pinned(page_folio(write->page)))
			tiommu_counters.late++;
		memcpy_to_page(write->page, write->offset, write->bytes, write->len);
		put_page(write->page);
		list_del(&write->list);
		kfree(write);
	}
}

/* Whether the map of n pages of 2^shift bytes is to fail; how many of them before it. */
static bool refuses(unsigned int shift, size_t *n)
{
	u64 each = 1ULL << (shift - PAGE_SHIFT), pages = *n * each;

	if (!tiommu_refuse || tiommu_refuse > pages) {
		tiommu_refuse -= min(tiommu_refuse, pages);
		return false;
	}
	*n = (tiommu_refuse - 1) / each;
	tiommu_refuse = 0;
	return true;
}

static int map_pages(struct iommu_domain *domain, unsigned long iova, phys_addr_t phys,
		     size_t pgsize, size_t count, int prot, gfp_t gfp, size_t *mapped)
{
	struct tiommu_domain *d = to_tiommu(domain);
	u64 access = (prot & IOMMU_READ ? ENTRY_READ : 0) | (prot & IOMMU_WRITE ? ENTRY_WRITE : 0);
	unsigned int shift = __ffs(pgsize);
	int ret = 0;
	bool refused;

	if (iova < domain->geometry.aperture_start ||
	    iova + pgsize * count - 1 > domain->geometry.aperture_end)
		return -ERANGE;
	mutex_lock(&tiommu_lock);
	tiommu_counters.maps++;
	refused = refuses(shift, &count);
	while (count-- && !ret) {
		ret = table_map(d->root, iova + *mapped, phys + *mapped, shift, access, gfp);
		if (!ret)
			*mapped += pgsize;
	}
	tiommu_counters.mapped += *mapped;
	tiommu_counters.bytes += *mapped;
	d->bytes += *mapped;
	mutex_unlock(&tiommu_lock);
	return ret ?: refused ? -EIO : 0;
}

/* A page of 2^shift bytes is about to be unmapped. */
static void write_late(struct tiommu_domain *d, u64 iova, u64 entry, unsigned int shift)
{
	struct late_write *late = &d->late;
	u64 phys = table_phys(entry) + (late->iova - iova);

	if (!late->len || late->iova - iova >= BIT_ULL(shift) || !(entry & ENTRY_WRITE))
		return;
	memcpy_to_page(pfn_to_page(PHYS_PFN(phys)), offset_in_page(phys), late->bytes, late->len);
	late->len = 0;
	late->dirty = true;
}

static size_t unmap_pages(struct iommu_domain *domain, unsigned long iova, size_t pgsize,
			  size_t count, struct iommu_iotlb_gather *gather)
{
	struct tiommu_domain *d = to_tiommu(domain);
	size_t size = pgsize * count, done = 0;

	mutex_lock(&tiommu_lock);
	tiommu_counters.unmaps++;
	while (done < size) {
		unsigned int shift;
		u64 *entry = table_find(d->root, iova + done, &shift);
		u64 page = 1ULL << shift;

		if (!entry)
			break;
		if (!IS_ALIGNED(iova + done, page) || page > size - done) {
			tiommu_counters.split++;
			break;
		}
		write_late(d, iova + done, *entry, shift);
		table_unmap(entry, shift);
		done += page;
	}
	tiommu_counters.unmapped += done;
	tiommu_counters.bytes -= done;
	d->bytes -= done;
	mutex_unlock(&tiommu_lock);
	if (done)
		iommu_iotlb_gather_add_range(gather, iova, done);
	return done;
}

static int iotlb_sync_map(struct iommu_domain *domain, unsigned long iova, size_t size)
{
	mutex_lock(&tiommu_lock);
	tiommu_counters.map_syncs++;
	mutex_unlock(&tiommu_lock);
	return 0;
}

static void iotlb_sync(struct iommu_domain *domain, struct iommu_iotlb_gather *gather)
{
	mutex_lock(&tiommu_lock);
	tiommu_counters.syncs++;
	finish_writes(to_tiommu(domain));
	mutex_unlock(&tiommu_lock);
}

static void flush_iotlb_all(struct iommu_domain *domain)
{
	mutex_lock(&tiommu_lock);
	tiommu_counters.flushes++;
	finish_writes(to_tiommu(domain));
	mutex_unlock(&tiommu_lock);
}

static phys_addr_t iova_to_phys(struct iommu_domain *domain, dma_addr_t iova)
{
	phys_addr_t phys = 0;
	unsigned int shift;
	u64 *entry;

	mutex_lock(&tiommu_lock);
	entry = table_find(to_tiommu(domain)->root, iova, &shift);
	if (entry)
		phys = table_phys(*entry) | (iova & (BIT_ULL(shift) - 1));
	mutex_unlock(&tiommu_lock);
	return phys;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 19, 0)
#define ATTACH_ARGS struct iommu_domain *domain, struct device *dev, struct iommu_domain *old
#else
#define ATTACH_ARGS struct iommu_domain *domain, struct device *dev
#endif

/* Only a domain that was made for a device like this one fits it. */
static int attach_paging(ATTACH_ARGS)
{
	struct tiommu_device *device = tiommu_device_of(dev);
	struct tiommu_config *config = &device->config;
	bool fits;

	mutex_lock(&tiommu_lock);
	fits = domain->pgsize_bitmap == config->pgsizes &&
	       domain->geometry.aperture_start == config->first &&
	       domain->geometry.aperture_end == config->last &&
	       (!domain->dirty_ops || (config->flags & TIOMMU_TRACKS));
	if (fits) {
		/* What the device has on its way lands before it leaves a domain. */
		if (device->domain)
			finish_writes(to_tiommu(device->domain));
		device->domain = domain;
	}
	mutex_unlock(&tiommu_lock);
	return fits ? 0 : -EINVAL;
}

static int attach_static(ATTACH_ARGS)
{
	struct tiommu_device *device = tiommu_device_of(dev);

	mutex_lock(&tiommu_lock);
	if (device->domain)
		finish_writes(to_tiommu(device->domain));
	device->domain = NULL;
	mutex_unlock(&tiommu_lock);
	return 0;
}

static bool enforce_cache_coherency(struct iommu_domain *domain)
{
	return to_tiommu(domain)->coherent;
}

static void domain_free(struct iommu_domain *domain)
{
	struct tiommu_domain *d = to_tiommu(domain);

	mutex_lock(&tiommu_lock);
	finish_writes(d);
	tiommu_counters.domains--;
	tiommu_counters.bytes -= d->bytes;
	mutex_unlock(&tiommu_lock);
	table_free(d->root);
	kfree(d);
}

static int set_dirty_tracking(struct iommu_domain *domain, bool enabled)
{
	mutex_lock(&tiommu_lock);
	to_tiommu(domain)->tracking = enabled;
	mutex_unlock(&tiommu_lock);
	return 0;
}

static int read_and_clear_dirty(struct iommu_domain *domain, unsigned long iova, size_t size,
				unsigned long flags, struct iommu_dirty_bitmap *dirty)
{
	struct tiommu_domain *d = to_tiommu(domain);
	u64 at = iova, end = (u64)iova + size;
	int ret = 0;

	mutex_lock(&tiommu_lock);
	/* Without a bitmap the call only clears, which is right at any time. */
	if (!d->tracking && dirty->bitmap)
		ret = -EINVAL;
	while (!ret && at < end) {
		unsigned int shift;
		u64 *entry = table_find(d->root, at, &shift);
		u64 page = BIT_ULL(shift);

		at &= ~(page - 1);
		if (entry && (*entry & ENTRY_DIRTY)) {
			iommu_dirty_bitmap_record(dirty, at, page);
			if (!(flags & IOMMU_DIRTY_NO_CLEAR))
				*entry &= ~ENTRY_DIRTY;
		}
		at += page;
	}
	if (!ret && d->late.dirty && d->late.iova >= iova && d->late.iova < end) {
		iommu_dirty_bitmap_record(dirty, d->late.iova & PAGE_MASK, PAGE_SIZE);
		d->late.dirty = flags & IOMMU_DIRTY_NO_CLEAR;
	}
	mutex_unlock(&tiommu_lock);
	return ret;
}

static const struct iommu_dirty_ops dirty_ops = {
	.set_dirty_tracking	= set_dirty_tracking,
	.read_and_clear_dirty	= read_and_clear_dirty,
};

static const struct iommu_domain_ops paging_ops = {
	.attach_dev		= attach_paging,
	.map_pages		= map_pages,
	.unmap_pages		= unmap_pages,
	.iotlb_sync_map		= iotlb_sync_map,
	.iotlb_sync		= iotlb_sync,
	.flush_iotlb_all	= flush_iotlb_all,
	.iova_to_phys		= iova_to_phys,
	.enforce_cache_coherency = enforce_cache_coherency,
	.free			= domain_free,
};

static const struct iommu_domain_ops static_ops = {
	.attach_dev		= attach_static,
};

struct iommu_domain tiommu_identity = {
	.type	= IOMMU_DOMAIN_IDENTITY,
	.ops	= &static_ops,
};

struct iommu_domain tiommu_blocked = {
	.type	= IOMMU_DOMAIN_BLOCKED,
	.ops	= &static_ops,
};

struct iommu_domain *tiommu_domain_alloc(struct device *dev, u32 flags,
					 const struct iommu_user_data *data)
{
	struct tiommu_config *config = &tiommu_device_of(dev)->config;
	struct tiommu_domain *d;

	if (data || (flags & ~IOMMU_HWPT_ALLOC_DIRTY_TRACKING))
		return ERR_PTR(-EOPNOTSUPP);
	if (flags && !(config->flags & TIOMMU_TRACKS))
		return ERR_PTR(-EOPNOTSUPP);
	d = kzalloc(sizeof(*d), GFP_KERNEL_ACCOUNT);
	if (!d)
		return ERR_PTR(-ENOMEM);
	d->root = table_new(GFP_KERNEL_ACCOUNT);
	if (!d->root) {
		kfree(d);
		return ERR_PTR(-ENOMEM);
	}
	INIT_LIST_HEAD(&d->delayed);
	d->domain.ops = &paging_ops;
	if (flags || (config->flags & (TIOMMU_TRACKS | TIOMMU_UNASKED)) ==
		     (TIOMMU_TRACKS | TIOMMU_UNASKED))
		d->domain.dirty_ops = &dirty_ops;
	mutex_lock(&tiommu_lock);
	d->coherent = config->flags & TIOMMU_COHERENT;
	d->domain.pgsize_bitmap = config->pgsizes;
	d->domain.geometry.aperture_start = config->first;
	d->domain.geometry.aperture_end = config->last;
	d->domain.geometry.force_aperture = true;
	tiommu_counters.domains++;
	mutex_unlock(&tiommu_lock);
	return &d->domain;
}

static bool delay(struct tiommu_domain *d, u64 phys, const void *buf, unsigned int len)
{
	struct delayed_write *write = kmalloc(sizeof(*write) + len, GFP_KERNEL);

	if (!write)
		return false;
	write->page = pfn_to_page(PHYS_PFN(phys));
	write->offset = offset_in_page(phys);
	write->len = len;
	memcpy(write->bytes, buf, len);
	get_page(write->page);
	list_add_tail(&write->list, &d->delayed);
	return true;
}

u64 tiommu_domain_dma(struct iommu_domain *domain, u64 iova, void *buf, u64 len, u32 flags)
{
	struct tiommu_domain *d = to_tiommu(domain);
	u64 access = flags & TIOMMU_WRITE ? ENTRY_WRITE : ENTRY_READ, done = 0;

	if (flags & TIOMMU_LATE) {
		if (!(flags & TIOMMU_WRITE) || len > TIOMMU_LATE_MAX ||
		    offset_in_page(iova) + len > PAGE_SIZE)
			return 0;
		d->late = (struct late_write){ .iova = iova, .len = len };
		memcpy(d->late.bytes, buf, len);
		return len;
	}
	while (done < len) {
		u64 at = iova + done, n = min(len - done, PAGE_SIZE - offset_in_page(at)), phys;
		unsigned int shift;
		u64 *entry = table_find(d->root, at, &shift);
		struct page *page;

		if (at < iova || at > domain->geometry.aperture_end || !entry ||
		    !(*entry & access)) {
			tiommu_counters.faults++;
			break;
		}
		phys = table_phys(*entry) | (at & (BIT_ULL(shift) - 1));
		if (!pfn_valid(PHYS_PFN(phys)))
			break; /* another device's registers */
		page = pfn_to_page(PHYS_PFN(phys));
		if (!(flags & TIOMMU_WRITE))
			memcpy_from_page(buf + done, page, offset_in_page(phys), n);
		else if (!(flags & TIOMMU_DELAY))
			memcpy_to_page(page, offset_in_page(phys), buf + done, n);
		else if (!delay(d, phys, buf + done, n))
			break;
		if (flags & TIOMMU_WRITE)
			*entry |= ENTRY_DIRTY; /* after the write: who clears it sees the bytes */
		done += n;
	}
	return done;
}
