// SPDX-License-Identifier: GPL-2.0-only
/*
 * The module's parameters, its registration with VFIO, a container's lock, and the
 * devices that are told of an unmap.
 *
 * The C files are for kernel interfaces that have no Rust binding. They decide
 * nothing: they pass the backend's operations to Rust, and Rust calls them for
 * pages, address spaces and IOMMU domains. Where the kernel's own interfaces ask
 * for certain flags or a certain order, they follow the real driver.
 */
#include <linux/iommu.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include "vfio_iommu.h"
#include "glue.h"

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
	size_t rounded;

	if (size <= PAGE_SIZE)
		return kzalloc(size, GFP_DIRTY);
	rounded = kmalloc_size_roundup(size);
	if (rounded <= PAGE_SIZE << PAGE_ALLOC_COSTLY_ORDER && rounded == PAGE_ALIGN(size))
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

/*
 * Whether pages may be pinned. Linux 6.4 moved the refusal of pins that nobody could be
 * told to give up from the backend to VFIO, and made it one of the device: before, one
 * device of the container that can be told is enough.
 */
bool dirty_devices_may_pin(struct dirty_devices *devices)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
	bool may;

	mutex_lock(&devices->lock);
	may = !list_empty(&devices->list);
	mutex_unlock(&devices->lock);
	return may;
#else
	return true;
#endif
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
