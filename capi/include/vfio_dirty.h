/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Dirty-page tracking for live migration: which pages of a guest may have been written
 * since the last time you asked?
 *
 *     cc main.c $(pkg-config --cflags --libs vfio_dirty)
 *
 * What is here
 *
 *   tracker     guest memory in slots, by guest-physical address; one report of all dirty pages
 *   slot        marks of whoever writes the memory of a slot
 *   source      a log that somebody else keeps, which each report asks: KVM's, a device's
 *   view        what the devices behind one IOMMU domain see: IOVAs
 *   device_log  the log of a device that must answer DMA logging or iommufd's dirty tracking
 *   container   a VFIO type1 container in this process, with raw ioctls, and its devices
 *   saved       a tracker as bytes, from which another process goes on: live upgrade
 *   stats       what an operator sees of a tracker, a container and a log
 *   rate        how fast memory becomes dirty, and an estimate of a migration's downtime
 *
 * No write is lost if everybody keeps this order
 *
 *   1. A writer writes, then marks, then says that the write is done.
 *   2. Whoever migrates takes the report, then copies the pages.
 *   3. All memory is copied once after vfio_dirty_tracker_start().
 *
 * Errors
 *
 *   A function that returns int returns 0, or a negative errno, or another value that is not
 *   negative where it says so. vfio_dirty_error() has the cause as a sentence. A failed call
 *   changes nothing, unless it says otherwise. If a report fails, every page that it was to
 *   cover counts as dirty.
 *
 *   Every function is -EINVAL for a pointer that is NULL and may not be, or that is
 *   misaligned. A bug in the library is -ENOTRECOVERABLE; no call ends the process, unless
 *   there is no memory for one of the library's own small structures.
 *
 * Threads
 *
 *   Any number of threads may use a tracker, slot, view, device_log, container or device at
 *   the same time. A report and a rate belong to one thread at a time, and a sink to the
 *   thread of its callback. take, start, stop, save, restore and what adds or removes sources
 *   wait for each other. A handle is freed once, when no thread uses it any more; no order is
 *   asked for.
 *
 * Memory
 *
 *   Every pointer is valid, for what its comment says, until the call returns, and nobody
 *   writes meanwhile to what the call reads. The paragraph "Safety" of a function has what it
 *   asks for besides. A bitmap consists of words of 64 bits in the byte order of this machine.
 *
 * Versions
 *
 *   The number in the soname changes with every release that changes or removes what is
 *   here: the second number of the version before 1.0 (libvfio_dirty.so.0.1), and the first
 *   from then on. Releases in between only add. A structure that begins with argsz may get
 *   more fields at its end: set argsz to its sizeof in your header.
 */


#ifndef VFIO_DIRTY_H
#define VFIO_DIRTY_H

#include <stddef.h>
#include <stdint.h>

/**
 * A report answers that a page is clean which was to be logged and is not mapped, as
 * Linux's drivers do. Without this flag the report fails with -EINVAL.
 */
#define VFIO_DIRTY_LOG_HOLES_CLEAN 1

/**
 * The value of `rounds` if a migration does not end.
 */
#define VFIO_DIRTY_NEVER 4294967295

/**
 * A VFIO container with type1 semantics, in this process: it maps memory for devices,
 * and knows which pages they may have written. Any thread may call it.
 */
struct vfio_dirty_container;

/**
 * An open device of a container, which reads, writes and marks by IOVA. Any thread may
 * call it. It keeps its container open.
 */
struct vfio_dirty_device;

/**
 * The log of what a device wrote, by IOVA: VFIO's DMA logging and iommufd's dirty
 * tracking, for a device that is emulated, vfio-user or vDPA. Any thread may call it.
 */
struct vfio_dirty_device_log;

/**
 * Takes dirty pages by guest-physical address. A source's callback gets one.
 *
 * It exists until the callback returns, and is used by the callback's thread alone. If
 * a call on it fails, the source has failed, whatever the callback returns: a page may
 * be lost.
 */
struct vfio_dirty_gpa_sink;

/**
 * Takes dirty pages by IOVA. The callback of a log gets one.
 *
 * It exists until the callback returns, and is used by the callback's thread alone. If
 * a call on it fails, the log has failed, whatever the callback returns: a page may be
 * lost.
 */
struct vfio_dirty_iova_sink;

/**
 * Bytes that become dirty in a second, over a window of time, and an estimate of how a
 * migration goes on. It has no clock: the caller says when each sample was taken, in
 * nanoseconds since any moment that stays the same.
 *
 * The rate is that of distinct pages: a page that is written twice between two takes
 * counts once. So longer rounds show a lower rate.
 *
 * A rate belongs to one thread at a time.
 */
struct vfio_dirty_rate;

/**
 * The dirty pages of a guest: a bitmap for each slot. Pages stay in it until
 * `vfio_dirty_report_clear`.
 *
 * A report belongs to one thread at a time. Threads that only read it may do so at the
 * same time.
 */
struct vfio_dirty_report;

/**
 * The sources that a saved tracker had, which must be added again.
 */
struct vfio_dirty_restored;

/**
 * The bytes of a saved tracker.
 */
struct vfio_dirty_saved;

/**
 * A slot's dirty pages, for whoever writes its memory. Any number of threads may mark
 * through it at the same time, without a lock. It stays valid until
 * `vfio_dirty_slot_free`, whatever happens to the slot and the tracker.
 */
struct vfio_dirty_slot;

/**
 * A source of a tracker. The handle is for `vfio_dirty_source_remove` alone, so whoever
 * never removes the source need not ask for it.
 */
struct vfio_dirty_source;

/**
 * Tracks everything that writes a guest's memory: slots that are marked, and sources
 * that are asked.
 *
 * It is off until `vfio_dirty_tracker_start`. Any thread may call it. Marks take no
 * lock that a take has.
 */
struct vfio_dirty_tracker;

/**
 * What the devices behind one IOMMU domain see of a guest's memory: which IOVA leads to
 * which guest-physical address. Any thread may call it.
 *
 * Keep it in step with the IOMMU: map before the mapping there, and unmap after the
 * unmapping there, when the device can no longer write.
 */
struct vfio_dirty_view;

/**
 * A range of addresses: IOVAs or guest-physical addresses, as the call says.
 */
struct vfio_dirty_range {
    /**
     * The first address.
     */
    uint64_t addr;
    /**
     * The length in bytes.
     */
    uint64_t size;
};

/**
 * Gets one dirty range. It returns 0 to go on, and any other value to stop.
 *
 * It may read the report, and must not change or free it.
 */
typedef int (*vfio_dirty_range_visit)(void *context, struct vfio_dirty_range range);

/**
 * Reads and clears a log by guest-physical address, and puts what it has into `sink`.
 * It returns 0, or a negative errno if it cannot tell what is dirty: then every page is.
 *
 * It may mark, map and unmap, ask for stats, and add, move, grow and remove slots. What
 * starts, stops, takes, saves, restores, or adds or removes sources of its tracker fails
 * with -EDEADLK in it.
 */
typedef int (*vfio_dirty_source_read)(void *context, struct vfio_dirty_gpa_sink *sink);

/**
 * Reads and clears a log by IOVA for the `nranges` ranges of `ask`, and puts what it has
 * into `sink`. It returns 0, or a negative errno if it cannot tell what is dirty: then
 * all memory behind the view is.
 *
 * `ask` has every IOVA that the view maps, or has mapped since the last take, in whole
 * pages of 4 KiB. The ranges are disjoint and sorted. They exist until the callback
 * returns, and there may be none. Pages that the log has besides may be put into
 * `sink` too if the view maps them.
 *
 * It may call what a source's callback may.
 */
typedef int (*vfio_dirty_log_read)(void *context,
                                   const struct vfio_dirty_range *ask,
                                   size_t nranges,
                                   struct vfio_dirty_iova_sink *sink);

/**
 * The options of a device's log. Make it zero, set `argsz`, and set what you need.
 */
struct vfio_dirty_device_log_options {
    /**
     * `sizeof(struct vfio_dirty_device_log_options)`
     */
    uint32_t argsz;
    /**
     * VFIO_DIRTY_LOG_HOLES_CLEAN, or 0.
     */
    uint32_t flags;
    /**
     * How many bytes the bitmaps of mapped ranges may take in all. 0 sets no limit.
     */
    uint64_t budget;
    /**
     * About how many bytes the log may keep for removed ranges that were not reported
     * yet. Beyond it the log becomes coarser and forgets nothing. 0 is 16 MiB.
     */
    uint64_t removed;
};

/**
 * How often some memory was told as dirty as a whole for one cause.
 */
struct vfio_dirty_whole {
    /**
     * How often it happened.
     */
    uint64_t times;
    /**
     * The bytes of memory of all these times together. Memory that is mapped twice
     * counts twice.
     */
    uint64_t bytes;
};

/**
 * What a tracker has, and what its last take found. Make it zero and set `argsz`.
 *
 * `whole_off` to `whole_restore_failed` is what was told as dirty as a whole since the
 * tracker was created, because nobody knows which of its pages were written. All of it
 * but `whole_new_memory` is more than what was written, and costs a larger round.
 */
struct vfio_dirty_tracker_stats {
    /**
     * `sizeof(struct vfio_dirty_tracker_stats)`. The call stores how many bytes it has
     * filled, which are fewer if the library is older than the header.
     */
    uint32_t argsz;
    /**
     * 1 if the tracker is on, and 0 if it is off.
     */
    uint32_t on;
    /**
     * How many takes there were since the tracker was created.
     */
    uint64_t takes;
    /**
     * How long the last take was, in nanoseconds, sources included.
     */
    uint64_t take_ns;
    /**
     * How many slots there are.
     */
    uint64_t slots;
    /**
     * How many slots moved or went since the logs were read, and are remembered.
     */
    uint64_t remembered_slots;
    /**
     * How many views there are.
     */
    uint64_t views;
    /**
     * How many mappings all views have.
     */
    uint64_t mappings;
    /**
     * How many mappings that are gone all views remember, because a log may still
     * report what was written through them.
     */
    uint64_t remembered_mappings;
    /**
     * The bytes that the slots' bitmaps take.
     */
    uint64_t bitmap_bytes;
    /**
     * The most bytes that they may take, or 0 if there is no limit.
     */
    uint64_t budget;
    /**
     * A take asked a tracker that is off: all memory.
     */
    struct vfio_dirty_whole whole_off;
    /**
     * A source by guest address failed: all memory.
     */
    struct vfio_dirty_whole whole_source_failed;
    /**
     * A log by IOVA failed: all memory behind its view.
     */
    struct vfio_dirty_whole whole_log_failed;
    /**
     * A bug interrupted the take before, so what sources had told is lost: all memory.
     */
    struct vfio_dirty_whole whole_source_panicked;
    /**
     * A guest had stacked so many mappings at the same IOVAs that it would have taken
     * too long to mark them one by one: all memory behind the view.
     */
    struct vfio_dirty_whole whole_stacked_mappings;
    /**
     * A view remembered as many mappings as it can, and one more went: the memory
     * behind that one.
     */
    struct vfio_dirty_whole whole_forgotten_mappings;
    /**
     * The tracker remembered as many moved and removed slots as it can, and one more
     * moved or went: that slot.
     */
    struct vfio_dirty_whole whole_forgotten_slots;
    /**
     * A slot was added, or grew, while the tracker was on: the new memory.
     */
    struct vfio_dirty_whole whole_new_memory;
    /**
     * A saved tracker could not be restored: all memory.
     */
    struct vfio_dirty_whole whole_restore_failed;
};

/**
 * What one source told in the last take.
 */
struct vfio_dirty_source_stats {
    /**
     * How many bytes this structure has in the library. A field beyond them is not there.
     */
    uint32_t argsz;
    /**
     * 1 if the source failed, and 0 if not.
     */
    uint32_t failed;
    /**
     * How long it was asked, in nanoseconds. For a log by IOVA that includes the
     * translation.
     */
    uint64_t time_ns;
    /**
     * The bytes that it told, in whole pages of its own page size. What it told twice
     * counts twice, and what two sources told counts for both. A source that failed has
     * what it told before it failed.
     */
    uint64_t bytes;
    /**
     * The name that it was added with. The string exists until the callback returns.
     */
    const char *name;
};

/**
 * Gets what one source told. It returns 0 to go on, and any other value to stop.
 * `stats` exists until it returns.
 */
typedef int (*vfio_dirty_source_stats_visit)(void *context,
                                             const struct vfio_dirty_source_stats *stats);

/**
 * What the last take found in one slot.
 */
struct vfio_dirty_slot_stats {
    /**
     * How many bytes this structure has in the library. A field beyond them is not there.
     */
    uint32_t argsz;
    /**
     * The slot's number.
     */
    uint32_t id;
    /**
     * The bytes that were marked since the take before, in whole pages: by the VMM, by
     * devices through mappings, and by logs by IOVA, whose dirty pages are marks too.
     * Each page counts once.
     */
    uint64_t marked;
    /**
     * The bytes that sources by guest address told. What was told twice counts twice.
     */
    uint64_t told;
};

/**
 * Gets what the last take found in one slot. It returns 0 to go on, and any other value
 * to stop. `stats` exists until it returns.
 */
typedef int (*vfio_dirty_slot_stats_visit)(void *context,
                                           const struct vfio_dirty_slot_stats *stats);

/**
 * What a container has. Make it zero and set `argsz`.
 */
struct vfio_dirty_container_stats {
    /**
     * `sizeof(struct vfio_dirty_container_stats)`. The call stores how many bytes it has
     * filled, which are fewer if the library is older than the header.
     */
    uint32_t argsz;
    /**
     * How many groups make all memory dirty in every report, because they are behind an
     * IOMMU that does not track, and have not pinned what they write.
     */
    uint32_t wholly_dirty_groups;
    /**
     * The page size of the dirty bitmaps in bytes, or 0 while tracking is off.
     */
    uint64_t pgsize;
    /**
     * How many mappings there are.
     */
    uint64_t mappings;
    /**
     * The bytes of memory that they have together.
     */
    uint64_t mapped_bytes;
    /**
     * At how many IOVAs devices have pinned a page. Each of these pages is dirty in
     * every report, because a device may write it at any time.
     */
    uint64_t pinned_pages;
    /**
     * The bytes that the dirty bitmaps take.
     */
    uint64_t bitmap_bytes;
    /**
     * The most bytes that they may take, or 0 if there is no limit.
     */
    uint64_t budget;
};

/**
 * What a device's log has. Make it zero and set `argsz`.
 */
struct vfio_dirty_device_log_stats {
    /**
     * `sizeof(struct vfio_dirty_device_log_stats)`. The call stores how many bytes it has
     * filled, which are fewer if the library is older than the header.
     */
    uint32_t argsz;
    /**
     * 0.
     */
    uint32_t reserved;
    /**
     * The page size of the log in bytes, or 0 while it is off. `logged`, `bitmap_bytes`,
     * `removed_ranges`, `removed_bytes` and `coarser` are 0 then.
     */
    uint64_t pgsize;
    /**
     * How many ranges are mapped.
     */
    uint64_t ranges;
    /**
     * How many pieces of them are logged. A range that the start named in two parts is
     * two pieces.
     */
    uint64_t logged;
    /**
     * The bytes that the bitmaps of what is logged take.
     */
    uint64_t bitmap_bytes;
    /**
     * The most bytes that they may take, or 0 if there is no limit.
     */
    uint64_t budget;
    /**
     * How many ranges of IOVAs were removed and are still to be reported. Ranges that
     * touch are one.
     */
    uint64_t removed_ranges;
    /**
     * About how many bytes the log keeps for removed ranges.
     */
    uint64_t removed_bytes;
    /**
     * About how many bytes it may keep for them.
     */
    uint64_t removed_limit;
    /**
     * How often that limit was reached since the log was switched on. The log became
     * coarser then: pages may count as dirty that are not.
     */
    uint64_t coarser;
};

/**
 * How a migration goes on at a dirty rate and a bandwidth that stay as they are. Make it
 * zero and set `argsz`.
 */
struct vfio_dirty_estimate {
    /**
     * `sizeof(struct vfio_dirty_estimate)`. The call stores how many bytes it has filled,
     * which are fewer if the library is older than the header.
     */
    uint32_t argsz;
    /**
     * How many rounds go before the guest can be stopped, or VFIO_DIRTY_NEVER if the rest
     * never fits the downtime limit: too much becomes dirty for the bandwidth. More than
     * 1000 rounds count as never.
     */
    uint32_t rounds;
    /**
     * The downtime in nanoseconds if the guest is stopped now: what remains, divided by
     * the bandwidth. QEMU calls it the expected downtime.
     */
    uint64_t downtime_now_ns;
    /**
     * How long the rounds take together, in nanoseconds, or UINT64_MAX if they never end.
     */
    uint64_t time_ns;
    /**
     * The downtime in nanoseconds when the guest is stopped after these rounds, or
     * UINT64_MAX if they never end.
     */
    uint64_t downtime_ns;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Creates a tracker without slots, which is off. Its bitmaps may take `budget` bytes in
 * all, or any amount if that is 0; 1 GiB of guest memory takes 32 KiB.
 *
 * # Safety
 *
 * There is room for a pointer at `tracker`.
 */
int vfio_dirty_tracker_new(uint64_t budget, struct vfio_dirty_tracker **tracker);

/**
 * Frees a tracker. Its sources are not called any more when it returns. Slots, views
 * and sources are handles of their own, which stay valid: marks do nothing then, and
 * every other call on them fails or does nothing. NULL is ignored, and so is a call in
 * a callback of the tracker.
 *
 * # Safety
 *
 * Nobody uses the tracker any more.
 */
void vfio_dirty_tracker_free(struct vfio_dirty_tracker *tracker);

/**
 * Adds slot `id`: `size` bytes of guest memory at guest-physical address `gpa`, which
 * this process has at `host`. Give NULL for `host` if no source reports host addresses
 * and no device of a container uses the memory.
 *
 * If `slot` is not NULL, it gets a handle to mark the slot's pages through, which are
 * of 4 KiB. If the tracker is on, all of the slot is dirty: its content was never copied.
 *
 * Errors, in this order; nothing changes then:
 *
 * - -EINVAL unless `gpa` is a multiple of 4 KiB, or if `size` is 0.
 * - -EOVERFLOW if the guest addresses or the host addresses wrap.
 * - -EEXIST if there is a slot `id`, or if another slot has some of the guest addresses
 *   or host addresses.
 * - -ENOMEM beyond the budget, or if there is no memory.
 *
 * # Safety
 *
 * There is room for a pointer at `slot`, or it is NULL. `host` is only an address, and
 * nothing is read or written there.
 */
int vfio_dirty_tracker_add_slot(const struct vfio_dirty_tracker *tracker,
                                uint32_t id,
                                uint64_t gpa,
                                const void *host,
                                uint64_t size,
                                struct vfio_dirty_slot **slot);

/**
 * Removes slot `id`. Its pages are in no later report. Marks through its handle fail
 * with -ESTALE then. Unmap its memory from every view too.
 *
 * -EINVAL if there is no such slot.
 *
 * # Safety
 *
 * `tracker` is a tracker.
 */
int vfio_dirty_tracker_remove_slot(const struct vfio_dirty_tracker *tracker, uint32_t id);

/**
 * Moves slot `id` to guest-physical address `gpa`, as when the guest moves a BAR. All
 * that is dirty in it is told at the new address, also what a log reports later through
 * mappings that were made before.
 *
 * Before you call it, read logs that go with the old place, and put them into
 * `vfio_dirty_slot_mark_bitmap`: KVM forgets a slot's log when the slot moves.
 *
 * Errors, in this order; nothing changes then:
 *
 * - -EINVAL if there is no such slot, or unless `gpa` is a multiple of 4 KiB.
 * - -EOVERFLOW if the addresses wrap.
 * - -EEXIST if another slot has some of the addresses.
 *
 * # Safety
 *
 * `tracker` is a tracker.
 */
int vfio_dirty_tracker_move_slot(const struct vfio_dirty_tracker *tracker,
                                 uint32_t id,
                                 uint64_t gpa);

/**
 * Lets slot `id` have `size` bytes, which are not fewer than before. Its handles have
 * the new pages. If the tracker is on, the new memory is dirty.
 *
 * Errors, in this order; nothing changes then:
 *
 * - -EINVAL if there is no such slot, or if `size` is less than before.
 * - -EOVERFLOW if the guest addresses or the host addresses wrap.
 * - -EEXIST if another slot has some of the addresses.
 * - -ENOMEM beyond the budget, or if there is no memory.
 *
 * # Safety
 *
 * `tracker` is a tracker.
 */
int vfio_dirty_tracker_grow_slot(const struct vfio_dirty_tracker *tracker,
                                 uint32_t id,
                                 uint64_t size);

/**
 * Switches tracking on, and forgets what was marked so far. Start the logs of your
 * sources before this call, and copy all memory after it. Writers need not stop. A
 * tracker that is on may be started again.
 *
 * -EPERM if the kernel refuses membarrier(2), which a seccomp filter must allow.
 * -EDEADLK in a callback of a source.
 *
 * # Safety
 *
 * `tracker` is a tracker.
 */
int vfio_dirty_tracker_start(const struct vfio_dirty_tracker *tracker);

/**
 * Switches tracking off: marks do nothing, and what no report has taken is forgotten.
 * Stop the logs of your sources after this call. A tracker that is off may be stopped.
 *
 * -EDEADLK in a callback of a source.
 *
 * # Safety
 *
 * `tracker` is a tracker.
 */
int vfio_dirty_tracker_stop(const struct vfio_dirty_tracker *tracker);

/**
 * ORs everything that was written since the last take into `report`: first asks each
 * source, then takes the marks of all slots. Copy the pages after this call. Use one
 * report for all rounds of a migration.
 *
 * The report is complete also if this fails, so a failure makes a round larger and
 * loses nothing:
 *
 * - The errno of the first source that failed, -EIO if its callback returned no errno, or
 *   if it was saved and not added again; vfio_dirty_error() names it, and
 *   vfio_dirty_tracker_source_stats() tells which failed. The other sources were asked all the same. The report
 *   has all memory behind the view of a log that failed, and every page if another
 *   source failed.
 * - -EINVAL if the tracker is off, and -ENOTRECOVERABLE: the report has every page.
 *
 * Nothing is taken, and the report is unchanged, if a pointer is refused (-EINVAL) and in
 * a callback of a source (-EDEADLK).
 *
 * # Safety
 *
 * Neither another thread nor a callback of a source uses the report.
 */
int vfio_dirty_tracker_take(const struct vfio_dirty_tracker *tracker,
                            struct vfio_dirty_report *report);

/**
 * Marks as dirty every page that the `len` bytes at guest-physical address `gpa` touch,
 * which may span slots. No bytes mark nothing. While the tracker is off, nothing is
 * marked. Call it after the write, and before you tell anybody that the write is done.
 *
 * It waits while a thread changes the slots. Through a slot's handle, marks wait for
 * nobody.
 *
 * -EOVERFLOW if the addresses wrap; nothing is marked then. -EINVAL if some of the
 * bytes are in no slot; the others are marked all the same.
 *
 * # Safety
 *
 * `tracker` is a tracker.
 */
int vfio_dirty_tracker_mark(const struct vfio_dirty_tracker *tracker,
                            uint64_t gpa,
                            uint64_t len);

/**
 * Marks as dirty every page that the `len` bytes at byte `offset` of the slot touch. No
 * bytes mark nothing. While the tracker is off, nothing is marked. Call it after the
 * write, and before you tell anybody that the write is done.
 *
 * -ESTALE if the slot was removed. -EINVAL if some of the bytes are beyond the slot's end;
 * the others are marked all the same.
 *
 * # Safety
 *
 * `slot` is a slot.
 */
int vfio_dirty_slot_mark(const struct vfio_dirty_slot *slot, uint64_t offset, uint64_t len);

/**
 * Marks the pages whose bits are set: bit k % 64 of word k / 64 is page k of 4 KiB of
 * the slot. Bits beyond its last page are ignored. While the tracker is off, nothing is
 * marked.
 *
 * It takes a log that ends between two takes, as KVM's of a slot that is about to move.
 *
 * -EINVAL unless `nwords` is what the slot's pages need. -ESTALE if the slot was removed.
 *
 * # Safety
 *
 * `words` has `nwords` words.
 */
int vfio_dirty_slot_mark_bitmap(const struct vfio_dirty_slot *slot,
                                const uint64_t *words,
                                size_t nwords);

/**
 * Frees a handle to a slot. The slot stays. NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the handle any more.
 */
void vfio_dirty_slot_free(struct vfio_dirty_slot *slot);

/**
 * Creates a report without slots; the first take gives it slots.
 *
 * # Safety
 *
 * There is room for a pointer at `report`.
 */
int vfio_dirty_report_new(struct vfio_dirty_report **report);

/**
 * Frees a report. NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the report or its words any more.
 */
void vfio_dirty_report_free(struct vfio_dirty_report *report);

/**
 * Stores the number of dirty pages of 4 KiB.
 *
 * # Safety
 *
 * No thread changes the report meanwhile.
 */
int vfio_dirty_report_pages(const struct vfio_dirty_report *report, uint64_t *pages);

/**
 * Stores where the bitmap of slot `id` is, and how many words it has: bit k % 64 of
 * word k / 64 is page k of 4 KiB of the slot. No bit beyond its last page is set.
 *
 * The words stay there until the report is cleared or freed, or taken into again.
 *
 * -EINVAL if the report has no such slot.
 *
 * # Safety
 *
 * No thread changes the report meanwhile.
 */
int vfio_dirty_report_slot(const struct vfio_dirty_report *report,
                           uint32_t id,
                           const uint64_t **words,
                           size_t *nwords);

/**
 * ORs the dirty pages of slot `id` into `words`, in pages of `pgsize` bytes, which may
 * be any power of two. Bit 0 is the page that holds the slot's first byte, also where
 * the slot starts inside that page.
 *
 * -EINVAL, in this order: `pgsize` is no power of two, the report has no such slot, or
 * `nwords` is too few. Nothing changes then.
 *
 * # Safety
 *
 * `words` has `nwords` words, which have values. No thread changes the report meanwhile.
 */
int vfio_dirty_report_bitmap(const struct vfio_dirty_report *report,
                             uint32_t id,
                             uint64_t pgsize,
                             uint64_t *words,
                             size_t nwords);

/**
 * Calls `visit` for each dirty range of guest-physical addresses, in their order. A
 * range consists of whole pages of `pgsize` bytes, which may be any power of two, cut
 * at the ends of its slot. Two ranges of one slot never touch.
 *
 * Returns 0, or what `visit` returned if that is not 0: no other range follows then.
 * -EINVAL if `pgsize` is no power of two or `visit` is NULL.
 *
 * # Safety
 *
 * `visit` may be called with `context`. No thread changes the report meanwhile.
 */
int vfio_dirty_report_ranges(const struct vfio_dirty_report *report,
                             uint64_t pgsize,
                             vfio_dirty_range_visit visit,
                             void *context);

/**
 * Makes every page clean. Call it when the copies of the pages have arrived: if a round
 * fails, do not clear it, and the next take adds to it.
 *
 * # Safety
 *
 * No other thread uses the report.
 */
int vfio_dirty_report_clear(struct vfio_dirty_report *report);

/**
 * Adds a source that has a log of its own by guest-physical address: KVM, the kernel's
 * page tables, a vhost-user device. Each take calls `read` with `context`. `name` is for
 * the text of an error, and is copied.
 *
 * Sources are called one after another, in the order in which they were added, by the
 * thread that takes or that removes the source.
 *
 * If `source` is not NULL, it gets a handle to the source.
 *
 * -EINVAL if `name` or `read` is NULL. -EDEADLK in a callback of a source.
 *
 * # Safety
 *
 * `read` and what `context` points to stay valid until `vfio_dirty_source_remove` or
 * `vfio_dirty_tracker_free` has returned. `read` returns: it neither throws nor longjmps
 * out of the call.
 */
int vfio_dirty_tracker_add_source(const struct vfio_dirty_tracker *tracker,
                                  const char *name,
                                  vfio_dirty_source_read read,
                                  void *context,
                                  struct vfio_dirty_source **source);

/**
 * Removes a source, as when its device is unplugged, and frees its handle. If the
 * tracker is on, the source is asked once more, and what it knows is in the next report.
 * Its callback is not called any more when this returns. NULL is ignored, and a tracker
 * that was freed is no error.
 *
 * Call it when the device has stopped to write, and before its log is closed.
 *
 * The errno of the source if it failed: it is removed all the same, and the next report
 * has what it would have after a take that failed so. -EDEADLK in a callback of a
 * source; nothing is removed or freed then.
 *
 * # Safety
 *
 * Nobody else uses the handle, and nobody uses it after this call if it returns anything
 * but -EDEADLK.
 */
int vfio_dirty_source_remove(struct vfio_dirty_source *source);

/**
 * ORs a slot's bitmap as KVM_GET_DIRTY_LOG returns it: bit k % 64 of word k / 64 is the
 * k-th page of the slot, in pages of the host's size. Bits beyond the slot's last page are
 * ignored.
 *
 * -EINVAL if there is no slot `id`, or unless `nwords` is what the slot's pages need.
 *
 * # Safety
 *
 * `words` has `nwords` words.
 */
int vfio_dirty_gpa_sink_or_slot(struct vfio_dirty_gpa_sink *sink,
                                uint32_t id,
                                const uint64_t *words,
                                size_t nwords);

/**
 * ORs an entry of KVM's dirty ring: page `page` of slot `id`, in pages of the host's size,
 * which are the entry's `offset` and `slot`. Reset the ring after the entries are taken.
 *
 * -EINVAL if there is no slot `id`, or if the page is beyond its end.
 *
 * # Safety
 *
 * `sink` is the callback's.
 */
int vfio_dirty_gpa_sink_or_page(struct vfio_dirty_gpa_sink *sink, uint32_t id, uint64_t page);

/**
 * ORs a bitmap by guest-physical address: bit k % 64 of word k / 64 is the page of
 * `pgsize` bytes at `gpa + k * pgsize`. A dirty page makes every page of a slot dirty
 * that shares a byte with it.
 *
 * Errors, in this order:
 *
 * - -EINVAL unless `pgsize` is a power of two and `gpa` a multiple of it.
 * - -EOVERFLOW if the pages go beyond the last address.
 * - -EINVAL if a dirty page shares no byte with a slot; the other pages are taken all
 *   the same.
 *
 * # Safety
 *
 * `words` has a bit for each of the `npages` pages, in whole words.
 */
int vfio_dirty_gpa_sink_or_bitmap(struct vfio_dirty_gpa_sink *sink,
                                  const uint64_t *words,
                                  uint64_t gpa,
                                  uint64_t npages,
                                  uint64_t pgsize);

/**
 * ORs every page that the `size` bytes at guest-physical address `gpa` touch. No bytes
 * change nothing.
 *
 * -EOVERFLOW if the addresses wrap. -EINVAL if some of the bytes are in no slot; the
 * others are taken all the same.
 *
 * # Safety
 *
 * `sink` is the callback's.
 */
int vfio_dirty_gpa_sink_or_range(struct vfio_dirty_gpa_sink *sink, uint64_t gpa, uint64_t size);

/**
 * As `vfio_dirty_gpa_sink_or_range`, for the `size` bytes at `host` in this process. A
 * `page_region` of PAGEMAP_SCAN is such a range, from its `start` to its `end`. Slots
 * without a host address do not count.
 *
 * # Safety
 *
 * `sink` is the callback's. `host` is only an address, and nothing is read there.
 */
int vfio_dirty_gpa_sink_or_host(struct vfio_dirty_gpa_sink *sink,
                                const void *host,
                                uint64_t size);

/**
 * ORs a bitmap by IOVA: bit k % 64 of word k / 64 is the page of `pgsize` bytes at
 * `iova + k * pgsize`. It is what VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT and
 * IOMMU_HWPT_GET_DIRTY_BITMAP return.
 *
 * -EINVAL unless `pgsize` is a power of two and `iova` a multiple of it. -EOVERFLOW if
 * the pages go beyond the last address. If a dirty page is neither in what the callback
 * was asked for nor mapped, the take fails with -EINVAL.
 *
 * # Safety
 *
 * `words` has a bit for each of the `npages` pages, in whole words.
 */
int vfio_dirty_iova_sink_or_bitmap(struct vfio_dirty_iova_sink *sink,
                                   const uint64_t *words,
                                   uint64_t iova,
                                   uint64_t npages,
                                   uint64_t pgsize);

/**
 * ORs the pages that the `size` bytes at `iova` touch. No bytes change nothing.
 *
 * -EOVERFLOW if the IOVAs wrap.
 *
 * # Safety
 *
 * `sink` is the callback's.
 */
int vfio_dirty_iova_sink_or_range(struct vfio_dirty_iova_sink *sink,
                                  uint64_t iova,
                                  uint64_t size);

/**
 * Creates an empty view of the tracker's memory, for the devices behind one virtual
 * IOMMU domain. Without a virtual IOMMU, map each slot to its own address.
 *
 * # Safety
 *
 * There is room for a pointer at `view`.
 */
int vfio_dirty_view_new(const struct vfio_dirty_tracker *tracker,
                        struct vfio_dirty_view **view);

/**
 * Frees the handle to a view. Logs that were added with it keep the view's mappings.
 * NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the handle any more.
 */
void vfio_dirty_view_free(struct vfio_dirty_view *view);

/**
 * Maps `size` bytes of guest memory at guest-physical address `gpa` to the IOVAs from
 * `iova` on. The bytes may span slots, and some may be in no slot, as another device's
 * BAR is: what is written there is ignored.
 *
 * The mapping leads to the memory that is at `gpa` now, and stays with it when its slot
 * moves.
 *
 * Errors, in this order; nothing is mapped then:
 *
 * - -EINVAL unless all three are multiples of 4 KiB, or if `size` is 0.
 * - -EOVERFLOW if the IOVAs or the guest addresses wrap.
 * - -EEXIST if an IOVA is mapped already.
 *
 * # Safety
 *
 * `view` is a view.
 */
int vfio_dirty_view_map(const struct vfio_dirty_view *view,
                        uint64_t iova,
                        uint64_t gpa,
                        uint64_t size);

/**
 * Unmaps the `size` bytes of IOVAs from `iova` on, and stores how many of them were
 * mapped in `unmapped`, unless that is NULL. A mapping that reaches beyond the range
 * keeps the part outside. Pages that were marked through the mappings stay dirty. The
 * view remembers what is gone until every log was read.
 *
 * -EINVAL unless both are multiples of 4 KiB, or if `size` is 0. -EOVERFLOW if the IOVAs
 * wrap. Nothing is unmapped then.
 *
 * # Safety
 *
 * There is room for the answer at `unmapped`, or it is NULL.
 */
int vfio_dirty_view_unmap(const struct vfio_dirty_view *view,
                          uint64_t iova,
                          uint64_t size,
                          uint64_t *unmapped);

/**
 * As `vfio_dirty_view_unmap`, with the dirty pages of the range, which are marked first:
 * those that VFIO_IOMMU_UNMAP_DMA returned, or that a log had which was read between two
 * takes. Bit k % 64 of word k / 64 is the page of `pgsize` bytes at `iova + k * pgsize`.
 *
 * Errors, in this order; nothing is marked or unmapped then:
 *
 * - -EINVAL unless `pgsize` is a power of two and `size` a multiple of it.
 * - As `vfio_dirty_view_unmap`.
 * - -EINVAL unless `iova` is a multiple of `pgsize`.
 *
 * # Safety
 *
 * `words` has a bit for each of the `size / pgsize` pages, in whole words.
 */
int vfio_dirty_view_unmap_dirty(const struct vfio_dirty_view *view,
                                uint64_t iova,
                                uint64_t size,
                                const uint64_t *words,
                                uint64_t pgsize,
                                uint64_t *unmapped);

/**
 * Marks as dirty every page that the `len` bytes at IOVA `iova` touch, which may span
 * mappings. No bytes mark nothing. While the tracker is off, nothing is marked. Call it
 * after the write, and before you tell anybody that the write is done.
 *
 * -EOVERFLOW if the IOVAs wrap; nothing is marked then. -EINVAL if some of the bytes are
 * in no mapping, and -ESTALE if the slot behind some was removed and no other slot came to
 * its address; the others are marked all the same.
 *
 * # Safety
 *
 * `view` is a view.
 */
int vfio_dirty_view_mark(const struct vfio_dirty_view *view, uint64_t iova, uint64_t len);

/**
 * Adds a log by IOVA that somebody else keeps, for the devices behind the view: VFIO's
 * DMA logging, iommufd's dirty tracking, the kernel's type1 container, a vfio-user
 * device. Each take calls `read` with `context`, and translates what it has, also what
 * was written through mappings that are gone. `name` is for the text of an error, and is
 * copied.
 *
 * Ranges that are at most `gap` bytes apart are asked for in one: 0 asks for as little
 * as possible, and more saves system calls.
 *
 * Add the log before its device can write. If `source` is not NULL, it gets a handle.
 *
 * -EINVAL if `name` or `read` is NULL, or if the tracker was freed. -EDEADLK in a
 * callback of a source.
 *
 * # Safety
 *
 * As `vfio_dirty_tracker_add_source`.
 */
int vfio_dirty_view_add_log(const struct vfio_dirty_view *view,
                            const char *name,
                            uint64_t gap,
                            vfio_dirty_log_read read,
                            void *context,
                            struct vfio_dirty_source **source);

/**
 * Adds a device's log of this library as a source, for a device that marks in its log
 * alone. Nobody else should read the log meanwhile, because a report clears what it has.
 * Start the log before the tracker, for all that the view maps, and stop it after the
 * tracker: otherwise takes fail with -EINVAL, and all memory behind the view is dirty.
 *
 * The source keeps the log alive, also after `vfio_dirty_device_log_free`.
 *
 * -EINVAL if `name` is NULL, or if the tracker was freed. -EDEADLK in a callback of a
 * source.
 *
 * # Safety
 *
 * `name` is a string of C. There is room for a pointer at `source`, or it is NULL.
 */
int vfio_dirty_view_add_device_log(const struct vfio_dirty_view *view,
                                   const char *name,
                                   const struct vfio_dirty_device_log *log,
                                   struct vfio_dirty_source **source);

/**
 * Adds a container of this library as a source, for devices that write through it.
 * Nobody else should read the container's bitmaps meanwhile, because a report clears
 * what it has. Start its dirty tracking before the tracker, and stop it after the
 * tracker: otherwise takes fail with -EINVAL, and all memory behind the view is dirty.
 *
 * What VFIO_IOMMU_UNMAP_DMA forgets is lost: unmap with
 * VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, and give its bitmap to
 * `vfio_dirty_view_unmap_dirty`.
 *
 * The source keeps the container alive, also after `vfio_dirty_container_free`.
 *
 * -EINVAL if `name` is NULL, or if the tracker was freed. -EDEADLK in a callback of a
 * source.
 *
 * # Safety
 *
 * `name` is a string of C. There is room for a pointer at `source`, or it is NULL.
 */
int vfio_dirty_view_add_container(const struct vfio_dirty_view *view,
                                  const char *name,
                                  const struct vfio_dirty_container *container,
                                  struct vfio_dirty_source **source);

/**
 * Creates a log that is off and has no ranges. NULL for `options` is all zero.
 *
 * -EINVAL if `argsz` is too small, or if a flag is unknown.
 *
 * # Safety
 *
 * `options` is NULL or has `argsz` bytes. There is room for a pointer at `log`.
 */
int vfio_dirty_device_log_new(const struct vfio_dirty_device_log_options *options,
                              struct vfio_dirty_device_log **log);

/**
 * Frees the handle to a log. A source that has the log keeps it. NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the handle any more.
 */
void vfio_dirty_device_log_free(struct vfio_dirty_device_log *log);

/**
 * Adds the `size` bytes of IOVAs from `iova` on, which the device gets mapped, whether
 * the log is on or off. Call it before the device can reach them. If the log is on, the
 * range is logged from now on, and it is clean. A device that does not know its map adds
 * once all that it may ever write.
 *
 * Errors, in this order; nothing changes then:
 *
 * - -EINVAL unless both are multiples of 4 KiB, or if `size` is 0.
 * - -EOVERFLOW if the IOVAs wrap.
 * - -EEXIST if another range has some of them.
 * - -ENOMEM, if the log is on, beyond the budget, or if there is no memory.
 *
 * # Safety
 *
 * `log` is a log.
 */
int vfio_dirty_device_log_add_range(const struct vfio_dirty_device_log *log,
                                    uint64_t iova,
                                    uint64_t size);

/**
 * Removes the range that starts at `iova` and has `size` bytes. Call it when the device
 * can no longer reach them. If the log is on, the dirty pages of the range stay until a
 * report has had them.
 *
 * Errors, in this order; nothing changes then:
 *
 * - -EINVAL if `size` is 0.
 * - -EOVERFLOW if the IOVAs wrap.
 * - -ENOENT if there is no range with exactly these bounds.
 *
 * # Safety
 *
 * `log` is a log.
 */
int vfio_dirty_device_log_remove_range(const struct vfio_dirty_device_log *log,
                                       uint64_t iova,
                                       uint64_t size);

/**
 * Switches the log on for what is mapped, or will be, in the `nranges` ranges of IOVAs
 * at `ranges`. NULL and 0 log all that is mapped or will be. Every page is clean.
 *
 * `pgsize` is a hint, in bytes: the log's pages have this size, or 4 KiB if it is
 * smaller.
 *
 * Errors, in this order; nothing changes then:
 *
 * - -EINVAL if there are no ranges at an address that is not NULL.
 * - -E2BIG if there are more than 256 ranges.
 * - -EINVAL unless `pgsize` is a power of two.
 * - For one range after the other: -EINVAL unless its first IOVA and its length are
 *   multiples of `pgsize`, or if it has no bytes; -EOVERFLOW if it wraps; -EINVAL if it
 *   overlaps one before it.
 * - -EINVAL if the log is on.
 * - -ENOMEM beyond the budget, or if there is no memory.
 *
 * # Safety
 *
 * There are `nranges` ranges.
 */
int vfio_dirty_device_log_start(const struct vfio_dirty_device_log *log,
                                const struct vfio_dirty_range *ranges,
                                size_t nranges,
                                uint64_t pgsize);

/**
 * Switches the log off, and forgets what was dirty. The ranges stay. A log that is off
 * may be stopped.
 *
 * # Safety
 *
 * `log` is a log.
 */
int vfio_dirty_device_log_stop(const struct vfio_dirty_device_log *log);

/**
 * Marks as dirty every page that the `len` bytes at IOVA `iova` touch, which may span
 * ranges. No bytes mark nothing, and neither do bytes that the log was not started for.
 * Call it after the write, and before you tell anybody that the write is done.
 *
 * Errors, in this order:
 *
 * - -EOVERFLOW if the IOVAs wrap; nothing is marked then.
 * - -EINVAL if the log is off.
 * - -EINVAL if some of the bytes are in no range; the others are marked all the same.
 *
 * # Safety
 *
 * `log` is a log.
 */
int vfio_dirty_device_log_mark(const struct vfio_dirty_device_log *log,
                               uint64_t iova,
                               uint64_t len);

/**
 * ORs the dirty pages of the `size` bytes of IOVAs from `iova` on into `words`, and
 * makes them clean: bit k % 64 of word k / 64 is the page of `pgsize` bytes at
 * `iova + k * pgsize`. It is DMA_LOGGING_REPORT. Copy the pages after this call.
 *
 * Errors, in this order. Nothing is cleared then, and every page of the report counts as
 * dirty:
 *
 * - -EINVAL unless `pgsize` is a power of two of at least 4 KiB, or if `size` is 0.
 * - -EOVERFLOW if the IOVAs wrap.
 * - -EINVAL unless `iova` is a multiple of `pgsize`, or if `nwords` is too few, or if the
 *   log is off or was not started for an IOVA.
 * - -EINVAL if an IOVA is not mapped, without VFIO_DIRTY_LOG_HOLES_CLEAN.
 *
 * # Safety
 *
 * `words` has `nwords` words, which have values.
 */
int vfio_dirty_device_log_report(const struct vfio_dirty_device_log *log,
                                 uint64_t iova,
                                 uint64_t size,
                                 uint64_t pgsize,
                                 uint64_t *words,
                                 size_t nwords);

/**
 * Answers an ioctl as the kernel would: VFIO_DEVICE_FEATURE of a device's file (the
 * features DMA_LOGGING_START, DMA_LOGGING_STOP and DMA_LOGGING_REPORT), and
 * IOMMU_HWPT_SET_DIRTY_TRACKING and IOMMU_HWPT_GET_DIRTY_BITMAP of an iommufd. `arg` is
 * the address of its structure.
 *
 * -ENOTTY for another ioctl or feature. A bad address is -EFAULT and no signal. The
 * other errors are those of the ioctl in Linux.
 *
 * # Safety
 *
 * The structure at `arg`, and the ranges and the bitmap that it names, are memory that
 * nobody else uses meanwhile, or addresses without memory.
 */
int vfio_dirty_device_log_ioctl(const struct vfio_dirty_device_log *log,
                                uint32_t nr,
                                unsigned long arg);

/**
 * Creates a container without groups and without an IOMMU type. Its bitmaps may take
 * `budget` bytes in all, or any amount if that is 0.
 *
 * # Safety
 *
 * There is room for a pointer at `container`.
 */
int vfio_dirty_container_new(uint64_t budget, struct vfio_dirty_container **container);

/**
 * Frees the handle to a container. Devices and sources that have the container keep it.
 * NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the handle any more.
 */
void vfio_dirty_container_free(struct vfio_dirty_container *container);

/**
 * Adds group `id` of emulated devices: there is no IOMMU behind it, and its devices read
 * and write through the container. Add one before VFIO_SET_IOMMU.
 *
 * -EINVAL if the container has the group already. -EBUSY while the vaddr of a mapping is
 * invalid. -ENOMEM.
 *
 * # Safety
 *
 * `container` is a container.
 */
int vfio_dirty_container_add_emulated_group(const struct vfio_dirty_container *container,
                                            uint32_t id);

/**
 * Answers an ioctl of the container's file as Linux does. `arg` is a value for
 * VFIO_CHECK_EXTENSION and VFIO_SET_IOMMU, and otherwise the address of a structure of
 * linux/vfio.h.
 *
 * Returns what the ioctl returns: VFIO_API_VERSION, whether there is the extension, or 0.
 * A bad address is -EFAULT and no signal. The other errors are those of the ioctl in
 * Linux; nothing is cleared or unmapped then. Pages have the host's size, which
 * VFIO_IOMMU_GET_INFO tells.
 *
 * # Safety
 *
 * - The structure at `arg` and the bitmap that it names are memory that nobody else uses
 *   meanwhile, or addresses without memory.
 * - VFIO_IOMMU_MAP_DMA lets devices use the memory at its vaddr, from any thread, until
 *   it is unmapped. If it goes before, devices get -EFAULT; it must not be used for
 *   anything else then.
 */
int vfio_dirty_container_ioctl(const struct vfio_dirty_container *container,
                               uint32_t nr,
                               unsigned long arg);

/**
 * Opens a device of group `group`. The group may have any number of them.
 *
 * -EINVAL if no IOMMU type is set, or if the container does not have the group. -ENOMEM.
 *
 * # Safety
 *
 * There is room for a pointer at `device`.
 */
int vfio_dirty_container_open_device(const struct vfio_dirty_container *container,
                                     uint32_t group,
                                     struct vfio_dirty_device **device);

/**
 * Closes a device and frees its handle. NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the device any more.
 */
void vfio_dirty_device_close(struct vfio_dirty_device *device);

/**
 * Reads `len` bytes at IOVA `iova` into `data`, as the device would.
 *
 * -EINVAL if `len` is 0. -EBUSY while the vaddr of a mapping is invalid. For the first
 * mapping that fails: -EINVAL if there is none, -EPERM unless it allows reads, -EFAULT if
 * its memory has gone or its process has forked.
 *
 * # Safety
 *
 * `data` has room for `len` bytes.
 */
int vfio_dirty_device_read(const struct vfio_dirty_device *device,
                           uint64_t iova,
                           void *data,
                           size_t len);

/**
 * Writes `len` bytes from `data` at IOVA `iova`, as the device would, and marks the
 * pages.
 *
 * Errors as `vfio_dirty_device_read`, but -EPERM unless the mapping allows reads and
 * writes, as in Linux. The bytes before the error are written and marked.
 *
 * # Safety
 *
 * `data` has `len` bytes.
 */
int vfio_dirty_device_write(const struct vfio_dirty_device *device,
                            uint64_t iova,
                            const void *data,
                            size_t len);

/**
 * Marks as dirty every page that the `size` bytes at IOVA `iova` touch, which the device
 * has written by itself. While tracking is off, nothing is marked. Call it after the
 * write, and before you tell anybody that the write is done.
 *
 * Errors, in this order:
 *
 * - -EINVAL if `size` is 0. -EOVERFLOW if the IOVAs wrap. Nothing is marked then.
 * - -EINVAL if the container has no group any more, or if some of the bytes are in no
 *   mapping; the others are marked all the same.
 *
 * # Safety
 *
 * `device` is a device.
 */
int vfio_dirty_device_mark(const struct vfio_dirty_device *device,
                           uint64_t iova,
                           uint64_t size);

/**
 * Saves the tracker as bytes, from which vfio_dirty_tracker_restore() goes on in another
 * process: a live upgrade of the VMM in the middle of a migration. docs/live-upgrade.md of
 * the project has the whole order of steps.
 *
 * Before the call, stop everything that marks or maps in this process: CPUs, devices, the
 * VMM's own threads. What they mark after it is not in the bytes. A device that has its
 * log elsewhere may go on writing, as long as its mappings stay.
 *
 * The call asks every source once more, as a take does. If one fails, what would count as
 * dirty in a take is dirty in the bytes, and the save does not fail. `undelivered` is the
 * report of the migration, whose pages have not arrived and are in the bytes; it stays as
 * it is. Give NULL if there is none. What it has of removed slots is not in the bytes.
 *
 * The tracker stays as it is and keeps all that is dirty, so the migration can go on here
 * if the new process does not start.
 *
 * Errors, in this order; the tracker keeps what the sources told:
 *
 * - -EDEADLK in a callback of a source.
 * - -EINVAL if the report is one of another tracker.
 * - -ENOMEM if there is no memory for the bytes.
 *
 * # Safety
 *
 * No thread changes the report meanwhile. There is room for a pointer at `saved`.
 */
int vfio_dirty_tracker_save(const struct vfio_dirty_tracker *tracker,
                            const struct vfio_dirty_report *undelivered,
                            struct vfio_dirty_saved **saved);

/**
 * Stores where the bytes of a saved tracker are, and how many. They stay there until
 * `vfio_dirty_saved_free`. Put them where the new process finds them, as in a memfd.
 *
 * # Safety
 *
 * `saved` is a saved tracker. There is room for the answers.
 */
int vfio_dirty_saved_bytes(const struct vfio_dirty_saved *saved,
                           const void **bytes,
                           size_t *nbytes);

/**
 * Frees the bytes of a saved tracker. NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the bytes any more.
 */
void vfio_dirty_saved_free(struct vfio_dirty_saved *saved);

/**
 * Goes on where the tracker was that vfio_dirty_tracker_save() made the `nbytes` bytes at
 * `bytes` of, in another process.
 *
 * Before the call, add the same slots to a new tracker, with their numbers, guest
 * addresses and sizes; host addresses may differ. Nothing may have written guest memory in
 * this process yet. The call switches the tracker on, if the saved one was on. A slot that
 * was not saved is dirty as a whole.
 *
 * After the call and before the first take, add each source of `restored` again, under its
 * name, and logs by IOVA with the view that `restored` has for them. A source that does not
 * come back is removed by its handle. Until then each take fails with -EIO, and has every
 * page, or all memory behind the view of a log. Map in the views what the devices have
 * mapped, before they write.
 *
 * Errors, in this order:
 *
 * - -EINVAL for a pointer, and -EDEADLK in a callback of a source. Nothing is restored
 *   then: a tracker that is off has every page in each take.
 * - -EINVAL if the bytes are damaged or incomplete, and -EOPNOTSUPP if they have another
 *   version of the format. **Every page is dirty then**, and the tracker is on. It has
 *   none of the saved sources or views. So the caller may go on with a round that sends
 *   all memory.
 * - -EINVAL if a saved slot is not in the tracker as it was. Every page is dirty then too.
 * - -EPERM if the kernel refuses membarrier(2), and -ENOTRECOVERABLE. The tracker is off
 *   then.
 *
 * # Safety
 *
 * There are `nbytes` bytes. There is room for a pointer at `restored`.
 */
int vfio_dirty_tracker_restore(const struct vfio_dirty_tracker *tracker,
                               const void *bytes,
                               size_t nbytes,
                               struct vfio_dirty_restored **restored);

/**
 * Stores what is known of source number `at` of the saved tracker, from 0 on, in the order
 * in which they were added. Each answer may be left out by NULL:
 *
 * - `name`: its name. The string stays there until `vfio_dirty_restored_free`.
 * - `view`: for a log by IOVA, a new handle to the view to add it with, and NULL for
 *   another source. Free it. The view has no mappings: make those that the devices have.
 *   It remembers the mappings of the old view until its logs were read.
 * - `source`: a new handle to remove it, if it does not come back.
 *
 * -ENOENT if there are not so many sources. A saved tracker that was off has none.
 *
 * # Safety
 *
 * `restored` is a restored tracker. There is room for each answer, or it is NULL.
 */
int vfio_dirty_restored_source(const struct vfio_dirty_restored *restored,
                               size_t at,
                               const char **name,
                               struct vfio_dirty_view **view,
                               struct vfio_dirty_source **source);

/**
 * Frees what a restore returned. The handles that were taken out of it stay. NULL is
 * ignored.
 *
 * # Safety
 *
 * Nobody uses it or its names any more.
 */
void vfio_dirty_restored_free(struct vfio_dirty_restored *restored);

/**
 * Stores what the tracker has, and what its last take found. It does not wait for a take
 * that is going on, so a callback of a source may call it.
 *
 * -EINVAL if `argsz` is too small.
 *
 * # Safety
 *
 * `stats` has `argsz` bytes.
 */
int vfio_dirty_tracker_stats(const struct vfio_dirty_tracker *tracker,
                             struct vfio_dirty_tracker_stats *stats);

/**
 * Calls `visit` for each source of the last take, in the order in which they were asked.
 * It is not called before the first take. `visit` may call anything but what frees the
 * tracker.
 *
 * Returns 0, or what `visit` returned if that is not 0: no other source follows then.
 * -EINVAL if `visit` is NULL.
 *
 * # Safety
 *
 * `visit` may be called with `context`.
 */
int vfio_dirty_tracker_source_stats(const struct vfio_dirty_tracker *tracker,
                                    vfio_dirty_source_stats_visit visit,
                                    void *context);

/**
 * Calls `visit` for each slot of the last take, sorted by address. It is not called
 * before the first take. `visit` may call anything but what frees the tracker.
 *
 * Returns 0, or what `visit` returned if that is not 0: no other slot follows then.
 * -EINVAL if `visit` is NULL.
 *
 * # Safety
 *
 * `visit` may be called with `context`.
 */
int vfio_dirty_tracker_slot_stats(const struct vfio_dirty_tracker *tracker,
                                  vfio_dirty_slot_stats_visit visit,
                                  void *context);

/**
 * Stores what the container has. It walks over the mappings.
 *
 * -EINVAL if `argsz` is too small, or if no IOMMU type is set.
 *
 * # Safety
 *
 * `stats` has `argsz` bytes.
 */
int vfio_dirty_container_stats(const struct vfio_dirty_container *container,
                               struct vfio_dirty_container_stats *stats);

/**
 * Stores what the log has.
 *
 * -EINVAL if `argsz` is too small.
 *
 * # Safety
 *
 * `stats` has `argsz` bytes.
 */
int vfio_dirty_device_log_stats(const struct vfio_dirty_device_log *log,
                                struct vfio_dirty_device_log_stats *stats);

/**
 * Creates a rate without samples, over the last `window_ns` nanoseconds. 0 has the last
 * two samples.
 *
 * # Safety
 *
 * There is room for a pointer at `rate`.
 */
int vfio_dirty_rate_new(uint64_t window_ns, struct vfio_dirty_rate **rate);

/**
 * Frees a rate. NULL is ignored.
 *
 * # Safety
 *
 * Nobody uses the rate any more.
 */
void vfio_dirty_rate_free(struct vfio_dirty_rate *rate);

/**
 * Records that `bytes` became dirty between the sample before and the time `at_ns`: 4096
 * times vfio_dirty_report_pages() of a report that was clear before the take. Of the first
 * sample only the time counts. A time that is not later than that of the sample before
 * adds its bytes to that sample.
 *
 * # Safety
 *
 * No other thread uses the rate.
 */
int vfio_dirty_rate_record(struct vfio_dirty_rate *rate, uint64_t at_ns, uint64_t bytes);

/**
 * Stores how many bytes became dirty in a second. -ENODATA before the second sample.
 *
 * # Safety
 *
 * No thread changes the rate meanwhile. There is room for the answer at `bytes`.
 */
int vfio_dirty_rate_bytes_per_second(const struct vfio_dirty_rate *rate, uint64_t *bytes);

/**
 * Estimates how a migration goes on that has `remaining` bytes to send, sends `bandwidth`
 * bytes a second, and may stop the guest for `limit_ns` nanoseconds. Each round sends what
 * became dirty in the round before.
 *
 * Pages that are written again and again become dirty less often than the rate of short
 * rounds says, and a round never has more than all memory. So a guest that writes the same
 * few pages may do better.
 *
 * -EINVAL if `argsz` is too small or `bandwidth` is 0. -ENODATA before the second sample.
 *
 * # Safety
 *
 * `estimate` has `argsz` bytes. No thread changes the rate meanwhile.
 */
int vfio_dirty_rate_estimate(const struct vfio_dirty_rate *rate,
                             uint64_t remaining,
                             uint64_t bandwidth,
                             uint64_t limit_ns,
                             struct vfio_dirty_estimate *estimate);

/**
 * Returns why the last call failed that returned an error on this thread, as a
 * sentence in English. It is "" if none did.
 *
 * The text stays until the next call on this thread that fails, or until the thread
 * ends. Calls that succeed leave it as it is, so ask only after an error.
 */
const char *vfio_dirty_error(void);

/**
 * Returns the version of the library, such as "0.1.0".
 */
const char *vfio_dirty_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* VFIO_DIRTY_H */
