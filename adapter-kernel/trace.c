// SPDX-License-Identifier: GPL-2.0-only
/* The tracepoints, and what they say of an ioctl. */
#include <linux/uaccess.h>
#include <linux/vfio.h>
#include "glue.h"
#define CREATE_TRACE_POINTS
#include "trace.h"

static void trace_dirty_pages(const void *data, unsigned long arg, long ret)
{
	struct vfio_iommu_type1_dirty_bitmap call;
	struct vfio_iommu_type1_dirty_bitmap_get get;

	if (copy_from_user(&call, (void __user *)arg, sizeof(call)))
		return;
	if (call.flags == VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
		trace_vfio_dirty_start(data, ret);
	if (call.flags != VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP ||
	    copy_from_user(&get, (void __user *)(arg + sizeof(call)), sizeof(get)))
		return;
	trace_vfio_dirty_get(data, get.iova, get.size, get.bitmap.pgsize, ret);
}

static void trace_unmap(const void *data, unsigned long arg, long ret)
{
	struct vfio_iommu_type1_dma_unmap unmap;

	if (!copy_from_user(&unmap, (void __user *)arg, sizeof(unmap)))
		trace_vfio_dirty_unmap(data, unmap.iova, unmap.size, unmap.flags, ret);
}

/*
 * Reads the argument after the ioctl and once more than the ioctl itself: a
 * caller who changes it meanwhile misleads the trace and nothing else.
 */
void dirty_trace_ioctl(const void *data, unsigned int cmd, unsigned long arg, long ret)
{
	if (cmd == VFIO_IOMMU_DIRTY_PAGES &&
	    (trace_vfio_dirty_start_enabled() || trace_vfio_dirty_get_enabled()))
		trace_dirty_pages(data, arg, ret);
	else if (cmd == VFIO_IOMMU_UNMAP_DMA && trace_vfio_dirty_unmap_enabled())
		trace_unmap(data, arg, ret);
}

void dirty_trace_pin(const void *data, u64 iova, int npage, int prot, int ret)
{
	trace_vfio_dirty_pin(data, iova, npage, prot, ret);
}
