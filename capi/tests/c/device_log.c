/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A device's log: calls, ioctls, and as a source. */
#include "check.h"
#include <linux/vfio.h>

#define IOVA 0x100000ul

static void options_are_checked(void) {
    struct vfio_dirty_device_log *log;
    struct vfio_dirty_device_log_options options = {0};
    struct vfio_dirty_range ranges[257];
    uint64_t words[1] = {0};
    IS(vfio_dirty_device_log_new(NULL, NULL), -EINVAL);
    IS(vfio_dirty_device_log_new(&options, &log), -EINVAL);
    says("argsz");
    options.argsz = sizeof(options);
    options.flags = 2;
    IS(vfio_dirty_device_log_new(&options, &log), -EINVAL);
    says("unknown flag");
    IS(vfio_dirty_device_log_new(ODD(&options), &log), -EINVAL);
    options.flags = VFIO_DIRTY_LOG_HOLES_CLEAN;
    options.budget = 8;
    OK(vfio_dirty_device_log_new(&options, &log));

    IS(vfio_dirty_device_log_add_range(NULL, 0, PAGE), -EINVAL);
    IS(vfio_dirty_device_log_add_range(log, 1, PAGE), -EINVAL);
    IS(vfio_dirty_device_log_add_range(log, 0, 0), -EINVAL);
    IS(vfio_dirty_device_log_add_range(log, -PAGE, 2 * PAGE), -EOVERFLOW);
    OK(vfio_dirty_device_log_add_range(log, IOVA, 2 * PAGE));
    IS(vfio_dirty_device_log_add_range(log, IOVA, PAGE), -EEXIST);
    IS(vfio_dirty_device_log_remove_range(log, IOVA, PAGE), -ENOENT);
    IS(vfio_dirty_device_log_remove_range(log, IOVA, 0), -EINVAL);
    IS(vfio_dirty_device_log_mark(log, IOVA, 1), -EINVAL); /* off */
    IS(vfio_dirty_device_log_report(log, IOVA, PAGE, 4096, words, 1), -EINVAL);

    IS(vfio_dirty_device_log_start(NULL, NULL, 0, 4096), -EINVAL);
    IS(vfio_dirty_device_log_start(log, NULL, 1, 4096), -EINVAL);
    IS(vfio_dirty_device_log_start(log, ranges, 0, 4096), -EINVAL);
    for (size_t i = 0; i < 257; i++)
        ranges[i] = (struct vfio_dirty_range){i * PAGE, PAGE};
    IS(vfio_dirty_device_log_start(log, ranges, 257, 4096), -E2BIG);
    IS(vfio_dirty_device_log_start(log, ranges, 1, 0), -EINVAL);
    IS(vfio_dirty_device_log_start(log, ranges, 1, 0x2000), -EINVAL);
    ranges[1].addr = 0;
    IS(vfio_dirty_device_log_start(log, ranges, 2, 4096), -EINVAL);
    says("overlap");
    ranges[0] = (struct vfio_dirty_range){0, 0x10000000};
    OK(vfio_dirty_device_log_start(log, ranges, 1, 4096));
    IS(vfio_dirty_device_log_start(log, NULL, 0, 4096), -EINVAL);
    IS(vfio_dirty_device_log_add_range(log, 2 * IOVA, PAGE), -ENOMEM);

    OK(vfio_dirty_device_log_mark(log, IOVA + PAGE, 1));
    OK(vfio_dirty_device_log_mark(log, IOVA, 0));
    IS(vfio_dirty_device_log_mark(log, 0, 1), -EINVAL);
    IS(vfio_dirty_device_log_mark(log, -1ul, 2), -EOVERFLOW);
    IS(vfio_dirty_device_log_report(log, IOVA, PAGE, 512, words, 1), -EINVAL);
    IS(vfio_dirty_device_log_report(log, IOVA, 65 * PAGE, 4096, words, 1), -EINVAL);
    IS(vfio_dirty_device_log_report(log, IOVA, PAGE, 4096, NULL, 1), -EINVAL);
    IS(vfio_dirty_device_log_report(log, 0x10000000, PAGE, 4096, words, 1), -EINVAL);
    OK(vfio_dirty_device_log_report(log, IOVA, 4 * PAGE, 4096, words, 1)); /* with a hole */
    CHECK(words[0] == 2);
    words[0] = 0;
    OK(vfio_dirty_device_log_report(log, IOVA, 4 * PAGE, 4096, words, 1));
    CHECK(words[0] == 0);
    OK(vfio_dirty_device_log_stop(log));
    OK(vfio_dirty_device_log_stop(log));
    IS(vfio_dirty_device_log_mark(log, IOVA, 1), -EINVAL);
    vfio_dirty_device_log_free(log);
    vfio_dirty_device_log_free(NULL);
}

/* VFIO_DEVICE_FEATURE with its data. */
static int feature(struct vfio_dirty_device_log *log, uint32_t flags, void *data, uint32_t size) {
    union {
        struct vfio_device_feature feature;
        uint64_t words[8];
    } arg = {.feature = {.argsz = (uint32_t)sizeof(arg.feature) + size, .flags = flags}};
    CHECK(sizeof(arg.feature) + size <= sizeof(arg));
    if (size)
        memcpy(arg.feature.data, data, size);
    int rc = vfio_dirty_device_log_ioctl(log, VFIO_DEVICE_FEATURE, (unsigned long)&arg);
    if (size)
        memcpy(data, arg.feature.data, size);
    return rc;
}

static void ioctls_are_answered(void) {
    struct vfio_dirty_device_log *log;
    OK(vfio_dirty_device_log_new(NULL, &log));
    OK(vfio_dirty_device_log_add_range(log, IOVA, 16 * PAGE));
    IS(vfio_dirty_device_log_ioctl(log, VFIO_IOMMU_MAP_DMA, 0), -ENOTTY);
    IS(vfio_dirty_device_log_ioctl(log, VFIO_DEVICE_FEATURE, 8), -EFAULT);
    IS(vfio_dirty_device_log_ioctl(NULL, VFIO_DEVICE_FEATURE, 8), -EINVAL);

    struct vfio_device_feature_dma_logging_range range = {.iova = 0, .length = 1ul << 40};
    struct vfio_device_feature_dma_logging_control start = {
        .page_size = 512, .num_ranges = 1, .ranges = (uintptr_t)&range};
    const uint32_t set = VFIO_DEVICE_FEATURE_SET, get = VFIO_DEVICE_FEATURE_GET;
    IS(feature(log, set | 0xfff, NULL, 0), -ENOTTY);
    OK(feature(log, set | VFIO_DEVICE_FEATURE_DMA_LOGGING_START, &start, sizeof(start)));
    CHECK(start.page_size == 4096);

    uint8_t bitmap[2] = {0x80, 0};
    struct vfio_device_feature_dma_logging_report report = {
        .iova = IOVA, .length = 9 * PAGE, .page_size = 4096, .bitmap = (uintptr_t)bitmap};
    OK(vfio_dirty_device_log_mark(log, IOVA + 8 * PAGE, 1));
    OK(feature(log, get | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, &report, sizeof(report)));
    CHECK(bitmap[0] == 0x80 && bitmap[1] == 1);
    report.bitmap = 8;
    OK(vfio_dirty_device_log_mark(log, IOVA, 1));
    IS(feature(log, get | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, &report, sizeof(report)),
       -EFAULT);
    report.bitmap = (uintptr_t)bitmap; /* nothing was cleared */
    OK(feature(log, get | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, &report, sizeof(report)));
    CHECK(bitmap[0] == 0x81);
    OK(feature(log, set | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, NULL, 0));
    IS(feature(log, get | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, &report, sizeof(report)),
       -EINVAL);
    vfio_dirty_device_log_free(log);
}

static void a_log_is_a_source(void) {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_report *report;
    struct vfio_dirty_view *view;
    struct vfio_dirty_device_log *log;
    struct vfio_dirty_source *source;
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, 64 * PAGE, NULL));
    OK(vfio_dirty_view_new(tracker, &view));
    OK(vfio_dirty_device_log_new(NULL, &log));
    IS(vfio_dirty_view_add_device_log(view, "nvme0", NULL, NULL), -EINVAL);
    IS(vfio_dirty_view_add_device_log(view, NULL, log, NULL), -EINVAL);
    IS(vfio_dirty_view_add_device_log(NULL, "nvme0", log, NULL), -EINVAL);
    OK(vfio_dirty_view_add_device_log(view, "nvme0", log, &source));
    OK(vfio_dirty_device_log_start(log, NULL, 0, 4096));
    OK(vfio_dirty_tracker_start(tracker));

    OK(vfio_dirty_device_log_add_range(log, IOVA, PAGE));
    OK(vfio_dirty_view_map(view, IOVA, 5 * PAGE, PAGE));
    OK(vfio_dirty_device_log_mark(log, IOVA, 1));
    OK(vfio_dirty_view_unmap(view, IOVA, PAGE, NULL));
    OK(vfio_dirty_device_log_remove_range(log, IOVA, PAGE));
    CHECK(take(tracker, report, 0) == 1 << 5);
    CHECK(take(tracker, report, 0) == 0);

    /* A log that was switched off knows nothing. */
    OK(vfio_dirty_view_map(view, IOVA, 6 * PAGE, PAGE));
    OK(vfio_dirty_device_log_stop(log));
    CHECK(take(tracker, report, -EINVAL) == 1 << 6);
    says("nvme0 cannot tell what is dirty: dirty-page tracking is off");
    vfio_dirty_device_log_free(log);
    IS(vfio_dirty_source_remove(source), -EINVAL);
    vfio_dirty_tracker_free(tracker);
    vfio_dirty_view_free(view);
    vfio_dirty_report_free(report);
}

void test_device_log(void) {
    options_are_checked();
    ioctls_are_answered();
    a_log_is_a_source();
}
