/* SPDX-License-Identifier: GPL-2.0-only */
/* Tracepoints: /sys/kernel/tracing/events/vfio_iommu_dirty. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM vfio_iommu_dirty

#if !defined(DIRTY_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define DIRTY_TRACE_H

#include <linux/tracepoint.h>

/* DIRTY_PAGES with START. The container's address tells containers apart. */
TRACE_EVENT(vfio_dirty_start,
	TP_PROTO(const void *container, long ret),
	TP_ARGS(container, ret),
	TP_STRUCT__entry(
		__field(const void *, container)
		__field(long, ret)
	),
	TP_fast_assign(
		__entry->container = container;
		__entry->ret = ret;
	),
	TP_printk("container=%p ret=%ld", __entry->container, __entry->ret)
);

/* DIRTY_PAGES with GET_BITMAP. */
TRACE_EVENT(vfio_dirty_get,
	TP_PROTO(const void *container, u64 iova, u64 size, u64 pgsize, long ret),
	TP_ARGS(container, iova, size, pgsize, ret),
	TP_STRUCT__entry(
		__field(const void *, container)
		__field(u64, iova)
		__field(u64, size)
		__field(u64, pgsize)
		__field(long, ret)
	),
	TP_fast_assign(
		__entry->container = container;
		__entry->iova = iova;
		__entry->size = size;
		__entry->pgsize = pgsize;
		__entry->ret = ret;
	),
	TP_printk("container=%p iova=0x%llx size=0x%llx pgsize=0x%llx ret=%ld",
		  __entry->container, __entry->iova, __entry->size, __entry->pgsize,
		  __entry->ret)
);

/* UNMAP_DMA. size is what was unmapped, or what was asked for if ret is not 0. */
TRACE_EVENT(vfio_dirty_unmap,
	TP_PROTO(const void *container, u64 iova, u64 size, u32 flags, long ret),
	TP_ARGS(container, iova, size, flags, ret),
	TP_STRUCT__entry(
		__field(const void *, container)
		__field(u64, iova)
		__field(u64, size)
		__field(u32, flags)
		__field(long, ret)
	),
	TP_fast_assign(
		__entry->container = container;
		__entry->iova = iova;
		__entry->size = size;
		__entry->flags = flags;
		__entry->ret = ret;
	),
	TP_printk("container=%p iova=0x%llx size=0x%llx flags=0x%x ret=%ld",
		  __entry->container, __entry->iova, __entry->size, __entry->flags,
		  __entry->ret)
);

/* A device's driver pins pages. ret is the number of pages, or an errno. */
TRACE_EVENT(vfio_dirty_pin,
	TP_PROTO(const void *container, u64 iova, int npage, int prot, int ret),
	TP_ARGS(container, iova, npage, prot, ret),
	TP_STRUCT__entry(
		__field(const void *, container)
		__field(u64, iova)
		__field(int, npage)
		__field(int, prot)
		__field(int, ret)
	),
	TP_fast_assign(
		__entry->container = container;
		__entry->iova = iova;
		__entry->npage = npage;
		__entry->prot = prot;
		__entry->ret = ret;
	),
	TP_printk("container=%p iova=0x%llx npage=%d prot=0x%x ret=%d",
		  __entry->container, __entry->iova, __entry->npage, __entry->prot,
		  __entry->ret)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
