// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contents of pages in the device's state, for clients that do not use its log.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::{bytes_at, memfd, world, world_with, Errno, World, PAGE, RW};

const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;

fn carrying(pages: u64) -> (World, OwnedFd) {
    let mut world = world_with(|server| server.with_carry(pages * PAGE));
    let file = memfd(16 * PAGE, true);
    map(&mut world, &file);
    (world, file)
}

/// 16 pages of the file at IOVA 0, and 16 pages behind messages at IOVA 64 KiB, which the client
/// has at the end of its memory.
fn map(world: &mut World, file: &OwnedFd) {
    world.client.memory.resize(32 << 12, 0);
    world
        .client
        .map((0, 16 * PAGE), RW, Some((file, 0)))
        .unwrap();
    world.client.map((16 * PAGE, 16 * PAGE), RW, None).unwrap();
}

fn write(world: &World, page: u64, byte: u8) {
    world.toy.dma.write(page * PAGE + 7, &[byte]).unwrap();
}

/// The state of the device, which has stopped and runs again.
fn save(world: &mut World) -> Result<Vec<u8>, crate::Failed> {
    world.client.state(STOP_COPY)?;
    let stream = world.client.mig_read_all();
    world.client.state(RUNNING).unwrap();
    Ok(stream)
}

/// How many pages the next state has.
fn carried(world: &mut World) -> Result<usize, crate::Failed> {
    let without = 16 + 256 + 16 + 16;
    Ok((save(world)?.len() - without) / 4104)
}

/// As QEMU does: it maps the memory, writes the state, and leaves RESUMING when the guest runs.
#[test]
fn contents_arrive_when_the_device_leaves_resuming() {
    let (mut source, from) = carrying(64);
    write(&source, 3, 1);
    source.client.doorbell(20 * PAGE, 0x0202); // by messages
    source.client.state(STOP_COPY).unwrap();
    // The contents are those of this moment.
    let late = b"cpu";
    std::os::unix::fs::FileExt::write_all_at(
        &File::from(from.try_clone().unwrap()),
        late,
        3 * PAGE,
    )
    .unwrap();
    let stream = source.client.mig_read_all();
    assert_eq!(stream.len(), 16 + 272 + 16 + 2 * 4104);

    let (mut destination, to) = carrying(64);
    destination.client.state(RESUMING).unwrap();
    for part in stream.chunks(1000) {
        destination.client.mig_write(part).unwrap();
    }
    assert_eq!(bytes_at(&to, 3 * PAGE + 7, 1), [0], "not yet");
    destination.client.state(RUNNING).unwrap();
    assert_eq!(bytes_at(&to, 3 * PAGE + 7, 1), [1]);
    assert_eq!(
        bytes_at(&to, 3 * PAGE, 3),
        [0; 3],
        "what the CPU wrote later is not the device's"
    );
    assert_eq!(destination.client.memory[20 * 4096..][..2], [2, 2]);
    // The destination carries them on, since nobody there knows of them.
    assert_eq!(carried(&mut destination), Ok(2));
    // One that does not map the memory refuses the state, and so does a device without carry
    // whose bytes are short.
    let mut unmapped = world();
    unmapped.client.state(RESUMING).unwrap();
    unmapped.client.mig_write(&stream).unwrap();
    assert_eq!(unmapped.client.state(RUNNING), Err(Errno(22)));
    let mut short = world();
    short.client.state(RESUMING).unwrap();
    short.client.mig_write(&stream[..stream.len() - 1]).unwrap();
    assert_eq!(short.client.state(RUNNING), Err(Errno(22)));
}

#[test]
fn reports_and_starts_clear_what_they_tell() {
    let (mut world, _file) = carrying(64);
    write(&world, 1, 1);
    write(&world, 2, 1);
    assert_eq!(carried(&mut world), Ok(2));
    assert_eq!(carried(&mut world), Ok(2), "a migration that was cancelled");
    world.client.start(PAGE, &[(2 * PAGE, 30 * PAGE)]).unwrap();
    assert_eq!(carried(&mut world), Ok(1), "page 2 is copied after START");
    write(&world, 2, 2);
    write(&world, 3, 2);
    write(&world, 4, 2);
    assert_eq!(carried(&mut world), Ok(4));
    assert_eq!(world.client.report(3 * PAGE, PAGE, PAGE).unwrap(), [0]);
    assert_eq!(carried(&mut world), Ok(3));
    assert_eq!(world.client.report(PAGE, 4 * PAGE, PAGE), Err(Errno(2)));
    assert_eq!(
        carried(&mut world),
        Ok(3),
        "a report that fails tells nothing"
    );
    // A part of a page is no report of the page.
    assert_eq!(world.client.report(2 * PAGE, 2048, 1024).unwrap(), [0, 1]);
    assert_eq!(carried(&mut world), Ok(3));
    world.client.stop().unwrap();
    assert_eq!(carried(&mut world), Ok(3), "nor is STOP");
    world.client.start(PAGE, &[]).unwrap();
    assert_eq!(carried(&mut world), Ok(0));
}

#[test]
fn a_mapping_that_has_gone_is_refused_until_its_pages_are_told() {
    let (mut world, file) = carrying(64);
    write(&world, 5, 1);
    world.client.unmap(16 * PAGE, 16 * PAGE).unwrap();
    assert_eq!(carried(&mut world), Ok(1), "nothing was written there");
    world.client.unmap(0, 16 * PAGE).unwrap();
    assert_eq!(save(&mut world), Err(Errno(14)));
    // The same IOVA, with other memory.
    let other = memfd(16 * PAGE, true);
    world
        .client
        .map((0, 16 * PAGE), RW, Some((&other, 0)))
        .unwrap();
    assert_eq!(save(&mut world), Err(Errno(14)));
    world.client.state(RUNNING).unwrap();
    assert_eq!(world.toy.write(0, &[1]), Some(Ok(())), "the device runs on");
    world.client.start(PAGE, &[(0, PAGE)]).unwrap();
    assert_eq!(save(&mut world), Err(Errno(14)));
    world.client.stop().unwrap();
    world.client.start(PAGE, &[]).unwrap();
    assert_eq!(carried(&mut world), Ok(0));
    // With the log a remap is no reason to refuse, as soon as its pages are told.
    write(&world, 6, 1);
    world.client.unmap(0, 16 * PAGE).unwrap();
    world
        .client
        .map((0, 16 * PAGE), RW, Some((&file, 0)))
        .unwrap();
    assert_eq!(save(&mut world), Err(Errno(14)));
    assert_eq!(world.client.report(0, 16 * PAGE, PAGE).unwrap(), [6]);
    assert_eq!(carried(&mut world), Ok(0));
}

#[test]
fn a_budget_that_is_exceeded_is_refused() {
    let (mut world, _file) = carrying(4);
    for page in 0..4 {
        write(&world, page, 1);
        write(&world, page, 2);
    }
    assert_eq!(carried(&mut world), Ok(4));
    write(&world, 4, 1);
    assert_eq!(save(&mut world), Err(Errno(28)));
    world.client.start(PAGE, &[(0, 16 * PAGE)]).unwrap();
    assert_eq!(
        save(&mut world),
        Err(Errno(28)),
        "nobody knows whether these were all"
    );
    world.client.stop().unwrap();
    world.client.start(PAGE, &[]).unwrap();
    assert_eq!(carried(&mut world), Ok(0));
}

/// What cannot be read is lost.
#[test]
fn a_truncated_file_is_refused() {
    let mut world = world_with(|server| server.with_carry(64 * PAGE));
    let file = memfd(2 * PAGE, false);
    world
        .client
        .map((0, 2 * PAGE), RW, Some((&file, 0)))
        .unwrap();
    write(&world, 1, 1);
    File::from(file.try_clone().unwrap()).set_len(PAGE).unwrap();
    assert_eq!(save(&mut world), Err(Errno(14)));
}

#[test]
fn nothing_is_carried_unless_the_server_says_so() {
    let mut world = world();
    let file = memfd(16 * PAGE, true);
    map(&mut world, &file);
    write(&world, 1, 1);
    assert_eq!(save(&mut world).unwrap().len(), 16 + 272);
}
