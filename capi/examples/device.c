/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A device model that does DMA behind a virtual IOMMU. It marks in its own log, which a
 * tracker reads. The program migrates 1 MiB of memory and compares.
 *
 *     cc device.c $(pkg-config --cflags --libs vfio_dirty) && ./a.out
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vfio_dirty.h>

#define RAM (1ul << 20)
#define IOVA 0x80000000ul
#define GPA 0x40000ul
#define WINDOW 0x10000ul

static unsigned char *ram, *copy;

static void ok(int rc, const char *what) {
    if (rc < 0) {
        fprintf(stderr, "%s: %s (%s)\n", what, vfio_dirty_error(), strerror(-rc));
        exit(1);
    }
}
#define OK(call) ok(call, #call)

/* The device writes, then marks; then it may raise its interrupt. */
static void dma_write(struct vfio_dirty_device_log *log, unsigned long iova, int value, size_t len) {
    memset(ram + GPA + (iova - IOVA), value, len);
    OK(vfio_dirty_device_log_mark(log, iova, len));
}

static int send_range(void *context, struct vfio_dirty_range range) {
    (void)context;
    memcpy(copy + range.addr, ram + range.addr, range.size);
    printf("sent %#lx bytes at %#lx\n", (unsigned long)range.size, (unsigned long)range.addr);
    return 0;
}

int main(void) {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_view *iommu;
    struct vfio_dirty_device_log *log;
    struct vfio_dirty_report *report;

    ram = calloc(1, RAM), copy = calloc(1, RAM);
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, ram, RAM, NULL));
    OK(vfio_dirty_view_new(tracker, &iommu));
    OK(vfio_dirty_device_log_new(NULL, &log));
    OK(vfio_dirty_view_add_device_log(iommu, "nic0", log, NULL));
    OK(vfio_dirty_report_new(&report));

    /* The migration starts: logs, tracker, and then a copy of all memory. */
    OK(vfio_dirty_device_log_start(log, NULL, 0, 4096));
    OK(vfio_dirty_tracker_start(tracker));
    memcpy(copy, ram, RAM);

    /* The guest maps a ring: in the log, in the view, and then the device may write. */
    OK(vfio_dirty_device_log_add_range(log, IOVA, WINDOW));
    OK(vfio_dirty_view_map(iommu, IOVA, GPA, WINDOW));
    dma_write(log, IOVA + 0xff0, 0x11, 0x20);
    OK(vfio_dirty_tracker_take(tracker, report));
    OK(vfio_dirty_report_ranges(report, 4096, send_range, NULL));
    OK(vfio_dirty_report_clear(report));

    /* It unmaps after the last write: what was written is told all the same. */
    dma_write(log, IOVA + 0x8000, 0x22, 0x3000);
    OK(vfio_dirty_view_unmap(iommu, IOVA, WINDOW, NULL));
    OK(vfio_dirty_device_log_remove_range(log, IOVA, WINDOW));
    OK(vfio_dirty_tracker_take(tracker, report));
    OK(vfio_dirty_report_ranges(report, 4096, send_range, NULL));

    OK(vfio_dirty_tracker_stop(tracker));
    OK(vfio_dirty_device_log_stop(log));
    int differ = memcmp(ram, copy, RAM);
    puts(differ ? "the memories differ" : "the memories are equal");
    vfio_dirty_report_free(report);
    vfio_dirty_device_log_free(log);
    vfio_dirty_view_free(iommu);
    vfio_dirty_tracker_free(tracker);
    free(ram), free(copy);
    return differ != 0;
}
