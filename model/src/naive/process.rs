// SPDX-License-Identifier: MIT OR Apache-2.0
//! The script's process: its memory, and what it may lock of it.

use dirty_core::Errno;
use dirty_script::op::{PAGE, USER_END};
use dirty_script::sim::User;

pub(super) type Result<T> = std::result::Result<T, Errno>;

#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) user: User,
    /// RLIMIT_MEMLOCK in pages.
    pub(super) limit: u64,
    /// CAP_IPC_LOCK: the limit does not count.
    pub(super) lock_cap: bool,
    /// Pages charged as locked.
    pub(super) locked: u64,
}

/// Whether these bytes lie below the end of user addresses.
pub(super) fn is_user_range(addr: u64, len: u64) -> bool {
    addr.checked_add(len).is_some_and(|end| end <= USER_END)
}

fn next(addr: u64, done: usize) -> u64 {
    addr.wrapping_add(done as u64)
}

impl Process {
    /// Reads a structure of `N` bytes.
    pub(super) fn copy_in<const N: usize>(&self, addr: u64) -> Result<[u8; N]> {
        if self.accessible(addr, N as u64, false) < N as u64 {
            return Err(Errno::EFAULT);
        }
        let mut bytes = [0; N];
        let mut done = 0;
        while done < N {
            done += self.user.read(next(addr, done), &mut bytes[done..]);
        }
        Ok(bytes)
    }

    /// Writes bytes. Those before a bad address are written even if it fails.
    pub(super) fn copy_out(&mut self, addr: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match self.user.write(next(addr, done), &bytes[done..]) {
                0 => return Err(Errno::EFAULT),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Writes words of a bitmap.
    pub(super) fn copy_words(&mut self, addr: u64, words: &[u64]) -> Result<()> {
        let mut bytes = vec![0; words.len() * 8];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        self.copy_out(addr, &bytes)
    }

    /// Writes bytes 0x5a up to a bad address. Returns how many.
    pub(super) fn write_bytes(&mut self, addr: u64, len: u64) -> u64 {
        let data = [0x5a; PAGE as usize];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(PAGE) as usize;
            match self.user.write(addr.wrapping_add(done), &data[..piece]) {
                0 => break,
                n => done += n as u64,
            }
        }
        done
    }

    /// How many bytes from `addr` on can be read (or written, if `write`).
    pub(super) fn accessible(&self, addr: u64, len: u64, write: bool) -> u64 {
        let mut done = 0;
        while done < len {
            let left = (len - done) as usize;
            match self.user.accessible(addr.wrapping_add(done), left, write) {
                0 => break,
                n => done += n as u64,
            }
        }
        done
    }

    /// Charges pages as locked. `lock_cap`: whoever pays has CAP_IPC_LOCK.
    pub(super) fn charge(&mut self, pages: u64, lock_cap: bool) -> Result<()> {
        if !lock_cap && self.locked + pages > self.limit {
            return Err(Errno::ENOMEM);
        }
        self.locked += pages;
        Ok(())
    }
}
