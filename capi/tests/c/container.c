/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A container by raw ioctls, its devices, and as a source. */
#include "check.h"
#include <linux/vfio.h>
#include <sys/mman.h>

#define IOVA 0x100000ul
#define SIZE (64 * PAGE)

static int call(const struct vfio_dirty_container *container, uint32_t nr, void *arg) {
    return vfio_dirty_container_ioctl(container, nr, (unsigned long)arg);
}

static int map(const struct vfio_dirty_container *container, uint64_t iova, void *at,
               uint64_t size, uint32_t flags) {
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof(map), .flags = flags, .vaddr = (uintptr_t)at, .iova = iova, .size = size};
    return call(container, VFIO_IOMMU_MAP_DMA, &map);
}

/* The dirty pages of the first mapping by the ioctl. */
static uint64_t dirty(const struct vfio_dirty_container *container) {
    uint64_t bitmap = 0;
    union {
        struct vfio_iommu_type1_dirty_bitmap dirty;
        char bytes[sizeof(struct vfio_iommu_type1_dirty_bitmap) +
                   sizeof(struct vfio_iommu_type1_dirty_bitmap_get)];
    } arg = {0};
    struct vfio_iommu_type1_dirty_bitmap_get get = {
        .iova = IOVA, .size = SIZE,
        .bitmap = {.pgsize = PAGE, .size = sizeof(bitmap), .data = (void *)&bitmap}};
    arg.dirty.argsz = sizeof(arg);
    arg.dirty.flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
    memcpy(arg.dirty.data, &get, sizeof(get));
    OK(call(container, VFIO_IOMMU_DIRTY_PAGES, &arg));
    return bitmap;
}

/* Unmaps the first mapping, and returns its dirty pages. */
static uint64_t unmap(const struct vfio_dirty_container *container) {
    uint64_t words = 0;
    struct vfio_bitmap bitmap = {.pgsize = PAGE, .size = sizeof(words), .data = (void *)&words};
    union {
        struct vfio_iommu_type1_dma_unmap unmap;
        char bytes[sizeof(struct vfio_iommu_type1_dma_unmap) + sizeof(struct vfio_bitmap)];
    } arg = {0};
    arg.unmap.argsz = sizeof(arg);
    arg.unmap.flags = VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
    arg.unmap.iova = IOVA;
    arg.unmap.size = SIZE;
    memcpy(arg.unmap.data, &bitmap, sizeof(bitmap));
    OK(call(container, VFIO_IOMMU_UNMAP_DMA, &arg));
    CHECK(arg.unmap.size == SIZE);
    return words;
}

static struct vfio_dirty_container *ready(void) {
    struct vfio_dirty_container *container;
    struct vfio_dirty_device *device = NULL;
    IS(vfio_dirty_container_new(0, NULL), -EINVAL);
    OK(vfio_dirty_container_new(0, &container));
    IS(vfio_dirty_container_ioctl(NULL, VFIO_GET_API_VERSION, 0), -EINVAL);
    IS(vfio_dirty_container_ioctl(container, VFIO_GET_API_VERSION, 0), VFIO_API_VERSION);
    IS(vfio_dirty_container_ioctl(container, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU), 1);
    IS(vfio_dirty_container_ioctl(container, VFIO_CHECK_EXTENSION, 999), 0);
    IS(vfio_dirty_container_ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), -EINVAL);
    IS(vfio_dirty_container_ioctl(container, 0xffffffff, 0), -EINVAL); /* no IOMMU type yet */
    IS(vfio_dirty_container_open_device(container, 1, &device), -EINVAL);
    OK(vfio_dirty_container_add_emulated_group(container, 1));
    IS(vfio_dirty_container_add_emulated_group(container, 1), -EINVAL);
    says("attached already");
    IS(vfio_dirty_container_add_emulated_group(NULL, 1), -EINVAL);
    OK(vfio_dirty_container_ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
    IS(vfio_dirty_container_ioctl(container, 0xffffffff, 0), -ENOTTY);
    IS(vfio_dirty_container_open_device(container, 2, &device), -EINVAL);
    IS(vfio_dirty_container_open_device(container, 1, NULL), -EINVAL);
    CHECK(device == NULL);
    return container;
}

static void start(const struct vfio_dirty_container *container) {
    struct vfio_iommu_type1_dirty_bitmap start = {
        .argsz = sizeof(start), .flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_START};
    OK(call(container, VFIO_IOMMU_DIRTY_PAGES, &start));
}

static void devices_write(const struct vfio_dirty_container *container, char *ram, char *rom) {
    struct vfio_dirty_device *device;
    char data[4] = {0};
    OK(vfio_dirty_container_open_device(container, 1, &device));
    OK(vfio_dirty_device_write(device, IOVA + PAGE - 2, "dma", 4));
    CHECK(memcmp(ram + PAGE - 2, "dma", 4) == 0);
    OK(vfio_dirty_device_read(device, IOVA + PAGE - 2, data, 4));
    CHECK(memcmp(data, "dma", 4) == 0);
    CHECK(dirty(container) == 3);
    CHECK(dirty(container) == 0);
    ram[7 * PAGE] = 1; /* by a mapping of its own */
    OK(vfio_dirty_device_mark(device, IOVA + 7 * PAGE, 1));
    CHECK(dirty(container) == 1 << 7);

    rom[0] = 5;
    OK(vfio_dirty_device_read(device, 2 * IOVA, data, 1));
    CHECK(data[0] == 5);
    IS(vfio_dirty_device_write(device, 2 * IOVA, data, 1), -EPERM);
    IS(vfio_dirty_device_read(device, 0, data, 1), -EINVAL);
    IS(vfio_dirty_device_write(device, 0, data, 1), -EINVAL);
    says("an address is not mapped");
    IS(vfio_dirty_device_write(device, IOVA + SIZE - 2, data, 4), -EINVAL);
    CHECK(dirty(container) == 1ul << 63); /* what came before the error */
    IS(vfio_dirty_device_read(device, IOVA, data, 0), -EINVAL);
    IS(vfio_dirty_device_read(device, IOVA, NULL, 1), -EINVAL);
    IS(vfio_dirty_device_write(device, IOVA, NULL, 1), -EINVAL);
    IS(vfio_dirty_device_write(device, IOVA, data, SIZE_MAX), -EINVAL);
    IS(vfio_dirty_device_mark(device, IOVA, 0), -EINVAL);
    IS(vfio_dirty_device_mark(device, -1ul, 2), -EOVERFLOW);
    IS(vfio_dirty_device_mark(device, 0, 1), -EINVAL);
    IS(vfio_dirty_device_write(NULL, IOVA, data, 1), -EINVAL);
    CHECK(dirty(container) == 0);
    vfio_dirty_device_close(device);
    vfio_dirty_device_close(NULL);
}

static void a_container_is_a_source(struct vfio_dirty_container *container, char *ram) {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_report *report;
    struct vfio_dirty_view *view;
    struct vfio_dirty_device *device;
    struct vfio_dirty_source *source;
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, ram, SIZE, NULL));
    OK(vfio_dirty_view_new(tracker, &view));
    IS(vfio_dirty_view_add_container(view, "container", NULL, NULL), -EINVAL);
    OK(vfio_dirty_view_add_container(view, "container", container, &source));
    OK(vfio_dirty_view_map(view, IOVA, 0, SIZE));
    OK(vfio_dirty_tracker_start(tracker));
    CHECK(take(tracker, report, 0) == 0);

    OK(vfio_dirty_container_open_device(container, 1, &device));
    OK(vfio_dirty_device_write(device, IOVA + 9 * PAGE, "x", 1));
    CHECK(take(tracker, report, 0) == 1 << 9);

    /* An unmap takes the bits along, so they go into the view. */
    OK(vfio_dirty_device_write(device, IOVA + 10 * PAGE, "x", 1));
    uint64_t words = unmap(container);
    CHECK(words == 1 << 10);
    OK(vfio_dirty_view_unmap_dirty(view, IOVA, SIZE, &words, PAGE, NULL));
    CHECK(take(tracker, report, 0) == 1 << 10);

    /* Handles go in any order. */
    OK(vfio_dirty_view_map(view, IOVA, 0, SIZE));
    OK(map(container, IOVA, ram, SIZE, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE));
    OK(vfio_dirty_device_write(device, IOVA + 11 * PAGE, "x", 1));
    vfio_dirty_container_free(container);
    vfio_dirty_view_free(view);
    CHECK(take(tracker, report, 0) == 1 << 11);
    OK(vfio_dirty_source_remove(source));
    OK(vfio_dirty_device_write(device, IOVA, "x", 1));
    vfio_dirty_device_close(device);
    vfio_dirty_report_free(report);
    vfio_dirty_tracker_free(tracker);
}

void test_container(void) {
    struct vfio_dirty_container *container = ready();
    char *ram = mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(ram != MAP_FAILED);
    const uint32_t rw = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    IS(vfio_dirty_container_ioctl(container, VFIO_IOMMU_MAP_DMA, 8), -EFAULT);
    IS(map(container, IOVA + 1, ram, SIZE, rw), -EINVAL);
    OK(map(container, IOVA, ram, SIZE, rw));
    IS(map(container, IOVA, ram, SIZE, rw), -EEXIST);
    OK(map(container, 2 * IOVA, ram + SIZE, PAGE, VFIO_DMA_MAP_FLAG_READ));
    start(container);
    CHECK(dirty(container) == 0);
    devices_write(container, ram, ram + SIZE);
    a_container_is_a_source(container, ram);
    CHECK(munmap(ram, 2 * SIZE) == 0);
}
