/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What an operator sees of a tracker, a container and a log; rates and estimates. */
#include "check.h"
#include <linux/vfio.h>
#include <stddef.h>

#define MIB (1ul << 20)
#define MS 1000000ul

/* What the visitors have seen. */
struct seen {
    struct vfio_dirty_source_stats sources[4];
    struct vfio_dirty_slot_stats slots[4];
    char name[4][16];
    size_t count, most;
};

static int see_source(void *context, const struct vfio_dirty_source_stats *stats) {
    struct seen *seen = context;
    CHECK(seen->count < seen->most && stats->argsz >= sizeof(*stats));
    snprintf(seen->name[seen->count], sizeof(seen->name[0]), "%s", stats->name);
    seen->sources[seen->count++] = *stats;
    return seen->count == seen->most ? 7 : 0;
}

static int see_slot(void *context, const struct vfio_dirty_slot_stats *stats) {
    struct seen *seen = context;
    CHECK(seen->count < seen->most && stats->argsz >= sizeof(*stats));
    seen->slots[seen->count++] = *stats;
    return seen->count == seen->most ? -5 : 0;
}

static struct vfio_dirty_tracker_stats stats_of(const struct vfio_dirty_tracker *tracker) {
    struct vfio_dirty_tracker_stats stats = {.argsz = sizeof(stats)};
    OK(vfio_dirty_tracker_stats(tracker, &stats));
    CHECK(stats.argsz == sizeof(stats));
    return stats;
}

/* A source that looks at the tracker while it is asked. */
static int looks(void *context, struct vfio_dirty_gpa_sink *sink) {
    CHECK(stats_of(context).slots == 2);
    return vfio_dirty_gpa_sink_or_range(sink, 0, 3 * PAGE);
}

static int fails(void *context, struct vfio_dirty_gpa_sink *sink) {
    int *answer = context;
    OK(vfio_dirty_gpa_sink_or_range(sink, 0, PAGE));
    return *answer;
}

static void a_tracker_has_stats(void) {
    struct vfio_dirty_tracker *tracker;
    struct vfio_dirty_report *report;
    struct vfio_dirty_view *view;
    struct seen seen = {.most = 4};
    int answer = 0;
    OK(vfio_dirty_tracker_new(4096, &tracker));
    OK(vfio_dirty_report_new(&report));
    OK(vfio_dirty_tracker_add_slot(tracker, 4, 0, NULL, 64 * PAGE, NULL));
    OK(vfio_dirty_tracker_add_slot(tracker, 9, MIB, NULL, 65 * PAGE, NULL));
    OK(vfio_dirty_view_new(tracker, &view));
    OK(vfio_dirty_view_map(view, 0, 0, PAGE));

    /* Before the first take. */
    struct vfio_dirty_tracker_stats stats = stats_of(tracker);
    CHECK(stats.on == 0 && stats.takes == 0 && stats.take_ns == 0);
    CHECK(stats.slots == 2 && stats.bitmap_bytes == 24 && stats.budget == 4096);
    CHECK(stats.views == 1 && stats.mappings == 1 && stats.remembered_mappings == 0);
    OK(vfio_dirty_tracker_source_stats(tracker, see_source, &seen));
    OK(vfio_dirty_tracker_slot_stats(tracker, see_slot, &seen));
    CHECK(seen.count == 0);

    /* A take that is off. */
    IS(vfio_dirty_tracker_take(tracker, report), -EINVAL);
    stats = stats_of(tracker);
    CHECK(stats.takes == 1 && stats.whole_off.times == 1);
    CHECK(stats.whole_off.bytes == 129 * PAGE);

    OK(vfio_dirty_report_clear(report));
    OK(vfio_dirty_tracker_add_source(tracker, "kvm", looks, tracker, NULL));
    OK(vfio_dirty_tracker_add_source(tracker, "vhost", fails, &answer, NULL));
    OK(vfio_dirty_tracker_start(tracker));
    OK(vfio_dirty_tracker_mark(tracker, MIB, 2 * PAGE));
    OK(vfio_dirty_tracker_take(tracker, report));
    stats = stats_of(tracker);
    CHECK(stats.on == 1 && stats.takes == 2 && stats.take_ns != 0);
    OK(vfio_dirty_tracker_source_stats(tracker, see_source, &seen));
    CHECK(seen.count == 2 && strcmp(seen.name[0], "kvm") == 0);
    CHECK(strcmp(seen.name[1], "vhost") == 0);
    CHECK(seen.sources[0].bytes == 3 * PAGE && seen.sources[1].bytes == PAGE);
    CHECK(seen.sources[0].failed == 0 && seen.sources[0].time_ns <= stats.take_ns);
    seen = (struct seen){.most = 3};
    OK(vfio_dirty_tracker_slot_stats(tracker, see_slot, &seen));
    CHECK(seen.count == 2 && seen.slots[0].id == 4 && seen.slots[1].id == 9);
    CHECK(seen.slots[0].marked == 0 && seen.slots[0].told == 4 * PAGE);
    CHECK(seen.slots[1].marked == 2 * PAGE && seen.slots[1].told == 0);

    /* Which source failed, and what that costs. */
    answer = -EAGAIN;
    IS(vfio_dirty_tracker_take(tracker, report), -EAGAIN);
    seen = (struct seen){.most = 2};
    IS(vfio_dirty_tracker_source_stats(tracker, see_source, &seen), 7);
    CHECK(seen.sources[0].failed == 0 && seen.sources[1].failed == 1);
    seen = (struct seen){.most = 1};
    IS(vfio_dirty_tracker_slot_stats(tracker, see_slot, &seen), -5);
    CHECK(seen.count == 1);
    stats = stats_of(tracker);
    CHECK(stats.whole_source_failed.times == 1);
    CHECK(stats.whole_source_failed.bytes == 129 * PAGE);
    OK(vfio_dirty_tracker_add_slot(tracker, 1, 2 * MIB, NULL, PAGE, NULL));
    CHECK(stats_of(tracker).whole_new_memory.bytes == PAGE);

    /* A program that is older than the library, and one that is newer. */
    const size_t first = sizeof(stats);
    char room[2 * sizeof(stats)];
    memset(room, 0x5a, sizeof(room));
    struct vfio_dirty_tracker_stats *other = (void *)room;
    IS(vfio_dirty_tracker_stats(tracker, NULL), -EINVAL);
    IS(vfio_dirty_tracker_stats(tracker, ODD(other)), -EINVAL);
    IS(vfio_dirty_tracker_stats(NULL, &stats), -EINVAL);
    other->argsz = (uint32_t)first - 1;
    IS(vfio_dirty_tracker_stats(tracker, other), -EINVAL);
    says("the argument stats has an argsz that is too small");
    CHECK(other->on == 0x5a5a5a5a);
    other->argsz = sizeof(room);
    OK(vfio_dirty_tracker_stats(tracker, other));
    CHECK(other->argsz == first && other->slots == 3 && room[first] == 0x5a);
    IS(vfio_dirty_tracker_source_stats(tracker, NULL, NULL), -EINVAL);
    IS(vfio_dirty_tracker_slot_stats(tracker, NULL, NULL), -EINVAL);
    IS(vfio_dirty_tracker_source_stats(NULL, see_source, &seen), -EINVAL);
    IS(vfio_dirty_tracker_slot_stats(NULL, see_slot, &seen), -EINVAL);

    vfio_dirty_view_free(view);
    vfio_dirty_report_free(report);
    vfio_dirty_tracker_free(tracker);
}

static void a_log_has_stats(void) {
    struct vfio_dirty_device_log *log;
    struct vfio_dirty_device_log_options options = {.argsz = sizeof(options), .budget = MIB};
    struct vfio_dirty_device_log_stats stats = {0};
    OK(vfio_dirty_device_log_new(&options, &log));
    IS(vfio_dirty_device_log_stats(log, &stats), -EINVAL);
    stats.argsz = sizeof(stats);
    IS(vfio_dirty_device_log_stats(NULL, &stats), -EINVAL);
    OK(vfio_dirty_device_log_add_range(log, 0, 64 * PAGE));
    OK(vfio_dirty_device_log_add_range(log, MIB, 64 * PAGE));
    OK(vfio_dirty_device_log_stats(log, &stats));
    CHECK(stats.argsz == sizeof(stats) && stats.reserved == 0 && stats.pgsize == 0);
    CHECK(stats.ranges == 2 && stats.logged == 0 && stats.bitmap_bytes == 0);
    CHECK(stats.budget == MIB && stats.removed_limit == 16 * MIB);

    OK(vfio_dirty_device_log_start(log, NULL, 0, 4096));
    OK(vfio_dirty_device_log_mark(log, 0, 1));
    OK(vfio_dirty_device_log_remove_range(log, 0, 64 * PAGE));
    OK(vfio_dirty_device_log_stats(log, &stats));
    CHECK(stats.pgsize == 4096 && stats.ranges == 1 && stats.logged == 1);
    CHECK(stats.bitmap_bytes == 8 && stats.removed_ranges == 1 && stats.removed_bytes != 0);
    CHECK(stats.coarser == 0);
    vfio_dirty_device_log_free(log);
}

static void a_container_has_stats(void) {
    struct vfio_dirty_container *container;
    struct vfio_dirty_container_stats stats = {.argsz = sizeof(stats)};
    static char ram[4 * PAGE] __attribute__((aligned(4096)));
    OK(vfio_dirty_container_new(MIB, &container));
    IS(vfio_dirty_container_stats(NULL, &stats), -EINVAL);
    IS(vfio_dirty_container_stats(container, NULL), -EINVAL);
    IS(vfio_dirty_container_stats(container, &stats), -EINVAL);
    says("no IOMMU type is set");
    OK(vfio_dirty_container_add_emulated_group(container, 1));
    OK(vfio_dirty_container_ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof(map), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        .vaddr = (uintptr_t)ram, .iova = MIB, .size = sizeof(ram)};
    OK(vfio_dirty_container_ioctl(container, VFIO_IOMMU_MAP_DMA, (unsigned long)&map));
    OK(vfio_dirty_container_stats(container, &stats));
    CHECK(stats.argsz == sizeof(stats) && stats.pgsize == 0 && stats.bitmap_bytes == 0);
    CHECK(stats.mappings == 1 && stats.mapped_bytes == sizeof(ram) && stats.budget == MIB);
    CHECK(stats.pinned_pages == 0 && stats.wholly_dirty_groups == 0);

    struct vfio_iommu_type1_dirty_bitmap start = {
        .argsz = sizeof(start), .flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_START};
    OK(vfio_dirty_container_ioctl(container, VFIO_IOMMU_DIRTY_PAGES, (unsigned long)&start));
    OK(vfio_dirty_container_stats(container, &stats));
    CHECK(stats.pgsize == 4096 && stats.bitmap_bytes != 0);
    stats.argsz = offsetof(struct vfio_dirty_container_stats, budget);
    IS(vfio_dirty_container_stats(container, &stats), -EINVAL);
    vfio_dirty_container_free(container);
}

static void a_rate_estimates(void) {
    struct vfio_dirty_rate *rate = NULL;
    struct vfio_dirty_estimate estimate = {.argsz = sizeof(estimate)};
    uint64_t bytes = 0;
    IS(vfio_dirty_rate_new(1000 * MS, NULL), -EINVAL);
    OK(vfio_dirty_rate_new(1000 * MS, &rate));
    IS(vfio_dirty_rate_record(NULL, 0, 0), -EINVAL);
    IS(vfio_dirty_rate_bytes_per_second(rate, NULL), -EINVAL);
    OK(vfio_dirty_rate_record(rate, 0, 0)); /* tracking begins */
    IS(vfio_dirty_rate_bytes_per_second(rate, &bytes), -ENODATA);
    says("a rate needs two samples");
    IS(vfio_dirty_rate_estimate(rate, MIB, MIB, 0, &estimate), -ENODATA);
    OK(vfio_dirty_rate_record(rate, 100 * MS, 10 * MIB));
    OK(vfio_dirty_rate_record(rate, 200 * MS, 10 * MIB));
    OK(vfio_dirty_rate_bytes_per_second(rate, &bytes));
    CHECK(bytes == 100 * MIB);

    /* Rounds of 400 and of 100 MiB, and 25 MiB are left. */
    OK(vfio_dirty_rate_estimate(rate, 400 * MIB, 400 * MIB, 70 * MS, &estimate));
    CHECK(estimate.argsz == sizeof(estimate) && estimate.rounds == 2);
    CHECK(estimate.downtime_now_ns == 1000 * MS && estimate.time_ns == 1250 * MS);
    CHECK(estimate.downtime_ns == 62500000);
    OK(vfio_dirty_rate_estimate(rate, 400 * MIB, 50 * MIB, 70 * MS, &estimate));
    CHECK(estimate.rounds == VFIO_DIRTY_NEVER && estimate.downtime_now_ns == 8000 * MS);
    CHECK(estimate.time_ns == UINT64_MAX && estimate.downtime_ns == UINT64_MAX);
    OK(vfio_dirty_rate_estimate(rate, -1ul, 1, 70 * MS, &estimate)); /* beyond 584 years */
    CHECK(estimate.downtime_now_ns == UINT64_MAX);
    IS(vfio_dirty_rate_estimate(rate, MIB, 0, 0, &estimate), -EINVAL);
    says("the argument bandwidth is 0");
    IS(vfio_dirty_rate_estimate(rate, MIB, MIB, 0, NULL), -EINVAL);
    estimate.argsz = 4;
    IS(vfio_dirty_rate_estimate(rate, MIB, MIB, 0, &estimate), -EINVAL);
    vfio_dirty_rate_free(rate);
    vfio_dirty_rate_free(NULL);
}

void test_stats(void) {
    a_tracker_has_stats();
    a_log_has_stats();
    a_container_has_stats();
    a_rate_estimates();
}
