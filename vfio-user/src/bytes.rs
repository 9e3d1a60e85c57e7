// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading and writing of fields, in the byte order of the host.

use core::fmt;

use crate::error::NoRoom;

/// Reads fields one after another; zero beyond the end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, tail) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = tail;
        *head
    }
}

/// Writes into a buffer, and remembers whether something did not fit.
pub(crate) struct Out<'a> {
    buffer: &'a mut [u8],
    len: usize,
    full: bool,
}

impl<'a> Out<'a> {
    pub(crate) fn new(buffer: &'a mut [u8]) -> Self {
        Out {
            buffer,
            len: 0,
            full: false,
        }
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let free = self.buffer.get_mut(self.len..).unwrap_or_default();
        match free.split_at_mut_checked(bytes.len()) {
            Some((place, _)) => {
                place.copy_from_slice(bytes);
                self.len = self.len.saturating_add(bytes.len());
            }
            None => self.full = true,
        }
    }

    /// What was written.
    pub(crate) fn done(self) -> Result<&'a mut [u8], NoRoom> {
        match self.full {
            true => Err(NoRoom),
            false => self.buffer.get_mut(..self.len).ok_or(NoRoom),
        }
    }
}

impl fmt::Write for Out<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes());
        Ok(())
    }
}
