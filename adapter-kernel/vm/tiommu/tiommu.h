/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The control file of the test IOMMU, /dev/tiommu.
 *
 * The IOMMU translates for TIOMMU_DEVICES platform devices, "tiommu.0" and so
 * on, each alone in its group. A device reads and writes memory by DMA when an
 * ioctl says so.
 */
#ifndef TIOMMU_H
#define TIOMMU_H
#include <linux/types.h>
#include <linux/ioctl.h>

#define TIOMMU_DEVICES	4
#define TIOMMU_RESERVED	4

/* The domain's dirty_ops exist if whoever allocates the domain asks for them. */
#define TIOMMU_TRACKS		1
/* The domain can enforce cache coherency. */
#define TIOMMU_COHERENT		2
/* The device's interrupts are not isolated. */
#define TIOMMU_UNSAFE_MSI	4
/* With TIOMMU_TRACKS: dirty_ops exist even if nobody has asked. */
#define TIOMMU_UNASKED		8

/*
 * What the IOMMU offers to a device: page sizes (bit k for 2^k bytes, from 4K to
 * 1G), the first and last IOVA that it translates, and reserved ranges, each by
 * its first and last IOVA. A range of which the last is 0 is not used.
 */
struct tiommu_config {
	__u32 device;
	__u32 flags;
	__u64 pgsizes;
	__u64 first;
	__u64 last;
	__u64 reserved[TIOMMU_RESERVED][2];
};

#define TIOMMU_WRITE	1
/*
 * The write is translated and sets dirty bits at once, but its bytes reach
 * memory at the next IOTLB sync of the domain.
 */
#define TIOMMU_DELAY	2
/*
 * The write, of at most TIOMMU_LATE_MAX bytes in one page, is made when the page is
 * unmapped, just before. Its dirty bit outlives the unmap: the next
 * read_and_clear_dirty of the range tells it. A domain remembers one such write.
 */
#define TIOMMU_LATE	4
#define TIOMMU_LATE_MAX	64

/* DMA between the device and memory; `data` is the address of the device's bytes. */
struct tiommu_dma {
	__u32 device;
	__u32 flags;
	__u64 iova;
	__u64 len;	/* at most TIOMMU_DMA_MAX */
	__u64 data;
	__u64 done;	/* out: bytes before the first that could not be reached */
};
#define TIOMMU_DMA_MAX	(1 << 20)

struct tiommu_dirty {
	__u32 device;
	__u32 flags;	/* IOMMU_DIRTY_NO_CLEAR */
	__u64 iova;
	__u64 size;
	__u64 first;	/* out: the range from the first to the last dirty page, */
	__u64 last;	/* or 0 and 0 if no page is dirty */
};

/* Counts since the module was loaded or TIOMMU_RESET; the last two are of now. */
struct tiommu_counters {
	__u64 maps;		/* calls of map_pages */
	__u64 mapped;		/* bytes that they mapped */
	__u64 map_syncs;	/* calls of iotlb_sync_map */
	__u64 unmaps;		/* calls of unmap_pages */
	__u64 unmapped;		/* bytes that they unmapped */
	__u64 syncs;		/* calls of iotlb_sync */
	__u64 flushes;		/* calls of flush_iotlb_all */
	__u64 split;		/* unmaps that ended inside a page of the table */
	__u64 faults;		/* DMA that was not mapped or not allowed */
	__u64 late;		/* delayed writes to memory that was no longer pinned */
	__u64 bytes;		/* that are mapped now */
	__u64 domains;		/* that exist now */
};

/* EBUSY if a domain is attached to the device. */
#define TIOMMU_CONFIGURE	_IOW('T', 0xd0, struct tiommu_config)
/* EFAULT if it stops early, with `done` set. */
#define TIOMMU_DMA		_IOWR('T', 0xd1, struct tiommu_dma)
#define TIOMMU_COUNTERS		_IOR('T', 0xd2, struct tiommu_counters)
#define TIOMMU_RESET		_IO('T', 0xd3)
/*
 * Fails the map_pages call that would map the N-th 4K from now on with EIO, once;
 * 0 takes that back. Returns how many were still to come, 0 if the call failed.
 */
#define TIOMMU_REFUSE		_IO('T', 0xd4)
/* Calls set_dirty_tracking and read_and_clear_dirty of the device's domain. */
#define TIOMMU_TRACK		_IOW('T', 0xd5, struct tiommu_dirty)
#define TIOMMU_READ_DIRTY	_IOWR('T', 0xd6, struct tiommu_dirty)

#endif
