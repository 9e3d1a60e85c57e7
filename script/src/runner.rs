// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs operations on a system: writes the arguments of ioctls into user
//! memory, makes the call, and reads what it left there.

use std::fmt::Write as _;

use dirty_core::uapi::*;
use dirty_core::Errno;

use crate::op::*;
use crate::reply::{Arrow, HexOr0, Reply, Words};
use crate::system::{Answer, System};

/// Runs one operation. Faults that were ordered before it are met during this
/// operation or forgotten.
pub fn run(system: &mut dyn System, op: &Op) -> Reply {
    let reply = dispatch(system, op);
    if !matches!(op, Op::Fault { .. } | Op::Dma { late: true, .. }) {
        system.end_faults();
    }
    reply
}

fn dispatch(s: &mut dyn System, op: &Op) -> Reply {
    match *op {
        Op::New(ref new) => Reply::Text(open(s, new)),
        Op::SetIommu(kind) => Reply::Answer(s.ioctl(VFIO_SET_IOMMU, kind)),
        Op::Attach { device, open } => {
            let mut text = String::new();
            if attach(s, device, None, &mut text) {
                text.push_str(" ok");
                if open {
                    open_device(s, device, &mut text);
                }
            }
            Reply::Text(text)
        }
        Op::Detach(device) => Reply::Answer(s.detach(device)),
        Op::CloseDevice(device) => {
            s.close_device(device);
            nothing()
        }
        Op::GetDevice(device) => {
            let mut text = String::new();
            open_device(s, device, &mut text);
            Reply::Text(text)
        }
        Op::Info { argsz, null } => Reply::Text(info(s, argsz, null)),
        Op::Ext(n) => Reply::Answer(s.ioctl(VFIO_CHECK_EXTENSION, n)),
        Op::Raw { nr, arg } => Reply::Answer(s.ioctl(nr, arg)),
        Op::Map(m) => Reply::Answer(map(s, &m)),
        Op::Unmap(u) => unmap(s, &u),
        Op::Dirty { argsz, flags, ptr } => {
            let arg = [pair(argsz, flags)];
            Reply::Answer(ioctl(s, VFIO_IOMMU_DIRTY_PAGES, &arg, ptr))
        }
        Op::Get(g) => get(s, &g),
        Op::Report(r) => {
            let mut words = filled(&r);
            let answer = s.report(&r, &mut words).map(|_| 0);
            Reply::Report(answer, Words { words, cut: false })
        }
        Op::Harvest(r) => {
            let mut words = filled(&r);
            let answer = s.harvest(&r, &mut words);
            Reply::Report(answer, Words { words, cut: false })
        }
        Op::Pin {
            device,
            iova,
            n,
            prot,
        } => Reply::Returned(s.pin(device, iova, n, prot)),
        Op::Unpin { device, iova, n } => Reply::Returned(s.unpin(device, iova, n)),
        Op::Rw {
            device,
            iova,
            len,
            write,
            caller,
        } => {
            let returned = s.rw(device, iova, len, write, caller);
            match caller {
                Caller::Child => Reply::Child(returned),
                _ => Reply::Returned(returned),
            }
        }
        Op::Dma {
            device,
            iova,
            len,
            late,
        } => Reply::Answer(s.dma(device, iova, len, late)),
        Op::Mark { iova, len } => Reply::Answer(s.mark(iova, len)),
        Op::OnUnmap {
            device,
            ref actions,
        } => Reply::Answer(s.on_unmap(device, actions)),
        Op::Fault { kind, n } => Reply::Answer(s.fault(kind, n)),
        Op::Stat(device) => Reply::Stat(s.stat(device)),
        Op::MemLock { limit, keep_cap } => Reply::Text(s.limit_locked(limit, keep_cap)),
        Op::VmLck => Reply::Text(format!(" => {} kB", s.locked_pages() * (PAGE / 1024))),
        Op::EntryLimit(limit) => {
            s.set_entry_limit(limit);
            nothing()
        }
        Op::HugeMem => mapped(s.map_memory(HUGE, 1 << 46, false)),
        Op::BigBuf(size) => mapped(s.map_memory(BIGB, size, true)),
        Op::Peek { addr, n } => {
            let mut bytes = vec![0; n as usize];
            match s.peek(addr, &mut bytes) {
                true => Reply::Bytes(bytes),
                false => Reply::Text(" => EFAULT".into()),
            }
        }
        Op::Poke { addr, ref bytes } => match s.poke(addr, bytes) {
            true => nothing(),
            false => Reply::Text(" => EFAULT".into()),
        },
        Op::MapN { n, stride, iova } => {
            let mut done = 0;
            let mut answer = Ok(0);
            while done < n {
                let at = iova.wrapping_add(stride.wrapping_mul(done));
                answer = map(s, &MapArg::new(at, PAGE, MEM, 3));
                if answer.is_err() {
                    break;
                }
                done += 1;
            }
            Reply::Text(format!(" done={done}{}", Arrow(answer)))
        }
    }
}

/// The reply of operations that answer nothing.
fn nothing() -> Reply {
    Reply::Text(String::new())
}

/// The reply of operations that map user memory.
fn mapped(result: Result<(), Errno>) -> Reply {
    Reply::Text(match result {
        Ok(()) => " => ok".into(),
        Err(e) => format!(" => {e}"),
    })
}

fn device_name(device: DeviceIndex) -> &'static str {
    DEVICES.get(device).map_or("?", |d| d.name)
}

/// Opens a container, attaches its groups and opens their devices; returns what
/// the reply says of these steps.
fn open(s: &mut dyn System, new: &New) -> String {
    s.open(new);
    let mut text = String::new();
    let mut kind = new.kind;
    for device in &new.devices {
        if attach(s, *device, kind, &mut text) {
            kind = None;
            if new.kind.is_some() && !device_name(*device).starts_with("pci") {
                open_device(s, *device, &mut text);
            }
        }
    }
    text
}

// Writing to a string cannot fail, so the results of `write!` are dropped
// below.

/// Attaches a group, and sets the IOMMU type if one is given. Returns whether
/// both succeeded.
fn attach(s: &mut dyn System, device: DeviceIndex, kind: Option<u64>, text: &mut String) -> bool {
    if let Err(e) = s.attach(device) {
        let _ = write!(text, " {}:{}={}", device_name(device), e.step, e.errno);
        return false;
    }
    let Some(kind) = kind else {
        return true;
    };
    let answer = s.ioctl(VFIO_SET_IOMMU, kind);
    let _ = match answer {
        Ok(_) => write!(text, " set_iommu({kind})=ok"),
        Err(e) => write!(text, " set_iommu({kind})={e}"),
    };
    answer.is_ok()
}

fn open_device(s: &mut dyn System, device: DeviceIndex, text: &mut String) {
    if let Err(e) = s.open_device(device) {
        let _ = write!(text, " {}:get_device_fd={e}", device_name(device));
    }
}

/// Two neighbouring 32-bit fields as one word.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// An ioctl whose argument is `words`, or is what lies at `ptr`.
fn ioctl(s: &mut dyn System, nr: u32, words: &[u64], ptr: Option<u64>) -> Answer {
    let mut bytes = [0; 48];
    let len = words.len() * 8;
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    s.poke(ARG, &bytes[..len]);
    s.ioctl(nr, ptr.unwrap_or(ARG))
}

/// A 64-bit word of user memory; `None` at a bad address.
fn peek_word(s: &mut dyn System, addr: u64) -> Option<u64> {
    let mut word = [0; 8];
    s.peek(addr, &mut word).then(|| u64::from_ne_bytes(word))
}

fn map(s: &mut dyn System, m: &MapArg) -> Answer {
    let arg = [pair(m.argsz, m.flags), m.vaddr, m.iova, m.size];
    ioctl(s, VFIO_IOMMU_MAP_DMA, &arg, m.ptr)
}

fn unmap(s: &mut dyn System, u: &UnmapArg) -> Reply {
    let b = u.bitmap;
    let arg = [
        pair(u.argsz, u.flags),
        u.iova,
        u.size,
        b.pgsize,
        b.bsize,
        b.data,
    ];
    let get = u.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
    if get {
        fill(s, b);
    }
    let answer = ioctl(s, VFIO_IOMMU_UNMAP_DMA, &arg, u.ptr);
    let size = peek_word(s, ARG + 16).unwrap_or(0);
    Reply::Unmap(answer, size, get.then(|| dump(s, b)))
}

fn get(s: &mut dyn System, g: &GetArg) -> Reply {
    let b = g.bitmap;
    let arg = [
        pair(g.argsz, g.flags),
        g.iova,
        g.size,
        b.pgsize,
        b.bsize,
        b.data,
    ];
    fill(s, b);
    let answer = match g.hdrend {
        Some(len) => {
            let at = BUF + BUF_SIZE - len;
            let bytes: Vec<u8> = arg.iter().flat_map(|w| w.to_ne_bytes()).collect();
            s.poke(at, bytes.get(..len as usize).unwrap_or(&bytes));
            s.ioctl(VFIO_IOMMU_DIRTY_PAGES, at)
        }
        None => ioctl(s, VFIO_IOMMU_DIRTY_PAGES, &arg, g.ptr),
    };
    Reply::Get(answer, dump(s, b))
}

/// Fills [`BUF`], where bitmaps go by default.
fn fill(s: &mut dyn System, b: Bitmap) {
    let len = match b.bsize {
        size if size < 60000 => size + 64,
        _ => BUF_SIZE,
    };
    s.poke(BUF, &vec![b.fill; len as usize]);
}

/// Reads the words of a bitmap that the reply shows.
fn dump(s: &mut dyn System, b: Bitmap) -> Words {
    let count = match b.dump {
        0 => (b.bsize.wrapping_add(7) / 8 + 1).min(6),
        n => n,
    };
    let mut shown = Words::default();
    for k in 0..count {
        match peek_word(s, b.data.wrapping_add(8 * k)) {
            Some(word) => shown.words.push(word),
            None => {
                shown.cut = true;
                break;
            }
        }
    }
    shown
}

/// The words for a typed report, filled as it asks.
fn filled(r: &ReportArg) -> Vec<u64> {
    let fill = u64::from(r.fill.unwrap_or(0)) * 0x0101_0101_0101_0101;
    vec![fill; r.words as usize]
}

/// The bytes that GET_INFO left in the user's memory.
struct InfoBytes(Vec<u8>);

impl InfoBytes {
    fn u32(&self, at: usize) -> u32 {
        let field = self.0.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_ne_bytes(field.unwrap_or_default())
    }

    fn u64(&self, at: usize) -> u64 {
        pair(self.u32(at), self.u32(at + 4))
    }
}

/// GET_INFO; returns the reply.
fn info(s: &mut dyn System, argsz: u32, null: bool) -> String {
    let mut bytes = vec![0xee; 4096];
    bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
    s.poke(ARG, &bytes);
    let answer = s.ioctl(VFIO_IOMMU_GET_INFO, if null { HOLE } else { ARG });
    let mut text = Arrow(answer).to_string();
    if answer.is_err() {
        return text;
    }
    s.peek(ARG, &mut bytes);
    let info = InfoBytes(bytes);
    let (needed, flags, cap_offset) = (info.u32(0), info.u32(4), info.u32(16));
    let _ = write!(
        text,
        " argsz={needed} flags={} pgsizes={}",
        HexOr0(flags.into()),
        HexOr0(info.u64(8))
    );
    if argsz >= 20 {
        let _ = write!(text, " cap_offset={cap_offset}");
    }
    if argsz < 24 || flags & VFIO_IOMMU_INFO_CAPS == 0 || argsz < needed {
        return text;
    }
    let mut at = cap_offset as usize;
    for _ in 0..10 {
        if at == 0 {
            break;
        }
        capability(&info, at, &mut text);
        at = info.u32(at + 4) as usize;
    }
    text
}

/// Writes the capability at offset `at` of the structure.
fn capability(info: &InfoBytes, at: usize, text: &mut String) {
    let (id, version) = (info.u32(at) as u16, info.u32(at) >> 16);
    let _ = write!(text, " cap@{at}{{id={id} ver={version}");
    let _ = match id {
        VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
            for k in 0..info.u32(at + 8) as usize {
                let (start, end) = (info.u64(at + 16 + 16 * k), info.u64(at + 24 + 16 * k));
                let _ = write!(text, " {start:x}-{end:x}");
            }
            Ok(())
        }
        VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => write!(
            text,
            " flags={} pgsize_bitmap={} max_dirty_bitmap_size={}",
            info.u32(at + 8),
            HexOr0(info.u64(at + 16)),
            HexOr0(info.u64(at + 24))
        ),
        VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => write!(text, " avail={}", info.u32(at + 8)),
        _ => Ok(()),
    };
    text.push('}');
}
