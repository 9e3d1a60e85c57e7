/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What the parts of the test share. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vfio_dirty.h>

/* Every address is a multiple of this. */
#define PAGE 4096ul

#define CHECK(truth)                                                                        \
    do {                                                                                    \
        if (!(truth)) {                                                                     \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #truth);             \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

/* What a call returns. */
#define IS(call, value) is(call, value, #call, __FILE__, __LINE__)
#define OK(call) IS(call, 0)

static inline void is(int got, int want, const char *what, const char *file, int line) {
    if (got != want) {
        fprintf(stderr, "%s:%d: %s is %d and not %d (last error: %s)\n", file, line, what, got,
                want, vfio_dirty_error());
        exit(1);
    }
}

/* The text of the last error has this part. */
static inline void says(const char *part) {
    if (!strstr(vfio_dirty_error(), part)) {
        fprintf(stderr, "\"%s\" is not in \"%s\"\n", part, vfio_dirty_error());
        exit(1);
    }
}

/* The first word of a slot in a report. */
static inline uint64_t word(const struct vfio_dirty_report *report, uint32_t id) {
    const uint64_t *words;
    size_t nwords;
    OK(vfio_dirty_report_slot(report, id, &words, &nwords));
    CHECK(nwords >= 1);
    return words[0];
}

/* Takes, and returns the first word of slot 0, which the report then forgets. */
static inline uint64_t take(struct vfio_dirty_tracker *tracker, struct vfio_dirty_report *report,
                            int rc) {
    IS(vfio_dirty_tracker_take(tracker, report), rc);
    uint64_t found = word(report, 0);
    OK(vfio_dirty_report_clear(report));
    return found;
}

static inline uint64_t pages(const struct vfio_dirty_report *report) {
    uint64_t count;
    OK(vfio_dirty_report_pages(report, &count));
    return count;
}

/* A pointer that is misaligned for everything that has an alignment. */
#define ODD(pointer) ((void *)((char *)(pointer) + 1))

void test_tracker(void);
void test_sources(void);
void test_views(void);
void test_device_log(void);
void test_container(void);
void test_saved(void);
void test_stats(void);
void test_threads(void);

#endif
