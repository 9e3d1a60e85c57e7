// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's log, and what a tracker makes of it.

use adapter_user::guest::{IovaRange, Report, Tracker};
use adapter_user::vfio_user::wire::wire::*;
use adapter_user::vfio_user::wire::{
    Capabilities, Command, FeatureAnswer, FeatureCall, Migration, Reply, Request,
};
use adapter_user::vfio_user::{ClientError, ClientOptions};
use adapter_user::{Errno, PageSize, Prot};

use crate::peer::{able, client, with, Memory, Peer};

const BASE: PageSize = PageSize::new(4096).unwrap();

/// What a scripted server answers to a report.
enum Answer {
    /// These bits.
    Bits(&'static [u64]),
    Refuse(u32),
}

/// Takes a START, with the log's page size for the answer. Returns the number of ranges.
fn start(peer: &mut Peer, page_size: u64) -> usize {
    let (header, payload) = peer.expect(Command::Feature);
    let Ok(Request::Feature(feature)) = Request::read(Command::Feature, &payload, 0, 1 << 20)
    else {
        panic!("no feature");
    };
    let Ok(FeatureCall::StartLogging { ranges, .. }) = feature.call(1 << 20) else {
        panic!("no START");
    };
    let mut buffer = vec![0; 4096];
    let answer = FeatureAnswer::Started(page_size);
    let reply = feature.reply(answer, &mut buffer).unwrap();
    peer.reply(&header, &Reply::Feature(reply));
    ranges.len()
}

/// Takes reports, each of which must be for this range.
fn reports(peer: &mut Peer, script: &[(u64, u64, u64, Answer)]) {
    for (iova, length, page_size, answer) in script {
        let (header, payload) = peer.expect(Command::Feature);
        let Ok(Request::Feature(feature)) = Request::read(Command::Feature, &payload, 0, 1 << 20)
        else {
            panic!("no feature");
        };
        let Ok(FeatureCall::Report { report, .. }) = feature.call(1 << 20) else {
            panic!("no REPORT");
        };
        let asked = (report.iova, report.length, report.page_size);
        assert_eq!(asked, (*iova, *length, *page_size));
        match answer {
            Answer::Bits(words) => {
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                let mut buffer = vec![0; bytes.len() + 64];
                let answer = FeatureAnswer::Report(report, &bytes);
                let reply = feature.reply(answer, &mut buffer).unwrap();
                peer.reply(&header, &Reply::Feature(reply));
            }
            Answer::Refuse(errno) => peer.refuse(&header, *errno),
        }
    }
}

/// The first page and the number of pages of each dirty range.
fn dirty(report: &Report) -> Vec<(u64, u64)> {
    let ranges = report.ranges(4096).unwrap();
    ranges
        .map(|range| (range.gpa >> 12, range.size >> 12))
        .collect()
}

/// 16 bytes of bitmap are 128 pages.
fn small() -> Capabilities {
    Capabilities {
        migration: Some(Migration {
            pgsize: 4096,
            max_bitmap_size: 16,
        }),
        ..able()
    }
}

#[test]
fn a_bitmap_is_read_in_parts() {
    let script = |peer: &mut Peer| {
        assert_eq!(start(peer, 4096), 2);
        reports(
            peer,
            &[
                (0x1000, 0x8_0000, 4096, Answer::Bits(&[1, 2])),
                (0x8_1000, 0x8_0000, 4096, Answer::Bits(&[4, 8])),
                (0x10_1000, 0x1000, 4096, Answer::Bits(&[1])),
            ],
        );
        let (header, _) = peer.expect(Command::Feature);
        peer.refuse(&header, 28);
    };
    let (client, server) = with(small(), ClientOptions::default(), &Memory::new(), script);
    let client = client.unwrap();
    let ranges = [0, 1 << 30].map(|iova| IovaRange { iova, size: 4096 });
    assert_eq!(client.start_logging(&ranges, BASE).unwrap(), BASE);
    let mut words = [1 << 63, 0, 0, 0, 0, 77];
    client
        .read_log(0x1000, 0x10_1000, BASE, &mut words)
        .unwrap();
    assert_eq!(words, [1 << 63 | 1, 2, 4, 8, 1, 77]);
    let few = client.read_log(0, 0x10_1000, BASE, &mut words[..4]);
    assert!(matches!(few, Err(ClientError::Argument(_))));
    let refused = client.read_log(0, 0x1000, BASE, &mut words);
    assert_eq!(
        refused,
        Err(ClientError::Refused(Command::Feature, Errno::ENOSPC))
    );
    server.join().unwrap();
}

/// START is refused: by a device that has a log, and by one that has none.
#[test]
fn a_device_without_a_log_is_named() {
    let (client, server) = client(|peer| {
        for (started, probed) in [(16, None), (25, Some(25))] {
            let (header, _) = peer.expect(Command::Feature);
            peer.refuse(&header, started);
            let (header, payload) = peer.expect(Command::Feature);
            let (head, data) = FeatureHead::split(&payload).unwrap();
            let asked = FEATURE_PROBE | FEATURE_SET | DMA_LOGGING_START;
            assert_eq!(head.flags, asked);
            match (
                probed,
                Request::read(Command::Feature, &payload, 0, 1 << 20),
            ) {
                (Some(errno), _) => peer.refuse(&header, errno),
                (None, Ok(Request::Feature(feature))) => {
                    assert!(data.is_empty());
                    peer.reply(&header, &Reply::Feature(feature));
                }
                (None, other) => panic!("{other:?}"),
            }
        }
    });
    let busy = ClientError::Refused(Command::Feature, Errno::EBUSY);
    assert_eq!(client.start_logging(&[], BASE), Err(busy));
    let none = client.start_logging(&[], BASE);
    assert_eq!(none, Err(ClientError::NoLog(Errno::ENOTTY)));
    let text = none.unwrap_err().to_string();
    assert!(text.contains("unplug it before a migration"), "{text}");
    server.join().unwrap();
}

/// A take has what the device wrote, at the guest's addresses.
#[test]
fn a_take_reads_the_log() {
    let (client, server) = client(|peer| {
        start(peer, 4096);
        reports(peer, &[(0x10_0000, 0x4000, 4096, Answer::Bits(&[0b1001]))]);
    });
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 1 << 20).unwrap();
    let view = tracker.iova_view();
    tracker.add_log("device", &view, 0, client.log()).unwrap();
    client.start_logging(&[], BASE).unwrap();
    tracker.start().unwrap();
    view.map(0x10_0000, 0x8000, 0x4000).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    assert_eq!(dirty(&report), [(8, 1), (11, 1)]);
    server.join().unwrap();
}

/// Pages of 64 KiB reach beyond what is mapped, at both ends.
#[test]
fn a_log_of_large_pages_is_asked_for_whole_pages() {
    let (client, server) = client(|peer| {
        start(peer, 65536);
        reports(peer, &[(0x1_0000, 0x2_0000, 65536, Answer::Bits(&[0b11]))]);
    });
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 1 << 20).unwrap();
    let view = tracker.iova_view();
    tracker.add_log("device", &view, 0, client.log()).unwrap();
    client.start_logging(&[], BASE).unwrap();
    tracker.start().unwrap();
    view.map(0x1_f000, 0x3000, 0x2000).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    assert_eq!(dirty(&report), [(3, 2)]);
    server.join().unwrap();
}

/// As libvfio-user: several mappings at once are refused, one is reported, and of what was
/// unmapped it knows nothing any more.
#[test]
fn what_the_server_has_forgotten_counts_as_dirty() {
    let (client, server) = client(|peer| {
        for _ in 0..2 {
            let (header, _) = peer.expect(Command::DmaMap);
            peer.reply(&header, &Reply::DmaMap);
        }
        start(peer, 4096);
        reports(
            peer,
            &[
                (0, 0x7000, 4096, Answer::Refuse(95)),
                (0, 0x2000, 4096, Answer::Bits(&[0b10])),
                (0x2000, 0x3000, 4096, Answer::Refuse(2)),
                (0x5000, 0x2000, 4096, Answer::Bits(&[0])),
            ],
        );
    });
    client.map(0, 0x2000, Prot::READ_WRITE, None).unwrap();
    client.map(0x5000, 0x2000, Prot::READ_WRITE, None).unwrap();
    client.start_logging(&[], BASE).unwrap();
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 1 << 20).unwrap();
    let view = tracker.iova_view();
    tracker.add_log("device", &view, 0, client.log()).unwrap();
    tracker.start().unwrap();
    view.map(0, 0x10_000, 0x7000).unwrap();
    view.unmap(0x2000, 0x3000).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    assert_eq!(dirty(&report), [(0x11, 4)]);
    server.join().unwrap();
}

/// An error, and a connection that has ended: all that the device can have written.
#[test]
fn a_log_that_cannot_be_read_makes_all_dirty() {
    let (client, server) = client(|peer| {
        start(peer, 4096);
        reports(peer, &[(0, 0x8000, 4096, Answer::Refuse(22))]);
    });
    client.start_logging(&[], BASE).unwrap();
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 1 << 20).unwrap();
    let view = tracker.iova_view();
    tracker.add_log("device", &view, 0, client.log()).unwrap();
    tracker.start().unwrap();
    view.map(0, 0x4000, 0x8000).unwrap();
    for _ in 0..2 {
        let mut report = Report::new();
        let failed = tracker.take(&mut report).unwrap_err();
        assert_eq!(failed.source, "device");
        assert_eq!(dirty(&report), [(4, 8)]);
    }
    server.join().unwrap();
}
