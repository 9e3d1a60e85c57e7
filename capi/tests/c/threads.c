/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Threads write and mark in every way while another takes and copies. At the end the copy
 * must be equal to the memory. */
#include "check.h"
#include <pthread.h>
#include <stdatomic.h>

#define NPAGES 256ul
#define WRITES 3000u
#define IOVA 0x40000000ul

static struct vfio_dirty_tracker *tracker;
static struct vfio_dirty_slot *slot;
static struct vfio_dirty_view *view, *logged;
static struct vfio_dirty_device_log *log_;
static _Atomic unsigned char ram[NPAGES * PAGE];
static unsigned char copy[NPAGES * PAGE];
static atomic_int running;

static void mark(int how, uint64_t at) {
    switch (how) {
    case 0: OK(vfio_dirty_slot_mark(slot, at, 1)); break;
    case 1: OK(vfio_dirty_tracker_mark(tracker, at, 1)); break;
    case 2: OK(vfio_dirty_view_mark(view, IOVA + at, 1)); break;
    default: OK(vfio_dirty_device_log_mark(log_, IOVA + at, 1)); break;
    }
}

static void *write_pages(void *context) {
    int how = *(int *)context;
    uint64_t random = (uint64_t)how + 1;
    for (unsigned i = 0; i < WRITES; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        uint64_t at = (random >> 33) % (NPAGES * PAGE);
        atomic_store_explicit(&ram[at], (unsigned char)i, memory_order_relaxed);
        mark(how, at);
        /* Each thread has an error text of its own. */
        if (i % 512 == 0) {
            IS(vfio_dirty_tracker_remove_slot(tracker, 100 + (uint32_t)how), -EINVAL);
            char text[40];
            snprintf(text, sizeof(text), "there is no slot %d", 100 + how);
            CHECK(strcmp(vfio_dirty_error(), text) == 0);
        }
    }
    atomic_fetch_sub(&running, 1);
    return NULL;
}

/* Slots, views and sources come and go meanwhile. */
static void *change(void *context) {
    (void)context;
    while (atomic_load(&running) > 0) {
        struct vfio_dirty_view *passing;
        struct vfio_dirty_source *source;
        OK(vfio_dirty_tracker_add_slot(tracker, 1, NPAGES * PAGE, NULL, PAGE, NULL));
        OK(vfio_dirty_tracker_remove_slot(tracker, 1));
        OK(vfio_dirty_view_new(tracker, &passing));
        OK(vfio_dirty_view_add_device_log(passing, "passing", log_, &source));
        OK(vfio_dirty_source_remove(source));
        vfio_dirty_view_free(passing);
        OK(vfio_dirty_view_unmap(view, IOVA + NPAGES * PAGE, PAGE, NULL));
        OK(vfio_dirty_view_map(view, IOVA + NPAGES * PAGE, 0, PAGE));
    }
    return NULL;
}

static int copy_range(void *context, struct vfio_dirty_range range) {
    (void)context;
    for (uint64_t at = range.addr; at < range.addr + range.size && at < sizeof(copy); at++)
        copy[at] = atomic_load_explicit(&ram[at], memory_order_relaxed);
    return 0;
}

static void round_(struct vfio_dirty_report *report) {
    OK(vfio_dirty_tracker_take(tracker, report));
    OK(vfio_dirty_report_ranges(report, 4096, copy_range, NULL));
    OK(vfio_dirty_report_clear(report));
}

void test_threads(void) {
    struct vfio_dirty_report *report;
    pthread_t writers[4], changer;
    int how[4] = {0, 1, 2, 3};
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, sizeof(ram), &slot));
    OK(vfio_dirty_view_new(tracker, &view));
    OK(vfio_dirty_view_map(view, IOVA, 0, sizeof(ram)));
    OK(vfio_dirty_view_new(tracker, &logged));
    OK(vfio_dirty_view_map(logged, IOVA, 0, sizeof(ram)));
    OK(vfio_dirty_device_log_new(NULL, &log_));
    OK(vfio_dirty_device_log_add_range(log_, IOVA, sizeof(ram)));
    OK(vfio_dirty_view_add_device_log(logged, "log", log_, NULL));
    OK(vfio_dirty_device_log_start(log_, NULL, 0, 4096));
    OK(vfio_dirty_tracker_start(tracker));

    atomic_store(&running, 4);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&writers[i], NULL, write_pages, &how[i]) == 0);
    CHECK(pthread_create(&changer, NULL, change, NULL) == 0);
    while (atomic_load(&running) > 0)
        round_(report);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(writers[i], NULL) == 0);
    CHECK(pthread_join(changer, NULL) == 0);
    round_(report);
    for (size_t at = 0; at < sizeof(copy); at++)
        CHECK(copy[at] == atomic_load(&ram[at]));

    vfio_dirty_slot_free(slot);
    vfio_dirty_view_free(view);
    vfio_dirty_view_free(logged);
    vfio_dirty_device_log_free(log_);
    vfio_dirty_report_free(report);
    vfio_dirty_tracker_free(tracker);
}
