/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Sources by guest address: what callbacks tell, how they fail, what they may call. */
#include "check.h"

#define HOST ((char *)0x700000000000)

struct source {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_report *report;
    struct vfio_dirty_view *view;
    struct vfio_dirty_source *own;
    int calls, answer;
};

static int tell(void *context, struct vfio_dirty_gpa_sink *sink) {
    struct source *source = context;
    uint64_t kvm[] = {1}, coarse = 2;
    source->calls++;
    OK(vfio_dirty_gpa_sink_or_slot(sink, 0, kvm, 1));
    OK(vfio_dirty_gpa_sink_or_page(sink, 0, 2));
    OK(vfio_dirty_gpa_sink_or_bitmap(sink, &coarse, 0x8000, 2, 0x4000)); /* 12 to 15 */
    OK(vfio_dirty_gpa_sink_or_range(sink, 20 * PAGE - 1, 2));
    OK(vfio_dirty_gpa_sink_or_host(sink, HOST + 30 * PAGE, PAGE));
    OK(vfio_dirty_gpa_sink_or_range(sink, 0, 0));
    return source->answer;
}
#define TOLD (1ul | 1ul << 2 | 0xful << 12 | 3ul << 19 | 1ul << 30)

/* Ignores that its calls fail. */
static int careless(void *context, struct vfio_dirty_gpa_sink *sink) {
    uint64_t words[2] = {1};
    switch (*(int *)context) {
    case 0: IS(vfio_dirty_gpa_sink_or_slot(sink, 9, words, 1), -EINVAL); break;
    case 1:
        IS(vfio_dirty_gpa_sink_or_slot(sink, 0, words, 0), -EINVAL);
        IS(vfio_dirty_gpa_sink_or_slot(sink, 0, words, 2), -EINVAL);
        break;
    case 2: IS(vfio_dirty_gpa_sink_or_slot(sink, 0, NULL, 1), -EINVAL); break;
    case 3: IS(vfio_dirty_gpa_sink_or_slot(sink, 0, ODD(words), 1), -EINVAL); break;
    case 4: IS(vfio_dirty_gpa_sink_or_page(sink, 0, 64), -EINVAL); break;
    case 5: IS(vfio_dirty_gpa_sink_or_bitmap(sink, words, 0, 1, 3), -EINVAL); break;
    case 6: IS(vfio_dirty_gpa_sink_or_bitmap(sink, words, 1, 1, 4096), -EINVAL); break;
    case 7: IS(vfio_dirty_gpa_sink_or_bitmap(sink, words, 64 * PAGE, 1, 4096), -EINVAL); break;
    case 8: IS(vfio_dirty_gpa_sink_or_range(sink, 63 * PAGE, PAGE + 1), -EINVAL); break;
    case 9: IS(vfio_dirty_gpa_sink_or_range(sink, 64 * PAGE, 1), -EINVAL); break;
    case 10: IS(vfio_dirty_gpa_sink_or_host(sink, HOST - 1, 1), -EINVAL); break;
    case 11: IS(vfio_dirty_gpa_sink_or_range(sink, -1ul, 2), -EOVERFLOW); return 0;
    case 12: IS(vfio_dirty_gpa_sink_or_bitmap(sink, words, 0, -1ul, 4096), -EOVERFLOW); return 0;
    default: CHECK(0);
    }
    OK(vfio_dirty_gpa_sink_or_range(sink, 0, 1)); /* the later ones do not hide it */
    return 0;
}

static int unused(void *context, const struct vfio_dirty_range *ask, size_t nranges,
                  struct vfio_dirty_iova_sink *sink) {
    (void)context, (void)ask, (void)nranges, (void)sink;
    return 0;
}

static int meddle(void *context, struct vfio_dirty_gpa_sink *sink) {
    struct source *source = context;
    struct vfio_dirty_source *own = source->own;
    source->calls++;
    IS(vfio_dirty_tracker_take(source->tracker, source->report), -EDEADLK);
    says("a callback of a source calls what waits for the source");
    IS(vfio_dirty_tracker_start(source->tracker), -EDEADLK);
    IS(vfio_dirty_tracker_stop(source->tracker), -EDEADLK);
    IS(vfio_dirty_tracker_add_source(source->tracker, "x", tell, source, NULL), -EDEADLK);
    IS(vfio_dirty_view_add_log(source->view, "x", 0, unused, NULL, NULL), -EDEADLK);
    if (own) {
        IS(vfio_dirty_source_remove(own), -EDEADLK);
        vfio_dirty_tracker_free(source->tracker); /* refused */
    }

    /* These are allowed, also those of another tracker. */
    struct vfio_dirty_tracker *other;
    OK(vfio_dirty_tracker_new(0, &other));
    OK(vfio_dirty_tracker_start(other));
    vfio_dirty_tracker_free(other);
    OK(vfio_dirty_tracker_mark(source->tracker, 40 * PAGE, 1));
    OK(vfio_dirty_view_map(source->view, 0, 41 * PAGE, PAGE));
    OK(vfio_dirty_view_mark(source->view, 0, 1));
    OK(vfio_dirty_view_unmap(source->view, 0, PAGE, NULL));
    OK(vfio_dirty_tracker_add_slot(source->tracker, 7, 900 * PAGE, NULL, PAGE, NULL));
    OK(vfio_dirty_tracker_remove_slot(source->tracker, 7));
    return vfio_dirty_gpa_sink_or_range(sink, 42 * PAGE, 1);
}

void test_sources(void) {
    struct source source = {0};
    struct vfio_dirty_source *handle;
    OK(vfio_dirty_tracker_new(0, &source.tracker));
    OK(vfio_dirty_report_new(&source.report));
    OK(vfio_dirty_view_new(source.tracker, &source.view));
    OK(vfio_dirty_tracker_add_slot(source.tracker, 0, 0, HOST, 64 * PAGE, NULL));
    struct vfio_dirty_tracker *t = source.tracker;
    struct vfio_dirty_report *r = source.report;

    IS(vfio_dirty_tracker_add_source(t, NULL, tell, NULL, NULL), -EINVAL);
    says("the argument name is NULL");
    IS(vfio_dirty_tracker_add_source(t, "kvm", NULL, NULL, NULL), -EINVAL);
    says("the argument read is NULL");
    IS(vfio_dirty_tracker_add_source(t, "kvm", tell, NULL, ODD(&handle)), -EINVAL);
    OK(vfio_dirty_source_remove(NULL));
    IS(vfio_dirty_source_remove(ODD(&source)), -EINVAL);

    OK(vfio_dirty_tracker_add_source(t, "kvm", tell, &source, &handle));
    OK(vfio_dirty_tracker_start(t));
    CHECK(take(t, r, 0) == TOLD && source.calls == 1);

    /* A source that fails makes every page dirty, and says why. */
    source.answer = -EAGAIN;
    CHECK(take(t, r, -EAGAIN) == ~0ul);
    says("kvm cannot tell what is dirty: its callback failed: ");
    source.answer = 5;
    CHECK(take(t, r, -EIO) == ~0ul);
    says("its callback returned 5, which is neither 0 nor a negative errno");
    source.answer = 0;
    CHECK(take(t, r, 0) == TOLD);

    /* One that is removed is asked once more. */
    OK(vfio_dirty_source_remove(handle));
    CHECK(source.calls == 5);
    CHECK(take(t, r, 0) == TOLD);
    CHECK(take(t, r, 0) == 0 && source.calls == 5);

    for (int what = 0; what <= 12; what++) {
        OK(vfio_dirty_tracker_add_source(t, "careless", careless, &what, &handle));
        int rc = what >= 11 ? -EOVERFLOW : -EINVAL;
        CHECK(take(t, r, rc) == ~0ul);
        says("careless cannot tell what is dirty: ");
        IS(vfio_dirty_source_remove(handle), rc);
        CHECK(take(t, r, 0) == ~0ul);
        CHECK(take(t, r, 0) == 0);
    }

    source.calls = 0;
    OK(vfio_dirty_tracker_add_source(t, "meddler", meddle, &source, &source.own));
    CHECK(take(t, r, 0) == 7ul << 40);
    OK(vfio_dirty_tracker_start(t)); /* the thread is free again */
    handle = source.own;
    source.own = NULL; /* is under way */
    OK(vfio_dirty_source_remove(handle));
    CHECK(take(t, r, 0) == 7ul << 40 && source.calls == 2);

    /* A handle may outlive the tracker. */
    OK(vfio_dirty_tracker_add_source(t, "kvm", tell, &source, &handle));
    vfio_dirty_tracker_free(t);
    OK(vfio_dirty_source_remove(handle));
    CHECK(source.calls == 2);
    IS(vfio_dirty_view_add_log(source.view, "late", 0, unused, NULL, NULL), -EINVAL);
    says("has lost its tracker");
    vfio_dirty_view_free(source.view);
    vfio_dirty_report_free(r);
}
