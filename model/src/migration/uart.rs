// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device whose saved state has the shape of that of `mtty`: a header that is there
//! at once, and one port that can be read when the device has stopped. Only lengths
//! matter.

use dirty_core::Errno;

/// Bytes of the header.
pub const HEADER: usize = 24;
/// Bytes of the header and the port.
pub const TOTAL: usize = 60;

/// The header's bytes: a write is refused that completes another header.
const MAGIC: u8 = 0xaa;

/// A data file.
#[derive(Debug, Default)]
struct File {
    load: bool,
    /// The transfer has ended.
    ended: bool,
    pos: usize,
    filled: usize,
    /// The header, as far as it was written.
    header: Vec<u8>,
    /// What was read so far, for [`super::Op::Copy`].
    taken: Vec<u8>,
}

/// The device and its data files.
#[derive(Debug, Default)]
pub(super) struct Uart {
    files: Vec<File>,
    /// The file of the transfer that goes on.
    current: Option<usize>,
    /// The files that the user has got, by their number; `None` once it has closed it.
    open: Vec<Option<usize>>,
    /// The same, also of those that are closed.
    ever: Vec<usize>,
}

impl Uart {
    fn open(&mut self, load: bool, filled: usize) -> usize {
        let index = self.files.len();
        self.files.push(File {
            load,
            filled,
            ..File::default()
        });
        self.current = Some(index);
        index
    }

    fn current(&mut self) -> Option<&mut File> {
        self.files.get_mut(self.current?)
    }

    /// Opens a file to save to, of which the user can read the header, or everything.
    pub(super) fn begin_save(&mut self, stopped: bool) -> usize {
        self.open(false, if stopped { TOTAL } else { HEADER })
    }

    /// The user can read the rest too.
    pub(super) fn save_rest(&mut self) {
        if let Some(file) = self.current() {
            file.filled = TOTAL;
        }
    }

    /// Opens a file to load from.
    pub(super) fn begin_load(&mut self) -> usize {
        self.open(true, 0)
    }

    /// Takes what was written. If there is too little, the transfer goes on.
    pub(super) fn end_load(&mut self) -> Result<(), Errno> {
        if self.current().is_some_and(|file| file.filled < TOTAL) {
            return Err(Errno::EINVAL);
        }
        self.end();
        Ok(())
    }

    /// Ends the transfer.
    pub(super) fn end(&mut self) {
        if let Some(file) = self.current() {
            file.ended = true;
            file.pos = 0;
            file.filled = 0;
        }
        self.current = None;
    }

    /// The user gets a file, and with it the next number.
    pub(super) fn give(&mut self, index: usize) -> usize {
        self.open.push(Some(index));
        self.ever.push(index);
        self.open.len() - 1
    }

    fn file(&mut self, number: usize) -> Result<&mut File, Errno> {
        let index = self.open.get(number).copied().flatten();
        let file = index.and_then(|index| self.files.get_mut(index));
        file.ok_or(Errno::EBADF)
    }

    pub(super) fn close(&mut self, number: usize) -> Result<(), Errno> {
        self.file(number)?;
        self.open[number] = None;
        Ok(())
    }

    pub(super) fn close_all(&mut self) {
        self.open.fill(None);
    }

    pub(super) fn read(&mut self, number: usize, len: usize) -> Result<usize, Errno> {
        let file = self.file(number)?;
        if file.load {
            return Err(Errno::EBADF);
        }
        if file.ended {
            return Err(Errno::ENODEV);
        }
        let end = file.filled.min(file.pos + len);
        let bytes = (file.pos..end).map(|at| if at < HEADER { MAGIC } else { 0 });
        file.taken.extend(bytes);
        let count = end - file.pos;
        file.pos = end;
        Ok(count)
    }

    /// Everything that was read of a file so far.
    pub(super) fn taken(&self, number: usize) -> Vec<u8> {
        let file = self.ever.get(number).map(|index| &self.files[*index]);
        file.map(|file| file.taken.clone()).unwrap_or_default()
    }

    pub(super) fn write(&mut self, number: usize, bytes: &[u8]) -> Result<usize, Errno> {
        let file = self.file(number)?;
        if !file.load {
            return Err(Errno::EBADF);
        }
        if file.pos + bytes.len() > TOTAL {
            return Err(Errno::ENOMEM);
        }
        if file.ended {
            return Err(Errno::ENODEV);
        }
        file.header.extend(bytes);
        file.pos += bytes.len();
        let before = file.filled;
        file.filled += bytes.len();
        if before < HEADER && file.filled >= HEADER {
            let header = &file.header[..HEADER];
            if header.iter().any(|byte| *byte != MAGIC) {
                return Err(Errno::EFAULT);
            }
        }
        Ok(bytes.len())
    }

    /// Whether a file has the ioctl of pre-copy: a file to save to has it.
    pub(super) fn has_precopy(&mut self, number: usize) -> Result<bool, Errno> {
        Ok(!self.file(number)?.load)
    }

    /// Bytes that can be read of a file; ENODEV if its transfer has ended.
    pub(super) fn left(&mut self, number: usize) -> Result<u64, Errno> {
        let file = self.file(number)?;
        match file.ended {
            true => Err(Errno::ENODEV),
            false => Ok((file.filled - file.pos) as u64),
        }
    }
}
