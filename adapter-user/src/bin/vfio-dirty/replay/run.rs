// SPDX-License-Identifier: MIT OR Apache-2.0
//! One operation at a time: run, and answered in the recordings' form.

use std::io::{self, Write};
use std::sync::atomic::Ordering;

use adapter_user::uapi::*;
use adapter_user::{charged_pages, Errno};
use nix::sys::mman::ProtFlags;
use nix::sys::resource::{setrlimit, Resource};

use super::arena;
use super::machine::Machine;
use super::process;
use super::script::{Bitmap, Case, Op, BIGB, BUF, BUF_SIZE, DEVICES, HOLE, HUGE, MEM};

/// Runs the lines of one case in this process.
pub(crate) fn case(case: &Case, out: &mut impl Write) -> io::Result<()> {
    let mut machine = Machine::new(case.entry_limit);
    for line in &case.lines {
        machine.out = format!("  {}", line.echo);
        op(&mut machine, &line.op);
        machine.out.push('\n');
        out.write_all(machine.out.as_bytes())?;
    }
    machine.close_all();
    out.flush()
}

/// C's `%#x`: no prefix before 0.
fn alternate(value: u64) -> String {
    if value == 0 {
        "0".into()
    } else {
        format!("{value:#x}")
    }
}

fn op(m: &mut Machine, op: &Op) {
    match *op {
        Op::New {
            ref devices,
            kind,
            set,
        } => {
            m.open();
            let mut kind = set.then_some(kind);
            for index in devices {
                if m.attach(*index, kind) {
                    kind = None;
                    if set && !DEVICES[*index].starts_with("pci") {
                        m.get_device(*index);
                    }
                }
            }
        }
        Op::SetIommu(kind) => {
            let answer = m.ioctl(VFIO_SET_IOMMU, kind);
            m.answer(answer);
        }
        Op::Attach { device, open } => {
            if m.attach(device, None) {
                m.say(format_args!(" ok"));
                if open {
                    m.get_device(device);
                }
            }
        }
        Op::Detach(device) => {
            let answer = m.detach(device);
            m.answer(answer);
        }
        Op::CloseDevice(device) => m.close_device(device),
        Op::GetDevice(device) => m.get_device(device),
        Op::Info { argsz, null } => info(m, argsz, null),
        Op::Ext(n) => {
            let answer = m.ioctl(VFIO_CHECK_EXTENSION, n);
            m.answer(answer);
        }
        Op::Raw { nr, arg } => {
            let answer = m.ioctl(nr, arg);
            m.answer(answer);
        }
        Op::Map {
            argsz,
            flags,
            vaddr,
            iova,
            size,
            ptr,
        } => {
            let arg = &mut words([pair(argsz, flags), vaddr, iova, size]);
            let answer = m.ioctl_with(VFIO_IOMMU_MAP_DMA, arg, ptr);
            m.answer(answer);
        }
        Op::Unmap {
            argsz,
            flags,
            iova,
            size,
            bitmap: b,
            ptr,
        } => {
            let fields = [pair(argsz, flags), iova, size, b.pgsize, b.bsize, b.data];
            let arg = &mut words(fields);
            if flags & 1 != 0 {
                m.fill(b.fill, b.bsize);
            }
            let answer = m.ioctl_with(VFIO_IOMMU_UNMAP_DMA, arg, ptr);
            m.answer(answer);
            m.say(format_args!(" size={}", alternate(word(arg, 16))));
            if flags & 1 != 0 {
                m.dump(b.data, b.bsize, b.dump);
            }
        }
        Op::Dirty { argsz, flags, ptr } => {
            let arg = &mut words([pair(argsz, flags)]);
            let answer = m.ioctl_with(VFIO_IOMMU_DIRTY_PAGES, arg, ptr);
            m.answer(answer);
        }
        Op::Get {
            argsz,
            flags,
            iova,
            size,
            bitmap,
            ptr,
            hdrend,
        } => get(m, [pair(argsz, flags), iova, size], bitmap, ptr, hdrend),
        Op::Pin {
            device,
            iova,
            n,
            prot,
        } => {
            let ret = m.pin(device, iova, n, prot);
            returned(m, ret);
        }
        Op::Unpin { device, iova, n } => {
            let ret = m.unpin(device, iova, n);
            returned(m, ret);
        }
        Op::Rw {
            device,
            iova,
            len,
            write,
            kthread,
            fork,
        } => {
            if fork {
                match process::in_child(|| m.rw(device, iova, len, write, kthread)) {
                    Ok(0) => m.say(format_args!(" child=0 ")),
                    Ok(ret) => m.say(format_args!(" child={ret} {}", Errno(-ret))),
                    Err(e) => m.answer(Err(e)),
                }
                return;
            }
            let ret = m.rw(device, iova, len, write, kthread);
            returned(m, ret);
        }
        Op::NoUnpin { device, on } => {
            let answer = m.device(device).map(|(_, driver)| {
                driver.no_unpin.store(on, Ordering::Relaxed);
                0
            });
            m.answer(answer);
        }
        Op::Stat(device) => {
            let stat = m.driver(device).stat();
            let (iova, size) = stat.last;
            let (calls, pinned) = (stat.unmap_calls, stat.pins.len());
            drop(stat);
            m.say(format_args!(
                " => dma_unmap_calls={calls} last={}+{} pinned={pinned}",
                alternate(iova),
                alternate(size)
            ));
        }
        Op::MemLock { limit, keep_cap } => memlock(m, limit, keep_cap),
        Op::VmLck => m.say(format_args!(" => {} kB", charged_pages() * 4)),
        Op::EntryLimit(limit) => m.entry_limit = limit,
        Op::HugeMem => mapped(m, HUGE, 1 << 46, ProtFlags::PROT_READ),
        Op::BigBuf { size } => {
            mapped(m, BIGB, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        }
        Op::Peek(addr) => {
            let mut byte = [0];
            match arena::read(addr, &mut byte) {
                Ok(()) => m.say(format_args!(" => {:02x}", byte[0])),
                Err(_) => m.say(format_args!(" => EFAULT")),
            }
        }
        Op::Poke { addr, value } => {
            if arena::write(addr, &[value]).is_err() {
                m.say(format_args!(" => EFAULT"));
            }
        }
        Op::MapN { n, stride, iova } => {
            let mut done = 0;
            let mut answer = Ok(0);
            while done < n {
                let at = iova.wrapping_add(stride.wrapping_mul(done));
                let arg = &mut words([pair(32, 3), MEM, at, 4096]);
                answer = m.ioctl_with(VFIO_IOMMU_MAP_DMA, arg, None);
                if answer.is_err() {
                    break;
                }
                done += 1;
            }
            m.say(format_args!(" done={done}"));
            m.answer(answer);
        }
    }
}

/// Two 32-bit fields that share a word.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// The bytes of a structure that is made of 64-bit words.
fn words<const N: usize>(words: [u64; N]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// The 64-bit word at a byte offset; zero beyond the end.
fn word(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_ne_bytes(field.unwrap_or_default())
}

/// Likewise, 32 bits.
fn half(bytes: &[u8], at: usize) -> u32 {
    word(bytes, at & !7).wrapping_shr(8 * (at as u32 & 4)) as u32
}

/// Appends what a call inside the kernel returned.
fn returned(m: &mut Machine, ret: Result<i32, Errno>) {
    match ret {
        Ok(ret) if ret < 0 => m.say(format_args!(" => ret={ret} {}", Errno(-ret))),
        Ok(ret) => m.say(format_args!(" => ret={ret}")),
        Err(e) => m.answer(Err(e)),
    }
}

fn get(m: &mut Machine, head: [u64; 3], b: Bitmap, ptr: Option<u64>, hdrend: Option<u64>) {
    let [flags, iova, size] = head;
    let arg = &mut words([flags, iova, size, b.pgsize, b.bsize, b.data]);
    m.fill(b.fill, b.bsize);
    let answer = match hdrend {
        Some(len) => {
            let at = BUF + BUF_SIZE - len;
            // The buffer is mapped: see `arena::map_all`.
            let _ = arena::write(at, &arg[..len as usize]);
            m.ioctl(VFIO_IOMMU_DIRTY_PAGES, at)
        }
        None => m.ioctl_with(VFIO_IOMMU_DIRTY_PAGES, arg, ptr),
    };
    m.answer(answer);
    m.dump(b.data, b.bsize, b.dump);
}

fn info(m: &mut Machine, argsz: u32, null: bool) {
    let mut arg = vec![0xee; 4096];
    arg[..4].copy_from_slice(&argsz.to_ne_bytes());
    let answer = m.ioctl_with(VFIO_IOMMU_GET_INFO, &mut arg, null.then_some(HOLE));
    m.answer(answer);
    if answer.is_err() {
        return;
    }
    let (needed, flags, cap_offset) = (half(&arg, 0), half(&arg, 4), half(&arg, 16));
    let (flags_text, pgsizes) = (alternate(flags.into()), alternate(word(&arg, 8)));
    m.say(format_args!(
        " argsz={needed} flags={flags_text} pgsizes={pgsizes}"
    ));
    if argsz >= 20 {
        m.say(format_args!(" cap_offset={cap_offset}"));
    }
    if argsz < 24 || flags & VFIO_IOMMU_INFO_CAPS == 0 || argsz < needed {
        return;
    }
    let mut at = cap_offset as usize;
    for _ in 0..10 {
        if at == 0 {
            break;
        }
        at = capability(m, &arg, at);
    }
}

/// Appends the capability at `at`; returns where the next one is.
fn capability(m: &mut Machine, arg: &[u8], at: usize) -> usize {
    let (id, version) = (half(arg, at) as u16, half(arg, at) >> 16);
    m.say(format_args!(" cap@{at}{{id={id} ver={version}"));
    match id {
        VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
            for k in 0..half(arg, at + 8) as usize {
                let (start, end) = (word(arg, at + 16 + 16 * k), word(arg, at + 24 + 16 * k));
                m.say(format_args!(" {start:x}-{end:x}"));
            }
        }
        VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
            let (pgsizes, max) = (alternate(word(arg, at + 16)), alternate(word(arg, at + 24)));
            m.say(format_args!(
                " flags={} pgsize_bitmap={pgsizes} max_dirty_bitmap_size={max}",
                half(arg, at + 8)
            ));
        }
        VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
            m.say(format_args!(" avail={}", half(arg, at + 8)));
        }
        _ => {}
    }
    m.say(format_args!("}}"));
    half(arg, at + 4) as usize
}

/// Sets the limit of locked memory, and gives up the right to exceed it.
fn memlock(m: &mut Machine, limit: u64, keep_cap: bool) {
    if let Err(e) = setrlimit(Resource::RLIMIT_MEMLOCK, limit, limit) {
        m.say(format_args!(" setrlimit={e}"));
    }
    if !keep_cap {
        for set in [
            caps::CapSet::Effective,
            caps::CapSet::Inheritable,
            caps::CapSet::Permitted,
        ] {
            if let Err(e) = caps::drop(None, set, caps::Capability::CAP_IPC_LOCK) {
                m.say(format_args!(" capset={e}"));
            }
        }
    }
}

/// Maps memory and says how it went.
fn mapped(m: &mut Machine, addr: u64, size: u64, prot: ProtFlags) {
    match arena::map(addr, size, prot) {
        Ok(()) => m.say(format_args!(" => ok")),
        Err(e) => m.say(format_args!(" => {}", Errno(e as i32))),
    }
}
