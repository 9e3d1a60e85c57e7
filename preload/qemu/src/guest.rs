// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guests: a program on bare hardware, and the same program in a Linux.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::qemu::fetch_package;
use crate::Result;

/// MiB that Linux has. From there on, at `BASE` of guest.c, the memory is the program's. Linux
/// keeps what follows its memory up to a multiple of 64 MiB to itself.
const LINUX_MEMORY: u32 = 128;

/// What QEMU boots.
pub(crate) struct Guests {
    bare: PathBuf,
    /// The kernel and its initramfs.
    linux: Option<(PathBuf, PathBuf)>,
}

impl Guests {
    /// Builds the guests in `folder`. The one with a Linux takes Debian's kernel.
    pub(crate) fn build(folder: &Path, cache: &Path, with_linux: bool) -> Result<Guests> {
        let bare = folder.join("guest");
        let flags = [
            "-m32", "-march=i686", "-mno-sse", "-ffreestanding", "-fno-pic", "-fno-stack-protector",
            "-nostdlib", "-no-pie",
            "-Wl,-Ttext=0x103000,--section-start=.multiboot=0x102000,--build-id=none,-z,noexecstack",
        ];
        compile(&flags, &bare)?;
        let linux = with_linux.then(|| linux(folder, cache)).transpose()?;
        Ok(Guests { bare, linux })
    }

    /// The arguments of QEMU for a guest with these words: in a Linux, if "linux" is the first.
    pub(crate) fn arguments(&self, command: &mut Command, words: &str) -> Result<()> {
        command.arg("-kernel");
        let Some(words) = words.strip_prefix("linux ") else {
            command.arg(&self.bare).arg("-append").arg(words);
            return Ok(());
        };
        let (kernel, initramfs) = self.linux.as_ref().ok_or("no Linux was built")?;
        command
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append");
        command.arg(format!("mem={LINUX_MEMORY}M quiet panic=-1 -- {words}"));
        Ok(())
    }
}

fn compile(flags: &[&str], to: &Path) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/guest.c");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-Wall", "-Wextra"]).args(flags);
    let status = gcc.arg("-o").arg(to).arg(source).status();
    match status
        .map_err(|error| format!("the guest needs gcc: {error}"))?
        .success()
    {
        true => Ok(()),
        false => Err("gcc did not build the guest".into()),
    }
}

fn linux(folder: &Path, cache: &Path) -> Result<(PathBuf, PathBuf)> {
    let unpacked = cache.join("linux");
    fetch_package("bookworm", "linux-image-cloud-amd64", &unpacked)?;
    let mut kernel = None;
    for file in fs::read_dir(unpacked.join("boot"))? {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("vmlinuz") {
            kernel = Some(path);
        }
    }
    let kernel = kernel.ok_or("the package of the kernel has none")?;
    let program = folder.join("guest-linux");
    compile(&["-DLINUX"], &program)?;
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, archive(&fs::read(&program)?))?;
    Ok((kernel, initramfs))
}

/// An initramfs whose first program is `init`. It has the two devices that it needs.
fn archive(init: &[u8]) -> Vec<u8> {
    const FOLDER: u32 = 0o040_755;
    const FILE: u32 = 0o100_755;
    const DEVICE: u32 = 0o020_600;
    let mut archive = Vec::new();
    entry(&mut archive, "dev", FOLDER, (0, 0), &[]);
    entry(&mut archive, "dev/console", DEVICE, (5, 1), &[]);
    entry(&mut archive, "dev/mem", DEVICE, (1, 1), &[]);
    entry(&mut archive, "init", FILE, (0, 0), init);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// Appends an entry of cpio's format "newc".
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let (inode, links) = (archive.len() as u32 + 1, 1);
    let fields = [
        inode,
        mode,
        0,
        0,
        links,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    pad(archive);
    archive.extend(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
