// SPDX-License-Identifier: GPL-2.0-only
//! The kernel's log.

extern "C" {
    fn dirty_warn(text: *const u8, len: usize);
}

/// Logs a text with the module's name before it.
pub fn warn(text: &str) {
    // SAFETY: `text` has so many bytes.
    unsafe { dirty_warn(text.as_ptr(), text.len()) };
}

/// Takes a text only: the module formats nothing.
#[macro_export]
macro_rules! pr_warn {
    ($text:literal) => {
        $crate::warn($text)
    };
}
