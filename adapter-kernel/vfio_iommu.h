/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What drivers/vfio/vfio.h declares of a container's IOMMU drivers. No headers package
 * has that file. vm/private-header compares this one with it.
 */
#ifndef DIRTY_VFIO_IOMMU_H
#define DIRTY_VFIO_IOMMU_H
#include <linux/version.h>
#include <linux/vfio.h>

enum vfio_group_type {
	VFIO_IOMMU,
	VFIO_EMULATED_IOMMU,
	VFIO_NO_IOMMU,
};

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
enum vfio_iommu_notify_type {
	VFIO_IOMMU_CONTAINER_CLOSE = 0,
};
#endif

struct vfio_iommu_driver_ops {
	char		*name;
	struct module	*owner;
	void		*(*open)(unsigned long arg);
	void		(*release)(void *iommu_data);
	long		(*ioctl)(void *iommu_data, unsigned int cmd, unsigned long arg);
	int		(*attach_group)(void *iommu_data, struct iommu_group *group,
					enum vfio_group_type);
	void		(*detach_group)(void *iommu_data, struct iommu_group *group);
	int		(*pin_pages)(void *iommu_data, struct iommu_group *group,
				     dma_addr_t user_iova, int npage, int prot,
				     struct page **pages);
	void		(*unpin_pages)(void *iommu_data, dma_addr_t user_iova, int npage);
	void		(*register_device)(void *iommu_data, struct vfio_device *vdev);
	void		(*unregister_device)(void *iommu_data, struct vfio_device *vdev);
	int		(*dma_rw)(void *iommu_data, dma_addr_t user_iova,
				  void *data, size_t count, bool write);
	struct iommu_domain *(*group_iommu_domain)(void *iommu_data,
						   struct iommu_group *group);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	void		(*notify)(void *iommu_data, enum vfio_iommu_notify_type event);
#endif
};

int vfio_register_iommu_driver(const struct vfio_iommu_driver_ops *ops);
void vfio_unregister_iommu_driver(const struct vfio_iommu_driver_ops *ops);

#endif
