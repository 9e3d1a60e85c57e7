/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The tracker, its slots and its reports. */
#include "check.h"

struct seen {
    struct vfio_dirty_range ranges[8];
    size_t count, most;
};

static int see(void *context, struct vfio_dirty_range range) {
    struct seen *seen = context;
    CHECK(seen->count < seen->most);
    seen->ranges[seen->count++] = range;
    return seen->count == seen->most ? 7 : 0;
}

static void pointers_are_checked(void) {
    struct vfio_dirty_tracker *tracker = NULL;
    struct vfio_dirty_report *report = NULL;
    IS(vfio_dirty_tracker_new(0, NULL), -EINVAL);
    says("the argument tracker is NULL");
    IS(vfio_dirty_tracker_new(0, ODD(&tracker)), -EINVAL);
    says("the argument tracker is misaligned");
    CHECK(tracker == NULL);
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_report_new(&report));
    IS(vfio_dirty_report_new(NULL), -EINVAL);

    IS(vfio_dirty_tracker_start(NULL), -EINVAL);
    IS(vfio_dirty_tracker_start(ODD(tracker)), -EINVAL);
    IS(vfio_dirty_tracker_stop(NULL), -EINVAL);
    IS(vfio_dirty_tracker_take(NULL, report), -EINVAL);
    IS(vfio_dirty_tracker_take(tracker, NULL), -EINVAL);
    IS(vfio_dirty_tracker_take(tracker, ODD(report)), -EINVAL);
    IS(vfio_dirty_tracker_mark(NULL, 0, 1), -EINVAL);
    IS(vfio_dirty_tracker_add_slot(NULL, 0, 0, NULL, PAGE, NULL), -EINVAL);
    IS(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, PAGE, ODD(&tracker)), -EINVAL);
    IS(vfio_dirty_tracker_remove_slot(tracker, 0), -EINVAL); /* so it was not added */
    IS(vfio_dirty_slot_mark(NULL, 0, 1), -EINVAL);
    IS(vfio_dirty_slot_mark_bitmap(NULL, NULL, 0), -EINVAL);
    IS(vfio_dirty_report_pages(report, NULL), -EINVAL);
    IS(vfio_dirty_report_slot(report, 0, NULL, NULL), -EINVAL);
    IS(vfio_dirty_report_bitmap(report, 0, 4096, NULL, 1), -EINVAL);
    says("the argument words is NULL");
    IS(vfio_dirty_report_ranges(report, 4096, NULL, NULL), -EINVAL);
    says("the argument visit is NULL");
    IS(vfio_dirty_report_clear(NULL), -EINVAL);
    vfio_dirty_tracker_free(NULL);
    vfio_dirty_tracker_free(ODD(tracker)); /* refused */
    vfio_dirty_report_free(NULL);
    vfio_dirty_slot_free(NULL);
    vfio_dirty_report_free(report);
    vfio_dirty_tracker_free(tracker);
}

static void slots_are_checked(void) {
    struct vfio_dirty_tracker *tracker;
    OK(vfio_dirty_tracker_new(16, &tracker)); /* two words: 128 pages */
    char *host = (char *)0x700000000000;
    IS(vfio_dirty_tracker_add_slot(tracker, 0, 1, NULL, PAGE, NULL), -EINVAL);
    IS(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, 0, NULL), -EINVAL);
    says("the size is zero");
    IS(vfio_dirty_tracker_add_slot(tracker, 0, -PAGE, NULL, 2 * PAGE, NULL), -EOVERFLOW);
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, host, 64 * PAGE, NULL));
    IS(vfio_dirty_tracker_add_slot(tracker, 0, 99 * PAGE, NULL, PAGE, NULL), -EEXIST);
    says("slot 0 exists already");
    IS(vfio_dirty_tracker_add_slot(tracker, 1, 63 * PAGE, NULL, PAGE, NULL), -EEXIST);
    IS(vfio_dirty_tracker_add_slot(tracker, 1, 99 * PAGE, host + PAGE, PAGE, NULL), -EEXIST);
    IS(vfio_dirty_tracker_add_slot(tracker, 1, 99 * PAGE, NULL, 65 * PAGE, NULL), -ENOMEM);
    says("the budget has 8 left");
    OK(vfio_dirty_tracker_add_slot(tracker, 1, 99 * PAGE, NULL, PAGE, NULL));

    IS(vfio_dirty_tracker_move_slot(tracker, 2, 0), -EINVAL);
    IS(vfio_dirty_tracker_move_slot(tracker, 1, 1), -EINVAL);
    IS(vfio_dirty_tracker_move_slot(tracker, 0, -PAGE), -EOVERFLOW);
    IS(vfio_dirty_tracker_move_slot(tracker, 1, 0), -EEXIST);
    IS(vfio_dirty_tracker_grow_slot(tracker, 2, 0), -EINVAL);
    IS(vfio_dirty_tracker_grow_slot(tracker, 0, PAGE), -EINVAL);
    IS(vfio_dirty_tracker_grow_slot(tracker, 0, 100 * PAGE), -EEXIST);
    IS(vfio_dirty_tracker_grow_slot(tracker, 0, 65 * PAGE), -ENOMEM);
    IS(vfio_dirty_tracker_remove_slot(tracker, 2), -EINVAL);
    says("there is no slot 2");
    vfio_dirty_tracker_free(tracker);
}

static void marks_are_reported(struct vfio_dirty_tracker *tracker,
                               struct vfio_dirty_report *report, struct vfio_dirty_slot *low) {
    OK(vfio_dirty_slot_mark(low, PAGE - 1, 2));
    OK(vfio_dirty_slot_mark(low, 0, 0));
    OK(vfio_dirty_tracker_mark(tracker, 100 * PAGE - 1, 2)); /* spans both slots */
    OK(vfio_dirty_tracker_mark(tracker, 0, 0));
    /* The slot has 100 pages: bits beyond are ignored, and other lengths are refused. */
    uint64_t log[] = {1ul << 9, ~0ul << 36, 0};
    IS(vfio_dirty_slot_mark_bitmap(low, log, 1), -EINVAL);
    IS(vfio_dirty_slot_mark_bitmap(low, log, 3), -EINVAL);
    OK(vfio_dirty_slot_mark_bitmap(low, log, 2));

    /* What is in no slot is an error, and the rest is marked. */
    IS(vfio_dirty_tracker_mark(tracker, 103 * PAGE, 2 * PAGE), -EINVAL);
    says("address 0x68000 is in no slot");
    IS(vfio_dirty_tracker_mark(tracker, 500 * PAGE, 1), -EINVAL);
    IS(vfio_dirty_tracker_mark(tracker, -1ul, 2), -EOVERFLOW);
    IS(vfio_dirty_slot_mark(low, 99 * PAGE, PAGE + 1), -EINVAL);

    OK(vfio_dirty_tracker_take(tracker, report));
    CHECK(word(report, 0) == (1ul << 9 | 3));
    CHECK(word(report, 1) == 9);
    CHECK(pages(report) == 6);
    const uint64_t *words;
    size_t nwords;
    OK(vfio_dirty_report_slot(report, 0, &words, &nwords));
    CHECK(nwords == 2 && words[1] == 1ul << 35);
    IS(vfio_dirty_report_slot(report, 5, &words, &nwords), -EINVAL);

    uint64_t coarse = 1ul << 63; /* ORed into */
    OK(vfio_dirty_report_bitmap(report, 0, 64 * 1024, &coarse, 1));
    CHECK(coarse == (1ul << 63 | 1 | 1ul << 6));
    IS(vfio_dirty_report_bitmap(report, 0, 3, &coarse, 1), -EINVAL);
    IS(vfio_dirty_report_bitmap(report, 5, 4096, &coarse, 1), -EINVAL);
    IS(vfio_dirty_report_bitmap(report, 0, 4096, &coarse, 1), -EINVAL);
    IS(vfio_dirty_report_bitmap(report, 0, 4096, &coarse, SIZE_MAX), -EINVAL);

    struct seen seen = {.most = 8};
    OK(vfio_dirty_report_ranges(report, 4096, see, &seen));
    CHECK(seen.count == 5);
    CHECK(seen.ranges[0].addr == 0 && seen.ranges[0].size == 2 * PAGE);
    CHECK(seen.ranges[1].addr == 9 * PAGE && seen.ranges[1].size == PAGE);
    CHECK(seen.ranges[2].addr == 99 * PAGE && seen.ranges[2].size == PAGE);
    CHECK(seen.ranges[4].addr == 103 * PAGE && seen.ranges[4].size == PAGE);
    seen = (struct seen){.most = 2};
    IS(vfio_dirty_report_ranges(report, 4096, see, &seen), 7);
    CHECK(seen.count == 2);
    IS(vfio_dirty_report_ranges(report, 0, see, &seen), -EINVAL);

    /* A round that was not delivered is in the next. */
    OK(vfio_dirty_tracker_mark(tracker, 50 * PAGE, 1));
    OK(vfio_dirty_tracker_take(tracker, report));
    CHECK(pages(report) == 7);
    OK(vfio_dirty_report_clear(report));
    CHECK(pages(report) == 0);
    CHECK(take(tracker, report, 0) == 0);
}

static void slots_change(struct vfio_dirty_tracker *tracker, struct vfio_dirty_report *report,
                         struct vfio_dirty_slot *low) {
    OK(vfio_dirty_slot_mark(low, 5 * PAGE, 1));
    OK(vfio_dirty_tracker_move_slot(tracker, 0, 200 * PAGE));
    IS(vfio_dirty_tracker_mark(tracker, 0, 1), -EINVAL);
    OK(vfio_dirty_tracker_mark(tracker, 206 * PAGE, 1));
    IS(vfio_dirty_tracker_mark(tracker, 103 * PAGE, 98 * PAGE), -EINVAL); /* with a hole */
    says("address 0x68000 is in no slot");
    OK(vfio_dirty_tracker_grow_slot(tracker, 0, 101 * PAGE));
    OK(vfio_dirty_tracker_take(tracker, report));
    struct seen seen = {.most = 8};
    OK(vfio_dirty_report_ranges(report, 4096, see, &seen));
    CHECK(seen.count == 4);
    CHECK(seen.ranges[0].addr == 103 * PAGE && seen.ranges[0].size == PAGE);
    CHECK(seen.ranges[1].addr == 200 * PAGE && seen.ranges[1].size == PAGE);
    CHECK(seen.ranges[2].addr == 205 * PAGE && seen.ranges[2].size == 2 * PAGE);
    CHECK(seen.ranges[3].addr == 300 * PAGE && seen.ranges[3].size == PAGE);
    OK(vfio_dirty_report_clear(report));

    /* A slot that joins is dirty as a whole, and one that goes is in no report. */
    OK(vfio_dirty_tracker_add_slot(tracker, 2, 0, NULL, 3 * PAGE, NULL));
    OK(vfio_dirty_tracker_take(tracker, report));
    CHECK(word(report, 2) == 7 && pages(report) == 3);
    OK(vfio_dirty_tracker_remove_slot(tracker, 2));
    OK(vfio_dirty_tracker_take(tracker, report));
    CHECK(pages(report) == 0);
    const uint64_t *words;
    size_t nwords;
    IS(vfio_dirty_report_slot(report, 2, &words, &nwords), -EINVAL);
}

void test_tracker(void) {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_report *report;
    struct vfio_dirty_slot *low, *high;
    pointers_are_checked();
    slots_are_checked();
    OK(vfio_dirty_tracker_new(0, &tracker));
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_tracker_add_slot(tracker, 0, 0, NULL, 100 * PAGE, &low));
    OK(vfio_dirty_tracker_add_slot(tracker, 1, 100 * PAGE, NULL, 4 * PAGE, &high));

    /* Nobody knows what is written while the tracker is off. */
    OK(vfio_dirty_slot_mark(low, 0, 1));
    IS(vfio_dirty_tracker_take(tracker, report), -EINVAL);
    says("dirty-page tracking is off");
    CHECK(pages(report) == 104);
    OK(vfio_dirty_report_clear(report));
    OK(vfio_dirty_tracker_start(tracker));
    CHECK(take(tracker, report, 0) == 0);

    marks_are_reported(tracker, report, low);
    slots_change(tracker, report, low);

    OK(vfio_dirty_slot_mark(high, 0, 1));
    OK(vfio_dirty_tracker_stop(tracker));
    OK(vfio_dirty_tracker_stop(tracker));
    OK(vfio_dirty_slot_mark(high, PAGE, 1));
    IS(vfio_dirty_tracker_take(tracker, report), -EINVAL);
    CHECK(pages(report) == 105);
    OK(vfio_dirty_report_clear(report));
    OK(vfio_dirty_tracker_start(tracker));
    OK(vfio_dirty_tracker_start(tracker));
    OK(vfio_dirty_tracker_take(tracker, report));
    CHECK(pages(report) == 0);

    OK(vfio_dirty_tracker_remove_slot(tracker, 1));
    IS(vfio_dirty_slot_mark(high, 0, 1), -ESTALE);
    says("the slot was removed");
    IS(vfio_dirty_slot_mark_bitmap(high, (uint64_t[]){1}, 1), -ESTALE);
    IS(vfio_dirty_slot_mark_bitmap(high, (uint64_t[]){1, 0}, 2), -EINVAL);
    vfio_dirty_tracker_free(tracker);
    OK(vfio_dirty_slot_mark(low, 0, 1)); /* the handle outlives the tracker */
    CHECK(pages(report) == 0);
    vfio_dirty_slot_free(low);
    vfio_dirty_slot_free(high);
    vfio_dirty_report_free(report);
}
