/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Tests the C interface as a program that has the header and pkg-config, and no more. */
#include "check.h"

int main(void) {
    CHECK(strcmp(vfio_dirty_error(), "") == 0);
    CHECK(strcmp(vfio_dirty_version(), VERSION) == 0);
    test_tracker();
    test_sources();
    test_views();
    test_device_log();
    test_container();
    test_saved();
    test_stats();
    test_threads();
    puts("the C interface does what its header says");
    return 0;
}
