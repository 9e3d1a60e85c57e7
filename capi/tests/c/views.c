/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Views, and logs by IOVA. */
#include "check.h"

/* A log of somebody else: dirty pages by IOVA. */
struct log {
    struct vfio_dirty_view *view; /* to map and unmap in, if it is not NULL */
    struct vfio_dirty_range asked[4];
    size_t nasked;
    uint64_t bitmap, iova, range;
    int answer;
};

static int read_log(void *context, const struct vfio_dirty_range *ask, size_t nranges,
                    struct vfio_dirty_iova_sink *sink) {
    struct log *log = context;
    CHECK(nranges <= 4);
    /* The guest may map and unmap meanwhile. */
    if (log->view) {
        OK(vfio_dirty_view_map(log->view, 0xf00000, 50 * PAGE, PAGE));
        OK(vfio_dirty_view_unmap(log->view, 0xf00000, PAGE, NULL));
    }
    memcpy(log->asked, ask, nranges * sizeof(*ask));
    log->nasked = nranges;
    if (log->bitmap)
        OK(vfio_dirty_iova_sink_or_bitmap(sink, &log->bitmap, log->iova, 64, 4096));
    if (log->range)
        OK(vfio_dirty_iova_sink_or_range(sink, log->range, 1));
    OK(vfio_dirty_iova_sink_or_range(sink, 0, 0));
    log->bitmap = log->range = 0; /* what is read is cleared */
    return log->answer;
}

static int careless(void *context, const struct vfio_dirty_range *ask, size_t nranges,
                    struct vfio_dirty_iova_sink *sink) {
    uint64_t words[1] = {1};
    (void)ask, (void)nranges;
    switch (*(int *)context) {
    case 0: IS(vfio_dirty_iova_sink_or_bitmap(sink, NULL, 0, 1, 4096), -EINVAL); break;
    case 1: IS(vfio_dirty_iova_sink_or_bitmap(sink, words, 0, 1, 0), -EINVAL); break;
    case 2: IS(vfio_dirty_iova_sink_or_bitmap(sink, words, 1, 1, 4096), -EINVAL); break;
    case 3: IS(vfio_dirty_iova_sink_or_bitmap(sink, words, -PAGE, 2, 4096), -EOVERFLOW); break;
    case 4: IS(vfio_dirty_iova_sink_or_range(sink, -1ul, 2), -EOVERFLOW); break;
    default: CHECK(0);
    }
    return 0;
}

static void mappings_are_checked(struct vfio_dirty_tracker *tracker,
                                 struct vfio_dirty_view *view) {
    struct vfio_dirty_view *none = NULL;
    uint64_t words[1] = {0}, unmapped = 99;
    IS(vfio_dirty_view_new(NULL, &none), -EINVAL);
    IS(vfio_dirty_view_new(tracker, NULL), -EINVAL);
    IS(vfio_dirty_view_map(NULL, 0, 0, PAGE), -EINVAL);
    IS(vfio_dirty_view_map(view, 1, 0, PAGE), -EINVAL);
    IS(vfio_dirty_view_map(view, 0, 0, 0), -EINVAL);
    IS(vfio_dirty_view_map(view, -PAGE, 0, 2 * PAGE), -EOVERFLOW);
    IS(vfio_dirty_view_unmap(view, 1, PAGE, NULL), -EINVAL);
    IS(vfio_dirty_view_unmap(view, -PAGE, 2 * PAGE, NULL), -EOVERFLOW);
    IS(vfio_dirty_view_unmap(view, 0, PAGE, ODD(&unmapped)), -EINVAL);
    OK(vfio_dirty_view_unmap(view, 0, PAGE, &unmapped));
    CHECK(unmapped == 0);
    IS(vfio_dirty_view_unmap_dirty(view, 0, PAGE, words, 0, NULL), -EINVAL);
    IS(vfio_dirty_view_unmap_dirty(view, 0, PAGE, words, 0x2000, NULL), -EINVAL);
    IS(vfio_dirty_view_unmap_dirty(view, 0, PAGE, NULL, 4096, NULL), -EINVAL);
    IS(vfio_dirty_view_unmap_dirty(view, 0x1000, 0x2000, words, 0x2000, NULL), -EINVAL);
    IS(vfio_dirty_view_mark(view, 0, 1), -EINVAL);
    says("address 0x0 is in no slot, mapping or range");
    IS(vfio_dirty_view_mark(view, -1ul, 2), -EOVERFLOW);
    OK(vfio_dirty_view_mark(view, 0, 0));
    vfio_dirty_view_free(NULL);
}

void test_views(void) {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_report *report;
    struct vfio_dirty_view *view, *other;
    struct vfio_dirty_source *source;
    struct log log = {0};
    uint64_t unmapped;
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, 64 * PAGE, NULL));
    OK(vfio_dirty_view_new(tracker, &view));
    OK(vfio_dirty_view_new(tracker, &other));
    mappings_are_checked(tracker, view);
    OK(vfio_dirty_tracker_start(tracker));

    /* Marks by IOVA stay when their mapping goes. */
    OK(vfio_dirty_view_map(view, 0x800000, 8 * PAGE, 4 * PAGE));
    OK(vfio_dirty_view_map(other, 0x800000, 0, PAGE));
    IS(vfio_dirty_view_map(view, 0x801000, 0, PAGE), -EEXIST);
    OK(vfio_dirty_view_mark(view, 0x800fff, 2));
    IS(vfio_dirty_view_mark(view, 0x803000, 2 * PAGE), -EINVAL); /* and its first page is */
    OK(vfio_dirty_view_unmap(view, 0x800000, 2 * PAGE, &unmapped));
    CHECK(unmapped == 2 * PAGE);
    CHECK(take(tracker, report, 0) == 0xb00);

    /* The bitmap of an unmap goes in with it. */
    uint64_t words = 2;
    OK(vfio_dirty_view_unmap_dirty(view, 0x802000, 2 * PAGE, &words, 4096, &unmapped));
    CHECK(unmapped == 2 * PAGE);
    CHECK(take(tracker, report, 0) == 0x800);

    /* A slot that is removed takes its mappings' pages along. */
    OK(vfio_dirty_tracker_add_slot(tracker, 1, 900 * PAGE, NULL, PAGE, NULL));
    OK(vfio_dirty_view_map(view, 0xa00000, 900 * PAGE, PAGE));
    OK(vfio_dirty_tracker_remove_slot(tracker, 1));
    IS(vfio_dirty_view_mark(view, 0xa00000, 1), -ESTALE);
    says("the slot was removed");
    OK(vfio_dirty_view_unmap(view, 0xa00000, PAGE, NULL));
    CHECK(take(tracker, report, 0) == 0);

    /* A log is asked for what is mapped or was, and told through every mapping. */
    IS(vfio_dirty_view_add_log(view, "vfio", 0, NULL, &log, NULL), -EINVAL);
    IS(vfio_dirty_view_add_log(view, NULL, 0, read_log, &log, NULL), -EINVAL);
    OK(vfio_dirty_view_add_log(view, "vfio", PAGE, read_log, &log, &source));
    CHECK(take(tracker, report, 0) == 0 && log.nasked == 0);
    OK(vfio_dirty_view_map(view, 0x100000, 16 * PAGE, PAGE));
    OK(vfio_dirty_view_unmap(view, 0x100000, PAGE, NULL));
    OK(vfio_dirty_view_map(view, 0x100000, 20 * PAGE, PAGE));
    OK(vfio_dirty_view_map(view, 0x102000, 30 * PAGE, PAGE)); /* one page apart: one range */
    OK(vfio_dirty_view_map(view, 0x900000, 40 * PAGE, PAGE));
    log.bitmap = 1, log.iova = 0x100000, log.range = 0x900800;
    CHECK(take(tracker, report, 0) == (1ul << 16 | 1ul << 20 | 1ul << 40));
    CHECK(log.nasked == 2);
    CHECK(log.asked[0].addr == 0x100000 && log.asked[0].size == 3 * PAGE);
    CHECK(log.asked[1].addr == 0x900000 && log.asked[1].size == PAGE);
    log.bitmap = 1;
    CHECK(take(tracker, report, 0) == 1ul << 20); /* the old mapping is forgotten */

    /* One that fails makes the memory behind its view dirty. */
    uint64_t behind = 1ul << 20 | 1ul << 30 | 1ul << 40;
    log.answer = -ENODEV;
    CHECK(take(tracker, report, -ENODEV) == behind);
    log.answer = 0;
    log.range = 0x500000; /* neither asked for nor mapped */
    CHECK(take(tracker, report, -EINVAL) == behind);
    says("vfio cannot tell what is dirty: address 0x500000");
    for (int what = 0; what <= 4; what++) {
        struct vfio_dirty_source *second;
        int rc = what < 3 ? -EINVAL : -EOVERFLOW;
        OK(vfio_dirty_view_add_log(view, "careless", 0, careless, &what, &second));
        CHECK(take(tracker, report, rc) == behind);
        IS(vfio_dirty_source_remove(second), rc);
        CHECK(take(tracker, report, 0) == behind);
    }

    /* The last log of a device that is unplugged. */
    log.range = 0x102000, log.view = view;
    OK(vfio_dirty_source_remove(source));
    vfio_dirty_view_free(view);
    CHECK(take(tracker, report, 0) == 1ul << 30);
    CHECK(take(tracker, report, 0) == 0);
    vfio_dirty_view_free(other);
    vfio_dirty_report_free(report);
    vfio_dirty_tracker_free(tracker);
}
