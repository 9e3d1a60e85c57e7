// SPDX-License-Identifier: GPL-2.0-only
//! A module's entry, exit and description.

use crate::error::Result;

/// Where the kernel crate has the C structure of the module. Nothing here needs it.
pub struct ThisModule(());

impl ThisModule {
    pub const THIS: ThisModule = ThisModule(());
}

/// A module exists from its `init` until it is unloaded, when it is dropped.
pub trait Module: Sized + Send + Sync {
    fn init(module: &'static ThisModule) -> Result<Self>;
}

/// Declares the module. modpost finds `init_module` and `cleanup_module` by name, and
/// the description in the section `.modinfo`.
#[macro_export]
macro_rules! module {
    (
        type: $type:ty,
        name: $name:literal,
        authors: [$author:literal],
        description: $description:literal,
        license: $license:literal,
    ) => {
        $crate::modinfo!(AUTHOR, "author=", $author);
        $crate::modinfo!(DESCRIPTION, "description=", $description);
        $crate::modinfo!(LICENSE, "license=", $license);

        static mut MODULE: Option<$type> = None;

        #[no_mangle]
        extern "C" fn init_module() -> $crate::ffi::c_int {
            static THIS: $crate::ThisModule = $crate::ThisModule::THIS;
            match <$type as $crate::Module>::init(&THIS) {
                Ok(module) => {
                    // SAFETY: the kernel calls this once, and cleanup_module after it.
                    unsafe { *(&raw mut MODULE) = Some(module) };
                    0
                }
                Err(e) => e.to_errno(),
            }
        }

        #[no_mangle]
        extern "C" fn cleanup_module() {
            // SAFETY: as in `init_module`.
            unsafe { *(&raw mut MODULE) = None };
        }

        // The module's loader calls both by pointers. Without these, objtool would have
        // the kernel forbid that where indirect branches are tracked.
        #[used]
        #[link_section = ".init.data"]
        static INIT: extern "C" fn() -> $crate::ffi::c_int = init_module;
        #[used]
        #[link_section = ".exit.data"]
        static EXIT: extern "C" fn() = cleanup_module;
    };
}

/// A line of the module's description, which ends with a 0.
#[doc(hidden)]
#[macro_export]
macro_rules! modinfo {
    ($static:ident, $key:literal, $value:literal) => {
        #[used]
        #[link_section = ".modinfo"]
        static $static: [u8; concat!($key, $value, "\0").len()] = {
            // SAFETY: the array is as long as the text.
            unsafe { *concat!($key, $value, "\0").as_ptr().cast() }
        };
    };
}
