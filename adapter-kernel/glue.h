/* SPDX-License-Identifier: GPL-2.0-only */
/* The functions that the C and the Rust half of the module call in each other. */
#ifndef DIRTY_GLUE_H
#define DIRTY_GLUE_H
#include <linux/gfp.h>
#include <linux/types.h>

/*
 * All memory is charged to the caller's memory cgroup. If there is none left, an
 * allocation fails: without __GFP_RETRY_MAYFAIL the OOM killer would come, and end
 * the process that asked.
 */
#define GFP_DIRTY (GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

struct dirty_devices;
struct iommu_domain;
struct iommu_group;
struct mm_struct;
struct page;
struct task_struct;
struct vfio_device;
enum vfio_group_type;

struct dirty_domain_info {
	u64 pgsize_bitmap;
	u64 first;
	u64 last;
	u64 kind;
	bool coherent;
	bool isolated_msi;
	bool dirty_tracking;
};

struct dirty_range {
	u64 first;
	u64 last;
};

/* Kinds of pages, as the core's PageKind. */
enum dirty_page_kind { DIRTY_PAGE_NORMAL, DIRTY_PAGE_RESERVED, DIRTY_PAGE_NONE };

/* Pages with consecutive pfns, as the core's Run. */
struct dirty_run {
	u64 pfn;
	u64 npages;
	enum dirty_page_kind kind;
};

/* Rust: the operations of the backend. */
void *dirty_backend_open(unsigned long type);
void dirty_backend_release(void *data);
long dirty_backend_ioctl(void *data, unsigned int cmd, unsigned long arg);
int dirty_backend_attach_group(void *data, struct iommu_group *group, bool emulated);
void dirty_backend_detach_group(void *data, struct iommu_group *group);
int dirty_backend_pin_pages(void *data, struct iommu_group *group, u64 iova,
			    int npage, int prot, struct page **pages);
void dirty_backend_unpin_pages(void *data, u64 iova, int npage);
void dirty_backend_register_device(void *data, struct vfio_device *vdev);
void dirty_backend_unregister_device(void *data, struct vfio_device *vdev);
int dirty_backend_dma_rw(void *data, u64 iova, void *buf, size_t len, bool write);
struct iommu_domain *dirty_backend_group_domain(void *data, struct iommu_group *group);

/* C: registration and module parameters. */
int dirty_register(void);
void dirty_unregister(void);
u32 dirty_dma_entry_limit(void);
u64 dirty_bitmap_budget(void);
bool dirty_skip_read_only(void);
bool dirty_iommu_dirty_tracking(void);

/* C: memory. */
void *dirty_alloc(size_t size);
void dirty_free(void *memory);

/* C: tracepoints; `data` tells containers apart. */
void dirty_trace_ioctl(const void *data, unsigned int cmd, unsigned long arg, long ret);
void dirty_trace_pin(const void *data, u64 iova, int npage, int prot, int ret);

/* C: a container's lock. */
struct mutex;
struct mutex *dirty_mutex_new(void);
void dirty_mutex_free(struct mutex *mutex);
void dirty_mutex_lock(struct mutex *mutex);
bool dirty_mutex_lock_killable(struct mutex *mutex);
void dirty_mutex_unlock(struct mutex *mutex);

/* C: devices. */
struct dirty_devices *dirty_devices_new(void);
void dirty_devices_free(struct dirty_devices *devices);
void dirty_devices_add(struct dirty_devices *devices, struct vfio_device *vdev);
void dirty_devices_remove(struct dirty_devices *devices, struct vfio_device *vdev);
bool dirty_devices_may_pin(struct dirty_devices *devices);
void dirty_devices_unmap(struct dirty_devices *devices, u64 iova, u64 size);

/* C: pages. */
long dirty_pin(struct mm_struct *mm, unsigned long vaddr, u64 npages, bool write,
	       struct dirty_run *runs, unsigned long max);
u64 dirty_unpin(u64 pfn, u64 npages, bool write);
enum dirty_page_kind dirty_page_kind(u64 pfn);
struct page *dirty_page(u64 pfn);

/* C: address spaces. */
int dirty_grab(struct mm_struct **mm, struct task_struct **task);
void dirty_release(struct mm_struct *mm, struct task_struct *task);
struct mm_struct *dirty_current_mm(void);
bool dirty_mm_alive(struct mm_struct *mm);
bool dirty_lock_cap(void);
int dirty_charge(struct mm_struct *mm, struct task_struct *task, u64 npages, bool lock_cap);
void dirty_uncharge(struct mm_struct *mm, struct task_struct *task, u64 npages);

/* C: user memory; each copy returns how many bytes were not copied. */
bool dirty_is_user_range(u64 addr, u64 len);
size_t dirty_copy_from_user(void *to, u64 from, size_t len);
size_t dirty_read_mm(struct mm_struct *mm, void *to, u64 from, size_t len, bool wait);
size_t dirty_write_mm(struct mm_struct *mm, u64 to, const void *from, size_t len, bool wait);
void dirty_hold_mm(struct mm_struct *mm);
void dirty_drop_mm(struct mm_struct *mm);
size_t dirty_fault_in(struct mm_struct *mm, u64 addr, size_t len, bool write);

/* C: IOMMU domains. */
int dirty_domain_attach(struct iommu_group *group, bool dirty_tracking,
			struct iommu_domain **domain, struct dirty_domain_info *info);
bool dirty_domain_join(struct iommu_group *group, struct iommu_domain *old,
		       struct iommu_domain *domain);
void dirty_domain_detach(struct iommu_group *group, struct iommu_domain *domain, bool last);
int dirty_reserved(struct iommu_group *group, struct dirty_range *ranges, int max);
int dirty_map(struct iommu_domain *domain, u64 iova, u64 pfn, u64 npages, u32 prot);
void dirty_unmap(struct iommu_domain *domain, u64 iova, u64 npages);
int dirty_set_tracking(struct iommu_domain *domain, bool on);
typedef void (*dirty_mark_t)(void *context, u64 first, u64 last);
void dirty_read_and_clear(struct iommu_domain *domain, u64 iova, u64 npages,
			  dirty_mark_t mark, void *context);
u64 dirty_iova_to_phys(struct iommu_domain *domain, u64 iova);

#endif
