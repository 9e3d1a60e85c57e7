// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts are parsed into operations, and operations print as scripts.

use dirty_script::op::*;
use dirty_script::{parse, BadLine};

/// Parses `text` as a number in a script.
fn arg(text: &str) -> Result<u64, BadLine> {
    let cases = parse(&format!("raw arg={text}"), &mut 0)?;
    match cases[0].lines[0].op {
        Op::Raw { arg, .. } => Ok(arg),
        ref other => panic!("{other:?}"),
    }
}

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
        assert_eq!(arg(text), Ok(value), "{text}");
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
        assert!(arg(text).is_err(), "{text}");
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
        ("poke hex=5", 1, "two digits a byte"),
        ("poke hex=+5", 1, "two digits a byte"),
        ("peek n=65537", 1, "at most 64K"),
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
        param name=dma_entry_limit val=2\nhugemem\nbigbuf size=1M\npeek a=buf n=3\npoke a=mem v=3\npoke hex=0aff
        mapn n=3 stride=2p iova=1p";
    let mut limit = 0;
    let cases = parse(text, &mut limit).expect("a script");
    let mut count = 0;
    for line in cases.iter().flat_map(|case| &case.lines) {
        let again = parse(&line.op.to_string(), &mut limit).expect(&line.echo);
        assert_eq!(again[0].lines[0].op, line.op, "{}", line.echo);
        count += 1;
    }
    assert_eq!(count, 41);
}

#[test]
fn a_module_parameter_outlives_its_case() {
    let mut limit = 65535;
    let text = "case a\nparam name=dma_entry_limit val=2\ncase b\nstart\n";
    let cases = parse(text, &mut limit).expect("a script");
    let limits: Vec<u32> = cases.iter().map(|c| c.entry_limit).collect();
    assert_eq!((limits, limit), (vec![65535, 2], 2));
}

#[test]
fn devices_have_the_numbers_of_their_constants() {
    let names = DEVICES.map(|device| device.name);
    let by_number = [
        PCI0, PCI1, XPCI0, XPCI1, EMU0, EMU1, EMU2, BIG0, LOW0, FOUR0,
    ];
    let by_number = by_number.map(|index| names[index]);
    let expected = [
        "pci0", "pci1", "xpci0", "xpci1", "emu0", "emu1", "emu2", "big0", "low0", "four0",
    ];
    assert_eq!(by_number, expected);
    assert_eq!(names.len(), expected.len());
}
