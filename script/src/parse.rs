// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts: lines of text to typed operations. A script is understood as a
//! whole before anything of it runs.

use std::fmt;

use crate::op::*;

/// An operation with its text, which the transcript repeats.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its text, words separated by single spaces.
    pub echo: String,
    /// What it says.
    pub op: Op,
}

/// A case: lines that run in a process of their own.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its `case` line; none before the first.
    pub title: Option<String>,
    /// Its operations.
    pub lines: Vec<Line>,
    /// The module parameter as earlier cases left it.
    pub entry_limit: u32,
}

/// A line that is not understood.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLine {
    /// Counted from 1.
    pub number: usize,
    /// What was expected, and what is there.
    pub reason: String,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.number, self.reason)
    }
}

/// Parses a whole script; `entry_limit` is the module parameter before it and
/// afterwards.
///
/// # Errors
///
/// The first line that is not understood.
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

/// The arguments of one line, taken out as they are understood.
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

    fn maybe(&mut self, key: &str) -> Result<Option<u64>, String> {
        self.text(key).map(number).transpose()
    }

    fn number(&mut self, key: &str, default: u64) -> Result<u64, String> {
        Ok(self.maybe(key)?.unwrap_or(default))
    }

    fn flag(&mut self, key: &str, default: bool) -> Result<bool, String> {
        Ok(self.number(key, u64::from(default))? != 0)
    }

    /// A number that the interface keeps in 32 bits.
    fn u32(&mut self, key: &str, default: u32) -> Result<u32, String> {
        let value = self.number(key, u64::from(default))?;
        u32::try_from(value).map_err(|_| format!("`{key}` must fit in 32 bits, found {value:#x}"))
    }

    /// Likewise, signed: -1 is written 2^64-1.
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

    /// What a report or a harvest takes.
    fn report(&mut self) -> Result<ReportArg, String> {
        let fill = match (self.flag("zeroed", false)?, self.maybe("fill")?) {
            (true, Some(_)) => return Err("`zeroed` and `fill` exclude each other".into()),
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

    fn bitmap(&mut self) -> Result<Bitmap, String> {
        Ok(Bitmap {
            pgsize: self.number("pgsize", 4096)?,
            bsize: self.number("bsize", 8)?,
            data: self.number("data", BUF)?,
            fill: self.number("fill", 0)? as u8,
            dump: self.number("dump", 0)?,
        })
    }

    /// Every argument must have been taken.
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
        .ok_or_else(|| format!("`{name}` is no device; there are {}", names()))
}

/// A number: an optional base, then numbers with signs and suffixes, summed
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
            ptr: a.maybe("ptr")?,
        }),
        "unmap" => {
            let flags = a.u32("flags", 0)?;
            Op::Unmap(UnmapArg {
                argsz: a.u32("argsz", if flags & 1 == 0 { 24 } else { 48 })?,
                flags,
                iova: a.number("iova", 0)?,
                size: a.number("size", 0)?,
                bitmap: a.bitmap()?,
                ptr: a.maybe("ptr")?,
            })
        }
        "start" | "stop" | "dirty" => Op::Dirty {
            argsz: a.u32("argsz", 8)?,
            flags: a.u32("flags", if name == "start" { 1 } else { 2 })?,
            ptr: a.maybe("ptr")?,
        },
        "get" => Op::Get(GetArg {
            argsz: a.u32("argsz", 48)?,
            flags: a.u32("flags", 4)?,
            iova: a.number("iova", 0)?,
            size: a.number("size", 0)?,
            bitmap: a.bitmap()?,
            ptr: a.maybe("ptr")?,
            hdrend: match a.maybe("hdrend")? {
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
            a.text("prot"); // as `pin`, and of no effect
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
                (true, true) => return Err("`kthread` and `fork` exclude each other".into()),
            },
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
            _ => return Err("`param` knows `name=dma_entry_limit` with `val=`".into()),
        },
        "hugemem" => Op::HugeMem,
        "bigbuf" => Op::BigBuf(a.number("size", 0x1000_1000)?),
        "peek" => Op::Peek(a.number("a", MEM)?),
        "poke" => Op::Poke {
            addr: a.number("a", MEM)?,
            value: a.number("v", 1)? as u8,
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
                 rw, mark, nounpin, onunmap, fault, stat, memlock, vmlck, param, hugemem, \
                 bigbuf, peek, poke, mapn) or `case NAME`, found `{name}`"
            ))
        }
    };
    a.done(op)
}

fn parse_new(a: &mut Args<'_>) -> Result<Op, String> {
    let (kind, set) = match a.text("type") {
        None | Some("v2") => (3, true),
        Some("v1") => (1, true),
        Some("nest") => (6, true),
        Some("none") => (3, false),
        Some(other) => return Err(format!("`type` is v1, nest or none, found `{other}`")),
    };
    let devices = a.text("devs").unwrap_or("").split(',');
    Ok(Op::New(New {
        devices: devices
            .filter(|d| !d.is_empty())
            .map(device)
            .collect::<Result<_, _>>()?,
        kind,
        set,
        budget: a.maybe("budget")?,
        skip_read_only: a.flag("skipro", false)?,
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
            "`do` lists unpin, start, stop and pin, found `{name}`"
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
    ] {
        if let Some(n) = a.maybe(key)? {
            return Ok(Op::Fault { kind, n });
        }
    }
    Err("`fault` needs one of alloc, copy, pin, map or charge, as `alloc=3`".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_the_recorder_reads_them() {
        for (text, value) in [
            ("0", 0),
            ("0x10", 16),
            ("3p", 3 << 12),
            ("top-1p", 4096u64.wrapping_neg()),
            ("top-0", 0),
            ("mem+64M-1p", MEM + (64 << 20) - 4096),
            ("end-8", BUF + BUF_SIZE - 8),
            ("8T-1p", (8 << 40) - 4096),
            ("-1", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
            ("bigb", BIGB),
        ] {
            assert_eq!(number(text), Ok(value), "{text}");
        }
        for text in [
            "",
            "x",
            "12q",
            "1pp",
            "0x",
            "mem1z",
            "+",
            "99999999999999999999",
        ] {
            assert!(number(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bad_line_says_where_and_what_was_expected() {
        let mut limit = 7;
        for (text, line, part) in [
            ("case a\nstart\nfrob\n", 3, "expected an operation"),
            ("map iova\n", 1, "expected `key=value`"),
            ("\n# x\nmap iova=zz", 3, "expected a number"),
            ("map io=0", 1, "no argument `io`"),
            ("map iova=0 iova=1", 1, "given twice"),
            ("pin dev=emu9", 1, "there are pci0"),
            ("detach", 1, "needs `dev=`"),
            ("map flags=0x100000000", 1, "32 bits"),
            ("param name=frob val=1", 1, "dma_entry_limit"),
        ] {
            let bad = parse(text, &mut limit).expect_err(text);
            assert_eq!(bad.number, line, "{text}");
            assert!(bad.reason.contains(part), "{text}: {}", bad.reason);
        }
    }

    #[test]
    fn an_operation_prints_as_what_it_is_parsed_from() {
        let text = "new devs=emu0,big0 type=v1 budget=100 skipro=1
            setiommu t=9\nattach dev=pci0 nodev=1\ndetach dev=emu1\nclosedev dev=emu0
            getdev dev=emu0\ninfo argsz=15 null=1\next n=3\nraw nr=0x3b7f arg=8
            map iova=0 size=4p ptr=hole\nunmap iova=1p size=2p flags=1 fill=255 bsize=16 ptr=0
            start\nstop argsz=7\ndirty flags=9 ptr=hole\nget size=4p hdrend=8 dump=5
            report iova=1p size=2p pgsize=0x2000 words=2 fill=255\nharvest size=1p zeroed=1
            pin dev=emu0 n=-1 prot=1\nunpin iova=0x800 n=2\nrw iova=5 len=7 write=0
            rw kthread=1\nrw fork=1\nmark iova=4 len=9\nnounpin v=1\nnounpin v=0
            onunmap dev=emu1 do=pin,start,stop,unpin\nfault alloc=1\nfault copy=2\nfault pin=3
            fault map=4\nfault charge=5\nstat\nmemlock v=8 keepcap=1\nvmlck
            param name=dma_entry_limit val=2\nhugemem\nbigbuf size=1M\npeek a=buf\npoke a=mem v=3
            mapn n=3 stride=2p iova=1p";
        let mut limit = 0;
        let cases = parse(text, &mut limit).expect("a script");
        let mut count = 0;
        for line in cases.iter().flat_map(|case| &case.lines) {
            let again = parse(&line.op.to_string(), &mut limit).expect(&line.echo);
            assert_eq!(again[0].lines[0].op, line.op, "{}", line.echo);
            count += 1;
        }
        assert_eq!(count, 40);
    }

    #[test]
    fn a_module_parameter_outlives_its_case() {
        let mut limit = 65535;
        let text = "case a\nparam name=dma_entry_limit val=2\ncase b\nstart\n";
        let cases = parse(text, &mut limit).expect("a script");
        let limits: Vec<u32> = cases.iter().map(|c| c.entry_limit).collect();
        assert_eq!((limits, limit), (vec![65535, 2], 2));
    }
}
