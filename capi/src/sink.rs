// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the callback of a source puts the dirty pages that it knows.

use adapter_user::guest::{DirtyIovas, Report};
use libc::{c_int, c_void};

use crate::border::border;
use crate::failure::Failure;
use crate::pointer::Pointers;
use crate::range::bitmap;

/// Takes dirty pages by guest-physical address. A source's callback gets one.
///
/// It exists until the callback returns, and is used by the callback's thread alone. If
/// a call on it fails, the source has failed, whatever the callback returns: a page may
/// be lost.
pub struct GpaSink<'a>(Sink<'a, Report>);

/// Takes dirty pages by IOVA. The callback of a log gets one.
///
/// It exists until the callback returns, and is used by the callback's thread alone. If
/// a call on it fails, the log has failed, whatever the callback returns: a page may be
/// lost.
pub struct IovaSink<'a>(Sink<'a, DirtyIovas>);

impl<'a> GpaSink<'a> {
    pub(crate) fn new(report: &'a mut Report) -> Self {
        GpaSink(Sink::new(report))
    }

    pub(crate) fn finish(self, rc: c_int) -> Result<(), Failure> {
        self.0.finish(rc)
    }
}

impl<'a> IovaSink<'a> {
    pub(crate) fn new(dirty: &'a mut DirtyIovas) -> Self {
        IovaSink(Sink::new(dirty))
    }

    pub(crate) fn finish(self, rc: c_int) -> Result<(), Failure> {
        self.0.finish(rc)
    }
}

struct Sink<'a, T> {
    into: &'a mut T,
    /// Why the first call failed that failed.
    failed: Option<Failure>,
}

impl<'a, T> Sink<'a, T> {
    fn new(into: &'a mut T) -> Self {
        Sink { into, failed: None }
    }

    fn or(&mut self, or: impl FnOnce(&mut T) -> Result<(), Failure>) -> Result<c_int, Failure> {
        let first = self.failed.take();
        // This stays if `or` panics.
        self.failed = Some(Failure::new(libc::ENOTRECOVERABLE, "a bug in vfio_dirty"));
        let result = or(self.into);
        self.failed = first.or_else(|| result.as_ref().err().cloned());
        result.map(|()| 0)
    }

    /// Whether all dirty pages were told: the callback has returned `rc`.
    fn finish(self, rc: c_int) -> Result<(), Failure> {
        match (self.failed, rc) {
            (Some(failed), _) => Err(failed),
            (None, 0) => Ok(()),
            (None, _) => Err(Failure::of_callback(rc)),
        }
    }
}

/// # Safety
///
/// As [`border`], for `sink` and what `or` uses.
unsafe fn or_gpa(
    sink: *mut GpaSink<'_>,
    or: impl FnOnce(&Pointers, &mut Report) -> Result<(), Failure>,
) -> c_int {
    // SAFETY: the caller promises it.
    unsafe { border(|c| c.handle_mut(sink, "sink")?.0.or(|report| or(c, report))) }
}

/// # Safety
///
/// As [`border`], for `sink` and what `or` uses.
unsafe fn or_iova(
    sink: *mut IovaSink<'_>,
    or: impl FnOnce(&Pointers, &mut DirtyIovas) -> Result<(), Failure>,
) -> c_int {
    // SAFETY: the caller promises it.
    unsafe { border(|c| c.handle_mut(sink, "sink")?.0.or(|dirty| or(c, dirty))) }
}

/// ORs a slot's bitmap as KVM_GET_DIRTY_LOG returns it: bit k % 64 of word k / 64 is the
/// k-th page of the slot, in pages of the host's size. Bits beyond the slot's last page are
/// ignored.
///
/// -EINVAL if there is no slot `id`, or unless `nwords` is what the slot's pages need.
///
/// # Safety
///
/// `words` has `nwords` words.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_gpa_sink_or_slot(
    sink: *mut GpaSink<'_>,
    id: u32,
    words: *const u64,
    nwords: usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        or_gpa(sink, |c, report| {
            Ok(report.or_slot(id, c.slice(words, nwords, "words")?)?)
        })
    }
}

/// ORs an entry of KVM's dirty ring: page `page` of slot `id`, in pages of the host's size,
/// which are the entry's `offset` and `slot`. Reset the ring after the entries are taken.
///
/// -EINVAL if there is no slot `id`, or if the page is beyond its end.
///
/// # Safety
///
/// `sink` is the callback's.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_gpa_sink_or_page(
    sink: *mut GpaSink<'_>,
    id: u32,
    page: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe { or_gpa(sink, |_, report| Ok(report.or_ring([(id, page)])?)) }
}

/// ORs a bitmap by guest-physical address: bit k % 64 of word k / 64 is the page of
/// `pgsize` bytes at `gpa + k * pgsize`. A dirty page makes every page of a slot dirty
/// that shares a byte with it.
///
/// Errors, in this order:
///
/// - -EINVAL unless `pgsize` is a power of two and `gpa` a multiple of it.
/// - -EOVERFLOW if the pages go beyond the last address.
/// - -EINVAL if a dirty page shares no byte with a slot; the other pages are taken all
///   the same.
///
/// # Safety
///
/// `words` has a bit for each of the `npages` pages, in whole words.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_gpa_sink_or_bitmap(
    sink: *mut GpaSink<'_>,
    words: *const u64,
    gpa: u64,
    npages: u64,
    pgsize: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        or_gpa(sink, |c, report| {
            let (words, extent) = bitmap(c, words, gpa, npages, pgsize)?;
            Ok(report.or_bitmap(words, extent)?)
        })
    }
}

/// ORs every page that the `size` bytes at guest-physical address `gpa` touch. No bytes
/// change nothing.
///
/// -EOVERFLOW if the addresses wrap. -EINVAL if some of the bytes are in no slot; the
/// others are taken all the same.
///
/// # Safety
///
/// `sink` is the callback's.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_gpa_sink_or_range(
    sink: *mut GpaSink<'_>,
    gpa: u64,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe { or_gpa(sink, |_, report| Ok(report.or_range(gpa, size)?)) }
}

/// As `vfio_dirty_gpa_sink_or_range`, for the `size` bytes at `host` in this process. A
/// `page_region` of PAGEMAP_SCAN is such a range, from its `start` to its `end`. Slots
/// without a host address do not count.
///
/// # Safety
///
/// `sink` is the callback's. `host` is only an address, and nothing is read there.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_gpa_sink_or_host(
    sink: *mut GpaSink<'_>,
    host: *const c_void,
    size: u64,
) -> c_int {
    let host = host.addr() as u64;
    // SAFETY: the caller keeps the contract.
    unsafe { or_gpa(sink, |_, report| Ok(report.or_host(host, size)?)) }
}

/// ORs a bitmap by IOVA: bit k % 64 of word k / 64 is the page of `pgsize` bytes at
/// `iova + k * pgsize`. It is what VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT and
/// IOMMU_HWPT_GET_DIRTY_BITMAP return.
///
/// -EINVAL unless `pgsize` is a power of two and `iova` a multiple of it. -EOVERFLOW if
/// the pages go beyond the last address. If a dirty page is neither in what the callback
/// was asked for nor mapped, the take fails with -EINVAL.
///
/// # Safety
///
/// `words` has a bit for each of the `npages` pages, in whole words.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_iova_sink_or_bitmap(
    sink: *mut IovaSink<'_>,
    words: *const u64,
    iova: u64,
    npages: u64,
    pgsize: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        or_iova(sink, |c, dirty| {
            let (words, extent) = bitmap(c, words, iova, npages, pgsize)?;
            Ok(dirty.or_bitmap(words, extent)?)
        })
    }
}

/// ORs the pages that the `size` bytes at `iova` touch. No bytes change nothing.
///
/// -EOVERFLOW if the IOVAs wrap.
///
/// # Safety
///
/// `sink` is the callback's.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_iova_sink_or_range(
    sink: *mut IovaSink<'_>,
    iova: u64,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe { or_iova(sink, |_, dirty| Ok(dirty.or_range(iova, size)?)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_fails_fails_the_source() {
        let mut report = Report::new();
        let mut sink = GpaSink::new(&mut report);
        // SAFETY: the sink is there, and no other pointer is.
        let rc = unsafe { vfio_dirty_gpa_sink_or_range(&mut sink, 0x1000, 1) };
        assert_eq!(rc, -libc::EINVAL);
        // SAFETY: as before.
        let rc = unsafe { vfio_dirty_gpa_sink_or_range(&mut sink, 0, 0) };
        assert_eq!(rc, 0);
        // SAFETY: as before.
        let rc = unsafe { vfio_dirty_gpa_sink_or_range(&mut sink, u64::MAX, 2) };
        assert_eq!(rc, -libc::EOVERFLOW);
        let failed = sink.finish(0).unwrap_err();
        assert_eq!(failed.errno, libc::EINVAL);
        assert_eq!(
            failed.text,
            "address 0x1000 is in no slot, mapping or range"
        );
    }

    #[test]
    fn a_panic_fails_the_source() {
        let mut dirty = DirtyIovas::default();
        let mut sink = IovaSink::new(&mut dirty);
        // SAFETY: the sink is there, and no other pointer is.
        let rc = unsafe { or_iova(&mut sink, |_, _| panic!("on purpose")) };
        assert_eq!(rc, -libc::ENOTRECOVERABLE);
        // SAFETY: as before.
        let rc = unsafe { vfio_dirty_iova_sink_or_range(&mut sink, 0, 1) };
        assert_eq!(rc, 0);
        assert_eq!(sink.finish(0).unwrap_err().errno, libc::ENOTRECOVERABLE);
    }

    #[test]
    fn what_a_callback_returns_is_an_errno() {
        for (rc, errno) in [
            (-1, 1),
            (-4095, 4095),
            (-4096, libc::EIO),
            (1, libc::EIO),
            (c_int::MIN, libc::EIO),
            (c_int::MAX, libc::EIO),
        ] {
            let mut report = Report::new();
            let failed = GpaSink::new(&mut report).finish(rc).unwrap_err();
            assert_eq!(failed.errno, errno, "{rc}");
        }
    }
}
