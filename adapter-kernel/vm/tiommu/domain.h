/* SPDX-License-Identifier: GPL-2.0-only */
/* Domains: translation, dirty bits, and DMA on behalf of a device. */
#ifndef TIOMMU_DOMAIN_H
#define TIOMMU_DOMAIN_H
#include <linux/iommu.h>
#include <linux/mutex.h>
#include "tiommu.h"

/*
 * A device, which is in its group alone. `domain` is the paging domain that it
 * is attached to, or NULL.
 */
struct tiommu_device {
	struct tiommu_config config;
	struct iommu_domain *domain;
};

/*
 * Protects devices, domains and counters. It may sleep, because only VFIO uses
 * the domains, and from process context.
 */
extern struct mutex tiommu_lock;
extern struct tiommu_device tiommu_devices[TIOMMU_DEVICES];
extern struct tiommu_counters tiommu_counters;
/* The 4K pages until a map is refused; 0 for none. */
extern u64 tiommu_refuse;

struct tiommu_device *tiommu_device_of(struct device *dev);
struct iommu_domain *tiommu_domain_alloc(struct device *dev, u32 flags,
					 const struct iommu_user_data *data);

/* Static domains in which nothing is translated by a table. */
extern struct iommu_domain tiommu_identity;
extern struct iommu_domain tiommu_blocked;

/*
 * The caller holds tiommu_lock, and the domain is a paging domain. Moves `len`
 * bytes between buf and memory; returns how many were moved.
 */
u64 tiommu_domain_dma(struct iommu_domain *domain, u64 iova, void *buf, u64 len, u32 flags);

#endif
