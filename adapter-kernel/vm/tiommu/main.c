// SPDX-License-Identifier: GPL-2.0-only
/*
 * A test IOMMU: a page table in memory, dirty bits, devices that do DMA when they
 * are told to, and counters. QEMU's emulated IOMMUs neither set dirty bits nor
 * count, and their page sizes and reserved regions cannot be chosen.
 */
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/iommu.h>
#include <linux/irqdomain.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/msi.h>
#include <linux/platform_device.h>
#include <linux/property.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include "domain.h"

#define PGSIZES		GENMASK_ULL(30, 12)
#define IOVA_LAST	GENMASK_ULL(47, 0)

static struct iommu_device iommu;
static struct platform_device *devices[TIOMMU_DEVICES];
/* An interrupt domain without interrupts, which says that MSIs are isolated. */
static struct irq_domain *isolated;

struct tiommu_device *tiommu_device_of(struct device *dev)
{
	return &tiommu_devices[to_platform_device(dev)->id];
}

static struct iommu_device *probe_device(struct device *dev)
{
	struct iommu_fwspec *fwspec = dev_iommu_fwspec_get(dev);

	if (!fwspec || fwspec->iommu_fwnode != iommu.fwnode)
		return ERR_PTR(-ENODEV);
	return &iommu;
}

static bool device_capable(struct device *dev, enum iommu_cap cap)
{
	u32 flags = tiommu_device_of(dev)->config.flags;

	switch (cap) {
	case IOMMU_CAP_CACHE_COHERENCY:
		return true;
	case IOMMU_CAP_ENFORCE_CACHE_COHERENCY:
		return flags & TIOMMU_COHERENT;
	case IOMMU_CAP_DIRTY_TRACKING:
		return flags & TIOMMU_TRACKS;
	default:
		return false;
	}
}

static int def_domain_type(struct device *dev)
{
	return IOMMU_DOMAIN_IDENTITY;
}

static void get_resv_regions(struct device *dev, struct list_head *list)
{
	struct tiommu_config *config = &tiommu_device_of(dev)->config;
	int k;

	for (k = 0; k < TIOMMU_RESERVED; k++) {
		struct iommu_resv_region *region;
		u64 first = config->reserved[k][0], last = config->reserved[k][1];

		if (!last)
			continue;
		region = iommu_alloc_resv_region(first, last - first + 1, 0, IOMMU_RESV_RESERVED,
						 GFP_KERNEL);
		if (region)
			list_add_tail(&region->list, list);
	}
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 13, 0)
static struct iommu_domain *domain_alloc_paging(struct device *dev)
{
	return tiommu_domain_alloc(dev, 0, NULL);
}
#endif

static const struct iommu_ops ops = {
	.capable		= device_capable,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	.domain_alloc_paging_flags = tiommu_domain_alloc,
#else
	.domain_alloc_paging	= domain_alloc_paging,
#endif
	.probe_device		= probe_device,
	.device_group		= generic_device_group,
	.def_domain_type	= def_domain_type,
	.get_resv_regions	= get_resv_regions,
	.identity_domain	= &tiommu_identity,
	.blocked_domain		= &tiommu_blocked,
	.owner			= THIS_MODULE,
};

static bool is_valid(const struct tiommu_config *config)
{
	int k;

	for (k = 0; k < TIOMMU_RESERVED; k++)
		if (config->reserved[k][0] > config->reserved[k][1])
			return false;
	return config->pgsizes && !(config->pgsizes & ~PGSIZES) &&
	       config->first < config->last && config->last <= IOVA_LAST &&
	       !(config->flags & ~(TIOMMU_TRACKS | TIOMMU_COHERENT | TIOMMU_UNSAFE_MSI |
				   TIOMMU_UNASKED));
}

static long configure(void __user *arg)
{
	struct tiommu_config config;
	struct tiommu_device *device;
	long ret = 0;

	if (copy_from_user(&config, arg, sizeof(config)))
		return -EFAULT;
	if (config.device >= TIOMMU_DEVICES || !is_valid(&config))
		return -EINVAL;
	device = &tiommu_devices[config.device];
	mutex_lock(&tiommu_lock);
	if (device->domain) {
		ret = -EBUSY;
	} else {
		device->config = config;
		dev_set_msi_domain(&devices[config.device]->dev,
				   config.flags & TIOMMU_UNSAFE_MSI ? NULL : isolated);
	}
	mutex_unlock(&tiommu_lock);
	return ret;
}

static long dma(void __user *arg)
{
	struct tiommu_dma dma;
	struct iommu_domain *domain;
	void __user *data;
	void *buf;
	long ret = 0;

	if (copy_from_user(&dma, arg, sizeof(dma)))
		return -EFAULT;
	if (dma.device >= TIOMMU_DEVICES || dma.len > TIOMMU_DMA_MAX ||
	    (dma.flags & ~(TIOMMU_WRITE | TIOMMU_DELAY | TIOMMU_LATE)))
		return -EINVAL;
	data = u64_to_user_ptr(dma.data);
	buf = kvzalloc(dma.len, GFP_KERNEL);
	if (!buf)
		return -ENOMEM;
	if ((dma.flags & TIOMMU_WRITE) && copy_from_user(buf, data, dma.len)) {
		kvfree(buf);
		return -EFAULT;
	}
	mutex_lock(&tiommu_lock);
	domain = tiommu_devices[dma.device].domain;
	if (domain)
		dma.done = tiommu_domain_dma(domain, dma.iova, buf, dma.len, dma.flags);
	mutex_unlock(&tiommu_lock);
	if (!domain)
		ret = -ENODEV;
	else if (dma.done < dma.len)
		ret = -EFAULT;
	if (!ret && !(dma.flags & TIOMMU_WRITE) && copy_to_user(data, buf, dma.len))
		ret = -EFAULT;
	kvfree(buf);
	if (domain && copy_to_user(arg, &dma, sizeof(dma)))
		ret = -EFAULT;
	return ret;
}

/* Calls a dirty operation of the domain that a device is attached to. */
static long dirty(void __user *arg, bool track)
{
	struct iommu_iotlb_gather gather;
	struct iommu_dirty_bitmap bitmap;
	struct iommu_domain *domain;
	struct tiommu_dirty dirty;
	long ret;

	if (copy_from_user(&dirty, arg, sizeof(dirty)))
		return -EFAULT;
	if (dirty.device >= TIOMMU_DEVICES)
		return -EINVAL;
	domain = iommu_get_domain_for_dev(&devices[dirty.device]->dev);
	if (!domain || !domain->dirty_ops)
		return -EOPNOTSUPP;
	if (track)
		return domain->dirty_ops->set_dirty_tracking(domain, dirty.flags);
	iommu_dirty_bitmap_init(&bitmap, NULL, &gather);
	ret = domain->dirty_ops->read_and_clear_dirty(domain, dirty.iova, dirty.size, dirty.flags,
						      &bitmap);
	if (ret)
		return ret;
	if (gather.start <= gather.end) {
		dirty.first = gather.start;
		dirty.last = gather.end;
		iommu_iotlb_sync(domain, &gather);
	} else {
		dirty.first = 0;
		dirty.last = 0;
	}
	return copy_to_user(arg, &dirty, sizeof(dirty)) ? -EFAULT : 0;
}

static long control(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *user = (void __user *)arg;
	struct tiommu_counters counters;
	u64 left;

	switch (cmd) {
	case TIOMMU_CONFIGURE:
		return configure(user);
	case TIOMMU_DMA:
		return dma(user);
	case TIOMMU_COUNTERS:
		mutex_lock(&tiommu_lock);
		counters = tiommu_counters;
		mutex_unlock(&tiommu_lock);
		return copy_to_user(user, &counters, sizeof(counters)) ? -EFAULT : 0;
	case TIOMMU_RESET:
		mutex_lock(&tiommu_lock);
		tiommu_counters = (struct tiommu_counters) {
			.bytes = tiommu_counters.bytes,
			.domains = tiommu_counters.domains,
		};
		mutex_unlock(&tiommu_lock);
		return 0;
	case TIOMMU_REFUSE:
		if (arg > INT_MAX)
			return -EINVAL;
		mutex_lock(&tiommu_lock);
		left = tiommu_refuse;
		tiommu_refuse = arg;
		mutex_unlock(&tiommu_lock);
		return left;
	case TIOMMU_TRACK:
		return dirty(user, true);
	case TIOMMU_READ_DIRTY:
		return dirty(user, false);
	}
	return -ENOTTY;
}

static const struct file_operations file_ops = {
	.owner		= THIS_MODULE,
	.unlocked_ioctl	= control,
};

static struct miscdevice control_file = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "tiommu",
	.fops	= &file_ops,
};

static int add_device(int id)
{
	struct platform_device *device = platform_device_alloc("tiommu", id);
	int ret;

	if (!device)
		return -ENOMEM;
	tiommu_devices[id].config = (struct tiommu_config) {
		.device		= id,
		.pgsizes	= SZ_4K | SZ_2M | SZ_1G,
		.last		= IOVA_LAST,
	};
	dev_set_msi_domain(&device->dev, isolated);
	ret = iommu_fwspec_init(&device->dev, iommu.fwnode);
	if (!ret)
		ret = platform_device_add(device);
	if (ret) {
		platform_device_put(device);
		return ret;
	}
	devices[id] = device;
	return 0;
}

static void remove_devices(void)
{
	int id;

	for (id = 0; id < TIOMMU_DEVICES; id++)
		platform_device_unregister(devices[id]);
}

static const struct irq_domain_ops no_interrupts = {};

static int add_isolated(void)
{
	struct irq_domain_info info = {
		.fwnode		= irq_domain_alloc_named_fwnode("tiommu"),
		.domain_flags	= IRQ_DOMAIN_FLAG_ISOLATED_MSI,
		.ops		= &no_interrupts,
	};

	if (!info.fwnode)
		return -ENOMEM;
	isolated = irq_domain_instantiate(&info);
	if (IS_ERR(isolated)) {
		irq_domain_free_fwnode(info.fwnode);
		return PTR_ERR(isolated);
	}
	return 0;
}

static void remove_isolated(void)
{
	struct fwnode_handle *fwnode = isolated->fwnode;

	irq_domain_remove(isolated);
	irq_domain_free_fwnode(fwnode);
}

static int __init tiommu_init(void)
{
	int ret, id;

	ret = add_isolated();
	if (ret)
		return ret;
	iommu.fwnode = fwnode_create_software_node(NULL, NULL);
	if (IS_ERR(iommu.fwnode)) {
		ret = PTR_ERR(iommu.fwnode);
		goto remove_isolated;
	}
	ret = iommu_device_sysfs_add(&iommu, NULL, NULL, "tiommu");
	if (ret)
		goto remove_node;
	ret = iommu_device_register(&iommu, &ops, NULL);
	if (ret)
		goto remove_sysfs;
	for (id = 0; !ret && id < TIOMMU_DEVICES; id++)
		ret = add_device(id);
	if (ret)
		goto remove_devices;
	ret = misc_register(&control_file);
	if (!ret)
		return 0;
remove_devices:
	remove_devices();
	iommu_device_unregister(&iommu);
remove_sysfs:
	iommu_device_sysfs_remove(&iommu);
remove_node:
	fwnode_remove_software_node(iommu.fwnode);
remove_isolated:
	remove_isolated();
	return ret;
}

/*
 * There is no exit: the IOMMU core holds a reference to the module for each
 * device, and so it stays until the power goes.
 */
module_init(tiommu_init);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("An IOMMU for tests");
