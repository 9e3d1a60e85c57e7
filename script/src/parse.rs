// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parses scripts: lines of text become typed operations. A whole script is
//! parsed before any of it runs.

use std::fmt;

use crate::op::*;

/// An operation, and its text, which the transcript repeats.
#[derive(Clone, Debug)]
pub struct Line {
    /// The line's words, separated by single spaces.
    pub echo: String,
    /// The operation.
    pub op: Op,
}

/// A case: operations that run together, in a process of their own.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its `case` line; `None` for lines before the first one.
    pub title: Option<String>,
    /// Its operations.
    pub lines: Vec<Line>,
    /// The module parameter `dma_entry_limit` as earlier cases left it.
    pub entry_limit: u32,
}

/// A line that cannot be parsed.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLine {
    /// The line's number, from 1.
    pub number: usize,
    /// What was expected, and what was found.
    pub reason: String,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.number, self.reason)
    }
}

/// Parses a whole script. `entry_limit` is the module parameter
/// `dma_entry_limit` before the script, and receives its value afterwards.
///
/// # Errors
///
/// The first line that cannot be parsed.
pub fn parse(text: &str, entry_limit: &mut u32) -> Result<Vec<Case>, BadLine> {
    let mut cases: Vec<Case> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let bad = |reason| BadLine {
            number: index + 1,
            reason,
        };
        let title = line.starts_with("case ").then(|| line.to_string());
        if title.is_some() || cases.is_empty() {
            cases.push(Case {
                title: title.clone(),
                lines: Vec::new(),
                entry_limit: *entry_limit,
            });
        }
        let (None, Some(case)) = (title, cases.last_mut()) else {
            continue;
        };
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some((&name, args)) = words.split_first().filter(|(n, _)| !n.starts_with('#')) else {
            continue;
        };
        let op = parse_op(name, args).map_err(bad)?;
        if let Op::EntryLimit(limit) = op {
            *entry_limit = limit;
        }
        case.lines.push(Line {
            echo: words.join(" "),
            op,
        });
    }
    Ok(cases)
}

/// The arguments of one line. Each is taken out when it is parsed, so that
/// those that are left are unknown.
struct Args<'a> {
    name: &'a str,
    left: Vec<(&'a str, &'a str)>,
}

impl<'a> Args<'a> {
    fn new(name: &'a str, args: &[&'a str]) -> Result<Self, String> {
        let mut left: Vec<(&str, &str)> = Vec::new();
        for arg in args {
            let (key, value) = arg
                .split_once('=')
                .ok_or_else(|| format!("expected `key=value`, found `{arg}`"))?;
            if left.iter().any(|(k, _)| *k == key) {
                return Err(format!("`{key}` is given twice"));
            }
            left.push((key, value));
        }
        Ok(Args { name, left })
    }

    fn text(&mut self, key: &str) -> Option<&'a str> {
        let at = self.left.iter().position(|(k, _)| *k == key)?;
        Some(self.left.remove(at).1)
    }

    fn optional(&mut self, key: &str) -> Result<Option<u64>, String> {
        self.text(key).map(number).transpose()
    }

    fn number(&mut self, key: &str, default: u64) -> Result<u64, String> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    fn flag(&mut self, key: &str, default: bool) -> Result<bool, String> {
        Ok(self.number(key, u64::from(default))? != 0)
    }

    /// A number that must fit in 32 bits.
    fn u32(&mut self, key: &str, default: u32) -> Result<u32, String> {
        let value = self.number(key, u64::from(default))?;
        u32::try_from(value).map_err(|_| format!("`{key}` must fit in 32 bits, found {value:#x}"))
    }

    /// A signed number that must fit in 32 bits; 2^64-1 stands for -1.
    fn i32(&mut self, key: &str, default: u32) -> Result<i32, String> {
        let value = self.number(key, u64::from(default))? as i64;
        i32::try_from(value).map_err(|_| format!("`{key}` must fit in 32 bits, found {value}"))
    }

    fn device(&mut self, default: Option<&'static str>) -> Result<DeviceIndex, String> {
        match self.text("dev").or(default) {
            Some(name) => device(name),
            None => Err(format!("`{}` needs `dev=`, one of {}", self.name, names())),
        }
    }

    /// The arguments of `report` and `harvest`.
    fn report(&mut self) -> Result<ReportArg, String> {
        let fill = match (self.flag("zeroed", false)?, self.optional("fill")?) {
            (true, Some(_)) => return Err("`zeroed` and `fill` cannot be given together".into()),
            (true, None) => None,
            (false, fill) => Some(fill.unwrap_or(0) as u8),
        };
        Ok(ReportArg {
            iova: self.number("iova", 0)?,
            size: self.number("size", 0)?,
            pgsize: self.number("pgsize", PAGE)?,
            words: match self.number("words", 1)? {
                n if n > 1 << 20 => return Err(format!("`words` is at most 2^20, found {n}")),
                n => n,
            },
            fill,
        })
    }

    /// The arguments that `get` and `unmap` share.
    fn bitmap(&mut self) -> Result<Bitmap, String> {
        Ok(Bitmap {
            pgsize: self.number("pgsize", 4096)?,
            bsize: self.number("bsize", 8)?,
            data: self.number("data", BUF)?,
            fill: self.number("fill", 0)? as u8,
            dump: self.number("dump", 0)?,
        })
    }

    /// Fails if an argument was not taken.
    fn done(self, op: Op) -> Result<Op, String> {
        match self.left.first() {
            None => Ok(op),
            Some((key, _)) => Err(format!("`{}` has no argument `{key}`", self.name)),
        }
    }
}

fn names() -> String {
    DEVICES.map(|d| d.name).join(", ")
}

fn device(name: &str) -> Result<DeviceIndex, String> {
    DEVICES
        .iter()
        .position(|d| d.name == name)
        .ok_or_else(|| format!("`{name}` is not a device; there are {}", names()))
}

/// A number: an optional base, then terms with signs and suffixes, all added
/// modulo 2^64.
fn number(text: &str) -> Result<u64, String> {
    const BASES: [(&str, u64); 8] = [
        ("mem", MEM),
        ("bigb", BIGB),
        ("buf", BUF),
        ("end", BUF + BUF_SIZE),
        ("ro", RO),
        ("hole", HOLE),
        ("huge", HUGE),
        ("top", 0),
    ];
    let wrong = || {
        format!(
            "expected a number (decimal or 0x, suffix p, M, G or T, after a base: mem, buf, \
             end, ro, hole, huge, bigb or top), found `{text}`"
        )
    };
    let base = BASES.iter().find(|(name, _)| text.starts_with(name));
    let (mut sum, mut rest) = base.map_or((0, text), |(name, base)| (*base, &text[name.len()..]));
    if base.is_none() && rest.is_empty() {
        return Err(wrong());
    }
    let mut negative = false;
    while !rest.is_empty() {
        if let Some(tail) = rest.strip_prefix(['+', '-']) {
            negative = rest.starts_with('-');
            rest = tail;
        }
        let (digits, radix) = match rest.strip_prefix("0x") {
            Some(hex) => (hex, 16),
            None => (rest, 10),
        };
        let len = digits
            .find(|c: char| !c.is_digit(radix))
            .unwrap_or(digits.len());
        let mut value = u64::from_str_radix(&digits[..len], radix).map_err(|_| wrong())?;
        rest = &digits[len..];
        for (suffix, shift) in [('p', 12), ('M', 20), ('G', 30), ('T', 40)] {
            if let Some(tail) = rest.strip_prefix(suffix) {
                value = value.checked_shl(shift).ok_or_else(wrong)?;
                rest = tail;
                break;
            }
        }
        sum = if negative {
            sum.wrapping_sub(value)
        } else {
            sum.wrapping_add(value)
        };
        if !rest.is_empty() && !rest.starts_with(['+', '-']) {
            return Err(wrong());
        }
    }
    Ok(sum)
}

fn parse_op(name: &str, args: &[&str]) -> Result<Op, String> {
    let mut a = Args::new(name, args)?;
    let op = match name {
        "new" => parse_new(&mut a)?,
        "setiommu" => Op::SetIommu(a.number("t", 3)?),
        "attach" => Op::Attach {
            device: a.device(None)?,
            open: a.text("nodev").is_none(),
        },
        "detach" => Op::Detach(a.device(None)?),
        "closedev" => Op::CloseDevice(a.device(None)?),
        "getdev" => Op::GetDevice(a.device(None)?),
        "info" => Op::Info {
            argsz: a.u32("argsz", 4096)?,
            null: a.text("null").is_some(),
        },
        "ext" => Op::Ext(a.number("n", 0)?),
        "raw" => Op::Raw {
            nr: a.u32("nr", 0)?,
            arg: a.number("arg", 0)?,
        },
        "map" => Op::Map(MapArg {
            argsz: a.u32("argsz", 32)?,
            flags: a.u32("flags", 3)?,
            vaddr: a.number("vaddr", MEM)?,
            iova: a.number("iova", 0)?,
            size: a.number("size", 0)?,
            ptr: a.optional("ptr")?,
        }),
        "unmap" => {
            let flags = a.u32("flags", 0)?;
            Op::Unmap(UnmapArg {
                argsz: a.u32("argsz", if flags & 1 == 0 { 24 } else { 48 })?,
                flags,
                iova: a.number("iova", 0)?,
                size: a.number("size", 0)?,
                bitmap: a.bitmap()?,
                ptr: a.optional("ptr")?,
            })
        }
        "start" | "stop" | "dirty" => Op::Dirty {
            argsz: a.u32("argsz", 8)?,
            flags: a.u32("flags", if name == "start" { 1 } else { 2 })?,
            ptr: a.optional("ptr")?,
        },
        "get" => Op::Get(GetArg {
            argsz: a.u32("argsz", 48)?,
            flags: a.u32("flags", 4)?,
            iova: a.number("iova", 0)?,
            size: a.number("size", 0)?,
            bitmap: a.bitmap()?,
            ptr: a.optional("ptr")?,
            hdrend: match a.optional("hdrend")? {
                Some(n) if n > 48 => return Err(format!("`hdrend` is at most 48, found {n}")),
                n => n,
            },
        }),
        "report" => Op::Report(a.report()?),
        "harvest" => Op::Harvest(a.report()?),
        "pin" => Op::Pin {
            device: a.device(Some("emu0"))?,
            iova: a.number("iova", 0)?,
            n: a.i32("n", 1)?,
            prot: a.u32("prot", 3)?,
        },
        "unpin" => {
            a.text("prot"); // allowed, because the recorded scripts have it
            Op::Unpin {
                device: a.device(Some("emu0"))?,
                iova: a.number("iova", 0)?,
                n: a.i32("n", 1)?,
            }
        }
        "rw" => Op::Rw {
            device: a.device(Some("emu0"))?,
            iova: a.number("iova", 0)?,
            len: match a.number("len", 1)? {
                n if n > 1 << 32 => return Err(format!("`len` is at most 4G, found {n:#x}")),
                n => n,
            },
            write: a.flag("write", true)?,
            caller: match (a.flag("kthread", false)?, a.text("fork").is_some()) {
                (false, false) => Caller::Process,
                (true, false) => Caller::KernelThread,
                (false, true) => Caller::Child,
                (true, true) => return Err("`kthread` and `fork` cannot be given together".into()),
            },
        },
        "dma" => Op::Dma {
            device: a.device(Some("xpci0"))?,
            iova: a.number("iova", 0)?,
            len: match a.number("len", 1)? {
                n if n > 1 << 32 => return Err(format!("`len` is at most 4G, found {n:#x}")),
                n => n,
            },
            late: a.flag("late", false)?,
        },
        "mark" => Op::Mark {
            iova: a.number("iova", 0)?,
            len: a.number("len", 1)?,
        },
        "nounpin" => {
            let unpin = !a.flag("v", true)?;
            Op::OnUnmap {
                device: a.device(Some("emu0"))?,
                actions: if unpin {
                    vec![Action::Unpin]
                } else {
                    Vec::new()
                },
            }
        }
        "onunmap" => Op::OnUnmap {
            device: a.device(Some("emu0"))?,
            actions: actions(a.text("do").unwrap_or("unpin"))?,
        },
        "fault" => fault(&mut a)?,
        "stat" => Op::Stat(a.device(Some("emu0"))?),
        "memlock" => Op::MemLock {
            limit: a.number("v", 0)?,
            keep_cap: a.text("keepcap").is_some(),
        },
        "vmlck" => Op::VmLck,
        "param" => match (a.text("name"), a.u32("val", 0)?) {
            (Some("dma_entry_limit"), limit) => Op::EntryLimit(limit),
            _ => return Err("`param` needs `name=dma_entry_limit` and `val=`".into()),
        },
        "hugemem" => Op::HugeMem,
        "bigbuf" => Op::BigBuf(a.number("size", 0x1000_1000)?),
        "peek" => Op::Peek {
            addr: a.number("a", MEM)?,
            n: match a.u32("n", 1)? {
                n if n > 1 << 16 => return Err(format!("`n` is at most 64K, found {n}")),
                n => n,
            },
        },
        "poke" => Op::Poke {
            addr: a.number("a", MEM)?,
            bytes: match a.text("hex") {
                Some(digits) => hex(digits)?,
                None => vec![a.number("v", 1)? as u8],
            },
        },
        "mapn" => Op::MapN {
            n: a.number("n", 1)?,
            stride: a.number("stride", 4096)?,
            iova: a.number("iova", 0)?,
        },
        _ => {
            return Err(format!(
                "expected an operation (new, setiommu, attach, detach, closedev, getdev, info, \
                 ext, raw, map, unmap, start, stop, dirty, get, report, harvest, pin, unpin, \
                 rw, dma, mark, nounpin, onunmap, fault, stat, memlock, vmlck, param, hugemem, \
                 bigbuf, peek, poke, mapn) or `case NAME`, found `{name}`"
            ))
        }
    };
    a.done(op)
}

/// Bytes, written as two hexadecimal digits each.
fn hex(digits: &str) -> Result<Vec<u8>, String> {
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).ok()?;
        let digits = pair.len() == 2 && !pair.starts_with('+');
        u8::from_str_radix(pair, 16).ok().filter(|_| digits)
    };
    let bytes: Option<Vec<u8>> = digits.as_bytes().chunks(2).map(byte).collect();
    bytes.ok_or_else(|| format!("`hex` takes two digits a byte, found `{digits}`"))
}

fn parse_new(a: &mut Args<'_>) -> Result<Op, String> {
    let kind = match a.text("type") {
        None | Some("v2") => Some(3),
        Some("v1") => Some(1),
        Some("nest") => Some(6),
        Some("none") => None,
        Some(other) => return Err(format!("`type` is v2, v1, nest or none, found `{other}`")),
    };
    let devices = a.text("devs").unwrap_or("").split(',');
    Ok(Op::New(New {
        devices: devices
            .filter(|d| !d.is_empty())
            .map(device)
            .collect::<Result<_, _>>()?,
        kind,
        budget: a.optional("budget")?,
        skip_read_only: a.flag("skipro", false)?,
        iommu_dirty_tracking: a.flag("iommudirty", false)?,
    }))
}

fn actions(text: &str) -> Result<Vec<Action>, String> {
    let names = text.split(',').filter(|name| !name.is_empty());
    let action = |name: &str| match name {
        "unpin" => Ok(Action::Unpin),
        "start" => Ok(Action::Start),
        "stop" => Ok(Action::Stop),
        "pin" => Ok(Action::Pin),
        _ => Err(format!(
            "`do` lists some of unpin, start, stop and pin, found `{name}`"
        )),
    };
    names.map(action).collect()
}

fn fault(a: &mut Args<'_>) -> Result<Op, String> {
    for (key, kind) in [
        ("alloc", FaultKind::Alloc),
        ("copy", FaultKind::Copy),
        ("pin", FaultKind::Pin),
        ("map", FaultKind::Map),
        ("charge", FaultKind::Charge),
        ("track", FaultKind::Track),
    ] {
        if let Some(n) = a.optional(key)? {
            return Ok(Op::Fault { kind, n });
        }
    }
    Err("`fault` needs one of alloc, copy, pin, map, charge or track, as `alloc=3`".into())
}
