/* SPDX-License-Identifier: GPL-2.0-only */
/* Domains that track dirty pages; glue.h declares what Rust calls. */
#ifndef DIRTY_TRACKING_H
#define DIRTY_TRACKING_H
#include <linux/types.h>

struct device;
struct iommu_domain;

/* A domain that tracks; ERR_PTR(-EOPNOTSUPP) if the device's IOMMU does not. */
struct iommu_domain *dirty_alloc_tracking(struct device *dev);
bool dirty_can_track(struct iommu_domain *domain);

#endif
