/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A tracker that is saved and restored: a live upgrade in the middle of a migration. */
#include "check.h"

#define IOVA 0x100000ul
#define ALL (~0ul)

static struct vfio_dirty_tracker *fresh(void) {
    struct vfio_dirty_tracker *tracker;
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, 64 * PAGE, NULL));
    return tracker;
}

/* A device's log that outlives the process: the IOVA that it tells next, or 0. */
static int read_log(void *context, const struct vfio_dirty_range *ask, size_t nranges,
                    struct vfio_dirty_iova_sink *sink) {
    uint64_t *written = context, iova = *written;
    if (iova == 0)
        return 0;
    CHECK(nranges == 1 && ask[0].addr == IOVA && ask[0].size == 4 * PAGE);
    *written = 0;
    return vfio_dirty_iova_sink_or_range(sink, iova, 1);
}

/* KVM, which meddles with its tracker if it has one. */
static int read_kvm(void *context, struct vfio_dirty_gpa_sink *sink) {
    const struct vfio_dirty_tracker *tracker = context;
    struct vfio_dirty_saved *saved = NULL;
    struct vfio_dirty_restored *restored = NULL;
    (void)sink;
    if (tracker) {
        IS(vfio_dirty_tracker_save(tracker, NULL, &saved), -EDEADLK);
        says("a callback of a source calls what waits for the source");
        IS(vfio_dirty_tracker_restore(tracker, NULL, 0, &restored), -EDEADLK);
        CHECK(saved == NULL && restored == NULL);
    }
    return 0;
}

static void pointers_are_checked(const struct vfio_dirty_tracker *tracker,
                                 const struct vfio_dirty_saved *saved) {
    struct vfio_dirty_saved *none = NULL;
    struct vfio_dirty_restored *restored = NULL;
    const void *bytes;
    size_t nbytes;
    IS(vfio_dirty_tracker_save(NULL, NULL, &none), -EINVAL);
    IS(vfio_dirty_tracker_save(tracker, NULL, NULL), -EINVAL);
    IS(vfio_dirty_tracker_save(tracker, ODD(tracker), &none), -EINVAL);
    CHECK(none == NULL);
    IS(vfio_dirty_saved_bytes(NULL, &bytes, &nbytes), -EINVAL);
    IS(vfio_dirty_saved_bytes(saved, NULL, &nbytes), -EINVAL);
    IS(vfio_dirty_saved_bytes(saved, &bytes, NULL), -EINVAL);
    IS(vfio_dirty_tracker_restore(NULL, "", 0, &restored), -EINVAL);
    IS(vfio_dirty_tracker_restore(tracker, NULL, 1, &restored), -EINVAL);
    says("the argument bytes is NULL");
    IS(vfio_dirty_tracker_restore(tracker, "", 0, NULL), -EINVAL);
    IS(vfio_dirty_restored_source(NULL, 0, NULL, NULL, NULL), -EINVAL);
    CHECK(restored == NULL);
    vfio_dirty_saved_free(NULL);
    vfio_dirty_restored_free(NULL);
}

/* The new process: pages 3, 5 and 8 were dirty, and the device has written page 10. */
static void what_was_saved_goes_on(const void *bytes, size_t nbytes,
                                   struct vfio_dirty_report *report, uint64_t *written) {
    struct vfio_dirty_tracker *tracker = fresh();
    struct vfio_dirty_restored *restored;
    struct vfio_dirty_view *view;
    struct vfio_dirty_source *source;
    const char *name;
    OK(vfio_dirty_tracker_restore(tracker, bytes, nbytes, &restored));
    CHECK(take(tracker, report, -EIO) == ALL);
    says("kvm cannot tell what is dirty: it was saved, and is still to be added again");
    OK(vfio_dirty_restored_source(restored, 0, &name, &view, &source));
    CHECK(strcmp(name, "kvm") == 0 && view == NULL);
    IS(vfio_dirty_source_remove(source), -EIO); /* it does not come back */
    CHECK(take(tracker, report, -EIO) == ALL);
    says("nvme0 cannot tell what is dirty");
    vfio_dirty_restored_free(restored);
    vfio_dirty_tracker_free(tracker);

    tracker = fresh();
    OK(vfio_dirty_tracker_restore(tracker, bytes, nbytes, &restored));
    OK(vfio_dirty_tracker_add_source(tracker, "kvm", read_kvm, NULL, NULL));
    OK(vfio_dirty_restored_source(restored, 1, &name, &view, NULL));
    CHECK(strcmp(name, "nvme0") == 0 && view != NULL);
    OK(vfio_dirty_view_add_log(view, name, 0, read_log, written, NULL));
    OK(vfio_dirty_restored_source(restored, 1, NULL, NULL, NULL));
    IS(vfio_dirty_restored_source(restored, 2, &name, NULL, NULL), -ENOENT);
    IS(vfio_dirty_restored_source(restored, SIZE_MAX, NULL, NULL, NULL), -ENOENT);
    IS(vfio_dirty_restored_source(restored, 1, ODD(&name), NULL, NULL), -EINVAL);
    vfio_dirty_restored_free(restored);
    OK(vfio_dirty_view_map(view, IOVA, 8 * PAGE, 4 * PAGE));
    *written = IOVA + 2 * PAGE;
    CHECK(take(tracker, report, 0) == (1 << 3 | 1 << 5 | 1 << 8 | 1 << 10));
    *written = IOVA + 3 * PAGE;
    CHECK(take(tracker, report, 0) == 1 << 11);
    vfio_dirty_view_free(view);
    vfio_dirty_tracker_free(tracker);
}

/* Whatever is wrong with the bytes, every page is dirty. */
static void what_is_damaged_is_refused(const void *bytes, size_t nbytes,
                                       struct vfio_dirty_report *report) {
    struct vfio_dirty_restored *restored = NULL;
    unsigned char *altered = malloc(nbytes);
    CHECK(altered);
    for (size_t at = 0; at < nbytes; at++) {
        struct vfio_dirty_tracker *tracker = fresh();
        int version = at >= 8 && at < 16;
        memcpy(altered, bytes, nbytes);
        altered[at] ^= 0x40;
        IS(vfio_dirty_tracker_restore(tracker, altered, nbytes, &restored),
           version ? -EOPNOTSUPP : -EINVAL);
        says(version ? "version" : "the saved tracker is damaged or incomplete");
        CHECK(take(tracker, report, 0) == ALL);
        CHECK(take(tracker, report, 0) == 0); /* it is on */
        IS(vfio_dirty_tracker_restore(tracker, bytes, at, &restored), -EINVAL);
        CHECK(take(tracker, report, 0) == ALL);
        vfio_dirty_tracker_free(tracker);
    }
    free(altered);

    struct vfio_dirty_tracker *tracker = fresh();
    OK(vfio_dirty_tracker_move_slot(tracker, 0, PAGE));
    IS(vfio_dirty_tracker_restore(tracker, bytes, nbytes, &restored), -EINVAL);
    says("slot 0 was saved, and the tracker has none or another one");
    CHECK(take(tracker, report, 0) == ALL);
    CHECK(restored == NULL);
    vfio_dirty_tracker_free(tracker);
}

static void a_tracker_that_is_off_stays_off(struct vfio_dirty_report *report) {
    struct vfio_dirty_tracker *tracker = fresh();
    struct vfio_dirty_saved *saved;
    struct vfio_dirty_restored *restored;
    const void *bytes;
    size_t nbytes;
    OK(vfio_dirty_tracker_save(tracker, NULL, &saved));
    OK(vfio_dirty_saved_bytes(saved, &bytes, &nbytes));
    OK(vfio_dirty_tracker_restore(tracker, bytes, nbytes, &restored));
    IS(vfio_dirty_restored_source(restored, 0, NULL, NULL, NULL), -ENOENT);
    CHECK(take(tracker, report, -EINVAL) == ALL);
    vfio_dirty_restored_free(restored);
    vfio_dirty_saved_free(saved);
    vfio_dirty_tracker_free(tracker);
}

void test_saved(void) {
    struct vfio_dirty_tracker *old = fresh(), *other = fresh();
    struct vfio_dirty_report *report, *undelivered;
    struct vfio_dirty_view *view;
    struct vfio_dirty_saved *saved, *none = NULL;
    uint64_t written = 0;
    const void *bytes;
    size_t nbytes;
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_report_new(&undelivered));
    OK(vfio_dirty_view_new(old, &view));
    OK(vfio_dirty_view_map(view, IOVA, 8 * PAGE, 4 * PAGE));
    OK(vfio_dirty_tracker_add_source(old, "kvm", read_kvm, old, NULL));
    OK(vfio_dirty_view_add_log(view, "nvme0", 0, read_log, &written, NULL));
    OK(vfio_dirty_tracker_start(old));
    OK(vfio_dirty_tracker_mark(old, 3 * PAGE, 1));
    OK(vfio_dirty_tracker_take(old, undelivered));
    OK(vfio_dirty_tracker_mark(old, 5 * PAGE, 1));
    written = IOVA; /* of page 8; the save reads the log */
    OK(vfio_dirty_tracker_save(old, undelivered, &saved));
    CHECK(written == 0);
    OK(vfio_dirty_saved_bytes(saved, &bytes, &nbytes));
    IS(vfio_dirty_tracker_save(other, undelivered, &none), -EINVAL);
    CHECK(none == NULL);
    pointers_are_checked(old, saved);

    /* The old process could go on. */
    OK(vfio_dirty_tracker_take(old, undelivered));
    CHECK(word(undelivered, 0) == (1 << 3 | 1 << 5 | 1 << 8));
    vfio_dirty_view_free(view);
    vfio_dirty_tracker_free(old);
    vfio_dirty_tracker_free(other);
    vfio_dirty_report_free(undelivered);

    what_was_saved_goes_on(bytes, nbytes, report, &written);
    what_is_damaged_is_refused(bytes, nbytes, report);
    vfio_dirty_saved_free(saved);
    a_tracker_that_is_off_stays_off(report);
    vfio_dirty_report_free(report);
}
