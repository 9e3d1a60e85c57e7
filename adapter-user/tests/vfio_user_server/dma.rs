// SPDX-License-Identifier: MIT OR Apache-2.0
//! Maps, and what the device reaches by them.

use std::fs::{read_to_string, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use adapter_user::{Error, Prot};
use vfio_user_wire::wire::{DMA_READABLE, DMA_WRITABLE, UNMAP_ALL};

use crate::{bytes_at, memfd, world, Errno, PAGE, RW};

#[test]
fn errors_of_maps_and_unmaps() {
    let mut world = world();
    let client = &mut world.client;
    let file = memfd(4 * PAGE, true);
    let map = |client: &mut crate::Client, iova, size, flags, offset| {
        client.map((iova, size), flags, Some((&file, offset)))
    };
    for (iova, size, flags, offset) in [
        (0, 0, RW, 0),
        (1, PAGE, RW, 0),
        (0, PAGE + 1, RW, 0),
        (0, PAGE, RW, 1),
        (PAGE.wrapping_neg(), 2 * PAGE, RW, 0),
        (0, PAGE, 0, 0),
        (0, 2 * PAGE, RW, 3 * PAGE), // beyond the file
        (0, PAGE, RW, PAGE.wrapping_neg()),
    ] {
        let got = map(client, iova, size, flags, offset);
        assert_eq!(
            got,
            Err(Errno(22)),
            "{iova:#x} {size:#x} {flags} {offset:#x}"
        );
    }
    assert_eq!(map(client, 2 * PAGE, 2 * PAGE, RW, 0), Ok(()));
    for (iova, size) in [
        (PAGE, 2 * PAGE),
        (3 * PAGE, PAGE),
        (3 * PAGE, 2 * PAGE),
        (0, 8 * PAGE),
    ] {
        assert_eq!(
            map(client, iova, size.min(4 * PAGE), RW, 0),
            Err(Errno(17)),
            "{iova:#x}"
        );
        assert_eq!(client.map((iova, size), RW, None), Err(Errno(17)));
    }
    // The last page of the address space.
    assert_eq!(client.map((PAGE.wrapping_neg(), PAGE), RW, None), Ok(()));
    for (iova, size) in [(2 * PAGE, PAGE), (3 * PAGE, PAGE), (0, 8 * PAGE), (0, PAGE)] {
        assert_eq!(client.unmap(iova, size), Err(Errno(2)), "{iova:#x}");
    }
    assert_eq!(client.unmap(2 * PAGE, 2 * PAGE), Ok(()));
    assert_eq!(client.unmap(2 * PAGE, 2 * PAGE), Err(Errno(2)));
    assert_eq!(client.unmap_with(UNMAP_ALL, 0, 0), Ok(()));
    assert_eq!(client.unmap(PAGE.wrapping_neg(), PAGE), Err(Errno(2)));
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let (_end, socket) = UnixStream::pair().unwrap();
    let folder = OwnedFd::from(File::open("/").unwrap());
    for fd in [null, socket.into(), folder] {
        let got = client.map((0, PAGE), RW, Some((&fd, 0)));
        assert_eq!(got, Err(Errno(22)));
    }
}

/// Files that may shrink and those that may not, and memory behind messages.
#[test]
fn the_device_reads_and_writes_across_maps() {
    for sealed in [true, false] {
        let mut world = world();
        let file = memfd(4 * PAGE, sealed);
        let client = &mut world.client;
        client
            .map((PAGE, PAGE), RW, Some((&file, 2 * PAGE)))
            .unwrap();
        client.map((2 * PAGE, PAGE), RW, Some((&file, 0))).unwrap();
        let data: Vec<u8> = (0..100).collect();
        world.toy.dma.write(2 * PAGE - 50, &data).unwrap();
        assert_eq!(bytes_at(&file, 3 * PAGE - 50, 50), data[..50]);
        assert_eq!(bytes_at(&file, 0, 50), data[50..]);
        let mut read = [0; 100];
        world.toy.dma.read(2 * PAGE - 50, &mut read).unwrap();
        assert_eq!(read, data[..]);
        let pin = world
            .toy
            .dma
            .pin(2 * PAGE - 50, 100, Prot::READ_WRITE)
            .unwrap();
        pin.write(99, &[77]).unwrap();
        assert_eq!(bytes_at(&file, 49, 1), [77]);
        let beyond = world.toy.dma.write(3 * PAGE - 1, &[1, 2]);
        assert_eq!(beyond, Err(Error::Unmapped));
        assert_eq!(bytes_at(&file, PAGE - 1, 1), [0], "nothing was written");
        world.client.unmap(PAGE, PAGE).unwrap();
        assert_eq!(pin.write(0, &[1]), Err(Error::Unmapped), "the pin went");
    }
}

#[test]
fn rights_of_maps() {
    let mut world = world();
    for (k, file) in [Some(memfd(PAGE, true)), Some(memfd(PAGE, false)), None]
        .iter()
        .enumerate()
    {
        let at = 4 * PAGE * k as u64;
        let file = file.as_ref().map(|file| (file, 0));
        let client = &mut world.client;
        client.map((at, PAGE), DMA_READABLE, file).unwrap();
        client.map((at + PAGE, PAGE), DMA_WRITABLE, file).unwrap();
        let dma = world.toy.dma.clone();
        let device = std::thread::spawn(move || {
            let denied = Err(Error::Denied);
            assert_eq!(dma.write(at, &[1]), denied);
            assert_eq!(dma.read(at + PAGE, &mut [0]), denied);
            assert_eq!(dma.read(at, &mut [0]), Ok(()));
            assert_eq!(dma.write(at + PAGE, &[1]), Ok(()));
            assert_eq!(dma.write(at + PAGE - 1, &[1, 1]), denied, "a part of it");
            assert_eq!(dma.pin(at, 1, Prot::WRITE).err(), Some(Error::Denied));
        });
        if file.is_none() {
            for _ in 0..2 {
                let (header, payload) = client.receive().unwrap();
                let reply = client.serve(&header, &payload);
                client.send(&reply, &[]);
            }
        }
        device.join().unwrap();
    }
    assert_eq!(
        world.toy.dma.pin(9 * PAGE, 1, Prot::WRITE).err(),
        Some(Error::Unmapped)
    );
}

#[test]
fn a_descriptor_must_allow_what_the_map_does() {
    let mut world = world();
    let file = memfd(PAGE, false);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only = OwnedFd::from(File::open(&path).unwrap());
    let write_only = OwnedFd::from(File::options().write(true).open(&path).unwrap());
    let client = &mut world.client;
    let map = |client: &mut crate::Client, iova, flags, fd| {
        client.map((iova, PAGE), flags, Some((fd, 0)))
    };
    assert_eq!(map(client, 0, RW, &read_only), Err(Errno(13)));
    assert_eq!(map(client, 0, RW, &write_only), Err(Errno(13)));
    assert_eq!(map(client, 0, DMA_READABLE, &read_only), Ok(()));
    assert_eq!(map(client, PAGE, RW, &file), Ok(()));
    world.toy.dma.write(PAGE, &[5]).unwrap();
    let mut byte = [0];
    world.toy.dma.read(0, &mut byte).unwrap();
    assert_eq!(byte, [5]);
    assert_eq!(world.toy.dma.write(0, &[6]), Err(Error::Denied));
    use nix::fcntl::{fcntl, FcntlArg, SealFlag};
    let sealed = memfd(PAGE, false);
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    assert_eq!(map(&mut world.client, 8 * PAGE, RW, &sealed), Err(Errno(1)));
    assert_eq!(
        map(&mut world.client, 8 * PAGE, DMA_READABLE, &sealed),
        Ok(())
    );
}

/// Every access gives an error, and none a signal. What fails is reported all the same.
#[test]
fn a_client_that_truncates_its_file() {
    let mut world = world();
    let file = memfd(4 * PAGE, false);
    world
        .client
        .map((0, 4 * PAGE), RW, Some((&file, 0)))
        .unwrap();
    world.client.start(PAGE, &[]).unwrap();
    let dma = &world.toy.dma;
    let pin = dma.pin(2 * PAGE, PAGE, Prot::READ_WRITE).unwrap();
    File::from(file.try_clone().unwrap()).set_len(PAGE).unwrap();
    assert_eq!(dma.write(PAGE, &[1]), Err(Error::BadAddress));
    assert_eq!(dma.read(PAGE, &mut [1]), Err(Error::BadAddress));
    assert_eq!(pin.write(0, &[1]), Err(Error::BadAddress));
    assert_eq!(pin.read(0, &mut [1]), Err(Error::BadAddress));
    assert!(dma.pin(PAGE, PAGE, Prot::READ_WRITE).is_err());
    assert_eq!(dma.write(0, &[1]), Ok(()));
    assert_eq!(dma.write(PAGE - 1, &[1, 2]), Err(Error::BadAddress));
    assert_eq!(world.client.report(0, 4 * PAGE, PAGE).unwrap(), [0, 1, 2]);
    drop(pin);
    world.client.unmap(0, 4 * PAGE).unwrap();
}

/// Huge pages that are not there are an error too, and no signal.
#[test]
fn huge_pages() {
    use nix::sys::memfd::{memfd_create, MFdFlags};
    const HUGE: u64 = 2 << 20;
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create(c"huge", flags).expect("a kernel with huge pages");
    File::from(file.try_clone().unwrap())
        .set_len(2 * HUGE)
        .unwrap();
    nix::fcntl::fcntl(
        &file,
        nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK),
    )
    .unwrap();
    let mut world = world();
    world
        .client
        .map((0, PAGE), RW, Some((&file, HUGE)))
        .unwrap();
    match world.toy.dma.write(8, &[9]) {
        Ok(()) => {
            let mut byte = [0];
            world.toy.dma.read(8, &mut byte).unwrap();
            assert_eq!(byte, [9]);
        }
        Err(error) => assert_eq!(error, Error::BadAddress),
    }
    world.client.unmap(0, PAGE).unwrap();
}

/// How many VMAs of a file this process has.
fn vmas(file: &OwnedFd) -> usize {
    let inode = File::from(file.try_clone().unwrap())
        .metadata()
        .unwrap()
        .ino();
    let maps = read_to_string("/proc/self/maps").unwrap();
    let of_file = |line: &&str| line.split_whitespace().nth(4) == Some(&inode.to_string());
    maps.lines().filter(of_file).count()
}

#[test]
fn a_file_is_mapped_once_and_goes_with_its_last_map() {
    for sealed in [true, false] {
        let mut world = world();
        let file = memfd(8 * PAGE, sealed);
        for k in 0..4 {
            // Another descriptor of the same file.
            let again = file.try_clone().unwrap();
            let at = (2 * k * PAGE, PAGE);
            world.client.map(at, RW, Some((&again, k * PAGE))).unwrap();
            assert_eq!(vmas(&file), 1);
        }
        File::from(file.try_clone().unwrap())
            .set_len(16 * PAGE)
            .unwrap();
        let grown = (100 * PAGE, PAGE);
        world
            .client
            .map(grown, RW, Some((&file, 12 * PAGE)))
            .unwrap();
        world.toy.dma.write(100 * PAGE, &[3]).unwrap();
        assert_eq!(bytes_at(&file, 12 * PAGE, 1), [3]);
        for k in 0..4 {
            world.client.unmap(2 * k * PAGE, PAGE).unwrap();
        }
        assert_eq!(vmas(&file), 1);
        world.client.unmap(100 * PAGE, PAGE).unwrap();
        assert_eq!(vmas(&file), 0);
        world.client.map((0, PAGE), RW, Some((&file, 0))).unwrap();
        world.end().unwrap();
        assert_eq!(vmas(&file), 0, "and with the client");
    }
}

/// A file too large to be mapped as a whole.
#[test]
fn a_huge_sparse_file() {
    let mut world = world();
    let file = memfd(1 << 61, false);
    let at = 1 << 60;
    world
        .client
        .map((0, 2 * PAGE), RW, Some((&file, at)))
        .unwrap();
    world.toy.dma.write(PAGE, &[8]).unwrap();
    assert_eq!(bytes_at(&file, at + PAGE, 1), [8]);
    world.client.unmap(0, 2 * PAGE).unwrap();
    assert_eq!(vmas(&file), 0);
}

#[test]
fn as_many_maps_as_there_may_be() {
    const MAPS: u64 = 65535;
    for sealed in [true, false] {
        let mut world = world();
        let file = memfd(MAPS * PAGE, sealed);
        let start = Instant::now();
        for k in 0..MAPS {
            let at = (2 * k * PAGE, PAGE);
            world.client.map(at, RW, Some((&file, k * PAGE))).unwrap();
        }
        println!("{MAPS} maps, sealed {sealed}: {:?}", start.elapsed());
        assert_eq!(vmas(&file), 1);
        let more = (2 * MAPS * PAGE, PAGE);
        assert_eq!(world.client.map(more, RW, Some((&file, 0))), Err(Errno(28)));
        world.toy.dma.write(2 * (MAPS - 1) * PAGE, &[4]).unwrap();
        assert_eq!(bytes_at(&file, (MAPS - 1) * PAGE, 1), [4]);
        let start = Instant::now();
        world.client.unmap_with(UNMAP_ALL, 0, 0).unwrap();
        println!("unmapped: {:?}", start.elapsed());
        assert_eq!(vmas(&file), 0);
    }
}

#[test]
fn no_dma_without_bus_mastering() {
    let mut world = crate::connect(|server| server);
    world.client.version(Default::default());
    let file = memfd(4 * PAGE, true);
    world
        .client
        .map((0, 4 * PAGE), RW, Some((&file, 0)))
        .unwrap();
    let dma = world.toy.dma.clone();
    let denied = Err(Error::Denied);
    assert_eq!(dma.write(0, &[1]), denied);
    assert_eq!(dma.read(0, &mut [1]), denied);
    assert_eq!(dma.pin(0, 1, Prot::READ).err(), Some(Error::Denied));
    world.client.bus_master(true);
    assert_eq!(dma.write(0, &[1]), Ok(()));
    let pin = dma.pin(PAGE, PAGE, Prot::READ_WRITE).unwrap();
    pin.write(0, &[1]).unwrap();
    world.client.bus_master(false);
    assert_eq!(dma.write(0, &[2]), denied);
    assert_eq!(pin.write(0, &[2]), Err(Error::Unmapped));
    assert_eq!(
        world.toy.quiesced.load(std::sync::atomic::Ordering::SeqCst),
        1
    );
    assert_eq!(world.toy.write(0, &[2]), Some(denied), "it runs again");
    world.client.bus_master(true);
    assert_eq!(dma.write(0, &[3]), Ok(()));
    world.client.raw(13, &[]).unwrap(); // DEVICE_RESET
    assert_eq!(dma.write(0, &[4]), denied);
    // Of a device that has stopped, the bit changes what it may do when it runs again.
    world.client.bus_master(true);
    world.client.state(1).unwrap();
    world.client.bus_master(false);
    assert_eq!(world.toy.write(0, &[5]), None, "it has stopped");
    world.client.state(2).unwrap();
    assert_eq!(world.toy.write(0, &[5]), Some(denied));
    assert_eq!(bytes_at(&file, 0, 1), [3]);
}
