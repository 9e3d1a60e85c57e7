// SPDX-License-Identifier: MIT OR Apache-2.0
//! VERSION: what is read, what is refused, what is agreed on.

mod support;

use support::{header, version};
use vfio_user_wire::{
    Agreed, Capabilities, Client, Command, Error, Header, Migration, Reply, Request, Server,
    Version,
};

/// What a server that knows everything makes of a client's payload.
fn serve(payload: &[u8]) -> Result<Agreed, Error> {
    let mut server = Server::new(everything());
    server.request(&header(1, payload.len()), payload, 0)?;
    Ok(*server.agreed().unwrap())
}

fn data(data: &str) -> Result<Agreed, Error> {
    serve(&version(1, &format!("{data}\0")))
}

fn capabilities(list: &str) -> Result<Agreed, Error> {
    data(&format!("{{\"capabilities\":{{{list}}}}}"))
}

fn everything() -> Capabilities {
    Capabilities {
        max_msg_fds: 8,
        max_data_xfer_size: 1 << 20,
        max_dma_maps: 65535,
        pgsizes: 4096 | 1 << 21,
        migration: Some(Migration {
            pgsize: 4096,
            max_bitmap_size: 1 << 20,
        }),
        write_multiple: true,
        twin_socket: true,
        twin_socket_fd: None,
    }
}

#[test]
fn nothing_said_is_the_default() {
    let nothing = serve(&version(0, "")).unwrap();
    assert_eq!(
        nothing,
        Agreed {
            minor: 0,
            max_send_fds: 1,
            max_receive_fds: 8,
            max_data_xfer_size: 1 << 20,
            max_dma_maps: 65535,
            pgsizes: 4096,
            migration: None,
            write_multiple: false,
            twin_socket: false,
        }
    );
    for same in [
        "{}",
        " { } ",
        r#"{"capabilities":{}}"#,
        r#"{"other":[{"a":[1,2]}]}"#,
    ] {
        assert_eq!(
            data(same),
            Ok(Agreed {
                minor: 1,
                ..nothing
            }),
            "{same}"
        );
    }
}

#[test]
fn what_qemu_says() {
    let qemu = r#"{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456},
        "max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 65535,
        "pgsizes": 4096, "write_multiple": true}}"#;
    let agreed = serve(&version(0, &format!("{qemu}\0"))).unwrap();
    assert_eq!(
        agreed,
        Agreed {
            minor: 0, // QEMU refuses a higher one
            max_send_fds: 16,
            max_receive_fds: 8,
            max_data_xfer_size: 1 << 20,
            max_dma_maps: 65535,
            pgsizes: 4096,
            migration: Some(Migration {
                pgsize: 4096,
                max_bitmap_size: 1 << 20,
            }),
            write_multiple: true,
            twin_socket: false,
        }
    );
    // Not asked for, so not in the reply.
    assert!(!agreed.reply(Some(0)).capabilities.twin_socket);
}

#[test]
fn the_lower_of_both() {
    for (theirs, agreed) in [(0, 0), (1, 1), (2, 2), (3, 2), (u16::MAX, 2)] {
        assert_eq!(serve(&version(theirs, "")).unwrap().minor, agreed);
    }
    let agreed = capabilities(
        r#""max_data_xfer_size":4096,"max_dma_maps":99999999999,"pgsizes":2097153,
        "migration":{"pgsize":8192,"max_bitmap_size":64}"#,
    )
    .unwrap();
    assert_eq!(agreed.max_data_xfer_size, 4096);
    assert_eq!(agreed.max_dma_maps, 65535);
    assert_eq!(agreed.pgsizes, 1 << 21);
    let migration = Migration {
        pgsize: 8192,
        max_bitmap_size: 64,
    };
    assert_eq!(agreed.migration, Some(migration));
}

#[test]
fn wrong_messages() {
    let payload = [&bytes![1u16, 0u16][..], b"{}\0"].concat();
    assert_eq!(serve(&payload), Err(Error::Major));
    for len in 0..4 {
        assert_eq!(serve(&vec![0; len]), Err(Error::ShortVersion));
    }
    assert_eq!(serve(&version(1, "{}")), Err(Error::NoTerminator));
    assert_eq!(serve(&version(1, "{")), Err(Error::NoTerminator));
    let mut server = Server::new(everything());
    let payload = version(1, "{}\0");
    let got = server.request(&header(1, payload.len()), &payload, 1);
    assert_eq!(got, Err(Error::VersionDescriptors));
    assert_eq!(server.agreed(), None);
    // A C string ends at the first NUL.
    assert!(data("{}\0garbage").is_ok());
    let mut not_utf8 = version(1, r#"{"a":""#);
    not_utf8.extend_from_slice(b"\xff\"}\0");
    assert_eq!(serve(&not_utf8), Err(Error::Json));
}

#[test]
fn wrong_json() {
    for text in [
        "",
        " ",
        "[]",
        "1",
        "\"a\"",
        "null",
        "{",
        "}",
        "{]",
        "{}x",
        "{}{}",
        "{,}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{\"a\":01}",
        "{\"a\":+1}",
        "{\"a\":1.}",
        "{\"a\":.5}",
        "{\"a\":1e}",
        "{\"a\":-}",
        "{\"a\":tru}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\\u12g4\"}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"}",
        "{\"a\":[1,]}",
        "{\"a\":[1}",
        "{\"a\":{\"b\":1]}",
        "{a:1}",
        "{'a':1}",
    ] {
        assert_eq!(data(text), Err(Error::Json), "{text}");
    }
    for text in [
        r#"{"a":[],"b":{},"c":[[],[{}],{"d":[1,-2,3.5e-7,true,false,null,"\u00e9\n\\"]}]}"#,
        "\t{\r\n\"a\" : 0 , \"b\" : 1E+5 }\n",
        r#"{"capabilities":{},"capabilities":{}}"#,
    ] {
        assert!(data(text).is_ok(), "{text}");
    }
    // Nesting costs no stack, and has an end: the object and 31 arrays in it.
    let nested = |n| format!("{{\"a\":{}1{}}}", "[".repeat(n), "]".repeat(n));
    assert!(data(&nested(31)).is_ok());
    assert_eq!(data(&nested(32)), Err(Error::Json));
    assert_eq!(data(&nested(10_000)), Err(Error::Json));
    assert_eq!(data(&"[".repeat(10_000)), Err(Error::Json));
}

#[test]
fn wrong_capabilities() {
    assert_eq!(data(r#"{"capabilities":1}"#), Err(Error::Capability));
    assert_eq!(data(r#"{"capabilities":[]}"#), Err(Error::Capability));
    for name in [
        "max_msg_fds",
        "max_data_xfer_size",
        "max_dma_maps",
        "pgsizes",
    ] {
        for value in [
            "-1",
            "1.0",
            "1e3",
            "\"1\"",
            "true",
            "null",
            "{}",
            "[1]",
            "18446744073709551616",
        ] {
            let list = format!("\"{name}\":{value}");
            assert_eq!(capabilities(&list), Err(Error::Capability), "{list}");
        }
        let most = format!("\"{name}\":18446744073709551615");
        assert!(capabilities(&most).is_ok(), "{most}");
    }
    for list in [
        r#""max_data_xfer_size":0"#,
        r#""write_multiple":1"#,
        r#""migration":true"#,
        r#""migration":{"pgsize":0}"#,
        r#""migration":{"pgsize":4097}"#,
        r#""migration":{"max_bitmap_size":-1}"#,
        r#""twin_socket":true"#,
        r#""twin_socket":{"supported":1}"#,
        r#""twin_socket":{"fd_index":-1}"#,
    ] {
        assert_eq!(capabilities(list), Err(Error::Capability), "{list}");
    }
    assert_eq!(capabilities(r#""pgsizes":0"#), Err(Error::NoPageSize));
    assert_eq!(capabilities(r#""pgsizes":8192"#), Err(Error::NoPageSize));
}

#[test]
fn names_and_order() {
    // The last of two counts, and a letter may be escaped.
    let agreed = capabilities(r#""max_msg_fds":2,"max_msg_fds":3"#).unwrap();
    assert_eq!(agreed.max_send_fds, 3);
    let agreed = capabilities(r#""max\u005Fmsg\u005ffds":4"#).unwrap();
    assert_eq!(agreed.max_send_fds, 4);
    for other in [
        "max_msg_fd",
        "max_msg_fdss",
        "Max_msg_fds",
        "max\\u015fmsg_fds",
        "",
    ] {
        let agreed = capabilities(&format!("\"{other}\":4")).unwrap();
        assert_eq!(agreed.max_send_fds, 1, "{other}");
    }
}

/// What a client with `ours` makes of a server's reply with `fds` descriptors.
fn accept(ours: Capabilities, theirs: Version, fds: usize) -> Result<Option<usize>, Error> {
    Client::new(ours).accept(&Reply::Version(theirs), fds)
}

#[test]
fn a_client_accepts() {
    let reply = |minor, capabilities| Version {
        minor,
        capabilities,
    };
    let plain = Capabilities::default();
    assert_eq!(accept(plain, reply(2, plain), 0), Ok(None));
    assert_eq!(accept(plain, reply(3, plain), 0), Err(Error::Minor));
    let twin = |fd| Capabilities {
        twin_socket: true,
        twin_socket_fd: fd,
        ..plain
    };
    assert_eq!(accept(twin(None), reply(0, plain), 0), Ok(None));
    assert_eq!(accept(twin(None), reply(0, twin(Some(0))), 1), Ok(Some(0)));
    assert_eq!(accept(twin(None), reply(0, twin(Some(1))), 2), Ok(Some(1)));
    assert_eq!(
        accept(twin(None), reply(0, twin(Some(1))), 1),
        Err(Error::TwinSocket)
    );
    assert_eq!(
        accept(twin(None), reply(0, twin(None)), 1),
        Err(Error::TwinSocket)
    );
    assert_eq!(
        accept(plain, reply(0, twin(Some(0))), 1),
        Err(Error::TwinSocket)
    );
    let huge = Capabilities {
        pgsizes: 1 << 30,
        ..plain
    };
    assert_eq!(accept(plain, reply(0, huge), 0), Err(Error::NoPageSize));

    let mut client = Client::new(plain);
    let failure = Reply::Failure(Command::Version, 22);
    assert_eq!(client.accept(&failure, 0), Err(Error::UnexpectedMessage));
    assert_eq!(client.agreed(), None);
    let once = Reply::Version(reply(0, plain));
    assert_eq!(client.accept(&once, 0), Ok(None));
    assert_eq!(client.accept(&once, 0), Err(Error::UnexpectedMessage));
}

#[test]
fn both_sides_agree_on_the_same() {
    let (mut server, mut client) = (Server::new(everything()), Client::new(everything()));
    let (mut to_server, mut to_client) = ([0; 512], [0; 512]);
    let len = client.version().write(1, false, &mut to_server).unwrap();
    let header = server.header(to_server.first_chunk().unwrap()).unwrap();
    let request = server
        .request(&header, &to_server[Header::SIZE..len], 0)
        .unwrap();
    assert_eq!(request, client.version());
    let agreed = *server.agreed().unwrap();
    let reply = Reply::Version(agreed.reply(Some(0)));
    let len = reply.write(1, &mut to_client).unwrap();
    let header = client.header(to_client.first_chunk().unwrap()).unwrap();
    let read = Reply::read(&header, &to_client[Header::SIZE..len]).unwrap();
    assert_eq!(read, reply);
    assert_eq!(client.accept(&read, 1), Ok(Some(0)));
    assert_eq!(client.agreed(), Some(&agreed));
}

#[test]
fn what_cannot_come_yet() {
    let mut server = Server::new(everything());
    let info = header(4, 16);
    assert_eq!(server.header(&info.to_bytes()), Err(Error::NotNegotiated));
    assert_eq!(
        server.request(&info, &[0; 16], 0),
        Err(Error::NotNegotiated)
    );
    let reply = Header {
        flags: 1,
        ..header(1, 4)
    };
    assert_eq!(
        server.header(&reply.to_bytes()),
        Err(Error::UnexpectedMessage)
    );
    let mut client = Client::new(everything());
    let dma = header(11, 16);
    assert_eq!(
        client.header(&dma.to_bytes()),
        Err(Error::UnexpectedMessage)
    );
    assert_eq!(
        client.request(&dma, &[0; 16]),
        Err(Error::UnexpectedMessage)
    );

    let payload = version(0, "");
    server.request(&header(1, 4), &payload, 0).unwrap();
    assert_eq!(
        server.request(&header(1, 4), &payload, 0),
        Err(Error::NegotiatedTwice)
    );
    assert_eq!(
        server.request(&dma, &[0; 16], 0),
        Err(Error::UnknownCommand)
    );
    assert!(server.header(&reply.to_bytes()).is_ok());
    let theirs = Version {
        minor: 0,
        capabilities: Capabilities::default(),
    };
    client.accept(&Reply::Version(theirs), 0).unwrap();
    assert_eq!(client.request(&info, &[0; 16]), Err(Error::UnknownCommand));
    let got = client.request(&dma, &[0; 16]);
    assert!(matches!(got, Ok(Request::DmaRead(_))), "{got:?}");
}
