// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Unix socket by lines.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::Result;

/// Nothing here takes so long, also on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) struct Lines {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl Lines {
    pub(crate) fn connect(path: &Path) -> Result<Lines> {
        let write = UnixStream::connect(path)?;
        write.set_read_timeout(Some(PATIENCE))?;
        let read = BufReader::new(write.try_clone()?);
        Ok(Lines { read, write })
    }

    pub(crate) fn send(&mut self, line: &str) -> Result<()> {
        Ok(self.write.write_all(format!("{line}\n").as_bytes())?)
    }

    pub(crate) fn receive(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.read.read_line(&mut line)? {
            0 => Err("the socket was closed".into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    pub(crate) fn ask(&mut self, line: &str) -> Result<String> {
        self.send(line)?;
        self.receive()
    }
}
