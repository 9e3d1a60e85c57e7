// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any bytes give one answer each, or end the connection.

#[path = "support/hostile.rs"]
mod hostile;
mod support;

use hostile::{to_client, to_server, Outcome};
use proptest::prelude::*;
use support::{header, version, JSON};
use vfio_user_wire::{Error, Header};

fn message(command: u16, payload: &[u8]) -> Vec<u8> {
    let header = header(command, payload.len());
    [&header.to_bytes()[..], payload].concat()
}

fn hello() -> Vec<u8> {
    message(1, &version(1, &format!("{JSON}\0")))
}

/// What a server answers after VERSION.
fn after_hello(messages: &[Vec<u8>]) -> Outcome {
    to_server(&[hello(), messages.concat()].concat(), 0)
}

fn open(answers: &[u32]) -> Outcome {
    Outcome {
        answers: answers.to_vec(),
        closed: None,
    }
}

fn closed(answers: &[u32], error: Error) -> Outcome {
    Outcome {
        answers: answers.to_vec(),
        closed: Some(error),
    }
}

/// Ten conversations that other servers panic, hang or lose their place in.
#[test]
fn ten_probes() {
    let info = message(4, &bytes![16u32, 0u32, 0u32, 0u32]);
    let map = message(2, &bytes![32u32, 3u32, 0u64, 0x1000u64, 0x1000u64]);
    let first = |data: &[u8]| {
        let payload = [version(1, ""), data.to_vec()].concat();
        to_server(&[message(1, &payload), info.clone()].concat(), 0)
    };
    // 1. The plain way.
    assert_eq!(after_hello(std::slice::from_ref(&info)), open(&[0, 0]));
    // 2. VERSION without JSON is a VERSION.
    assert_eq!(first(b""), open(&[0, 0]));
    // 3. JSON without NUL.
    let got = first(b"{\"capabilities\":{}}");
    assert_eq!(got, closed(&[22], Error::NoTerminator));
    // 4. JSON without capabilities.
    assert_eq!(first(b"{}\0"), open(&[0, 0]));
    // 5. A size below that of a header.
    let tiny = Header {
        size: 4,
        ..header(4, 0)
    };
    let got = after_hello(&[tiny.to_bytes().to_vec(), info.clone()]);
    assert_eq!(got, closed(&[0], Error::MessageTooShort));
    // 6. DMA_MAP twice: whether the second is EEXIST, the server knows.
    let got = after_hello(&[map.clone(), map, info.clone()]);
    assert_eq!(got, open(&[0, 0, 0, 0]));
    // 7. A probe of a feature.
    let probe = message(16, &bytes![8u32, 1u32 | 1 << 18]);
    assert_eq!(after_hello(&[probe, info.clone()]), open(&[0, 0, 0]));
    // 8. REGION_WRITE_MULTI.
    let data = [bytes![1u64, 0u64, 0u32, 4u32], b"abcd\0\0\0\0".to_vec()].concat();
    assert_eq!(
        after_hello(&[message(15, &data), info.clone()]),
        open(&[0, 0, 0])
    );
    // The same, 4 bytes short.
    let got = after_hello(&[message(15, &data[..data.len() - 4]), info.clone()]);
    assert_eq!(got, open(&[0, 22, 0]));
    // 9. A write to a region that is not there: the server knows.
    let write = [bytes![0u64, 99u32, 4u32], b"abcd".to_vec()].concat();
    assert_eq!(
        after_hello(&[message(10, &write), info.clone()]),
        open(&[0, 0, 0])
    );
    // 10. A read of 2 GiB.
    let read = message(9, &bytes![0u64, 7u32, 1u32 << 31]);
    assert_eq!(after_hello(&[read, info]), open(&[0, 22, 0]));
}

#[test]
fn how_large_a_message_may_be() {
    // `to_server` has a max_data_xfer_size of 64 KiB.
    let first = |payload| to_server(&header(1, payload).to_bytes(), 0);
    assert_eq!(first(65536 - 16).closed, Some(Error::ShortVersion)); // none came
    assert_eq!(first(65536 - 15), closed(&[], Error::MessageTooLong));
    let later = |payload| after_hello(&[header(9, payload).to_bytes().to_vec()]);
    assert_eq!(later(131072 - 16), open(&[0, 22]));
    assert_eq!(later(131072 - 15), closed(&[0], Error::MessageTooLong));
    let huge = Header {
        size: u32::MAX,
        ..header(9, 0)
    };
    let got = after_hello(&[huge.to_bytes().to_vec()]);
    assert_eq!(got, closed(&[0], Error::MessageTooLong));
}

#[test]
fn types_and_unknown_commands() {
    for kind in 2..16 {
        let wrong = Header {
            flags: kind,
            ..header(4, 0)
        };
        let got = after_hello(&[wrong.to_bytes().to_vec()]);
        assert_eq!(got, closed(&[0], Error::MessageType));
        let got = to_client(&wrong.to_bytes());
        assert_eq!(got, closed(&[], Error::MessageType));
    }
    for command in [0, 11, 12, 14, 19, 255, u16::MAX] {
        let got = after_hello(&[message(command, &[0; 16])]);
        assert_eq!(got, open(&[0, 22]), "{command}");
    }
    for command in (0..30).filter(|command| ![11, 12].contains(command)) {
        let got = to_client(&message(command, &[0; 32]));
        assert_eq!(got, open(&[22]), "{command}");
    }
    assert_eq!(to_client(&message(11, &[0; 16])), open(&[0]));
    assert_eq!(to_client(&message(11, &[0xff; 16])), open(&[7]));
}

/// A message that is likely to be taken: a known command, and fields with a meaning.
fn likely() -> impl Strategy<Value = Vec<u8>> {
    let field = prop_oneof![
        Just(0u32),
        0..64u32,
        (0..32u32, 0..20u32).prop_map(|(bit, low)| 1 << bit | low),
        Just(u32::MAX),
        any::<u32>(),
    ];
    let flags = prop_oneof![8 => Just(0u32), 4 => Just(1), 1 => Just(0x21), 1 => any::<u32>()];
    (0..20u16, flags, prop::collection::vec(field, 0..16)).prop_map(|(command, flags, fields)| {
        let payload: Vec<u8> = fields.iter().flat_map(|f| f.to_ne_bytes()).collect();
        let header = Header {
            flags,
            ..header(command, payload.len())
        };
        [&header.to_bytes()[..], &payload].concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        hostile::both(&bytes);
    }

    #[test]
    fn likely_messages(messages in prop::collection::vec(likely(), 0..8), fds in 0..4usize) {
        let bytes = messages.concat();
        let got = to_server(&[hello(), bytes.clone()].concat(), fds);
        if got.closed.is_none() {
            prop_assert_eq!(got.answers.len(), messages.len() + 1);
        }
        let got = to_client(&bytes);
        if got.closed.is_none() {
            prop_assert_eq!(got.answers.len(), messages.len());
        }
    }

    #[test]
    fn any_json(text in "[\\{\\}\\[\\]:,\"a-z_0-9. \\\\-]{0,60}") {
        to_server(&message(1, &version(0, &format!("{text}\0"))), 0);
        let data = format!("{{\"capabilities\":{{{text}}}}}\0");
        to_server(&message(1, &version(0, &data)), 0);
    }
}
