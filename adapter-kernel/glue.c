// SPDX-License-Identifier: GPL-2.0-only
/*
 * The C half, for kernel interfaces that have no Rust binding. It decides
 * nothing: it passes the backend's operations to Rust, and Rust calls it for
 * pages, address spaces and IOMMU domains. Where the kernel's own interfaces
 * ask for certain flags or a certain order, it follows the real driver.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/iommu.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/mm_inline.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <uapi/linux/iommufd.h>
#include "vfio.h"
#include "glue.h"

/*
 * All memory is charged to the caller's memory cgroup. If there is none left, an
 * allocation fails: without __GFP_RETRY_MAYFAIL the OOM killer would come, and end
 * the process that asked.
 */
#define GFP_DIRTY (GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

/* So few pages need no memory for pointers to them. */
#define PIN_FEW 16UL
/*
 * The most pages that are pinned while the mmap lock is held. A caller may exceed its
 * limit of locked memory by so many, until they are charged.
 */
#define PIN_MAX 8192ULL
/* The most page table entries of a device's memory that are read meanwhile. */
#define PIN_ENTRIES 4096

static bool allow_unsafe_interrupts;
module_param(allow_unsafe_interrupts, bool, 0644);
MODULE_PARM_DESC(allow_unsafe_interrupts,
		 "Take groups whose interrupts are not isolated.");

static bool disable_hugepages;
module_param(disable_hugepages, bool, 0644);
MODULE_PARM_DESC(disable_hugepages, "Map page by page, never in larger ones.");

static unsigned int dma_entry_limit = U16_MAX;
module_param(dma_entry_limit, uint, 0644);
MODULE_PARM_DESC(dma_entry_limit, "Most mappings of a container (65535).");

static unsigned long long bitmap_budget;
module_param(bitmap_budget, ullong, 0644);
MODULE_PARM_DESC(bitmap_budget,
		 "Most bytes for the dirty bitmaps of a container; 0, the default, for any amount.");

static bool skip_read_only;
module_param(skip_read_only, bool, 0644);
MODULE_PARM_DESC(skip_read_only,
		 "Do not report read-only mappings behind an IOMMU as dirty.");

static bool iommu_dirty_tracking;
module_param(iommu_dirty_tracking, bool, 0644);
MODULE_PARM_DESC(iommu_dirty_tracking,
		 "Ask IOMMUs that track dirty pages which pages devices have written.");

u32 dirty_dma_entry_limit(void)
{
	return READ_ONCE(dma_entry_limit);
}

u64 dirty_bitmap_budget(void)
{
	return READ_ONCE(bitmap_budget);
}

bool dirty_skip_read_only(void)
{
	return READ_ONCE(skip_read_only);
}

bool dirty_iommu_dirty_tracking(void)
{
	return READ_ONCE(iommu_dirty_tracking);
}

/*
 * Zeroed memory, which dirty_free() frees. kmalloc() rounds more than two pages up
 * to a power of two, and kvmalloc() more than 4 MiB to huge pages: for 64 GiB of
 * mappings that can be half as much again as the bits. So kmalloc() serves up to
 * eight pages and only if it wastes no page; vmalloc() serves the rest, and rounds
 * to pages.
 */
void *dirty_alloc(size_t size)
{
	size_t rounded = kmalloc_size_roundup(size);

	if (size <= PAGE_SIZE ||
	    (rounded <= PAGE_SIZE << PAGE_ALLOC_COSTLY_ORDER && rounded == PAGE_ALIGN(size)))
		return kvzalloc(size, GFP_DIRTY);
	return __vmalloc(size, GFP_DIRTY | __GFP_ZERO);
}

void dirty_free(void *memory)
{
	kvfree(memory);
}

static long ioctl(void *data, unsigned int cmd, unsigned long arg)
{
	long ret = dirty_backend_ioctl(data, cmd, arg);

	dirty_trace_ioctl(data, cmd, arg, ret);
	return ret;
}

static int attach_group(void *data, struct iommu_group *group, enum vfio_group_type type)
{
	return dirty_backend_attach_group(data, group, type == VFIO_EMULATED_IOMMU);
}

static int pin_pages(void *data, struct iommu_group *group, dma_addr_t iova, int npage,
		     int prot, struct page **pages)
{
	int ret = dirty_backend_pin_pages(data, group, iova, npage, prot, pages);

	dirty_trace_pin(data, iova, npage, prot, ret);
	return ret;
}

static void unpin_pages(void *data, dma_addr_t iova, int npage)
{
	dirty_backend_unpin_pages(data, iova, npage);
}

static int dma_rw(void *data, dma_addr_t iova, void *buf, size_t len, bool write)
{
	return dirty_backend_dma_rw(data, iova, buf, len, write);
}

static const struct vfio_iommu_driver_ops dirty_ops = {
	.name			= "vfio-iommu-dirty",
	.owner			= THIS_MODULE,
	.open			= dirty_backend_open,
	.release		= dirty_backend_release,
	.ioctl			= ioctl,
	.attach_group		= attach_group,
	.detach_group		= dirty_backend_detach_group,
	.pin_pages		= pin_pages,
	.unpin_pages		= unpin_pages,
	.register_device	= dirty_backend_register_device,
	.unregister_device	= dirty_backend_unregister_device,
	.dma_rw			= dma_rw,
	.group_iommu_domain	= dirty_backend_group_domain,
};

int dirty_register(void)
{
	return vfio_register_iommu_driver(&dirty_ops);
}

void dirty_unregister(void)
{
	vfio_unregister_iommu_driver(&dirty_ops);
}

struct mutex *dirty_mutex_new(void)
{
	struct mutex *mutex = kmalloc(sizeof(*mutex), GFP_KERNEL_ACCOUNT);

	if (mutex)
		mutex_init(mutex);
	return mutex;
}

void dirty_mutex_free(struct mutex *mutex)
{
	mutex_destroy(mutex);
	kfree(mutex);
}

void dirty_mutex_lock(struct mutex *mutex)
{
	mutex_lock(mutex);
}

bool dirty_mutex_lock_killable(struct mutex *mutex)
{
	return !mutex_lock_killable(mutex);
}

void dirty_mutex_unlock(struct mutex *mutex)
{
	mutex_unlock(mutex);
}

/*
 * The open devices of a container that have a dma_unmap callback. Callbacks run
 * under this lock and unpin, which takes the container's lock: so this lock is
 * always taken first.
 */
struct dirty_devices {
	struct mutex lock;
	struct list_head list;
};

struct dirty_devices *dirty_devices_new(void)
{
	struct dirty_devices *devices = kzalloc(sizeof(*devices), GFP_DIRTY);

	if (devices) {
		mutex_init(&devices->lock);
		INIT_LIST_HEAD(&devices->list);
	}
	return devices;
}

void dirty_devices_free(struct dirty_devices *devices)
{
	WARN_ON(!list_empty(&devices->list));
	mutex_destroy(&devices->lock);
	kfree(devices);
}

void dirty_devices_add(struct dirty_devices *devices, struct vfio_device *vdev)
{
	if (!vdev->ops->dma_unmap)
		return;
	mutex_lock(&devices->lock);
	list_add(&vdev->iommu_entry, &devices->list);
	mutex_unlock(&devices->lock);
}

void dirty_devices_remove(struct dirty_devices *devices, struct vfio_device *vdev)
{
	if (!vdev->ops->dma_unmap)
		return;
	mutex_lock(&devices->lock);
	list_del(&vdev->iommu_entry);
	mutex_unlock(&devices->lock);
}

/* Tells every device to unpin a range. The caller does not hold the container's lock. */
void dirty_devices_unmap(struct dirty_devices *devices, u64 iova, u64 size)
{
	struct vfio_device *vdev;

	mutex_lock(&devices->lock);
	list_for_each_entry(vdev, &devices->list, iommu_entry)
		vdev->ops->dma_unmap(vdev, iova, size);
	mutex_unlock(&devices->lock);
}

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
		ret = (args.pfn | (~args.addr_mask >> PAGE_SHIFT)) + 1 - args.pfn;
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
		got = pin_user_pages_remote(mm, at, want, flags, pages, NULL);
		if (got <= 0)
			return to->npages ? 0 : got ?: -EFAULT;
		for (k = 0; k < got; k += len) {
			long most = min_t(u64, got - k, left_in_folio(pages[k]));
			bool reserved = PageReserved(pages[k]);

			len = num_pages_contiguous(pages + k, most);
			if (!append(to, page_to_pfn(pages[k]), len,
				    reserved ? DIRTY_PAGE_RESERVED : DIRTY_PAGE_NORMAL)) {
				unpin_user_pages(pages + k, got - k);
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

int dirty_grab(struct mm_struct **mm, struct task_struct **task)
{
	if (!current->mm)
		return -ENODEV;
	get_task_struct(current->group_leader);
	*task = current->group_leader;
	mmgrab(current->mm);
	*mm = current->mm;
	return 0;
}

void dirty_release(struct mm_struct *mm, struct task_struct *task)
{
	mmdrop(mm);
	put_task_struct(task);
}

struct mm_struct *dirty_current_mm(void)
{
	return current->mm;
}

bool dirty_mm_alive(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users) != 0;
}

bool dirty_lock_cap(void)
{
	return capable(CAP_IPC_LOCK);
}

int dirty_charge(struct mm_struct *mm, struct task_struct *task, u64 npages, bool lock_cap)
{
	int ret;

	if (!mmget_not_zero(mm))
		return -ESRCH;
	ret = mmap_write_lock_killable(mm);
	if (!ret) {
		ret = __account_locked_vm(mm, npages, true, task, lock_cap);
		mmap_write_unlock(mm);
	}
	mmput(mm);
	if (ret == -ENOMEM)
		pr_warn_ratelimited("Task %s (%d) RLIMIT_MEMLOCK (%ld) exceeded\n",
				    task->comm, task_pid_nr(task),
				    task_rlimit(task, RLIMIT_MEMLOCK));
	return ret;
}

void dirty_uncharge(struct mm_struct *mm, struct task_struct *task, u64 npages)
{
	/* An mm without users has no account any more. */
	if (!mmget_not_zero(mm))
		return;
	mmap_write_lock(mm);
	__account_locked_vm(mm, npages, false, task, true);
	mmap_write_unlock(mm);
	mmput(mm);
}

bool dirty_is_user_range(u64 addr, u64 len)
{
	return access_ok((void __user *)addr, len);
}

size_t dirty_copy_from_user(void *to, u64 from, size_t len)
{
	return copy_from_user(to, (void __user *)from, len);
}

/* Whether the caller may copy from and to mm. A kernel thread adopts it for that. */
static bool enter_mm(struct mm_struct *mm, bool *adopted)
{
	*adopted = false;
	if (!mmget_not_zero(mm))
		return false;
	if (!current->mm) {
		kthread_use_mm(mm);
		*adopted = true;
	}
	if (current->mm == mm)
		return true;
	mmput(mm);
	return false;
}

static void leave_mm_of(struct mm_struct *mm, bool adopted)
{
	if (adopted)
		kthread_unuse_mm(mm);
	mmput(mm);
}

/*
 * The two copies below are made under the container's lock. They wait for a page
 * that is not there only if `wait` is set; else they stop at it. Both return how
 * many bytes they left.
 */
size_t dirty_read_mm(struct mm_struct *mm, void *to, u64 from, size_t len, bool wait)
{
	const void __user *user = (const void __user *)from;
	bool adopted;

	if (!enter_mm(mm, &adopted))
		return len;
	if (wait) {
		len = copy_from_user(to, user, len);
	} else if (access_ok(user, len)) {
		pagefault_disable();
		len = __copy_from_user_inatomic(to, user, len);
		pagefault_enable();
	}
	leave_mm_of(mm, adopted);
	return len;
}

size_t dirty_write_mm(struct mm_struct *mm, u64 to, const void *from, size_t len, bool wait)
{
	void __user *user = (void __user *)to;
	bool adopted;

	if (!enter_mm(mm, &adopted))
		return len;
	if (wait) {
		len = copy_to_user(user, from, len);
	} else if (access_ok(user, len)) {
		pagefault_disable();
		len = __copy_to_user_inatomic(user, from, len);
		pagefault_enable();
	}
	leave_mm_of(mm, adopted);
	return len;
}

void dirty_hold_mm(struct mm_struct *mm)
{
	mmgrab(mm);
}

void dirty_drop_mm(struct mm_struct *mm)
{
	mmdrop(mm);
}

/*
 * Waits for the pages of an mm, which are not changed; returns how many bytes from
 * the first that cannot be had.
 */
size_t dirty_fault_in(struct mm_struct *mm, u64 addr, size_t len, bool write)
{
	const char __user *user = (const char __user *)addr;
	bool adopted;

	if (!access_ok(user, len) || !enter_mm(mm, &adopted))
		return len;
	len = write ? fault_in_safe_writeable(user, len) : fault_in_readable(user, len);
	leave_mm_of(mm, adopted);
	return len;
}

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
