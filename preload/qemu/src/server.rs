// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process that serves the sample device.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lines::PATIENCE;
use crate::Result;

pub(crate) struct Server {
    child: Child,
}

impl Server {
    /// Starts `program`, which listens at `socket` when this returns.
    pub(crate) fn start(program: &Path, socket: &Path, said: &Path) -> Result<Server> {
        // If this program is killed, so is the server.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        command.arg(socket).stdin(Stdio::null());
        let child = command.stderr(File::create(said)?).spawn()?;
        let mut server = Server { child };
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = server.child.try_wait()? {
                return Err(format!("the server has ended: {status}").into());
            }
            if start.elapsed() > PATIENCE {
                return Err("the server does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.kill(); // it may have ended
    }
}
